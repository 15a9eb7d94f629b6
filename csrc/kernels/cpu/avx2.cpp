#if defined(__x86_64__)

#include "std_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FUSEDLOSS_TABLE kAvx2
#include "table.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
