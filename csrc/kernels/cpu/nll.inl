// Negative log likelihood on the CPU: reads one log-probability for each position and writes one gradient entry.
// It does not zero the gradient tensor: freshly mapped zero pages cost nothing, and the caller has them.

#include "../../math/nll.h"
#include "../class_loss.h"
#include "blocks.h"
#include "memory.h"

namespace fusedloss::cpu {
namespace {

// Calls body(position, offset into a (outer, classes, inner) tensor, weight) for every position that counts.
template <class Acc, class F>
void for_each_target(const NllArgs& args, const ClassTensor& tensor, std::int64_t block, Partial& partial, F body) {
  const std::int64_t size = positions_per_block(args);
  const std::int64_t end = std::min(args.shape.positions(), (block + 1) * size);
  const Acc* weight = static_cast<const Acc*>(args.weight);
  const PositionTensor& index = args.target.index;
  for (std::int64_t position = block * size; position < end; ++position) {
    const std::int64_t target = load_one<std::int64_t>(index.data, index.dtype, position * index.stride);
    if (target == args.target.ignore_index) continue;
    if (target < 0 || target >= args.shape.classes) {
      if (partial.invalid < 0) partial.invalid = position;
      continue;
    }
    const std::int64_t outer = position / args.shape.inner, inner = position % args.shape.inner;
    body(position, outer * tensor.outer_stride + target * tensor.class_stride + inner * tensor.inner_stride,
         weight ? weight[target] : Acc(1));
  }
}

void nll_forward(const NllArgs& args, std::int64_t begin, std::int64_t end) {
  with_accumulate(args.log_probs.dtype, [&]<class Acc>() {
    for (std::int64_t block = begin; block < end; ++block) {
      Partial& partial = args.partials[block];
      if (args.loss.data) {
        const std::int64_t size = positions_per_block(args), first = block * size;
        const Acc zero = 0;
        for (std::int64_t i = first; i < std::min(args.shape.positions(), first + size); ++i) {
          store(args.loss.data, args.loss.dtype, i, 1, 1, &zero);
        }
      }
      for_each_target<Acc>(args, args.log_probs, block, partial,
                           [&](std::int64_t position, std::int64_t offset, Acc weight) {
                             const Acc x = load_one<Acc>(args.log_probs.data, args.log_probs.dtype, offset);
                             const Acc loss = math::nll_loss(x, weight);
                             partial.loss += double(loss);
                             partial.divisor += double(weight);
                             if (args.loss.data) store(args.loss.data, args.loss.dtype, position, 1, 1, &loss);
                           });
    }
  });
}

void nll_backward(const NllArgs& args, std::int64_t begin, std::int64_t end) {
  with_accumulate(args.log_probs.dtype, [&]<class Acc>() {
    const ClassTensor& grad = args.grad_log_probs;
    const PositionTensor& grad_loss = args.grad_loss;
    for (std::int64_t block = begin; block < end; ++block) {
      Partial ignored;
      for_each_target<Acc>(args, grad, block, ignored, [&](std::int64_t position, std::int64_t offset, Acc weight) {
        const Acc g = load_one<Acc>(grad_loss.data, grad_loss.dtype, position * grad_loss.stride);
        const Acc value = math::nll_grad(Acc(double(g) * args.grad_scale), weight);
        store(grad.data, grad.dtype, offset, 1, 1, &value);
      });
    }
  });
}

}  // namespace
}  // namespace fusedloss::cpu
