#include <cstdint>

#include "cpu/folds.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastdpo {

// A matrix of 128 MiB is 32768 page faults in pages of 4 KiB, 64 in those of 2 MiB. Advice: where the system has none of
// them to give, nothing happens.
void use_huge_pages(const MemoryArgs& a) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto first = reinterpret_cast<uintptr_t>(a.data);
  if (a.num_rows == 0 || a.num_cols == 0) return;
  const uintptr_t end = first + ((a.num_rows - 1) * a.stride + a.num_cols) * (a.dtype == DType::kFloat32 ? 4 : 2);
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (begin < last) madvise(reinterpret_cast<void*>(begin), last - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(a);
#endif
}

}  // namespace fastdpo
