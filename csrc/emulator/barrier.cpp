// Barriers: __syncthreads of a block, the rendezvous of lanes for a collective of their warp.
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

void complete(Collective& collective, int warp) {
  const uint32_t arrived = collective.arrived;
  block.warps[warp].pending &= ~(1u << (&collective - block.warps[warp].collectives));
  collective.finish(collective.arguments, arrived);
  for (uint32_t left = arrived; left; left &= left - 1) {
    Thread& thread = block.threads[warp * kWarpSize + std::countr_zero(left)];
    if (thread.waits) make_ready(thread);
  }
}

// The pending collective of exactly these lanes, or a new one.
Collective& pending_collective(Warp& warp, uint32_t lanes) {
  for (uint32_t left = warp.pending; left; left &= left - 1) {
    Collective& collective = warp.collectives[std::countr_zero(left)];
    if (collective.lanes == lanes) return collective;
  }
  const int slot = std::countr_one(warp.pending);
  warp.pending |= 1u << slot;
  warp.collectives[slot].lanes = lanes;
  warp.collectives[slot].arrived = 0;
  return warp.collectives[slot];
}

}  // namespace

int block_barrier(Vote vote, int predicate, Location location) {
  if (block.barrier_arrived == 0) {
    block.barrier_vote = vote;
    block.barrier_location = location;
  } else if (block.barrier_vote != vote || block.barrier_location.line() != location.line() ||
             std::string(block.barrier_location.file_name()) != location.file_name()) {
    fail("divergent __syncthreads, others of the block wait" + text_of(block.barrier_location),
         location);
  }
  block.barrier_value += predicate != 0;
  block.running->waits = false;
  if (++block.barrier_arrived == block.num_live) {
    release_barrier();
  } else {
    wait_for("__syncthreads", location);
  }
  return block.barrier_result;
}

void rendezvous(const char* what, uint32_t lanes, void* argument, Finish finish,
                Location location) {
  Thread& self = *block.running;
  const int w = self.id / kWarpSize, lane = self.id % kWarpSize;
  Warp& warp = block.warps[w];
  if (!(lanes >> lane & 1)) fail(std::string(what) + " with a mask without the caller", location);
  Collective& collective = pending_collective(warp, lanes);
  if (collective.arrived == 0) {
    collective.what = what;
    collective.finish = finish;
  } else if (collective.what != what || collective.finish != finish) {
    fail(std::string("divergent warp: this lane is in ") + what + ", another of its mask in " +
             collective.what,
         location);
  }
  collective.arguments[lane] = argument;
  collective.arrived |= 1u << lane;
  if (collective.arrived == (lanes & ~warp.exited)) {
    complete(collective, w);
  } else {
    wait_for(what, location);
  }
}

void warp_barrier(uint32_t lanes, Location location) {
  rendezvous(
      "__syncwarp", lanes, nullptr,
      [](void* const*, uint32_t arrived) { race_warp_barrier(arrived); }, location);
}

void release_waiters_for(const Thread& exited) {
  const int w = exited.id / kWarpSize;
  Warp& warp = block.warps[w];
  for (uint32_t left = warp.pending; left; left &= left - 1) {
    Collective& collective = warp.collectives[std::countr_zero(left)];
    if (collective.arrived == (collective.lanes & ~warp.exited)) complete(collective, w);
  }
  if (block.barrier_arrived && block.barrier_arrived == block.num_live) release_barrier();
}

}  // namespace dalle::emulator
