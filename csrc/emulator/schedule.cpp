// Which thread runs next: in order, or (DALLE_EMULATOR_SEED) at random.
#include <bit>

#include "emulator/block.h"

namespace dalle::emulator {
namespace {

// The warp of the running thread runs while it can: few switches between barriers, and one warp
// runs far ahead of the others.
Thread* next_in_order() {
  const int first = block.running ? block.running->id / kWarpSize : 0;
  const int lane = block.running ? block.running->id % kWarpSize : 0;
  for (int i = 0; i < block.num_warps; ++i) {
    const int w = (first + i) % block.num_warps;
    const uint32_t ready = block.warps[w].ready;
    if (ready == 0) continue;
    const uint32_t behind = i == 0 ? ready & ~((uint32_t{2} << lane) - 1) : 0;
    return &block.threads[w * kWarpSize + std::countr_zero(behind ? behind : ready)];
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
  const int first = static_cast<int>(next_random() % kWarpSize);
  const int offset = std::countr_zero(std::rotr(block.warps[best].ready, first));
  return &block.threads[best * kWarpSize + (first + offset) % kWarpSize];
}

}  // namespace

// xorshift64*
uint64_t next_random() {
  block.random ^= block.random >> 12;
  block.random ^= block.random << 25;
  block.random ^= block.random >> 27;
  return (block.random * 0x2545F4914F6CDD1Dull) >> 32;
}

Thread* next_thread() {
  Thread* next = block.random ? next_at_random() : next_in_order();
  if (next) block.warps[next->id / kWarpSize].ready &= ~(1u << next->id % kWarpSize);
  return next;
}

}  // namespace dalle::emulator
