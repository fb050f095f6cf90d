#include "emulator/fiber.h"

#include <cstdint>

namespace dalle::emulator {

#if DALLE_EMULATOR_ASSEMBLY

// The six registers that a callee keeps (System V ABI) go on the old stack and come from the new
// one; `ret` takes the address behind them.
extern "C" void dalle_emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden dalle_emulator_switch
.globl dalle_emulator_switch
.type dalle_emulator_switch, @function
dalle_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size dalle_emulator_switch, .-dalle_emulator_switch
)");

void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSaved = 6;
  void** top =
      reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // no caller; makes the stack pointer 8 modulo 16 in entry(), as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSaved; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.fake_stack = nullptr;
}

void switch_fiber(Fiber& from, Fiber& to) {
  dalle_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
  fiber.fake_stack = nullptr;
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace dalle::emulator
