// The host runtime's own interface: what the emulated intrinsics and launch.cuh call. Kernels do not use it
// directly.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <tuple>

namespace mmk::simt {

inline constexpr unsigned kWarpSize = 32;
inline constexpr size_t kMaxStaticSharedBytes = 48 * 1024;
inline constexpr size_t kMaxSharedBytes = 227 * 1024;  // static and dynamic, on sm_90

// One launch, its arguments bound: `invoke(arguments)` runs the kernel once, as the current thread.
struct Kernel {
  const void* function;
  void (*invoke)(const void* arguments);
  const void* arguments;
};

// Runs all blocks one after the other, every thread of a block as a fiber. Returns cudaSuccess,
// cudaErrorInvalidConfiguration for a geometry that no GPU takes, or cudaErrorLaunchFailure for a fault in
// the kernel. Overlapping: launched to start before the grid before it has ended.
cudaError_t run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_smem_bytes,
                     bool overlapping);

template <class... Params, class... Args>
cudaError_t launch(bool overlapping, void (*kernel)(Params...), dim3 grid, dim3 block,
                   size_t dynamic_smem_bytes, cudaStream_t, Args&&... args) {
  struct Bound {
    void (*kernel)(Params...);
    std::tuple<Params...> args;
  };
  const Bound bound{kernel, {static_cast<Args&&>(args)...}};
  const auto invoke = [](const void* arguments) {
    const Bound& bound = *static_cast<const Bound*>(arguments);
    std::apply(bound.kernel, bound.args);
  };
  return run_grid({reinterpret_cast<const void*>(kernel), invoke, &bound}, grid, block, dynamic_smem_bytes,
                  overlapping);
}

// Ends the launch with a fault; the message gets the kernel's name and the coordinates of the current thread.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// ---- shared memory ---------------------------------------------------------------------------------------

// The block's storage for one MMK_SHARED, identified by the address `site`; filled with 0xFF at the start of
// a block.
void* static_shared(const void* site, const char* name, size_t bytes);
void* dynamic_shared();
// Faults unless [address, address + bytes) lies in one shared array of this block.
void require_shared(const void* address, size_t bytes, const char* what);
// The address itself, after a fault if it is not a multiple of `alignment`.
void* aligned_access(const void* address, size_t alignment);

// ---- meeting points --------------------------------------------------------------------------------------

struct BarrierResult {
  int count;  // threads with a nonzero predicate
  int threads;
};
// Blocks until all live threads of the block have arrived at this same place in the source.
BarrierResult block_barrier(int predicate, const std::source_location& where);

// A warp collective. Every lane brings a frame on its own stack; the last of the lanes in `mask` to arrive
// calls complete(frames, present) for all of them, in which frames[lane] is null for lanes that are not
// present.
struct Collective {
  const char* name;
  void (*complete)(void* const (&frames)[kWarpSize], unsigned present);
  bool aligned;                // .sync.aligned: all 32 lanes of the warp must be there
  bool orders_memory = false;  // as __syncwarp does, and no other
};
void warp_collective(const Collective& collective, unsigned mask, void* frame,
                     const std::source_location& where);

unsigned lane_index();
// Lanes of the current warp that have not exited.
unsigned live_lanes();
// Around each atomic: lets other threads run now and then, and faults on what looks like an endless wait.
void begin_atomic(void* address, size_t bytes);
void end_atomic();
void threadfence();

// ---- programmatic dependent launch ----------------------------------------------------------------------

// Until a thread of its block has called it, a thread of an overlapping grid must not touch what the grid
// before writes.
void wait_for_previous_grid();

// ---- cp.async --------------------------------------------------------------------------------------------

void cp_async(void* shared, const void* global, int bytes, int source_bytes);
void cp_async_commit_group();
void cp_async_wait_group(int pending);
void cp_async_wait_all();

}  // namespace mmk::simt

extern "C" {
// Order in which threads and blocks run: 0 = by index, 1 = reversed, others = shuffled with that seed.
void mmk_simt_set_order(uint64_t seed);
// The first fault since the last mmk_simt_clear_error, or "".
const char* mmk_simt_last_error();
void mmk_simt_clear_error();
}
