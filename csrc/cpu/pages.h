// Memory that the operating system hands out page by page.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mmk::cpu {

#ifdef __linux__
inline uintptr_t page_of(const void* data) {
  const uintptr_t size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return reinterpret_cast<uintptr_t>(data) / size * size;
}
#endif

// Whether most of a block has been written before: blocks that the allocator got from the system just now
// have no pages yet. A few pages tell, in some microseconds; false where the system does not say.
inline bool has_pages([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr int kSamples = 8;
  int found = 0;
  for (int i = 0; i < kSamples; ++i) {
    const uintptr_t page = page_of(static_cast<const char*>(data) + bytes / kSamples * i);
    unsigned char state = 0;
    if (mincore(reinterpret_cast<void*>(page), 1, &state) == 0) found += state & 1;
  }
  return 2 * found > kSamples;
#else
  return false;
#endif
}

// Asks for huge pages for a block of new memory: the first access to each page of 4 KB costs more than the
// kernels that write it. The system may refuse; that changes no result.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = page_of(data);
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Before a kernel writes a result. Whether that is large and in memory that was written before; new memory
// gets huge pages if it is large: most of the time of small kernels goes to new pages.
inline bool prepare_result(void* data, int64_t bytes) {
  constexpr int64_t kLarge = int64_t{4} << 20;
  if (data == nullptr || bytes < kLarge) return false;
  if (has_pages(data, bytes)) return true;
  prefer_huge_pages(data, bytes);
  return false;
}

}  // namespace mmk::cpu
