// Pieces of a workspace. Planned twice by the same code: without memory, to learn how much is needed, and with it.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedloss::cuda {

class Arena {
 public:
  Arena() = default;
  explicit Arena(void* base) : base_(static_cast<char*>(base)), is_measured_(false) {}

  // Null while nothing is but measured.
  template <class Value>
  Value* take(std::int64_t count) {
    constexpr std::size_t kAlignment = 16;
    used_ = (used_ + kAlignment - 1) / kAlignment * kAlignment;
    void* place = base_ ? base_ + used_ : nullptr;
    used_ += static_cast<std::size_t>(count) * sizeof(Value);
    return static_cast<Value*>(place);
  }

  bool is_measured() const { return is_measured_; }
  std::size_t used() const { return used_; }

 private:
  char* base_ = nullptr;
  bool is_measured_ = true;
  std::size_t used_ = 0;
};

}  // namespace fusedloss::cuda
