// What a launch needs of its workspace, and the launch itself where it is not only measured.

#pragma once

#include "arena.h"
#include "device.h"
#include "reduce.cuh"

namespace fusedloss::cuda {

// way: see PlannedLaunch.
template <class... Parameters>
void start(Arena& arena, void* stream, const char* name, void (*kernel)(Parameters...), const Launch& shape,
           std::int64_t way, const std::type_identity_t<Parameters>&... arguments) {
  if (arena.is_measured()) {
    arena.note({name, address_of(kernel), shape, way});
  } else {
    launch(name, kernel, shape, stream, arguments...);
  }
}

// Tickets, set to zero on the stream.
inline unsigned* zero_tickets(Arena& arena, std::int64_t count, void* stream) {
  unsigned* tickets = arena.take<unsigned>(count);
  if (!arena.is_measured() && count > 0) {
    check(cudaMemsetAsync(tickets, 0, count * sizeof(unsigned), static_cast<cudaStream_t>(stream)), "tickets");
  }
  return tickets;
}

// One unit needs nothing: a small problem is one launch.
inline GridSums grid_sums(Arena& arena, std::int64_t units, void* stream) {
  if (units == 1) return {};
  unsigned* tickets = zero_tickets(arena, 1, stream);
  return {arena.take<Sums>(units), tickets, units};
}

}  // namespace fusedloss::cuda
