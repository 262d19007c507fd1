// cp.async: the issue poisons the target, the wait copies the bytes.
#include <array>
#include <cstring>
#include <vector>

#include "simt/internal.h"
#include "simt/races.h"
#include "simt/traffic.h"

namespace mmk::simt {
namespace {

struct Copy {
  void* target;
  const void* source;
  int bytes;
  int source_bytes;
  const void* site;  // of the issue
  int64_t group;
  std::array<unsigned char, 16> data;
};

struct Queue {
  std::vector<Copy> copies;  // in the order of issue
  int64_t open_group = 0;    // groups closed so far
};
std::vector<Queue> queues;  // one for each thread of the block

// The hardware may read and write at any time from the issue to the wait, so both count as accesses.
void record(const Copy& copy) {
  if (copy.source_bytes > 0) record_access(copy.source, copy.source_bytes, AccessKind::kRead, copy.site);
  record_access(copy.target, copy.bytes, AccessKind::kWrite, copy.site);
}

void count(const std::vector<Copy>& outstanding, const Copy& copy) {
  if (!counting) return;
  if (copy.source_bytes > 0) count_access(copy.source, copy.source_bytes, Operation::kAsyncCopy, copy.site);
  count_access(copy.target, copy.bytes, Operation::kAsyncCopy, copy.site);
  size_t bytes = copy.source_bytes;
  for (const Copy& other : outstanding) bytes += other.source_bytes;
  count_outstanding(bytes);
}

// Completes the copies of all groups before `group`.
void land_before(int64_t group) {
  auto& copies = queues[thread_index()].copies;
  size_t landed = 0;
  for (; landed < copies.size() && copies[landed].group < group; ++landed) {
    record(copies[landed]);
    std::memcpy(copies[landed].target, copies[landed].data.data(), copies[landed].bytes);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace

void begin_block_copies(unsigned threads) {
  if (queues.size() < threads) queues.resize(threads);
  for (Queue& queue : queues) {
    queue.copies.clear();
    queue.open_group = 0;
  }
}

size_t pending_copies(unsigned thread) {
  return queues[thread].copies.size();
}

void cp_async(void* shared, const void* global, int bytes, int source_bytes) {
  for (const void* address : {static_cast<const void*>(shared), global}) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
      fail("misaligned access of %d bytes at %p", bytes, address);
  }
  require_shared(shared, bytes, "cp.async");
  Queue& queue = queues[thread_index()];
  Copy copy{shared, global, bytes, source_bytes, __builtin_return_address(0), queue.open_group, {}};
  record(copy);
  count(queue.copies, copy);
  if (source_bytes > 0) std::memcpy(copy.data.data(), global, source_bytes);
  std::memset(shared, 0xff, bytes);
  queue.copies.push_back(copy);
}

void cp_async_commit_group() {
  ++queues[thread_index()].open_group;
}
void cp_async_wait_group(int pending) {
  land_before(queues[thread_index()].open_group - pending);
}
void cp_async_wait_all() {
  land_before(queues[thread_index()].open_group + 1);
}

}  // namespace mmk::simt
