#include "huge_pages.h"

#include <ATen/TensorSubclassLikeUtils.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fusedloss::ops {

at::Tensor with_huge_pages(at::Tensor fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Smaller blocks hold no aligned huge page (2 MB) or come from memory that is in use already.
  constexpr size_t kSmallest = size_t(4) << 20;
  if (fresh.is_cpu() && !at::isTensorSubclassLike(fresh) && fresh.nbytes() >= kSmallest) {
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t data = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
    const uintptr_t begin = (data + page - 1) / page * page, end = (data + fresh.nbytes()) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused: ordinary pages
  }
#endif
  return fresh;
}

}  // namespace fusedloss::ops
