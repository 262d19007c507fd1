// The state of the running launch; only one runs at a time.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "simt/context.h"
#include "simt/internal.h"

namespace mmk::simt {

#ifdef MMK_SIMT_ASAN
inline constexpr size_t kStackBytes = 1 << 20;
#else
inline constexpr size_t kStackBytes = 256 << 10;
#endif

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

// Whether launches are recorded: also, as they run, or only, without running.
enum class Recording { kOff, kAlso, kOnly };

// A warp; the fields are lane masks.
struct Warp {
  unsigned live;     // not exited
  unsigned waiting;  // at a collective
};

struct Machine {
  std::mutex mutex;  // of a launch
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
  Recording recording = Recording::kOff;
  std::string recorded;
};
extern Machine machine;

inline Fiber& current_fiber() {
  return machine.fibers[machine.current];
}
inline Warp& current_warp() {
  return machine.warps[machine.current / kWarpSize];
}

// scheduler.cpp: returns to the scheduler until it resumes this thread.
void suspend();

// meeting_points.cpp: ends the current thread, so that others no longer wait for it.
void exit_thread();

// meeting_points.cpp: called at each atomic.
void count_atomic();

// faults.cpp: called when no thread can continue.
void report_deadlock();

}  // namespace mmk::simt
