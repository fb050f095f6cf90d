// Where threads wait for others: __syncthreads of a block, the rendezvous of a warp's lanes.
#include <bit>

#include "emulator/block.h"

namespace dalle::emulator {
namespace {

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
    Thread& thread = block.threads[warp * kWarpSize + std::countr_zero(left)];
    if (thread.waits) make_ready(thread);
  }
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

}  // namespace

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
  const int w = self.id / kWarpSize, lane = self.id % kWarpSize;
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

void release_waiters_for(const Thread& exited) {
  const int w = exited.id / kWarpSize;
  Warp& warp = block.warps[w];
  for (uint32_t left = warp.open; left; left &= left - 1) {
    Meeting& meeting = warp.meetings[std::countr_zero(left)];
    if (meeting.arrived == (meeting.lanes & ~warp.exited)) finish_meeting(meeting, w);
  }
  if (block.barrier_arrived && block.barrier_arrived == block.num_live) release_barrier();
}

}  // namespace dalle::emulator
