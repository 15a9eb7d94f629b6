// What a linear layer's loss asks of the cross entropy of some of the classes, beside its operators.

#pragma once

#include <optional>

#include "checks.h"
#include "cross_entropy.h"

namespace fusedloss::ops {

inline void check_merged(const char* loss, const MergedRows& rows) {
  TORCH_CHECK(
      is_present(rows.row_max) && is_present(rows.row_log_sum) && is_present(rows.row_mass) && is_present(rows.divisor),
      loss, ": the gradient of a shard needs row_max, row_log_sum, row_mass and divisor");
}

inline CrossEntropyGradOutputs grads_of(const Tensor& grad_loss, OptionalTensor grad_lse, OptionalTensor grad_entropy,
                                        const MergedRows& rows) {
  return {grad_loss,         grad_lse,     grad_entropy,  *rows.row_max,
          *rows.row_log_sum, rows.row_gap, *rows.divisor, rows.row_mass};
}

// The class weights of a shard's `classes`, of those of all classes.
std::optional<Tensor> weight_of_shard(const char* loss, OptionalTensor weight, const c10::SymInt& classes,
                                      const ClassShard& shard);

}  // namespace fusedloss::ops
