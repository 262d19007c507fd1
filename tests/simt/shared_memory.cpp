// The shared memory of the running block: one array for each MMK_SHARED and one for the dynamic part, each
// between guard bytes.
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt/internal.h"
#include "simt/machine.h"
#include "simt/traffic.h"

namespace mmk::simt {
namespace {

constexpr size_t kGuardBytes = 128;  // a multiple of the arrays' alignment
constexpr unsigned char kGuard = 0x5a;
constexpr unsigned char kPoison = 0xff;
const char kDynamicSite = 0;

struct Array {
  const void* site;
  std::string name;
  size_t bytes;
  unsigned char* memory;  // guard, data, guard
  bool used;              // by this block

  unsigned char* data() const { return memory + kGuardBytes; }
};
std::vector<Array> arrays;
std::unordered_map<const void*, size_t> opt_ins;  // kernel -> bytes of dynamic shared memory

void set_guards_readable([[maybe_unused]] const Array& array, [[maybe_unused]] bool readable) {
#ifdef MMK_SIMT_ASAN
  const auto change = readable ? __asan_unpoison_memory_region : __asan_poison_memory_region;
  change(array.memory, kGuardBytes);
  change(array.data() + array.bytes, kGuardBytes);
#endif
}

Array& new_array(const void* site, const char* name, size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kGuardBytes, bytes + 2 * kGuardBytes) != 0) std::abort();
  std::memset(memory, kGuard, bytes + 2 * kGuardBytes);
  arrays.push_back({site, name, bytes, static_cast<unsigned char*>(memory), false});
  set_guards_readable(arrays.back(), false);
  return arrays.back();
}

Array& find_array(const void* site, const char* name, size_t bytes) {
  for (Array& array : arrays) {
    if (array.site == site) return array;
  }
  return new_array(site, name, bytes);
}

void require_capacity() {
  const size_t fixed = fixed_shared_bytes();
  size_t dynamic = 0;
  for (const Array& array : arrays) dynamic += array.site == &kDynamicSite ? array.bytes : 0;
  if (fixed > kMaxStaticSharedBytes)
    fail("uses %zu bytes of static shared memory; the limit is 48 KB", fixed);
  const auto limit = static_cast<size_t>(current_device().shared_per_block);
  if (fixed + dynamic > limit) {
    fail("uses %zu bytes of static and %zu of dynamic shared memory; the device has %zu", fixed, dynamic,
         limit);
  }
  if (fixed + dynamic > kMaxSharedBytesWithoutOptIn &&
      !may_use_dynamic_shared(machine.kernel.function, dynamic)) {
    fail("uses %zu bytes of static and %zu of dynamic shared memory; over 48 KB a launch needs the opt-in",
         fixed, dynamic);
  }
}

bool guards_intact(const Array& array) {
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (array.memory[i] != kGuard || array.data()[array.bytes + i] != kGuard) return false;
  }
  return true;
}

}  // namespace

void allow_dynamic_shared(const void* function, size_t bytes) {
  opt_ins[function] = bytes;
}

size_t allowed_dynamic_shared(const void* function) {
  const auto found = opt_ins.find(function);
  return found == opt_ins.end() ? 0 : found->second;
}

void forget_opt_ins() {
  opt_ins.clear();
}

bool may_use_dynamic_shared(const void* function, size_t bytes) {
  return bytes <= allowed_dynamic_shared(function);
}

void begin_grid_shared(size_t dynamic_bytes) {
  if (dynamic_bytes > 0) new_array(&kDynamicSite, "dynamic shared memory", dynamic_bytes);
}

void begin_block_shared() {
  for (Array& array : arrays) {
    array.used = array.site == &kDynamicSite;
    if (array.used) std::memset(array.data(), kPoison, array.bytes);
  }
}

void end_block_shared() {
  for (const Array& array : arrays) {
    set_guards_readable(array, true);
    if (!guards_intact(array)) block_fault("wrote outside the bounds of shared array " + array.name);
    set_guards_readable(array, false);
  }
}

void end_grid_shared() {
  for (const Array& array : arrays) {
    set_guards_readable(array, true);
    std::free(array.memory);
  }
  arrays.clear();
}

size_t fixed_shared_bytes() {
  size_t bytes = 0;
  for (const Array& array : arrays) bytes += array.site == &kDynamicSite ? 0 : array.bytes;
  return bytes;
}

void* static_shared(const void* site, const char* name, size_t bytes) {
  Array& array = find_array(site, name, bytes);
  if (!array.used) {
    array.used = true;
    std::memset(array.data(), kPoison, array.bytes);
    require_capacity();
  }
  return array.data();
}

void* dynamic_shared() {
  if (arrays.empty() || arrays.front().site != &kDynamicSite)
    fail("uses dynamic shared memory, but was launched with 0 bytes");
  return arrays.front().data();
}

void require_shared(const void* address, size_t bytes, const char* what) {
  const auto* first = static_cast<const unsigned char*>(address);
  for (const Array& array : arrays) {
    if (first >= array.data() && first + bytes <= array.data() + array.bytes) return;
  }
  fail("%s: %zu bytes at %p are not in the shared memory of the block", what, bytes, address);
}

namespace {

const Array* array_of(const void* address) {
  const auto* byte = static_cast<const unsigned char*>(address);
  for (const Array& array : arrays) {
    if (byte >= array.data() && byte < array.data() + array.bytes) return &array;
  }
  return nullptr;
}

}  // namespace

bool is_shared(const void* address) {
  return array_of(address) != nullptr;
}

std::string shared_place(const void* address) {
  const Array* array = array_of(address);
  if (array == nullptr) return "no shared memory";
  const auto byte = static_cast<const unsigned char*>(address) - array->data();
  return (array->site == &kDynamicSite ? "" : "shared array ") + array->name + ", byte " +
         std::to_string(byte);
}

void* aligned_access(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail("misaligned access of %zu bytes at %p", alignment, address);
  }
  expect_vector(address, alignment);
  return const_cast<void*>(address);
}

}  // namespace mmk::simt
