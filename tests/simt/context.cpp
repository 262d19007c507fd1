#include "simt/context.h"

#include <cstdint>
#include <cstring>

namespace mmk::simt {

#ifdef MMK_SIMT_NATIVE_SWITCH

// void mmk_simt_switch(void** save_stack_pointer, void* load_stack_pointer): pushes the System V callee-saved
// registers to the old stack and pops them from the new one. Kernels do not change MXCSR and the x87 control
// word, so they are not saved.
asm(R"(
.text
.p2align 4
.hidden mmk_simt_switch
.globl mmk_simt_switch
.type mmk_simt_switch, @function
mmk_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mmk_simt_switch, .-mmk_simt_switch
)");
extern "C" void mmk_simt_switch(void** save_stack_pointer, void* load_stack_pointer);

void prepare(Context& context, void* stack, size_t bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  // entry starts as if called: its return address (null, which ends backtraces) is 8 bytes below a multiple
  // of 16.
  auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
  void** frame = top - 2 - kSavedRegisters;
  std::memset(frame, 0, (2 + kSavedRegisters) * sizeof(void*));
  frame[kSavedRegisters] = reinterpret_cast<void*>(entry);
  context.stack_pointer = frame;
}

void switch_context(Context& from, Context& to) {
  mmk_simt_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare(Context& context, void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to) {
  swapcontext(&from.state, &to.state);
}

#endif

}  // namespace mmk::simt
