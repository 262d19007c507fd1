// The interface of the runtime for the emulated intrinsics and launch.cuh. Kernels do not use it directly.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <tuple>

namespace mmk::simt {

inline constexpr unsigned kWarpSize = 32;
inline constexpr size_t kMaxStaticSharedBytes = 48 * 1024;
// Static and dynamic, of a kernel that did not opt in by cudaFuncSetAttribute.
inline constexpr size_t kMaxSharedBytesWithoutOptIn = 48 * 1024;

// The attributes of the current device that launchers ask for, and that limit a launch.
struct Device {
  int64_t multiprocessors;
  int64_t shared_per_block;  // static and dynamic
  int64_t shared_per_multiprocessor;
  int64_t threads_per_multiprocessor;
  int64_t capability;  // 10 * major + minor
};
const Device& current_device();

// A kernel with its arguments: `invoke(arguments)` runs it once, as the current thread.
struct Kernel {
  const void* function;
  void (*invoke)(const void* arguments);
  const void* arguments;
};

// What cudaFuncSetAttribute sets: the most dynamic shared memory that launches of this kernel may ask for.
void allow_dynamic_shared(const void* function, size_t bytes);

// Runs the blocks one after the other, every thread of a block as a fiber. Returns cudaSuccess,
// cudaErrorInvalidConfiguration for a geometry that no GPU accepts, or cudaErrorLaunchFailure for a fault in
// the kernel. An overlapping grid may start before the previous one has ended.
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

// Ends the launch with a fault; the message also names the kernel and the current thread.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// ---- shared memory ---------------------------------------------------------------------------------------

// The storage of one MMK_SHARED in this block, identified by the address `site`; 0xFF bytes at the start.
void* static_shared(const void* site, const char* name, size_t bytes);
void* dynamic_shared();
// Faults unless [address, address + bytes) lies in one shared array of this block.
void require_shared(const void* address, size_t bytes, const char* what);
// Returns the address; faults unless it is a multiple of `alignment`. Where traffic is counted, the access
// that follows is one of `alignment` bytes.
void* aligned_access(const void* address, size_t alignment);

// ---- meeting points --------------------------------------------------------------------------------------

struct BarrierResult {
  int count;  // threads with a nonzero predicate
  int threads;
};
// Waits until all live threads of the block have arrived at this place in the source.
BarrierResult block_barrier(int predicate, const std::source_location& where);

// A warp collective. Every lane brings a frame on its stack. The last lane of `mask` to arrive calls
// complete(frames, present) for all; frames[lane] is null for lanes that are not present.
struct Collective {
  const char* name;
  void (*complete)(void* const (&frames)[kWarpSize], unsigned present);
  bool aligned;                // .sync.aligned: all 32 lanes of the warp must be there
  bool orders_memory = false;  // only __syncwarp does
};
void warp_collective(const Collective& collective, unsigned mask, void* frame,
                     const std::source_location& where);

unsigned lane_index();
// Lanes of the current warp that have not exited.
unsigned live_lanes();
// Around each atomic: lets other threads run now and then, and faults on a wait that seems endless.
void begin_atomic(void* address, size_t bytes);
void end_atomic();
void threadfence();

// ---- programmatic dependent launch ----------------------------------------------------------------------

// In an overlapping grid, a thread may touch memory that the previous grid writes only after a thread of its
// block has called this.
void wait_for_previous_grid();

// ---- cp.async --------------------------------------------------------------------------------------------

void cp_async(void* shared, const void* global, int bytes, int source_bytes);
void cp_async_commit_group();
void cp_async_wait_group(int pending);
void cp_async_wait_all();

}  // namespace mmk::simt

extern "C" {
// The order in which threads and blocks run: 0 by index, 1 reversed, others shuffled with that seed.
void mmk_simt_set_order(uint64_t seed);
// The device of the launches that follow. attributes: those of mmk::simt::Device, in order.
void mmk_simt_set_device(const int64_t* attributes);
// From now on launches are recorded; unless `run`, their geometry is checked and no thread runs.
void mmk_simt_record(int64_t run);
// Ends the recording. A line per launch: symbol of the kernel, blocks, threads, bytes of dynamic shared
// memory, bytes that the kernel opted in to. Valid until the next call.
const char* mmk_simt_recorded();
// From now on the memory traffic of launches is counted; builds with MMK_SIMT_RACES only.
void mmk_simt_count();
// Ends it. A line per launch: "launch", symbol of the kernel, blocks, threads, bytes of static and dynamic
// shared memory, most bytes that cp.async has outstanding in a thread and in a block; then a line per place
// in the code: its address, shared or global, operation, requests, bytes, wavefronts or sectors, and their
// ideal number. Valid until the next mmk_simt_count.
const char* mmk_simt_counted();
// File and line of such an address, and of the calls that it was inlined into.
const char* mmk_simt_source_place(uint64_t address);
// The first fault since the last mmk_simt_clear_error, or "".
const char* mmk_simt_last_error();
void mmk_simt_clear_error();
}
