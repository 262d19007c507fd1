// Runs the blocks of a grid one after the other, the threads of a block as fibers that switch only where they
// meet.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "simt/context.h"
#include "simt/device.h"
#include "simt/internal.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace mmk::simt {
namespace {

constexpr unsigned kMaxThreads = 1024;
#ifdef MMK_SIMT_ASAN
constexpr size_t kStackBytes = 1 << 20;
#else
constexpr size_t kStackBytes = 256 << 10;
#endif
constexpr size_t kGuardBytes = 64 << 10;
// A thread that does more atomics than this without meeting others waits for something that never comes.
constexpr int64_t kMaxAtomics = 4 << 20;
constexpr int64_t kAtomicsPerYield = 64;

enum class State { kReady, kAtBarrier, kAtCollective, kExited };

struct Fiber {
  Context context;
  char* stack;
  void* fake_stack;  // of ASan
  uint3 index;
  State state;
  std::source_location where;  // of the meeting point it waits at
  int predicate;
  BarrierResult barrier_result;
  Collective collective;
  unsigned mask;
  void* frame;
  int64_t atomics;
};

// Sets of lanes.
struct Warp {
  unsigned live;     // not exited
  unsigned waiting;  // at a collective
};

struct Machine {
  std::mutex mutex;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned threads = 0;  // of a block
  unsigned live = 0;
  unsigned at_barrier = 0;
  unsigned current = 0;
  bool in_kernel = false;
  bool faulted = false;
  Kernel kernel{};
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  uint64_t seed = 0;
  uint64_t random = 0;
  std::string error;
};
Machine machine;

Fiber& self() {
  return machine.fibers[machine.current];
}
Warp& own_warp() {
  return machine.warps[machine.current / kWarpSize];
}

// ---- switching -------------------------------------------------------------------------------------------

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

void suspend() {
  Fiber& fiber = self();
#ifdef MMK_SIMT_ASAN
  // A null slot tells ASan that this stack is not coming back.
  const bool last = machine.faulted || fiber.state == State::kExited;
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  switch_context(fiber.context, machine.scheduler);
#ifdef MMK_SIMT_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void release_barrier_if_complete();
void complete_collective_of(unsigned thread);

// The others no longer have to wait for this thread.
void exit_thread() {
  self().state = State::kExited;
  --machine.live;
  release_barrier_if_complete();
  own_warp().live &= ~(1u << lane_index());
  const unsigned first = machine.current - lane_index();
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (own_warp().waiting >> lane & 1u) complete_collective_of(first + lane);
  }
}

void fiber_main() {
#ifdef MMK_SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  machine.kernel.invoke(machine.kernel.arguments);
  if (const size_t copies = pending_copies(machine.current); copies != 0) {
    fail("exits with %zu cp.async copies that it has not waited for", copies);
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
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // redzones of a thread that a fault left behind
#endif
    prepare(fiber.context, fiber.stack, kStackBytes, fiber_main);
  }
  machine.warps.assign((machine.threads + kWarpSize - 1) / kWarpSize, {0xffffffffu, 0});
  if (const unsigned rest = machine.threads % kWarpSize; rest != 0)
    machine.warps.back().live = (1u << rest) - 1;
  machine.live = machine.threads;
  machine.at_barrier = 0;
}

// ---- faults ----------------------------------------------------------------------------------------------

std::string coordinates(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

// `culprit` names the thread, or says that it is not known.
void record_fault(const std::string& culprit, const std::string& text) {
  machine.faulted = true;
  if (!machine.error.empty()) return;
  machine.error = "kernel " + kernel_name(machine.kernel.function) + ": block " + coordinates(blockIdx) +
                  ", " + culprit + ": " + text;
}

void record_fault(const uint3& thread, const std::string& text) {
  record_fault("thread " + coordinates(thread), text);
}

std::string place_of(const std::source_location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string waiting_at(const Fiber& fiber) {
  if (fiber.state == State::kExited) return "have exited";
  if (fiber.state == State::kAtBarrier) return "wait at __syncthreads, " + place_of(fiber.where);
  char mask[32];
  std::snprintf(mask, sizeof(mask), " mask 0x%08x", fiber.mask);
  return std::string("wait at ") + fiber.collective.name + mask + ", " + place_of(fiber.where);
}

// Nobody can go on: tell where each group of threads is.
void report_deadlock() {
  struct Group {
    std::string waiting;
    const Fiber* first;
    int threads;
  };
  std::vector<Group> groups;
  const Fiber* culprit = nullptr;
  for (unsigned i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (culprit == nullptr && fiber.state != State::kExited) culprit = &fiber;
    const std::string waiting = waiting_at(fiber);
    const auto same = [&](const Group& group) { return group.waiting == waiting; };
    const auto group = std::find_if(groups.begin(), groups.end(), same);
    if (group != groups.end()) {
      ++group->threads;
    } else {
      groups.push_back({waiting, &fiber, 1});
    }
  }
  std::string text = "deadlock, not all threads reach the same barrier or warp collective:";
  for (const Group& group : groups) {
    text += "\n  " + std::to_string(group.threads) + " threads from " + coordinates(group.first->index) +
            " on " + group.waiting;
  }
  record_fault(culprit->index, text);
}

bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// ---- barriers --------------------------------------------------------------------------------------------

void release_barrier_if_complete() {
  if (machine.at_barrier == 0 || machine.at_barrier != machine.live) return;
  BarrierResult result{0, 0};
  const Fiber* first = nullptr;
  for (unsigned i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.state != State::kAtBarrier) continue;
    if (first == nullptr) first = &fiber;
    if (!same_place(fiber.where, first->where)) return report_deadlock();
    ++result.threads;
    result.count += fiber.predicate != 0;
  }
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (fiber.state != State::kAtBarrier) continue;
    fiber.state = State::kReady;
    fiber.barrier_result = result;
  }
  machine.at_barrier = 0;
}

// ---- warp collectives ------------------------------------------------------------------------------------

bool same_collective(const Fiber& a, const Fiber& b) {
  return a.mask == b.mask && std::strcmp(a.collective.name, b.collective.name) == 0;
}

// Completes the collective that `thread` waits at, if all live lanes of its mask are there.
void complete_collective_of(unsigned thread) {
  const Fiber& fiber = machine.fibers[thread];
  Warp& warp = machine.warps[thread / kWarpSize];
  const unsigned first = thread / kWarpSize * kWarpSize;
  const unsigned present = warp.live & fiber.mask;
  if (fiber.collective.aligned && present != 0xffffffffu) {
    fail("%s needs all 32 lanes of the warp, live are 0x%08x", fiber.collective.name, present);
  }
  if ((present & ~warp.waiting) != 0) return;
  void* frames[kWarpSize] = {};
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((present >> lane & 1u) == 0) continue;
    // Lanes at another collective may still come to this one; if they cannot, it is a deadlock.
    if (!same_collective(fiber, machine.fibers[first + lane])) return;
    frames[lane] = machine.fibers[first + lane].frame;
  }
  fiber.collective.complete(frames, present);
  warp.waiting &= ~present;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (frames[lane] != nullptr) machine.fibers[first + lane].state = State::kReady;
  }
}

// ---- blocks and grids ------------------------------------------------------------------------------------

// splitmix64
uint64_t next_random() {
  uint64_t value = machine.random += 0x9e3779b97f4a7c15u;
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
  value = (value ^ value >> 27) * 0x94d049bb133111ebu;
  return value ^ value >> 31;
}

// 0..count-1 in the order that the seed asks for; a new shuffle each time.
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

const char* check_geometry(dim3 grid, dim3 block, size_t dynamic_smem_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "the grid is empty";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return "the grid is larger than (2^31-1, 65535, 65535)";
  if (threads == 0) return "the block is empty";
  if (threads > kMaxThreads) return "more than 1024 threads";
  if (block.z > 64) return "the block is larger than (1024, 1024, 64)";
  if (dynamic_smem_bytes > kMaxSharedBytes) return "more than 227 KB of shared memory";
  return nullptr;
}

}  // namespace

cudaError_t run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_smem_bytes) {
  if (machine.in_kernel) fail("launches a kernel");
  const std::lock_guard lock(machine.mutex);
  machine.kernel = kernel;
  if (const char* reason = check_geometry(grid, block, dynamic_smem_bytes)) {
    return geometry_fault(reason, grid, block, dynamic_smem_bytes);
  }
  machine.faulted = false;
  machine.threads = block.x * block.y * block.z;
  machine.random = machine.seed;
  gridDim = grid;
  blockDim = block;
  begin_grid_shared(dynamic_smem_bytes);
  std::vector<unsigned> order;
  set_order(order, size_t{grid.x} * grid.y * grid.z);
  for (const unsigned index : order) {
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
    run_block();
    if (machine.faulted) break;
  }
  end_grid_shared();
  return machine.faulted ? cudaErrorLaunchFailure : cudaSuccess;
}

void fail(const char* format, ...) {
  char text[1024];  // no heap: the stack of a thread with a fault is left as it is
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (!machine.in_kernel) {
    std::fprintf(stderr, "mmk::simt: device code outside a kernel: %s\n", text);
    std::abort();
  }
  record_fault(self().index, text);
  suspend();
  std::abort();  // a faulted block is never resumed
}

void block_fault(const std::string& text) {
  record_fault("one of the threads", text);
}

BarrierResult block_barrier(int predicate, const std::source_location& where) {
  Fiber& fiber = self();
  fiber.state = State::kAtBarrier;
  fiber.where = where;
  fiber.predicate = predicate;
  fiber.atomics = 0;
  ++machine.at_barrier;
  release_barrier_if_complete();
  if (fiber.state == State::kAtBarrier || machine.faulted) suspend();
  return fiber.barrier_result;
}

void warp_collective(const Collective& collective, unsigned mask, void* frame,
                     const std::source_location& where) {
  Fiber& fiber = self();
  const unsigned lane = lane_index();
  if ((mask >> lane & 1u) == 0)
    fail("%s: mask 0x%08x leaves out the calling lane %u", collective.name, mask, lane);
  fiber.state = State::kAtCollective;
  fiber.collective = collective;
  fiber.mask = mask;
  fiber.frame = frame;
  fiber.where = where;
  fiber.atomics = 0;
  own_warp().waiting |= 1u << lane;
  complete_collective_of(machine.current);
  if (fiber.state == State::kAtCollective) suspend();
}

unsigned thread_index() {
  return machine.current;
}
unsigned lane_index() {
  return machine.current % kWarpSize;
}

unsigned live_lanes() {
  return own_warp().live;
}

void count_atomic() {
  Fiber& fiber = self();
  if (++fiber.atomics > kMaxAtomics)
    fail("does atomics without end: a wait for a block that runs later, or a lost value");
  if (fiber.atomics % kAtomicsPerYield == 0) suspend();
}

}  // namespace mmk::simt

using mmk::simt::machine;

void mmk_simt_set_order(uint64_t seed) {
  machine.seed = seed;
}
const char* mmk_simt_last_error() {
  return machine.error.c_str();
}
void mmk_simt_clear_error() {
  machine.error.clear();
}
