#if defined(__x86_64__)

#include "std_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FUSEDLOSS_LANES 8
#define FUSEDLOSS_TABLE kAvx2
#include "table.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
