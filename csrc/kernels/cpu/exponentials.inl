// Part of cross_entropy.inl: the exponentials of which both orders of traversal are made, where nearly all arithmetic
// is.

#include "vector.h"

namespace fusedloss::cpu {
namespace {

// The logits that are needed next. They need not exist.
struct Ahead {
  const char* data = nullptr;
  std::int64_t stride = 0;  // bytes from those of one group to those of the next
};

// e = exp(x - shift) of `groups` groups of kWidest lanes; those of x and e lie `stride` apart, and all have the same
// shifts. e may be x. Meanwhile the logits ahead, if there are any, come into the cache, a line at a time: a processor
// fetches few lines at once, and would wait for most of a whole chunk.
//
// A function of its own: inlined into a traversal, GCC 12 finds no vector form for it.
template <bool kAhead, class Acc>
[[gnu::noinline]] void exponentials(const Acc* x, const Acc* shift, Acc* e, std::int64_t stride, std::int64_t groups,
                                    Ahead next = {}) {
  const auto look_ahead = [&](std::int64_t group) __attribute__((always_inline)) {
    const char* line = next.data + group * next.stride;
    for (std::int64_t i = 0; kAhead && i < kWidest * std::int64_t(sizeof(Acc)); i += kLine)
      __builtin_prefetch(line + i);
  };
#if FUSEDLOSS_VECTORS
  if constexpr (std::is_same_v<Acc, float>) {
    using Vector = FloatVector;
    constexpr int kParts = kWidest / Vector::kLanes;  // of a group
    Vector shifts[kParts];
    unrolled<kParts>([&](int i) { shifts[i] = Vector::load(shift + i * Vector::kLanes); });
    const auto take = [&]<int kGroups>(std::int64_t group) __attribute__((always_inline)) {
      FloatVectors<kGroups * kParts> v;
      const Acc* from = x + group * stride;
      Acc* to = e + group * stride;
      unrolled<kGroups * kParts>([&](int i) {
        v.part[i] =
            (Vector::load(from + i / kParts * stride + i % kParts * Vector::kLanes) - shifts[i % kParts]).part[0];
      });
      v = exp_nonpositive(v);
      unrolled<kGroups * kParts>([&](int i) {
        std::memcpy(to + i / kParts * stride + i % kParts * Vector::kLanes, &v.part[i], sizeof(Floats));
      });
    };
    constexpr int kAtOnce = Vector::kLanes / 4 / kParts;  // as many vectors as there are registers for
    std::int64_t group = 0;
    for (; group + kAtOnce <= groups; group += kAtOnce) {
      for (int i = 0; i < kAtOnce; ++i) look_ahead(group + i);
      take.template operator()<kAtOnce>(group);
    }
    for (; group < groups; ++group) take.template operator()<1>(group);
    return;
  }
#endif
  for (std::int64_t group = 0; group < groups; ++group) {
    look_ahead(group);
    const Acc* from = x + group * stride;
    Acc* to = e + group * stride;
#pragma omp simd
    for (int i = 0; i < kWidest; ++i) to[i] = math::exp_nonpositive(from[i] - shift[i]);
  }
}

}  // namespace
}  // namespace fusedloss::cpu
