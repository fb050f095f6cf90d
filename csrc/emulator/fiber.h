// Switching between stacks: a few lines of assembly on x86-64, ucontext elsewhere or where
// DALLE_EMULATOR_UCONTEXT is defined (several times slower: it saves the signal mask). No torch
// here.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(DALLE_EMULATOR_UCONTEXT)
#define DALLE_EMULATOR_ASSEMBLY 1
#else
#define DALLE_EMULATOR_ASSEMBLY 0
#include <ucontext.h>
#endif

namespace dalle::emulator {

struct Fiber {
#if DALLE_EMULATOR_ASSEMBLY
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Makes `fiber` start in entry(), which must not return, on this stack.
void prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)());

// Saves the running fiber in `from` and resumes `to`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace dalle::emulator
