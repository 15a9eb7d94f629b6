// The list of losses: whatever exists once for each of them, by the arguments that it takes.

#pragma once

#include "class_loss.h"
#include "elementwise.h"

namespace fusedloss {

template <template <class Args> class Entry>
struct Losses {
  Entry<CrossEntropyArgs> cross_entropy;
  Entry<NllArgs> nll;
  Entry<ElementwiseArgs> bce_with_logits;
  Entry<ElementwiseArgs> bce;

  // Another table, of what make(name, entry) makes of each entry here.
  template <template <class Args> class Other, class Make>
  Losses<Other> map(Make make) const {
    return {make("cross_entropy", cross_entropy), make("nll", nll), make("bce_with_logits", bce_with_logits),
            make("bce", bce)};
  }
};

}  // namespace fusedloss
