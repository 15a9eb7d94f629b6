// What the formula of an elementwise loss gives for one element. On the CPU Acc may be a vector of elements, which a
// formula does not notice, so long as it chooses by select and not by a conditional.

#pragma once

#include "portable.h"

namespace fusedloss::math {

template <class Acc>
struct LossAndSlope {
  Acc loss;
  Acc slope;  // dloss/dinput
};

}  // namespace fusedloss::math
