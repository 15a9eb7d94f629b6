// A launch's workspace in memory, as it was planned.

#pragma once

#include "device.h"
#include "plan.h"
#include "reduce.cuh"

namespace fusedloss::cuda {

class Memory {
 public:
  Memory(const Workspace& workspace, const Allocate& allocate, void* stream)
      : start_(workspace.bytes > 0 ? static_cast<char*>(allocate(workspace.bytes)) : nullptr), stream_(stream) {}

  // Null where the piece is absent.
  template <class Value>
  Value* at(const Piece& piece) const {
    return piece.bytes > 0 ? static_cast<Value*>(static_cast<void*>(start_ + piece.offset)) : nullptr;
  }

  // Set to zero on the stream.
  unsigned* tickets(const Piece& piece) const {
    unsigned* const tickets = at<unsigned>(piece);
    if (tickets) check(cudaMemsetAsync(tickets, 0, piece.bytes, static_cast<cudaStream_t>(stream_)), "tickets");
    return tickets;
  }

  GridSums grid(const GridPieces& pieces) const {
    static_assert(sizeof(unsigned) == kTicketBytes && sizeof(Sums) == kSumsBytes);
    return {at<Sums>(pieces.parts), tickets(pieces.ticket), pieces.units};
  }

 private:
  char* const start_;
  void* const stream_;
};

}  // namespace fusedloss::cuda
