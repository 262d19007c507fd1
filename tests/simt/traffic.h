// Counts the memory traffic of warps, for the builds with MMK_SIMT_RACES, whose accesses the compiler
// reports. Accesses of the lanes of a warp that are made by the same instruction, the same number of times
// after the warp last met, are one request.
#pragma once

#include <cstddef>

namespace mmk::simt {

enum class Operation { kRead, kWrite, kAtomic, kAsyncCopy, kMatrixLoad };

#ifdef MMK_SIMT_RACES

// Whether traffic is counted.
extern bool counting;

// Counts an access of the current thread, made by the instruction at `site`.
void count_access(const void* address, size_t bytes, Operation operation, const void* site);
// The current thread accesses these bytes in one instruction, however the compiler splits the access.
void expect_vector(const void* address, size_t bytes);
// The bytes that the current thread's copies, not waited for, read.
void count_outstanding(size_t bytes);

void begin_grid_traffic();
void begin_block_traffic();
void end_warp_requests(unsigned warp);  // all live lanes of the warp met
void end_block_requests();              // all threads of the block met
void end_block_traffic();
void end_grid_traffic(size_t blocks, size_t dynamic_bytes);

#else

inline constexpr bool counting = false;
inline void count_access(const void*, size_t, Operation, const void*) {}
inline void expect_vector(const void*, size_t) {}
inline void count_outstanding(size_t) {}
inline void begin_grid_traffic() {}
inline void begin_block_traffic() {}
inline void end_warp_requests(unsigned) {}
inline void end_block_requests() {}
inline void end_block_traffic() {}
inline void end_grid_traffic(size_t, size_t) {}

#endif

}  // namespace mmk::simt
