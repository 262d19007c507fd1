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

// Whether most pages of a block are resident: memory fresh from the system has none yet. Samples a few pages,
// in microseconds. False where the system does not tell.
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

// Requests huge pages for new memory: the page fault of each 4 KB page costs more than the kernel's writes to
// it. A refusal changes no result.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = page_of(data);
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Call before a kernel writes a result. Returns whether the result is large and its memory resident. Large
// new memory gets huge pages: page faults would take most of a small kernel's time.
inline bool prepare_result(void* data, int64_t bytes) {
  constexpr int64_t kLarge = int64_t{4} << 20;
  if (data == nullptr || bytes < kLarge) return false;
  if (has_pages(data, bytes)) return true;
  prefer_huge_pages(data, bytes);
  return false;
}

}  // namespace mmk::cpu
