#include "overlap.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fusedloss::ops {
namespace {

// The bytes of a tensor as runs without gaps. Dimensions that continue a run are part of it; the others, outermost
// first, say where runs begin.
class Runs {
 public:
  explicit Runs(const at::Tensor& tensor) : length_(static_cast<std::int64_t>(tensor.element_size())) {
    if (tensor.numel() == 0) length_ = 0;
    first_ = reinterpret_cast<std::int64_t>(tensor.const_data_ptr());
    for (std::int64_t d = 0; d < tensor.dim(); ++d) {
      if (tensor.size(d) > 1) dims_.push_back({tensor.stride(d) * length_, tensor.size(d)});
    }
    std::stable_sort(dims_.begin(), dims_.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
    while (!dims_.empty() && dims_.back().stride == length_) {
      length_ *= dims_.back().size;
      dims_.pop_back();
    }
  }

  std::int64_t length() const { return length_; }
  std::int64_t first() const { return first_; }
  std::int64_t end() const {
    std::int64_t last = first_;
    for (const Dim& dim : dims_) last += dim.stride * (dim.size - 1);
    return last + length_;
  }

  // Whether every dimension steps over all that lies within it: then nothing meets, and nothing has to be listed.
  bool nest() const {
    std::int64_t extent = length_;
    for (auto dim = dims_.rbegin(); dim != dims_.rend(); ++dim) {
      if (dim->stride < extent) return false;
      extent += dim->stride * (dim->size - 1);
    }
    return true;
  }

  // Sorted.
  std::vector<std::int64_t> begins() const {
    std::vector<std::int64_t> begins{first_}, next;
    for (const Dim& dim : dims_) {
      next.clear();
      next.reserve(begins.size() * static_cast<std::size_t>(dim.size));
      for (const std::int64_t begin : begins) {
        for (std::int64_t i = 0; i < dim.size; ++i) next.push_back(begin + i * dim.stride);
      }
      begins.swap(next);
    }
    if (!std::is_sorted(begins.begin(), begins.end())) std::sort(begins.begin(), begins.end());
    return begins;
  }

 private:
  struct Dim {
    std::int64_t stride;  // in bytes
    std::int64_t size;
  };

  std::int64_t first_;
  std::int64_t length_;
  std::vector<Dim> dims_;
};

}  // namespace

bool overlaps_itself(const at::Tensor& tensor) {
  const Runs runs(tensor);
  if (runs.length() == 0 || runs.nest()) return false;
  const auto begins = runs.begins();
  return std::adjacent_find(begins.begin(), begins.end(),
                            [&](std::int64_t a, std::int64_t b) { return b - a < runs.length(); }) != begins.end();
}

bool overlap(const at::Tensor& a, const at::Tensor& b) {
  const Runs of_a(a), of_b(b);
  if (of_a.length() == 0 || of_b.length() == 0) return false;
  if (of_a.end() <= of_b.first() || of_b.end() <= of_a.first()) return false;
  const auto begins_a = of_a.begins(), begins_b = of_b.begins();
  for (auto i = begins_a.begin(), j = begins_b.begin(); i != begins_a.end() && j != begins_b.end();) {
    if (*i + of_a.length() <= *j) {
      ++i;
    } else if (*j + of_b.length() <= *i) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

}  // namespace fusedloss::ops
