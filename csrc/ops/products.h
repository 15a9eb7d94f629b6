// Matrix products, of ATen's libraries, as the gradients of a linear layer need them: with a factor, and with results
// that are wider than their operands. Each result is rounded once.

#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <cmath>
#include <optional>
#include <utility>

#include "huge_pages.h"
#include "launch.h"

namespace fusedloss::ops {

// A factor in the accumulate type. On the CPU the host knows it; on a device it stays there.
class Factor {
 public:
  Factor() = default;
  // grad_output / scale
  Factor(const Tensor& grad_output, OptionalTensor scale) {
    const Tensor quotient = is_present(scale) ? grad_output.to(at::kDouble) / *scale : grad_output.to(at::kDouble);
    if (quotient.is_cpu()) {
      number_ = *quotient.reshape({}).const_data_ptr<double>();
    } else {
      tensor_ = quotient.reshape({});
    }
  }

  bool is_one() const { return !tensor_.defined() && number_ == 1; }
  bool on_device() const { return tensor_.defined(); }
  bool is_known_finite() const { return !on_device() && std::isfinite(number_); }
  double number() const { return number_; }

  // Rounded once: a device would round the factor to half precision first.
  Tensor times(const Tensor& tensor) const {
    if (!on_device()) return is_one() ? tensor : tensor * number_;
    const auto wide = accumulate_type(tensor.scalar_type());
    return (tensor.to(wide) * tensor_.to(wide)).to(tensor.scalar_type());
  }

 private:
  double number_ = 1;
  Tensor tensor_;
};

// Only CUDA's libraries write products of half precision in float32.
inline bool has_wide_products(const Tensor& tensor) {
  return tensor.is_cuda() && (tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16);
}

// a x b + bias, into a matrix.
inline void linear_into(Tensor& result, const Tensor& a, const Tensor& b, OptionalTensor bias) {
  if (is_present(bias)) {
    at::addmm_out(result, *bias, a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

// a x b, in the type of the result, which is a's or wider.
inline void product_into(Tensor result, const Tensor& a, const Tensor& b) {
  if (result.scalar_type() == a.scalar_type()) {
    at::mm_out(result, a, b);
  } else if (has_wide_products(a) && result.scalar_type() == at::kFloat) {
    at::mm_out(result, a, b, at::kFloat);
  } else {
    result.copy_(at::mm(a, b));
  }
}

// factor * (a x b), of a type that is a's or wider. With a factor on a device the product is made in float32: it is to
// be a small one.
inline Tensor product(const Tensor& a, const Tensor& b, const Factor& factor, at::ScalarType type) {
  const bool wide = has_wide_products(a) && (type != a.scalar_type() || factor.on_device());
  if (wide) return factor.times(at::mm(a, b, at::kFloat)).to(type);
  Tensor result = with_huge_pages(at::empty({a.size(0), b.size(1)}, a.options()));
  if (factor.is_one() || factor.on_device()) {
    at::mm_out(result, a, b);
  } else {
    at::addmm_out(result, result, a, b, /*beta=*/0, factor.number());
  }
  if (factor.on_device()) result = factor.times(result);
  return result.to(type);
}

// A sum of products in the accumulate type.
class ProductSum {
 public:
  ProductSum(at::IntArrayRef sizes, const at::TensorOptions& of_operands)
      : sum_(with_huge_pages(
            at::empty(sizes, of_operands.dtype(accumulate_type(c10::typeMetaToScalarType(of_operands.dtype())))))) {}

  // Where a product is as narrow as its operands, what it has lost is another one.
  void add(const Tensor& a, const Tensor& b) {
    const bool is_first = std::exchange(is_empty_, false);
    if (a.scalar_type() == sum_.scalar_type() || has_wide_products(a)) {
      if (is_first) return product_into(sum_, a, b);
      if (a.scalar_type() == sum_.scalar_type()) {
        at::addmm_out(sum_, sum_, a, b);
      } else {
        at::addmm_out(sum_, sum_, a, b, at::kFloat);
      }
      return;
    }
    Tensor part = at::mm(a, b);
    is_first ? sum_.copy_(part) : sum_.add_(part);
    sum_.add_(at::addmm_out(part, part, a, b, /*beta=*/-1));
  }

  // Zeros, if nothing has been added.
  Tensor& result() { return std::exchange(is_empty_, false) ? sum_.zero_() : sum_; }

 private:
  Tensor sum_;
  bool is_empty_ = true;
};

}  // namespace fusedloss::ops
