// What the formula of an elementwise loss gives for one element.

#pragma once

#include "portable.h"

namespace fusedloss::math {

template <class Acc>
struct LossAndSlope {
  Acc loss;
  Acc slope;  // dloss/dinput
};

}  // namespace fusedloss::math
