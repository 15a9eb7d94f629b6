// One launch as the operators make it, twice.

#pragma once

#include <exception>
#include <initializer_list>

#include "buffer.h"
#include "cpu_reference.h"

using fusedloss::Pass;

inline const char* name_of(Pass pass) {
  constexpr const char* kNames[] = {"forward", "forward_with_gradient", "backward"};
  return kNames[static_cast<int>(pass)];
}

// Workspace of exactly the size that is asked for, filled with what no kernel may rely on.
template <class Args>
void launch(const fusedloss::cuda::Loss<Args>& loss, const Args& args, Pass pass) {
  void* workspace = nullptr;
  const auto allocate = [&](std::size_t bytes) {
    require(cudaMalloc(&workspace, bytes), "cudaMalloc");
    require(cudaMemset(workspace, 0xff, bytes), "cudaMemset");
    return workspace;
  };
  loss.launch(args, pass, allocate, nullptr);
  require(cudaDeviceSynchronize(), "the kernel");
  if (workspace) require(cudaFree(workspace), "cudaFree");
}

// Runs prepare() and the launch twice; both must leave the same bytes in all outputs, absent ones left out.
template <class Args, class Prepare>
void launch_twice(const char* what, const fusedloss::cuda::Loss<Args>& loss, const Args& args, Pass pass,
                  std::initializer_list<Buffer*> outputs, Prepare prepare) {
  std::vector<std::vector<char>> first;
  for (int turn = 0; turn < 2; ++turn) {
    prepare();
    launch(loss, args, pass);
    int i = 0;
    for (Buffer* output : outputs) {
      if (!*output) continue;
      output->download();
      if (turn == 0) {
        first.push_back(output->got_bytes());
      } else {
        EXPECT(first[i] == output->got_bytes(), "%s: output %d differs from run to run", what, i);
      }
      ++i;
    }
  }
}
