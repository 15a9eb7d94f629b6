#include "overlap.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fusedloss::ops {
namespace {

// The bytes of a tensor as runs without gaps. Dimensions that continue a run are part of it; the others, innermost
// first, say where runs begin.
struct Runs {
  struct Dim {
    std::int64_t stride;  // in bytes
    std::int64_t size;
  };

  std::int64_t first;
  std::int64_t length;
  std::vector<Dim> dims;

  explicit Runs(const at::Tensor& tensor)
      : first(reinterpret_cast<std::int64_t>(tensor.const_data_ptr())),
        length(tensor.numel() == 0 ? 0 : static_cast<std::int64_t>(tensor.element_size())) {
    for (std::int64_t d = 0; d < tensor.dim(); ++d) {
      if (tensor.size(d) > 1) dims.push_back({tensor.stride(d) * length, tensor.size(d)});
    }
    std::ranges::sort(dims, {}, &Dim::stride);
    auto outer = dims.begin();
    for (; outer != dims.end() && outer->stride == length; ++outer) length *= outer->size;
    dims.erase(dims.begin(), outer);
  }

  std::int64_t end() const {
    std::int64_t last = first;
    for (const Dim& dim : dims) last += dim.stride * (dim.size - 1);
    return last + length;
  }

  // Whether every dimension steps over all that lies within it: then nothing meets, and nothing has to be listed.
  bool nest() const {
    std::int64_t extent = length;
    for (const Dim& dim : dims) {
      if (dim.stride < extent) return false;
      extent += dim.stride * (dim.size - 1);
    }
    return true;
  }

  // Sorted.
  std::vector<std::int64_t> begins() const {
    std::vector<std::int64_t> begins{first};
    for (const Dim& dim : dims) {
      const std::size_t within = begins.size();
      begins.reserve(within * static_cast<std::size_t>(dim.size));
      for (std::int64_t step = 1; step < dim.size; ++step) {
        for (std::size_t i = 0; i < within; ++i) begins.push_back(begins[i] + step * dim.stride);
      }
    }
    if (!std::ranges::is_sorted(begins)) std::ranges::sort(begins);
    return begins;
  }
};

}  // namespace

bool overlaps_itself(const at::Tensor& tensor) {
  const Runs runs(tensor);
  if (runs.length == 0 || runs.nest()) return false;
  const auto begins = runs.begins();
  return std::adjacent_find(begins.begin(), begins.end(),
                            [&](std::int64_t a, std::int64_t b) { return b - a < runs.length; }) != begins.end();
}

bool overlap(const at::Tensor& a, const at::Tensor& b) {
  const Runs of_a(a), of_b(b);
  if (of_a.length == 0 || of_b.length == 0) return false;
  if (of_a.end() <= of_b.first || of_b.end() <= of_a.first) return false;
  const auto begins_a = of_a.begins(), begins_b = of_b.begins();
  for (auto i = begins_a.begin(), j = begins_b.begin(); i != begins_a.end() && j != begins_b.end();) {
    if (*i + of_a.length <= *j) {
      ++i;
    } else if (*j + of_b.length <= *i) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

}  // namespace fusedloss::ops
