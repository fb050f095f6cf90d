// Runs the threads of a block as fibers, each until it waits or ends; deadlocks.
#include <map>

#include "emulator/block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace dalle::emulator {
namespace {

// The launching thread's stack, for AddressSanitizer.
const void* main_stack = nullptr;
[[maybe_unused]] size_t main_stack_bytes = 0;

void begin_switch([[maybe_unused]] Fiber& from, [[maybe_unused]] const Thread* next,
                  [[maybe_unused]] bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake_stack,
                                 next ? next->stack : main_stack,
                                 next ? kStackBytes : main_stack_bytes);
#endif
}

void end_switch([[maybe_unused]] Fiber* self) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self ? self->fake_stack : nullptr, &bottom, &bytes);
  if (self == nullptr && main_stack == nullptr) {  // the first fiber comes from the main stack
    main_stack = bottom;
    main_stack_bytes = bytes;
  }
#endif
}

// Resumes `next`, or the launching thread where it is null.
void go_to(Thread* next, bool for_ever = false) {
  Fiber& from = block.running ? block.running->fiber : block.main;
  block.running = next;
  if (next) threadIdx = next->index;
  begin_switch(from, next, for_ever);
  switch_fiber(from, next ? next->fiber : block.main);
  end_switch(&from);
}

std::string deadlock() {
  std::map<std::string, int> groups;
  for (int i = 0; i < block.num_threads; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.waits) ++groups[std::string(thread.waits_for) + text_of(thread.location)];
  }
  std::string text = "deadlock:";
  for (const auto& [what, count] : groups) {
    text += " " + std::to_string(count) + " threads wait in " + what + ",";
  }
  return text + " " + std::to_string(block.num_threads - block.num_live) + " have exited";
}

void exit_thread() {
  Thread& self = *block.running;
  self.copies.clear();
  --block.num_live;
  block.warps[self.id / kWarpSize].exited |= 1u << self.id % kWarpSize;
  release_waiters_for(self);
}

void thread_main() {
  end_switch(nullptr);
  block.body(block.argument);
  exit_thread();
  Thread* next = next_thread();
  if (next == nullptr && block.num_live) fail(deadlock());
  go_to(next, true);
  __builtin_unreachable();
}

}  // namespace

void make_ready(Thread& thread) {
  thread.waits = false;
  block.warps[thread.id / kWarpSize].ready |= 1u << thread.id % kWarpSize;
}

void wait_for(const char* what, Location location) {
  Thread& self = *block.running;
  self.waits = true;
  self.waits_for = what;
  self.location = location;
  Thread* next = next_thread();
  if (next == nullptr) fail(deadlock());
  go_to(next);
}

void run_threads() {
  ++counts.blocks;
  block.num_live = block.num_threads;
  block.barrier_arrived = block.barrier_value = 0;
  block.running = nullptr;
  for (int w = 0; w < block.num_warps; ++w) {
    Warp& warp = block.warps[w];
    const int count = block.num_threads - w * kWarpSize;
    warp.ready = count >= kWarpSize ? kAllLanes : (1u << count) - 1;
    warp.exited = ~warp.ready;
    warp.priority = block.random ? static_cast<uint32_t>(next_random()) : 0;
    warp.pending = 0;
  }
  for (int i = 0; i < block.num_threads; ++i) {
    Thread& thread = block.threads[i];
    const unsigned x = blockDim.x, y = blockDim.y, id = static_cast<unsigned>(i);
    thread.index = {id % x, id / x % y, id / x / y};
    thread.id = i;
    thread.waits = false;
    thread.groups = 0;
    thread.copies.clear();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(thread.stack, kStackBytes);
#endif
    prepare(thread.fiber, thread.stack, kStackBytes, &thread_main);
  }
  main_stack = nullptr;
  go_to(next_thread());
}

[[noreturn]] void abandon_threads() {
  go_to(nullptr, true);
  __builtin_unreachable();
}

}  // namespace dalle::emulator
