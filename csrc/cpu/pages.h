// Memory that the operating system hands out page by page.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mmk::cpu {

// glibc returns blocks of this size to the operating system when they are freed, so that each is new memory.
constexpr int64_t kNewMemory = int64_t{32} << 20;

// Asks for huge pages where a block is new memory: the first access to each page of 4 KB costs more than the
// kernels that write it. The system may refuse; that changes no result.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes,
                              [[maybe_unused]] int64_t least = kNewMemory) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes < least) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace mmk::cpu
