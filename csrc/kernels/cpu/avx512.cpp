#if defined(__x86_64__)

#include "std_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif

#define FUSEDLOSS_LANES 16
#define FUSEDLOSS_TABLE kAvx512
#include "table.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
