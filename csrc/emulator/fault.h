// How a launch fails: the line that says so, and the faults of a kernel (a bad address, a stack
// that overflows) turned into one. No torch here.
#pragma once

#include <setjmp.h>
#include <signal.h>

#include "emulator/api.h"

namespace dalle::emulator {

extern sigjmp_buf escape;  // out of a signal handler, into run_block()

uint64_t seed();  // DALLE_EMULATOR_SEED, 0 for none

// Turns SIGSEGV and SIGBUS of a kernel into a failure while it lives. Under AddressSanitizer, which
// says more about a bad address and ends the process, it names the kernel before that.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  struct sigaction segv_before_ = {}, bus_before_ = {};
  stack_t stack_before_ = {};
};

}  // namespace dalle::emulator
