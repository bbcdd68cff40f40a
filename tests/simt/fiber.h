// A stack of its own that a CUDA thread runs on, and the switch between two of them.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __x86_64__

namespace simt {

struct Fiber {
  void* stack_pointer = nullptr;

  // the first switch to the fiber enters `entry`, which must never return
  void start(char* stack, size_t bytes, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack + bytes);
    top -= 2;  // keeps the alignment that a call would have
    *top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;  // six registers, whatever they hold
  }
};

extern "C" void simt_switch(void** save, void* load);
// ucontext would make two system calls for each switch
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
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
.size simt_switch, .-simt_switch
)");

inline void switch_fiber(Fiber& from, Fiber& to) {
  simt_switch(&from.stack_pointer, to.stack_pointer);
}

}  // namespace simt

#else
#include <ucontext.h>

namespace simt {

struct Fiber {
  ucontext_t context;

  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

}  // namespace simt
#endif
