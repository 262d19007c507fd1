// Shared by the files of the runtime.
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

// Records a fault of a block whose thread is unknown.
void block_fault(const std::string& text);

// Index of the running thread in its block.
unsigned thread_index();

// The symbol of a function of this program or library, or its address; and the demangled name.
std::string kernel_symbol(const void* function);
std::string kernel_name(const void* function);

// File and line of an instruction, and of the calls that it was inlined into.
std::string source_place(const void* instruction);

// shared_memory.cpp. The first use in a block poisons an array; end_block_shared faults on changed guard
// bytes.
void begin_grid_shared(size_t dynamic_bytes);
// The dynamic shared memory that the kernel opted in to, and whether it is enough.
size_t allowed_dynamic_shared(const void* function);
void forget_opt_ins();
bool may_use_dynamic_shared(const void* function, size_t bytes);
void begin_block_shared();
void end_block_shared();
void end_grid_shared();
size_t fixed_shared_bytes();  // static, of the blocks so far
bool is_shared(const void* address);
// "shared array name, byte 12".
std::string shared_place(const void* address);

// async_copy.cpp. The copies that a thread issued and did not wait for.
void begin_block_copies(unsigned threads);
size_t pending_copies(unsigned thread);

}  // namespace mmk::simt
