// Finds races between the accesses that g++ reports with -fsanitize=thread, through the functions at the end
// of this file, which replace those of the sanitizer. Time counts the events that order threads: an access is
// ordered before the current one if a barrier of both threads lies between.
#ifdef MMK_SIMT_RACES

#include "simt/races.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt/device.h"
#include "simt/machine.h"
#include "simt/traffic.h"

namespace mmk::simt {
namespace {

using Time = uint32_t;  // 0: never

struct Event {
  const void* site = nullptr;
  Time time = 0;
  uint16_t thread = 0;
  AccessKind kind = AccessKind::kRead;
};

// Of many accesses it is enough to keep the latest, and the latest by another lane of its warp, by another
// warp of its block and by another block. A thread made at most one of these four.
struct History {
  Event latest;
  Event of_other_lane;
  Event of_other_warp;
  Event of_other_block;
};

// The accesses to kCellBytes of memory. The last write is enough: it is ordered after all earlier ones.
struct Cell {
  Event write;
  History reads;
  History atomics;
};

constexpr uintptr_t kCellBytes = 2;  // the smallest element that kernels write
constexpr uintptr_t kPageBytes = 512;
struct Page {
  std::array<Cell, kPageBytes / kCellBytes> cells;
  Time used = 0;  // the last grid that accessed it
};

struct WarpOrder {
  Time known[kWarpSize][kWarpSize] =
      {};  // [lane][other]: up to when accesses of other are ordered before lane
};

// The accesses of a block up to `end` are published: a fence and then an atomic of the block followed them.
struct Published {
  Time begin;
  Time end;
};

Time now = 0;
Time previous_grid = 0;
Time grid = 0;
Time block = 0;
Time barrier = 0;  // the block's last
Time fence = 0;    // the block's last
bool overlapping = false;
bool acquired = false;         // the block ran an atomic, so published accesses are ordered before
bool silent = false;           // inside an atomic
std::vector<bool> has_waited;  // per thread: for the previous grid
std::vector<WarpOrder> warps;
std::vector<Published> published;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::vector<std::unique_ptr<Page>> spare;  // pages whose accesses are all ordered before any to come

unsigned warp_of(unsigned thread) {
  return thread / kWarpSize;
}

bool is_published(Time time) {
  const auto later = std::upper_bound(published.begin(), published.end(), time,
                                      [](Time time, const Published& other) { return time < other.begin; });
  return later != published.begin() && time <= std::prev(later)->end;
}

// Whether the event is ordered before the current access of the current thread.
bool ordered(const Event& event, bool shared) {
  if (event.time < block) {
    if (shared || event.time < previous_grid) return true;
    if (event.time < grid) return !overlapping || has_waited[machine.current];
    return acquired && is_published(event.time);
  }
  if (event.thread == machine.current || event.time <= barrier) return true;
  const unsigned warp = warp_of(machine.current);
  return warp_of(event.thread) == warp &&
         event.time <= warps[warp].known[machine.current % kWarpSize][event.thread % kWarpSize];
}

const char* verb(AccessKind kind) {
  return kind == AccessKind::kAtomic ? "atomic" : kind == AccessKind::kWrite ? "write" : "read";
}

// Faults unless `earlier` is ordered before `event`, which the current thread does.
void require_order(const Event& earlier, const Event& event, uintptr_t address, bool shared) {
  if (ordered(earlier, shared)) return;
  static char text[2048];  // no heap: the stack of a faulted thread is never unwound
  const uint3& other = machine.fibers[earlier.thread].index;
  const char* of = earlier.time >= block  ? "of the same block"
                   : earlier.time >= grid ? "of another block"
                                          : "of the previous grid";
  std::snprintf(text, sizeof(text), "race on %s: %s at %s, and %s at %s by thread (%u, %u, %u) %s",
                shared ? shared_place(reinterpret_cast<const void*>(address)).c_str() : "global memory",
                verb(event.kind), source_place(event.site).c_str(), verb(earlier.kind),
                source_place(earlier.site).c_str(), other.x, other.y, other.z, of);
  fail("%s", text);
}

void require_order(const History& earlier, const Event& event, uintptr_t address, bool shared) {
  require_order(earlier.latest, event, address, shared);
  require_order(earlier.of_other_lane, event, address, shared);
  require_order(earlier.of_other_warp, event, address, shared);
  require_order(earlier.of_other_block, event, address, shared);
}

void remember(History& history, const Event& event) {
  const Event& last = history.latest;
  if (last.time < block) {
    history.of_other_block = last;
    history.of_other_warp = history.of_other_lane = {};
  } else if (warp_of(last.thread) != warp_of(event.thread)) {
    history.of_other_warp = last;
    history.of_other_lane = {};
  } else if (last.thread != event.thread) {
    history.of_other_lane = last;
  }
  history.latest = event;
}

std::unique_ptr<Page> new_page() {
  if (spare.empty()) return std::make_unique<Page>();
  std::unique_ptr<Page> page = std::move(spare.back());
  spare.pop_back();
  return page;
}

Page& page_of(uintptr_t address) {
  struct Recent {
    uintptr_t key = ~uintptr_t{0};
    Time grid = 0;
    Page* page = nullptr;
  };
  static std::array<Recent, 256> recent;
  const uintptr_t key = address / kPageBytes;
  Recent& entry = recent[key % recent.size()];
  if (entry.key != key || entry.grid != grid) {
    auto& page = pages[key];
    if (page == nullptr) page = new_page();
    page->used = grid;
    entry = {key, grid, page.get()};
  }
  return *entry.page;
}

// Cells take 72 times the memory that they describe, so pages are used again for other addresses. They need
// not be cleared: accesses before `oldest` are ordered before all to come.
void retire_pages(Time oldest) {
  for (auto page = pages.begin(); page != pages.end();) {
    if (page->second->used >= oldest) {
      ++page;
      continue;
    }
    spare.push_back(std::move(page->second));
    page = pages.erase(page);
  }
}

}  // namespace

void record_access(const void* address, size_t bytes, AccessKind kind, const void* site) {
  if (!machine.in_kernel || silent) return;
  const char* stack = current_fiber().stack;
  if (address >= stack && address < stack + kStackBytes) return;
  const bool shared = is_shared(address);
  const Event event{site, now, static_cast<uint16_t>(machine.current), kind};
  const auto first = reinterpret_cast<uintptr_t>(address) / kCellBytes;
  const auto last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / kCellBytes;
  for (uintptr_t index = first; index <= last; ++index) {
    const uintptr_t place = index * kCellBytes;
    Cell& cell = page_of(place).cells[place % kPageBytes / kCellBytes];
    require_order(cell.write, event, place, shared);
    if (kind != AccessKind::kRead) require_order(cell.reads, event, place, shared);
    if (kind != AccessKind::kAtomic) require_order(cell.atomics, event, place, shared);
    switch (kind) {
      case AccessKind::kRead:
        remember(cell.reads, event);
        break;
      case AccessKind::kWrite:
        cell.write = event;
        break;
      case AccessKind::kAtomic:
        remember(cell.atomics, event);
        break;
    }
  }
}

void begin_grid_order(bool overlaps) {
  previous_grid = grid;
  grid = ++now;
  overlapping = overlaps;
  retire_pages(overlaps ? previous_grid : grid);
  published.clear();
}

void begin_block_order() {
  block = barrier = ++now;
  ++now;  // accesses come after the barrier that starts a block
  fence = 0;
  acquired = silent = false;
  has_waited.assign(machine.threads, false);
  warps.assign(machine.warps.size(), {});
}

void order_block() {
  barrier = now++;
  if (std::find(has_waited.begin(), has_waited.end(), true) != has_waited.end()) {
    has_waited.assign(machine.threads, true);
  }
}

void order_lanes(unsigned warp, unsigned lanes) {
  WarpOrder& of = warps[warp];
  Time joined[kWarpSize] = {};
  bool waited = false;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((lanes >> lane & 1u) == 0) continue;
    for (unsigned other = 0; other < kWarpSize; ++other) {
      joined[other] = std::max(joined[other], of.known[lane][other]);
    }
    waited = waited || has_waited[warp * kWarpSize + lane];
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (lanes >> lane & 1u) joined[lane] = now;
  }
  ++now;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((lanes >> lane & 1u) == 0) continue;
    std::copy(joined, joined + kWarpSize, of.known[lane]);
    has_waited[warp * kWarpSize + lane] = waited;
  }
}

void threadfence() {
  fence = now++;
}

void begin_atomic(void* address, size_t bytes) {
  count_atomic();
  record_access(address, bytes, AccessKind::kAtomic, __builtin_return_address(0));
  count_access(address, bytes, Operation::kAtomic, __builtin_return_address(0));
  silent = true;
  acquired = true;
  if (fence == 0) return;
  if (published.empty() || published.back().begin != block) published.push_back({block, 0});
  published.back().end = fence;
}

void end_atomic() {
  silent = false;
}

void wait_for_previous_grid() {
  has_waited[machine.current] = true;
}

// An access that the compiler reports.
void observe(const void* address, size_t bytes, AccessKind kind, const void* site) {
  record_access(address, bytes, kind, site);
  if (counting && !silent) {
    count_access(address, bytes, kind == AccessKind::kRead ? Operation::kRead : Operation::kWrite, site);
  }
}

}  // namespace mmk::simt

// The functions that g++ calls.
extern "C" {

#define MMK_ACCESS(name, bytes, kind)                                                             \
  void __tsan_##name(void* address) {                                                             \
    mmk::simt::observe(address, bytes, mmk::simt::AccessKind::kind, __builtin_return_address(0)); \
  }
MMK_ACCESS(read1, 1, kRead)
MMK_ACCESS(read2, 2, kRead)
MMK_ACCESS(read4, 4, kRead)
MMK_ACCESS(read8, 8, kRead)
MMK_ACCESS(read16, 16, kRead)
MMK_ACCESS(write1, 1, kWrite)
MMK_ACCESS(write2, 2, kWrite)
MMK_ACCESS(write4, 4, kWrite)
MMK_ACCESS(write8, 8, kWrite)
MMK_ACCESS(write16, 16, kWrite)
MMK_ACCESS(unaligned_read2, 2, kRead)
MMK_ACCESS(unaligned_read4, 4, kRead)
MMK_ACCESS(unaligned_read8, 8, kRead)
MMK_ACCESS(unaligned_read16, 16, kRead)
MMK_ACCESS(unaligned_write2, 2, kWrite)
MMK_ACCESS(unaligned_write4, 4, kWrite)
MMK_ACCESS(unaligned_write8, 8, kWrite)
MMK_ACCESS(unaligned_write16, 16, kWrite)
#undef MMK_ACCESS

void __tsan_read_range(void* address, size_t bytes) {
  mmk::simt::observe(address, bytes, mmk::simt::AccessKind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  mmk::simt::observe(address, bytes, mmk::simt::AccessKind::kWrite, __builtin_return_address(0));
}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}

}  // extern "C"

#endif
