// The CUDA kernels on raw pointers, against the CPU kernels and against the formulas written out in at least double
// precision. No framework is needed: this is a program for a machine with a GPU, and a library of single cases for an
// emulator (emulate.py), which runs the same kernels and the same cases and watches their accesses to memory.

#include <cstdio>
#include <exception>

#include "cases.h"
#include "judge.h"

using namespace check;

namespace {

std::vector<Case> all_cases(const Selection& selection) {
  std::vector<Case> cases;
  add_cross_entropy(cases, selection);
  add_nll(cases, selection);
  add_elementwise(cases, selection);
  add_rescale(cases, selection);
  return cases;
}

// Returns the number of failed checks. The first of a case are printed, for the first cases that fail.
int run(const Case& one) {
  static int failed_cases = 0;
  const int before = failures() = failed_cases < 10 ? 0 : 1000;
  try {
    one.run();
  } catch (const std::exception& error) {
    EXPECT(false, "%s", error.what());
  }
  const int failed = failures() - before;
  if (failed > 0) {
    ++failed_cases;
    std::printf("FAILED: %s: %d checks\n", one.name.c_str(), failed);
  }
  return failed;
}

std::vector<Case> selected;

}  // namespace

// --- For a caller that runs cases one by one ----------------------------------------------------------------------

#define FUSEDLOSS_ENTRY extern "C" __attribute__((visibility("default")))

FUSEDLOSS_ENTRY int kernels_select(int level, int rotation) {
  selected = all_cases({Level(level), rotation});
  return static_cast<int>(selected.size());
}

FUSEDLOSS_ENTRY const char* kernels_name(int index) { return selected[index].name.c_str(); }

FUSEDLOSS_ENTRY int kernels_run(int index) {
  fingerprint() = 0;
  worst_error() = 0;
  const int failed = run(selected[index]);
  std::fflush(stdout);
  return failed;
}

// Of the last case: its results, which must not depend on the order in which anything ran.
FUSEDLOSS_ENTRY unsigned long long kernels_fingerprint() { return fingerprint(); }

FUSEDLOSS_ENTRY double kernels_worst_error() { return worst_error(); }

// --- The program --------------------------------------------------------------------------------------------------

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("kernels: skipped, there is no CUDA device\n");
    return 77;
  }
  const std::vector<Case> cases = all_cases({});
  long failed = 0;
  for (const Case& one : cases) failed += run(one);
  std::printf("kernels: %zu cases, %ld failed checks\n", cases.size(), failed);
  return failed == 0 ? 0 : 1;
}
