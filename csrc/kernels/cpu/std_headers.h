// Every standard header the kernels use. Included before an instruction set is switched on: an inline function of the
// standard library compiled for wider instructions would be merged with the baseline's copy by the linker.

#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
