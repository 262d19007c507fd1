// What the runtime's own files share with each other.
#pragma once

#include <cstddef>
#include <string>

#include "simt/runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define MMK_SIMT_ASAN 1
#endif

namespace mmk::simt {

// A fault that no one thread is known to have made.
void block_fault(const std::string& text);

// Index of the running thread in its block.
unsigned thread_index();

// The name of a function of this program or library, demangled, or its address.
std::string kernel_name(const void* function);

// File and line of an instruction, and of the calls that were inlined to it.
std::string source_place(const void* instruction);

// shared_memory.cpp. A block's memory is poisoned where it is first used; end_block faults on broken guard
// bytes.
void begin_grid_shared(size_t dynamic_bytes);
void begin_block_shared();
void end_block_shared();
void end_grid_shared();
bool is_shared(const void* address);
// "shared array name, byte 12".
std::string shared_place(const void* address);

// async_copy.cpp. Copies that a thread has issued and not waited for.
void begin_block_copies(unsigned threads);
size_t pending_copies(unsigned thread);

}  // namespace mmk::simt
