// The race detector (MMK_SIMT_RACES). The compiler reports every access of a kernel; two accesses to the same
// memory are a fault if one writes and nothing orders them.
#pragma once

#include <cstddef>

namespace mmk::simt {

enum class AccessKind { kRead, kWrite, kAtomic };

#ifdef MMK_SIMT_RACES

// Records an access of the current thread, made by the instruction at `site`.
void record_access(const void* address, size_t bytes, AccessKind kind, const void* site);

// Events that order accesses. An overlapping grid may start before the previous one has ended.
void begin_grid_order(bool overlapping);
void begin_block_order();
void order_block();                               // all threads of the block met
void order_lanes(unsigned warp, unsigned lanes);  // these lanes met at __syncwarp

#else

inline void record_access(const void*, size_t, AccessKind, const void*) {}
inline void begin_grid_order(bool) {}
inline void begin_block_order() {}
inline void order_block() {}
inline void order_lanes(unsigned, unsigned) {}

#endif

}  // namespace mmk::simt
