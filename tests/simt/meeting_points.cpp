// The points where threads meet: barriers of the block and collectives of a warp.
#include <cstring>

#include "simt/machine.h"
#include "simt/races.h"
#include "simt/traffic.h"

namespace mmk::simt {
namespace {

// A thread with more atomics than this between meeting points waits for a value that never comes.
constexpr int64_t kMaxAtomics = 4 << 20;
constexpr int64_t kAtomicsPerYield = 64;

bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

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
  order_block();
  end_block_requests();
}

bool same_collective(const Fiber& a, const Fiber& b) {
  return a.mask == b.mask && std::strcmp(a.collective.name, b.collective.name) == 0;
}

// Completes the collective at which `thread` waits, if all live lanes of its mask have arrived.
void complete_collective_of(unsigned thread) {
  const Fiber& fiber = machine.fibers[thread];
  Warp& warp = machine.warps[thread / kWarpSize];
  const unsigned first = thread / kWarpSize * kWarpSize;
  const unsigned present = warp.live & fiber.mask;
  if (fiber.collective.aligned && present != 0xffffffffu) {
    fail("%s needs all 32 lanes of the warp, only 0x%08x are live", fiber.collective.name, present);
  }
  if ((present & ~warp.waiting) != 0) return;
  void* frames[kWarpSize] = {};
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((present >> lane & 1u) == 0) continue;
    // Lanes at another collective may still arrive here; if they cannot, it is a deadlock.
    if (!same_collective(fiber, machine.fibers[first + lane])) return;
    frames[lane] = machine.fibers[first + lane].frame;
  }
  fiber.collective.complete(frames, present);
  if (fiber.collective.orders_memory) order_lanes(thread / kWarpSize, present);
  if (present == warp.live) end_warp_requests(thread / kWarpSize);
  warp.waiting &= ~present;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (frames[lane] != nullptr) machine.fibers[first + lane].state = State::kReady;
  }
}

}  // namespace

BarrierResult block_barrier(int predicate, const std::source_location& where) {
  Fiber& fiber = current_fiber();
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
  Fiber& fiber = current_fiber();
  const unsigned lane = lane_index();
  if ((mask >> lane & 1u) == 0)
    fail("%s: mask 0x%08x does not include the calling lane %u", collective.name, mask, lane);
  fiber.state = State::kAtCollective;
  fiber.collective = collective;
  fiber.mask = mask;
  fiber.frame = frame;
  fiber.where = where;
  fiber.atomics = 0;
  current_warp().waiting |= 1u << lane;
  complete_collective_of(machine.current);
  if (fiber.state == State::kAtCollective) suspend();
}

void exit_thread() {
  current_fiber().state = State::kExited;
  --machine.live;
  release_barrier_if_complete();
  current_warp().live &= ~(1u << lane_index());
  const unsigned first = machine.current - lane_index();
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (current_warp().waiting >> lane & 1u) complete_collective_of(first + lane);
  }
}

unsigned thread_index() {
  return machine.current;
}
unsigned lane_index() {
  return machine.current % kWarpSize;
}

unsigned live_lanes() {
  return current_warp().live;
}

void count_atomic() {
  Fiber& fiber = current_fiber();
  if (++fiber.atomics > kMaxAtomics)
    fail("runs atomics without end: it waits for a later block or for a value that never comes");
  if (fiber.atomics % kAtomicsPerYield == 0) suspend();
}

#ifndef MMK_SIMT_RACES
void begin_atomic(void*, size_t) {
  count_atomic();
}
void end_atomic() {}
void threadfence() {}
void wait_for_previous_grid() {}
#endif

}  // namespace mmk::simt
