// Reports faults, and leaves a kernel that has one.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "simt/device.h"
#include "simt/machine.h"

namespace mmk::simt {
namespace {

std::string coordinates(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

// `culprit` names the thread, or says that it is unknown.
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

}  // namespace

// Reports where each group of threads waits.
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

void fail(const char* format, ...) {
  char text[2048];  // no heap: the stack of a faulted thread is never unwound
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (!machine.in_kernel) {
    std::fprintf(stderr, "mmk::simt: device code outside a kernel: %s\n", text);
    std::abort();
  }
  record_fault(current_fiber().index, text);
  suspend();
  std::abort();  // a faulted block is never resumed
}

void block_fault(const std::string& text) {
  record_fault("one of the threads", text);
}

}  // namespace mmk::simt

using mmk::simt::machine;

const char* mmk_simt_last_error() {
  return machine.error.c_str();
}

void mmk_simt_clear_error() {
  machine.error.clear();
}
