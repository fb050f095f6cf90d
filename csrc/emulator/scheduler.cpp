// Runs the threads of a block as fibers, in order or (DALLE_EMULATOR_SEED) at random; barriers,
// warp rendezvous, deadlocks.
#include <bit>
#include <map>

#include "emulator/block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace dalle::emulator {

Block block;
Counts counts;

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

// Goes on with `next`, or with the launching thread where it is null.
void go_to(Thread* next, bool for_ever = false) {
  Fiber& from = block.running ? block.running->fiber : block.main;
  block.running = next;
  if (next) threadIdx = next->index;
  begin_switch(from, next, for_ever);
  switch_fiber(from, next ? next->fiber : block.main);
  end_switch(&from);
}

// The warp of the running thread goes on while it can: few switches between barriers, and one warp
// runs far ahead of the others.
Thread* next_in_order() {
  const int first = block.running ? block.running->id / kLanes : 0;
  const int lane = block.running ? block.running->id % kLanes : 0;
  for (int i = 0; i < block.num_warps; ++i) {
    const int w = (first + i) % block.num_warps;
    const uint32_t ready = block.warps[w].ready;
    if (ready == 0) continue;
    const uint32_t behind = i == 0 ? ready & ~((uint32_t{2} << lane) - 1) : 0;
    return &block.threads[w * kLanes + std::countr_zero(behind ? behind : ready)];
  }
  return nullptr;
}

// Priorities of warps, redrawn now and then, so that each warp is sometimes far ahead and sometimes
// far behind (uniform choices keep all of them abreast); lanes of a warp uniformly.
Thread* next_at_random() {
  if (next_random() % 128 == 0) {
    block.warps[next_random() % block.num_warps].priority = static_cast<uint32_t>(next_random());
  }
  int best = -1;
  for (int w = 0; w < block.num_warps; ++w) {
    if (block.warps[w].ready == 0) continue;
    if (best < 0 || block.warps[w].priority > block.warps[best].priority) best = w;
  }
  if (best < 0) return nullptr;
  const int turn = static_cast<int>(next_random() % kLanes);
  const int place = std::countr_zero(std::rotr(block.warps[best].ready, turn));
  return &block.threads[best * kLanes + (place + turn) % kLanes];
}

Thread* next_thread() {
  Thread* next = block.random ? next_at_random() : next_in_order();
  if (next) block.warps[next->id / kLanes].ready &= ~(1u << next->id % kLanes);
  return next;
}

std::string deadlock() {
  std::map<std::string, int> groups;
  for (int i = 0; i < block.num_threads; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.waits) ++groups[std::string(thread.waits_for) + text_of(thread.place)];
  }
  std::string text = "deadlock:";
  for (const auto& [what, count] : groups) {
    text += " " + std::to_string(count) + " threads wait in " + what + ",";
  }
  return text + " " + std::to_string(block.num_threads - block.num_live) + " have exited";
}

void release_barrier() {
  const int count = block.barrier_value, arrived = block.barrier_arrived;
  const Vote vote = block.barrier_vote;
  block.barrier_result = vote == Vote::kAny   ? count > 0
                         : vote == Vote::kAll ? count == arrived
                                              : count;
  block.barrier_arrived = block.barrier_value = 0;
  ++counts.barriers;
  race_block_barrier();
  for (int i = 0; i < block.num_threads; ++i) {
    if (block.threads[i].waits) make_ready(block.threads[i]);
  }
}

void finish_meeting(Meeting& meeting, int warp) {
  const uint32_t came = meeting.arrived;
  block.warps[warp].open &= ~(1u << (&meeting - block.warps[warp].meetings));
  meeting.finish(meeting.arguments, came);
  for (uint32_t left = came; left; left &= left - 1) {
    Thread& thread = block.threads[warp * kLanes + std::countr_zero(left)];
    if (thread.waits) make_ready(thread);
  }
}

// Those who wait for this thread alone need not wait for it any more.
void exit_thread() {
  Thread& self = *block.running;
  self.exited = true;
  self.copies.clear();
  --block.num_live;
  const int w = self.id / kLanes;
  Warp& warp = block.warps[w];
  warp.exited |= 1u << self.id % kLanes;
  for (uint32_t left = warp.open; left; left &= left - 1) {
    Meeting& meeting = warp.meetings[std::countr_zero(left)];
    if (meeting.arrived == (meeting.lanes & ~warp.exited)) finish_meeting(meeting, w);
  }
  if (block.barrier_arrived && block.barrier_arrived == block.num_live) release_barrier();
}

// The open meeting of exactly these lanes, or a new one.
Meeting& meeting_of(Warp& warp, uint32_t lanes) {
  for (uint32_t left = warp.open; left; left &= left - 1) {
    Meeting& meeting = warp.meetings[std::countr_zero(left)];
    if (meeting.lanes == lanes) return meeting;
  }
  const int place = std::countr_one(warp.open);
  warp.open |= 1u << place;
  warp.meetings[place].lanes = lanes;
  warp.meetings[place].arrived = 0;
  return warp.meetings[place];
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

// xorshift64*
uint64_t next_random() {
  block.random ^= block.random >> 12;
  block.random ^= block.random << 25;
  block.random ^= block.random >> 27;
  return (block.random * 0x2545F4914F6CDD1Dull) >> 32;
}

void make_ready(Thread& thread) {
  thread.waits = false;
  block.warps[thread.id / kLanes].ready |= 1u << thread.id % kLanes;
}

void wait_for(const char* what, Place place) {
  Thread& self = *block.running;
  self.waits = true;
  self.waits_for = what;
  self.place = place;
  Thread* next = next_thread();
  if (next == nullptr) fail(deadlock());
  go_to(next);
}

int block_barrier(Vote vote, int predicate, Place place) {
  if (block.barrier_arrived == 0) {
    block.barrier_vote = vote;
    block.barrier_place = place;
  } else if (block.barrier_vote != vote || block.barrier_place.line() != place.line() ||
             std::string(block.barrier_place.file_name()) != place.file_name()) {
    fail("divergent __syncthreads, others of the block wait" + text_of(block.barrier_place), place);
  }
  block.barrier_value += predicate != 0;
  block.running->waits = false;
  if (++block.barrier_arrived == block.num_live) {
    release_barrier();
  } else {
    wait_for("__syncthreads", place);
  }
  return block.barrier_result;
}

void meet(const char* what, uint32_t lanes, void* argument, Finish finish, Place place) {
  Thread& self = *block.running;
  const int w = self.id / kLanes, lane = self.id % kLanes;
  Warp& warp = block.warps[w];
  if (!(lanes >> lane & 1)) fail(std::string(what) + " with a mask without the caller", place);
  Meeting& meeting = meeting_of(warp, lanes);
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.finish = finish;
  } else if (meeting.what != what || meeting.finish != finish) {
    fail(std::string("divergent warp: this lane is in ") + what + ", another of its mask in " +
             meeting.what,
         place);
  }
  meeting.arguments[lane] = argument;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == (lanes & ~warp.exited)) {
    finish_meeting(meeting, w);
  } else {
    wait_for(what, place);
  }
}

void warp_barrier(uint32_t lanes, Place place) {
  meet(
      "__syncwarp", lanes, nullptr, [](void* const*, uint32_t came) { race_warp_barrier(came); },
      place);
}

// Every thread from the kernel's first line to its end, or to the first failure.
void run_threads() {
  ++counts.blocks;
  block.num_live = block.num_threads;
  block.barrier_arrived = block.barrier_value = 0;
  block.running = nullptr;
  for (int w = 0; w < block.num_warps; ++w) {
    Warp& warp = block.warps[w];
    const int count = block.num_threads - w * kLanes;
    warp.ready = count >= kLanes ? kAllLanes : (1u << count) - 1;
    warp.exited = ~warp.ready;
    warp.priority = block.random ? static_cast<uint32_t>(next_random()) : 0;
    warp.open = 0;
  }
  for (int i = 0; i < block.num_threads; ++i) {
    Thread& thread = block.threads[i];
    const unsigned x = blockDim.x, y = blockDim.y, id = static_cast<unsigned>(i);
    thread.index = {id % x, id / x % y, id / x / y};
    thread.id = i;
    thread.waits = thread.exited = false;
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

// Only from a thread of the kernel: back to run_threads()'s caller.
[[noreturn]] void abandon_threads() {
  go_to(nullptr, true);
  __builtin_unreachable();
}

}  // namespace dalle::emulator

extern "C" __attribute__((visibility("default"))) const void* dalle_emulator_counts() {
  return &dalle::emulator::counts;
}
