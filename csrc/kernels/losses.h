// The list of losses.

#pragma once

#include "../math/bce.h"
#include "../math/bce_with_logits.h"
#include "class_loss.h"
#include "elementwise.h"

namespace fusedloss {

// Whatever exists once for each loss, by the arguments that the loss takes.
template <template <class Args> class Entry>
struct Losses {
  Entry<CrossEntropyArgs> cross_entropy;
  Entry<NllArgs> nll;
  Entry<ElementwiseArgs> bce_with_logits;
  Entry<ElementwiseArgs> bce;

  // The losses of one element differ by their formula alone: elementwise(formula) makes the entry of each.
  template <class Elementwise>
  static constexpr Losses make(Entry<CrossEntropyArgs> cross_entropy, Entry<NllArgs> nll, Elementwise elementwise) {
    return {
        .cross_entropy = cross_entropy,
        .nll = nll,
        .bce_with_logits = elementwise(math::BceWithLogits()),
        .bce = elementwise(math::Bce()),
    };
  }

  // Another table, of what make(name, entry) makes of each entry here.
  template <template <class Args> class Other, class Make>
  Losses<Other> map(Make make) const {
    return {
        .cross_entropy = make("cross_entropy", cross_entropy),
        .nll = make("nll", nll),
        .bce_with_logits = make("bce_with_logits", bce_with_logits),
        .bce = make("bce", bce),
    };
  }
};

}  // namespace fusedloss
