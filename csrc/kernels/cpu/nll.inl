// Negative log likelihood on the CPU. Forward reads one log-probability for each position; backward writes the whole
// gradient, zeros and the targets' entries.

#include "../../math/nll.h"
#include "../../math/reduction.h"
#include "../class_loss.h"
#include "blocks.h"
#include "cpu.h"
#include "memory.h"

namespace fusedloss::cpu {
namespace {

// Up to kLanes consecutive positions: where the target's entry of each lies, and what it weighs.
template <class Acc>
struct Targets {
  std::int64_t begin;
  int count;
  bool counts[kLanes];
  std::int64_t offset[kLanes];  // 0 where the position does not count
  Acc weight[kLanes];           // likewise

  Targets(const NllArgs& args, const ClassTensor& tensor, std::int64_t begin, std::int64_t end, Partial& partial)
      : begin(begin), count(static_cast<int>(std::min<std::int64_t>(kLanes, end - begin))) {
    const Acc* class_weight = static_cast<const Acc*>(args.weight);
    const std::int64_t inner = args.shape.inner, size = size_of(tensor.dtype);
    std::int64_t buffer[kLanes];
    const std::int64_t* target = load_positions(args.target.index, begin, count, buffer);
    std::int64_t outer_index = begin / inner, inner_index = begin % inner;
    for (int i = 0; i < count; ++i) {
      const bool ignored = target[i] == args.target.ignore_index;
      counts[i] = !ignored && target[i] >= 0 && target[i] < args.shape.classes;
      if (!ignored && !counts[i] && partial.invalid < 0) partial.invalid = begin + i;
      offset[i] = counts[i] ? outer_index * tensor.outer_stride + target[i] * tensor.class_stride +
                                  inner_index * tensor.inner_stride
                            : 0;
      // Each lies in a line of its own, and the processor would wait for a few at a time.
      __builtin_prefetch(static_cast<const char*>(tensor.data) + offset[i] * size);
      weight[i] = !counts[i] ? Acc(0) : class_weight ? class_weight[target[i]] : Acc(1);
      partial.divisor += double(weight[i]);
      if (++inner_index == inner) {
        inner_index = 0;
        ++outer_index;
      }
    }
  }
};

template <class Acc, class F>
void for_each_group(const NllArgs& args, const ClassTensor& tensor, std::int64_t block, Partial& partial, F body) {
  const std::int64_t size = positions_per_block(args);
  const std::int64_t end = std::min(args.shape.positions(), (block + 1) * size);
  for (std::int64_t begin = block * size; begin < end; begin += kLanes) {
    body(Targets<Acc>(args, tensor, begin, end, partial));
  }
}

void nll_forward(const NllArgs& args, Partial* partials, std::int64_t begin, std::int64_t end) {
  with_accumulate(args.log_probs.dtype, [&]<class Acc>() {
    for (std::int64_t block = begin; block < end; ++block) {
      Partial& partial = partials[block];
      for_each_group<Acc>(args, args.log_probs, block, partial, [&](const Targets<Acc>& targets) {
        Acc loss[kLanes];
        with_floating(args.log_probs.dtype, [&]<class T>() {
          const T* log_probs = static_cast<const T*>(args.log_probs.data);
          for (int i = 0; i < targets.count; ++i) {
            loss[i] = Acc(0);
            if (targets.counts[i]) {
              loss[i] = math::nll_loss(convert<Acc>(log_probs[targets.offset[i]]), targets.weight[i]);
            }
          }
        });
        for (int i = 0; i < targets.count; ++i) partial.loss += double(loss[i]);
        if (args.loss.data) store(args.loss.data, args.loss.dtype, targets.begin, 1, targets.count, loss);
      });
    }
  });
}

// Zeros for the positions [begin, end), in the order in which they lie in memory.
inline void fill_zeros(const NllArgs& args, std::int64_t begin, std::int64_t end) {
  const ClassTensor& grad = args.grad_log_probs;
  const std::int64_t inner = args.shape.inner, classes = args.shape.classes;
  while (begin < end) {
    const std::int64_t first = begin % inner, count = std::min(end - begin, inner - first);
    const std::int64_t offset = begin / inner * grad.outer_stride + first * grad.inner_stride;
    const bool by_rows = grad.class_stride < grad.inner_stride;
    if (grad.class_stride == 1 && grad.inner_stride == classes) {
      store_zeros(grad.data, grad.dtype, offset, 1, count * classes);
    } else {
      for (std::int64_t i = 0; i < (by_rows ? count : classes); ++i) {
        const std::int64_t at = offset + i * (by_rows ? grad.inner_stride : grad.class_stride);
        store_zeros(grad.data, grad.dtype, at, by_rows ? grad.class_stride : grad.inner_stride,
                    by_rows ? classes : count);
      }
    }
    begin += count;
  }
}

void nll_backward(const NllArgs& args, Partial*, std::int64_t begin, std::int64_t end) {
  const double scale = math::mean_scale(args.grad_divisor);
  with_accumulate(args.grad_log_probs.dtype, [&]<class Acc>() {
    const std::int64_t size = positions_per_block(args);
    for (std::int64_t block = begin; block < end; ++block) {
      Partial unused;
      fill_zeros(args, block * size, std::min(args.shape.positions(), (block + 1) * size));
      for_each_group<Acc>(args, args.grad_log_probs, block, unused, [&](const Targets<Acc>& targets) {
        Acc buffer[kLanes];
        const Acc* g = load_positions(args.grad_loss, targets.begin, targets.count, buffer);
        with_floating(args.grad_log_probs.dtype, [&]<class T>() {
          T* grad = static_cast<T*>(args.grad_log_probs.data);
          for (int i = 0; i < targets.count; ++i) {
            if (!targets.counts[i]) continue;
            const Acc grad_loss = static_cast<Acc>(double(g[i]) * scale);
            grad[targets.offset[i]] = round_to<T>(math::nll_grad(grad_loss, targets.weight[i]));
          }
        });
      });
    }
  });
}

}  // namespace
}  // namespace fusedloss::cpu
