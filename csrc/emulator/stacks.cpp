// The threads of a block, each with its stack, made once.
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#include "emulator/block.h"

namespace dalle::emulator {
namespace {

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

char* stacks = nullptr;
size_t stacks_bytes() { return kMaxThreads * (kStackBytes + page_bytes()); }

}  // namespace

// Stacks with a page without access below each, so that an overflow stops there. Memory comes with
// the first use.
void make_threads() {
  if (stacks) return;
  void* memory = mmap(nullptr, stacks_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
  stacks = static_cast<char*>(memory);
  block.threads.resize(kMaxThreads);
  block.warps.resize(kMaxThreads / kWarpSize);
  char* next = stacks;
  for (Thread& thread : block.threads) {
    mprotect(next, page_bytes(), PROT_NONE);
    thread.stack = next + page_bytes();
    next = thread.stack + kStackBytes;
  }
}

bool in_stacks(const void* at) {
  const char* address = static_cast<const char*>(at);
  return address >= stacks && address < stacks + stacks_bytes();
}

}  // namespace dalle::emulator
