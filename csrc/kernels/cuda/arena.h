// Pieces of a workspace. Planned twice by the same code: without memory, to learn how much is needed, and with it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda.h"

namespace fusedloss::cuda {

class Arena {
 public:
  // Measures. What would be launched goes into `plan`, if it is given.
  explicit Arena(std::vector<PlannedLaunch>* plan = nullptr) : base_(kAlignment), is_measured_(true), plan_(plan) {}
  explicit Arena(void* base) : base_(reinterpret_cast<std::uintptr_t>(base)), is_measured_(false) {}

  // While it only measures, addresses where nothing is; never null, so that a plan cannot depend on that.
  template <class Value>
  Value* take(std::int64_t count) {
    used_ = (used_ + kAlignment - 1) / kAlignment * kAlignment;
    const std::uintptr_t place = base_ + used_;
    used_ += static_cast<std::size_t>(count) * sizeof(Value);
    return reinterpret_cast<Value*>(place);
  }

  bool is_measured() const { return is_measured_; }
  std::size_t used() const { return used_; }

  void note(const PlannedLaunch& launch) {
    if (plan_) plan_->push_back(launch);
  }

 private:
  static constexpr std::size_t kAlignment = 16;
  std::uintptr_t base_;
  bool is_measured_;
  std::vector<PlannedLaunch>* plan_ = nullptr;
  std::size_t used_ = 0;
};

}  // namespace fusedloss::cuda
