#include "cpu.h"

#include <array>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <optional>
#include <vector>

#include "../../math/reduction.h"
#include "blocks.h"
#include "memory.h"
#include "scratch.h"

namespace fusedloss::cpu {

extern const Losses<Loss> kBaseline;
extern const Losses<Loss> kAvx2;
extern const Losses<Loss> kAvx512;

const Losses<Loss>& kernels([[maybe_unused]] InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) return kAvx512;
  if (set == InstructionSet::avx2) return kAvx2;
#endif
  return kBaseline;
}

void* scratch(std::size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    std::size_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (bytes > buffer.bytes) {
    const std::size_t line = 64, rounded = (bytes + line - 1) / line * line;
    std::free(buffer.data);
    buffer = {};
    buffer.data = std::aligned_alloc(line, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

namespace {

template <class Args>
void run(BlockKernel<Args> kernel, const Args& args, Partial* partials, ParallelFor parallel_for) {
  const auto body = [&](std::int64_t begin, std::int64_t end) { kernel(args, partials, begin, end); };
  parallel_for(block_count(args), Work::of(body));
}

template <class Args>
Partial sum(BlockKernel<Args> kernel, const Args& args, ParallelFor parallel_for) {
  const std::int64_t blocks = block_count(args);
  std::array<Partial, 16> few;
  std::vector<Partial> many(blocks > std::int64_t(few.size()) ? blocks : 0);
  Partial* partials = many.empty() ? few.data() : many.data();
  run(kernel, args, partials, parallel_for);
  Partial total;
  for (std::int64_t i = 0; i < blocks; ++i) {
    total.loss += partials[i].loss;
    total.divisor += partials[i].divisor;
    if (total.invalid < 0) total.invalid = partials[i].invalid;
  }
  return total;
}

// The divisor of the mean, where it is known before a position has been looked at.
template <class Args>
std::optional<double> known_divisor(const Args&) {
  return std::nullopt;
}
std::optional<double> known_divisor(const ElementwiseArgs& args) {
  return args.has_ignore_index ? std::nullopt : std::optional(static_cast<double>(args.shape.numel));
}

void write(const Total& total, const Partial& sum) {
  const double* denominator = total.denominator;
  if (total.divisor) *total.divisor = denominator ? *denominator : sum.divisor;
  if (!total.loss) return;
  const double loss = denominator ? math::reduced_over(sum.loss, *denominator)
                                  : math::reduced(total.reduction == Reduction::mean, sum.loss, sum.divisor);
  store(total.loss, total.dtype, 0, 1, 1, &loss);
}

}  // namespace

template <class Args>
std::int64_t launch(const Loss<Args>& loss, const Args& args, Pass pass, ParallelFor parallel_for) {
  const bool split = splits_rows(args);
  std::vector<std::byte> shared(split ? shared_bytes(args) : 0);
  if (pass == Pass::backward) {
    split ? loss.split(args, nullptr, shared.data(), parallel_for) : run(loss.backward, args, nullptr, parallel_for);
    return -1;
  }
  Args with_divisor = args;
  double divisor;
  if (pass == Pass::forward_with_gradient) {
    const auto known = known_divisor(args);
    const Partial counted = known ? Partial{.divisor = *known} : sum(loss.count, args, parallel_for);
    if (counted.invalid >= 0) return counted.invalid;
    divisor = args.total.denominator ? *args.total.denominator : counted.divisor;
    if (args.total.reduction == Reduction::mean) with_divisor.grad_divisor = &divisor;
  }
  Partial total;
  if (split) {
    loss.split(with_divisor, &total, shared.data(), parallel_for);
  } else {
    total = sum(loss.forward, with_divisor, parallel_for);
  }
  if (total.invalid < 0) write(args.total, total);
  return total.invalid;
}

template std::int64_t launch(const Loss<CrossEntropyArgs>&, const CrossEntropyArgs&, Pass, ParallelFor);
template std::int64_t launch(const Loss<NllArgs>&, const NllArgs&, Pass, ParallelFor);
template std::int64_t launch(const Loss<ElementwiseArgs>&, const ElementwiseArgs&, Pass, ParallelFor);

}  // namespace fusedloss::cpu
