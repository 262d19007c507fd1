// Groups the accesses of lanes into requests of their warps, and counts wavefronts of shared memory and
// sectors of global memory.
#ifdef MMK_SIMT_RACES

#include "simt/traffic.h"

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "simt/machine.h"

// The first and last byte of this library: its data are no memory of the device.
extern "C" const char __ehdr_start __attribute__((visibility("hidden")));
extern "C" const char _end __attribute__((visibility("hidden")));

namespace mmk::simt {

bool counting = false;

namespace {

constexpr uintptr_t kWordBytes = 4;  // of a bank
constexpr uintptr_t kBanks = 32;
constexpr uintptr_t kWavefrontBytes = kWordBytes * kBanks;
constexpr uintptr_t kSectorBytes = 32;
constexpr uintptr_t kVectorBytes = 16;  // the widest access
constexpr size_t kParameterBytes = 4096;

enum class Space { kShared, kGlobal };

struct Range {
  uintptr_t begin = 0;
  uintptr_t end = 0;  // equal to begin: no access
  uintptr_t bytes() const { return end - begin; }
};

struct Request {
  std::array<Range, kWarpSize> lanes;
};

using Key = std::tuple<const void*, Space, Operation>;

// The requests of an instruction since the lanes of the warp met.
struct Series {
  std::array<size_t, kWarpSize> accesses = {};  // of each lane
  std::vector<Request> requests;
};

struct Totals {
  int64_t requests = 0;
  int64_t bytes = 0;   // different ones, of each request
  int64_t passes = 0;  // wavefronts or sectors
  int64_t ideal = 0;
};

// A vector access that was announced, of which the compiler reports the parts that it needs.
struct Vector {
  Range range;
  uint32_t seen = 0;  // a bit for each byte
  Operation operation = Operation::kRead;
};

// Accesses to neighbouring words, one after another: the parts of a structure such as float2, for example.
struct Parts {
  Range range;
  uintptr_t part = 0;  // bytes of each
  Operation operation = Operation::kRead;
  const void* first_site = nullptr;
  const void* last_site = nullptr;
};

struct Thread {
  std::array<Vector, 16> vectors;
  size_t next_vector = 0;
  Parts parts;
  size_t most_outstanding = 0;
};

std::vector<Thread> threads;
std::vector<std::map<Key, Series>> warps;
std::map<Key, Totals> grid_totals;
size_t thread_outstanding = 0;  // most of a thread
size_t block_outstanding = 0;   // most of a block: the sum of its threads
std::string counted;

Space space_of(uintptr_t address) {
  return is_shared(reinterpret_cast<const void*>(address)) ? Space::kShared : Space::kGlobal;
}

// Stack, parameters, and the variables of the runtime, such as threadIdx.
bool is_no_device_memory(uintptr_t address) {
  const auto inside = [address](const void* begin, size_t bytes) {
    return address - reinterpret_cast<uintptr_t>(begin) < bytes;
  };
  return inside(current_fiber().stack, kStackBytes) || inside(machine.kernel.arguments, kParameterBytes) ||
         inside(&__ehdr_start, static_cast<size_t>(&_end - &__ehdr_start));
}

void add(unsigned thread, Range range, Operation operation, const void* site) {
  Series& series = warps[thread / kWarpSize][{site, space_of(range.begin), operation}];
  const unsigned lane = thread % kWarpSize;
  for (; range.begin < range.end; range.begin += kVectorBytes) {
    const size_t index = series.accesses[lane]++;
    if (index == series.requests.size()) series.requests.emplace_back();
    series.requests[index].lanes[lane] = {range.begin, std::min(range.end, range.begin + kVectorBytes)};
  }
}

void end_parts(unsigned thread) {
  Parts& parts = threads[thread].parts;
  if (parts.range.bytes() == 0) return;
  // The widest aligned accesses; more than one where alignment or length forbid one.
  for (uintptr_t begin = parts.range.begin; begin < parts.range.end;) {
    uintptr_t bytes = parts.part;
    while (begin % (2 * bytes) == 0 && begin + 2 * bytes <= parts.range.end && 2 * bytes <= kVectorBytes) {
      bytes *= 2;
    }
    add(thread, {begin, begin + bytes}, parts.operation, parts.first_site);
    begin += bytes;
  }
  parts = {};
}

// nvcc knows the alignment of shared arrays, and joins accesses to neighbouring words in unrolled loops. Of
// global memory it joins the parts of a structure only: those are different instructions, close to each
// other.
bool joins(const Parts& parts, const Range& range, Operation operation, const void* site) {
  constexpr ptrdiff_t kNear = 64;  // bytes of code
  if (parts.operation != operation || parts.part != range.bytes() ||
      parts.range.bytes() + range.bytes() > kVectorBytes) {
    return false;
  }
  if (range.begin != parts.range.end && range.end != parts.range.begin) return false;
  const auto distance = static_cast<const char*>(site) - static_cast<const char*>(parts.last_site);
  return space_of(range.begin) == Space::kShared || (distance > 0 && distance < kNear);
}

// Whether the access is a part of an announced vector; the first part counts the vector.
bool is_of_vector(Thread& thread, const Range& range, Operation operation, const void* site) {
  for (Vector& vector : thread.vectors) {
    if (range.begin < vector.range.begin || range.end > vector.range.end) continue;
    const auto bits =
        static_cast<uint32_t>(((uint64_t{1} << range.bytes()) - 1) << (range.begin - vector.range.begin));
    if (vector.seen == 0) {
      vector.operation = operation;
      add(machine.current, vector.range, operation, site);
    } else if (vector.operation != operation || (vector.seen & bits) != 0) {
      vector = {};  // a later access to the same memory
      continue;
    }
    vector.seen |= bits;
    return true;
  }
  return false;
}

// Lanes that the hardware serves together: 32 lanes with accesses of up to 4 bytes, 16 with 8, 8 with 16.
// Those that read the same word share it; different words of a bank take a wavefront each.
void count_shared(const Request& request, Totals& totals) {
  uintptr_t widest = 0;
  for (const Range& lane : request.lanes) widest = std::max(widest, lane.bytes());
  const unsigned together = widest <= 4 ? 32 : widest <= 8 ? 16 : 8;
  for (unsigned first = 0; first < kWarpSize; first += together) {
    std::vector<uintptr_t> words;
    for (unsigned lane = first; lane < first + together; ++lane) {
      const Range& range = request.lanes[lane];
      for (uintptr_t word = range.begin / kWordBytes; word * kWordBytes < range.end; ++word) {
        words.push_back(word);
      }
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    std::array<int64_t, kBanks> of_bank = {};
    for (const uintptr_t word : words) ++of_bank[word % kBanks];
    totals.passes += *std::max_element(of_bank.begin(), of_bank.end());
    totals.ideal += static_cast<int64_t>((words.size() * kWordBytes + kWavefrontBytes - 1) / kWavefrontBytes);
    totals.bytes += static_cast<int64_t>(words.size() * kWordBytes);
  }
}

void count_global(const Request& request, Totals& totals) {
  std::vector<Range> ranges;
  std::copy_if(request.lanes.begin(), request.lanes.end(), std::back_inserter(ranges),
               [](const Range& range) { return range.bytes() > 0; });
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uintptr_t bytes = 0;
  uintptr_t end = 0;          // of the bytes so far
  uintptr_t next_sector = 0;  // after those so far
  int64_t sectors = 0;
  for (const Range& range : ranges) {
    if (range.end > end) bytes += range.end - std::max(range.begin, end);
    end = std::max(end, range.end);
    const uintptr_t first = std::max(range.begin / kSectorBytes, next_sector);
    next_sector = std::max(next_sector, (range.end - 1) / kSectorBytes + 1);
    if (next_sector > first) sectors += static_cast<int64_t>(next_sector - first);
  }
  totals.passes += sectors;
  totals.ideal += static_cast<int64_t>((bytes + kSectorBytes - 1) / kSectorBytes);
  totals.bytes += static_cast<int64_t>(bytes);
}

}  // namespace

void count_access(const void* address, size_t bytes, Operation operation, const void* site) {
  if (!counting || !machine.in_kernel) return;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const Range range{begin, begin + bytes};
  if (is_no_device_memory(begin)) return;
  Thread& thread = threads[machine.current];
  if (operation != Operation::kRead && operation != Operation::kWrite) {
    return add(machine.current, range, operation, site);
  }
  if (bytes <= kVectorBytes && is_of_vector(thread, range, operation, site)) return;
  Parts& parts = thread.parts;
  if (joins(parts, range, operation, site)) {
    parts.range = {std::min(parts.range.begin, range.begin), std::max(parts.range.end, range.end)};
    parts.last_site = site;
    return;
  }
  end_parts(machine.current);
  if (bytes > kVectorBytes) return add(machine.current, range, operation, site);
  parts = {range, bytes, operation, site, site};
}

void expect_vector(const void* address, size_t bytes) {
  if (!counting || !machine.in_kernel) return;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (is_no_device_memory(begin)) return;
  Thread& thread = threads[machine.current];
  for (Vector& vector : thread.vectors) {
    if (vector.range.begin == begin && vector.range.bytes() == bytes) {
      vector = {};
    }
  }
  thread.vectors[thread.next_vector] = {{begin, begin + bytes}};
  thread.next_vector = (thread.next_vector + 1) % thread.vectors.size();
}

void count_outstanding(size_t bytes) {
  if (!counting) return;
  size_t& most = threads[machine.current].most_outstanding;
  most = std::max(most, bytes);
}

void begin_grid_traffic() {
  grid_totals.clear();
  thread_outstanding = block_outstanding = 0;
}

void begin_block_traffic() {
  if (!counting) return;
  threads.assign(machine.threads, {});
  warps.assign((machine.threads + kWarpSize - 1) / kWarpSize, {});
}

void end_warp_requests(unsigned warp) {
  if (!counting) return;
  const unsigned end = std::min((warp + 1) * kWarpSize, machine.threads);
  for (unsigned thread = warp * kWarpSize; thread < end; ++thread) {
    end_parts(thread);
    threads[thread].vectors.fill({});
  }
  for (auto& [key, series] : warps[warp]) {
    Totals& totals = grid_totals[key];
    for (const Request& request : series.requests) {
      ++totals.requests;
      std::get<Space>(key) == Space::kShared ? count_shared(request, totals) : count_global(request, totals);
    }
    series.requests.clear();
    series.accesses.fill(0);
  }
}

void end_block_requests() {
  if (!counting) return;
  for (unsigned warp = 0; warp < warps.size(); ++warp) end_warp_requests(warp);
}

void end_block_traffic() {
  if (!counting) return;
  end_block_requests();
  size_t sum = 0;
  for (const Thread& thread : threads) {
    sum += thread.most_outstanding;
    thread_outstanding = std::max(thread_outstanding, thread.most_outstanding);
  }
  block_outstanding = std::max(block_outstanding, sum);
}

void end_grid_traffic(size_t blocks, size_t dynamic_bytes) {
  if (!counting) return;
  counted += "launch " + kernel_symbol(machine.kernel.function);
  for (const size_t value : {blocks, size_t{machine.threads}, fixed_shared_bytes(), dynamic_bytes,
                             thread_outstanding, block_outstanding}) {
    counted += ' ' + std::to_string(value);
  }
  counted += '\n';
  for (const auto& [key, totals] : grid_totals) {
    const auto& [site, space, operation] = key;
    static constexpr const char* kOperations[] = {"read", "write", "atomic", "async_copy", "matrix_load"};
    counted += std::to_string(reinterpret_cast<uintptr_t>(site));
    counted += space == Space::kShared ? " shared " : " global ";
    counted += kOperations[static_cast<int>(operation)];
    for (const int64_t value : {totals.requests, totals.bytes, totals.passes, totals.ideal}) {
      counted += ' ' + std::to_string(value);
    }
    counted += '\n';
  }
}

}  // namespace mmk::simt

void mmk_simt_count() {
  mmk::simt::counted.clear();
  mmk::simt::counting = true;
}

const char* mmk_simt_counted() {
  mmk::simt::counting = false;
  return mmk::simt::counted.c_str();
}

const char* mmk_simt_source_place(uint64_t site) {
  static std::string place;
  place = mmk::simt::source_place(reinterpret_cast<const void*>(site));
  return place.c_str();
}

#endif
