// The race detector's rules: exact happens-before on shared and global memory, byte by byte.
// __syncthreads and __syncwarp order accesses, shuffles and votes do not, blocks of one launch are
// never ordered, launches always are.
#include "emulator/race.h"

#include <algorithm>
#include <cstring>

namespace dalle::emulator {
namespace {

uint32_t epoch = 1, launch_epoch = 1, block_epoch = 1;
uint32_t clocks[kMaxThreads][kWarpSize];  // [thread][lane of its warp]

bool is_live(const Stamp& stamp, bool shared) {
  return stamp.epoch >= (shared ? block_epoch : launch_epoch);
}

// Whether the access of `stamp` happened before what thread `self` does now.
bool is_ordered(const Stamp& stamp, uint32_t self, bool shared) {
  if (!is_live(stamp, shared)) return true;
  if (!is_of_this_block(stamp)) return false;
  if (stamp.epoch < epoch || stamp.thread == self) return true;
  return stamp.thread / kWarpSize == self / kWarpSize &&
         stamp.clock <= clocks[self][stamp.thread % kWarpSize];
}

void record(const void* address, size_t bytes, Access access, const char* what, Site site) {
  const bool shared = in_arena(address);
  const uint32_t self = static_cast<uint32_t>(block.running->id);
  const uint32_t clock = clocks[self][self % kWarpSize];
  const auto kind = access == Access::kAtomic    ? Kind::kAtomic
                    : access == Access::kPending ? Kind::kPending
                                                 : Kind::kPlain;
  const Stamp now = {epoch, self, clock, static_cast<uint32_t>(kind), site};
  if (shared && !array_containing(address, bytes)) {
    fail(what + line_of(site) + " is outside of the arrays in shared memory");
  }
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = first; at < first + bytes; ++at) {
    Cell& cell = cell_of(at);
    const Stamp& write = cell.write;
    const bool pending = is_live(write, shared) &&
                         static_cast<Kind>(write.kind) == Kind::kPending && is_of_this_block(write);
    if (pending && access != Access::kArrival) {
      report_race(at, "wait for a cp.async", write, what, site);
    }
    const bool both_atomic =
        access == Access::kAtomic && static_cast<Kind>(write.kind) == Kind::kAtomic;
    if (!both_atomic && !is_ordered(write, self, shared)) {
      report_race(at, "write", write, what, site);
    }
    if (access == Access::kRead) {
      const Stamp& first = cell.reads[0];
      const bool same_warp = first.thread / kWarpSize == self / kWarpSize;
      cell.reads[is_ordered(first, self, shared) ? 0 : same_warp ? 1 : 2] = now;
      continue;
    }
    for (Stamp& read : cell.reads) {
      if (!is_ordered(read, self, shared)) report_race(at, "read", read, what, site);
      read = {};
    }
    cell.write = now;
  }
}

}  // namespace

bool is_of_this_block(const Stamp& stamp) { return stamp.epoch >= block_epoch; }

void record_plain(const void* at, size_t bytes, bool writes, const void* instruction) {
  if (block.running == nullptr || in_stacks(at)) return;
  record(at, bytes, writes ? Access::kWrite : Access::kRead, writes ? "a write" : "a read",
         reinterpret_cast<Site>(instruction));
}

void race_begin_launch() {
  launch_epoch = ++epoch;
  limit_cells();
}

void race_begin_block() {
  block_epoch = ++epoch;
  std::memset(clocks, 0, sizeof(clocks));
  for (int i = 0; i < kMaxThreads; ++i) clocks[i][i % kWarpSize] = 1;
}

void race_block_barrier() { ++epoch; }

void race_warp_barrier(uint32_t lanes) {
  const int first = block.running->id / kWarpSize * kWarpSize;
  uint32_t joined[kWarpSize] = {};
  for (uint32_t left = lanes; left; left &= left - 1) {
    const uint32_t* of_lane = clocks[first + std::countr_zero(left)];
    for (int i = 0; i < kWarpSize; ++i) joined[i] = std::max(joined[i], of_lane[i]);
  }
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    std::memcpy(clocks[first + lane], joined, sizeof(joined));
    if (++clocks[first + lane][lane] > kMaxClock) fail("too many __syncwarp for the race detector");
  }
}

void race_access(const void* at, size_t bytes, Access access, const char* what, Location location) {
  record(at, bytes, access, what, site_of(location));
}

}  // namespace dalle::emulator
