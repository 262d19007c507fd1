// Runs the blocks of a grid in turn, and the threads of a block as fibers that switch only at meeting points.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "simt/device.h"
#include "simt/machine.h"
#include "simt/races.h"
#include "simt/traffic.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace mmk::simt {

Machine machine;

void suspend() {
  Fiber& fiber = current_fiber();
#ifdef MMK_SIMT_ASAN
  // A null slot tells ASan that this stack will not be used again.
  const bool last = machine.faulted || fiber.state == State::kExited;
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  switch_context(fiber.context, machine.scheduler);
#ifdef MMK_SIMT_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kGuardBytes = 64 << 10;

void resume(unsigned thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  threadIdx = fiber.index;
  machine.in_kernel = true;
#ifdef MMK_SIMT_ASAN
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  switch_context(machine.scheduler, fiber.context);
#ifdef MMK_SIMT_ASAN
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
  machine.in_kernel = false;
}

void fiber_main() {
#ifdef MMK_SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  machine.kernel.invoke(machine.kernel.arguments);
  if (const size_t copies = pending_copies(machine.current); copies != 0) {
    fail("exits without waiting for %zu cp.async copies", copies);
  }
  exit_thread();
  suspend();
}

char* new_stack() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    std::perror("mmk::simt: no memory for the stack of a thread");
    std::abort();
  }
  return static_cast<char*>(memory) + kGuardBytes;
}

void start_fibers() {
  while (machine.fibers.size() < machine.threads) machine.fibers.emplace_back().stack = new_stack();
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fiber.state = State::kReady;
    fiber.atomics = 0;
#ifdef MMK_SIMT_ASAN
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // redzones that a faulted thread left
#endif
    prepare(fiber.context, fiber.stack, kStackBytes, fiber_main);
  }
  machine.warps.assign((machine.threads + kWarpSize - 1) / kWarpSize, {0xffffffffu, 0});
  if (const unsigned rest = machine.threads % kWarpSize; rest != 0)
    machine.warps.back().live = (1u << rest) - 1;
  machine.live = machine.threads;
  machine.at_barrier = 0;
}

// splitmix64
uint64_t next_random() {
  uint64_t value = machine.random += 0x9e3779b97f4a7c15u;
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
  value = (value ^ value >> 27) * 0x94d049bb133111ebu;
  return value ^ value >> 31;
}

// Fills `order` with 0..count-1 in the order of the seed; shuffles differ from call to call.
void set_order(std::vector<unsigned>& order, size_t count) {
  order.resize(count);
  for (size_t i = 0; i < count; ++i) order[i] = static_cast<unsigned>(machine.seed == 1 ? count - 1 - i : i);
  if (machine.seed <= 1) return;
  for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

void run_block() {
  begin_block_shared();
  begin_block_copies(machine.threads);
  start_fibers();
  begin_block_order();
  begin_block_traffic();
  std::vector<unsigned> order;
  while (machine.live > 0) {
    set_order(order, machine.threads);
    bool progress = false;
    for (const unsigned thread : order) {
      if (machine.fibers[thread].state != State::kReady) continue;
      progress = true;
      resume(thread);
      if (machine.faulted) return;
    }
    if (!progress) return report_deadlock();
  }
  end_block_traffic();
  end_block_shared();
}

cudaError_t geometry_fault(const char* reason, dim3 grid, dim3 block, size_t dynamic_smem_bytes) {
  char text[256];
  std::snprintf(text, sizeof(text),
                ": grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of dynamic shared memory: ", grid.x,
                grid.y, grid.z, block.x, block.y, block.z, dynamic_smem_bytes);
  if (machine.error.empty()) machine.error = "kernel " + kernel_name(machine.kernel.function) + text + reason;
  return cudaErrorInvalidConfiguration;
}

const char* check_geometry(const void* function, dim3 grid, dim3 block, size_t dynamic_smem_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "the grid is empty";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return "the grid is larger than (2^31-1, 65535, 65535)";
  if (threads == 0) return "the block is empty";
  if (threads > kMaxThreads) return "more than 1024 threads";
  if (block.z > 64) return "the block is larger than (1024, 1024, 64)";
  if (dynamic_smem_bytes > static_cast<size_t>(current_device().shared_per_block))
    return "more shared memory than the device has";
  if (dynamic_smem_bytes > kMaxSharedBytesWithoutOptIn &&
      !may_use_dynamic_shared(function, dynamic_smem_bytes))
    return "more than 48 KB of shared memory without opt-in";
  return nullptr;
}

void record_launch(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_smem_bytes) {
  const auto blocks = uint64_t{grid.x} * grid.y * grid.z;
  const auto threads = uint64_t{block.x} * block.y * block.z;
  static std::unordered_map<const void*, std::string> symbols;
  std::string& symbol = symbols[kernel.function];
  if (symbol.empty()) symbol = kernel_symbol(kernel.function);
  machine.recorded += symbol;
  for (const uint64_t value :
       {blocks, threads, uint64_t{dynamic_smem_bytes}, uint64_t{allowed_dynamic_shared(kernel.function)}}) {
    machine.recorded += ' ' + std::to_string(value);
  }
  machine.recorded += '\n';
}

}  // namespace

cudaError_t run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_smem_bytes,
                     bool overlapping) {
  if (machine.in_kernel) fail("launches a kernel");
  const std::lock_guard lock(machine.mutex);
  machine.kernel = kernel;
  if (const char* reason = check_geometry(kernel.function, grid, block, dynamic_smem_bytes)) {
    return geometry_fault(reason, grid, block, dynamic_smem_bytes);
  }
  if (machine.recording != Recording::kOff) record_launch(kernel, grid, block, dynamic_smem_bytes);
  if (machine.recording == Recording::kOnly) return cudaSuccess;
  machine.faulted = false;
  machine.threads = block.x * block.y * block.z;
  machine.random = machine.seed;
  gridDim = grid;
  blockDim = block;
  begin_grid_shared(dynamic_smem_bytes);
  begin_grid_order(overlapping);
  begin_grid_traffic();
  std::vector<unsigned> order;
  set_order(order, size_t{grid.x} * grid.y * grid.z);
  for (const unsigned index : order) {
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
    run_block();
    if (machine.faulted) break;
  }
  if (!machine.faulted) end_grid_traffic(order.size(), dynamic_smem_bytes);
  end_grid_shared();
  return machine.faulted ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace mmk::simt

void mmk_simt_set_order(uint64_t seed) {
  mmk::simt::machine.seed = seed;
}

void mmk_simt_record(int64_t run) {
  using namespace mmk::simt;
  forget_opt_ins();
  machine.recorded.clear();
  machine.recording = run != 0 ? Recording::kAlso : Recording::kOnly;
}

const char* mmk_simt_recorded() {
  using namespace mmk::simt;
  machine.recording = Recording::kOff;
  return machine.recorded.c_str();
}
