// Switches stacks: in assembly on x86-64 (a few ns; ucontext takes 30 times as long, for its system calls),
// with ucontext elsewhere.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(MMK_SIMT_UCONTEXT)
#define MMK_SIMT_NATIVE_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace mmk::simt {

struct Context {
#ifdef MMK_SIMT_NATIVE_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
};

// The first switch to `context` will run entry() on the given stack; entry must not return.
void prepare(Context& context, void* stack, size_t bytes, void (*entry)());
// Saves the running context in `from` and continues `to`.
void switch_context(Context& from, Context& to);

}  // namespace mmk::simt
