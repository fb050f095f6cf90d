// The race detector's parts: stamps of accesses, the shadow memory that keeps them, the report.
// Only in the build that looks for races. No torch here.
#pragma once

#include <bit>
#include <type_traits>

#include "emulator/block.h"

namespace dalle::emulator {

// The line of an access: the address of an instruction, or a Location with the top bit set.
using Site = uintptr_t;
constexpr Site kIsLocation = ~(~Site{0} >> 1);
inline Site site_of(Location location) {
  static_assert(sizeof(Location) == sizeof(Site) && std::is_trivially_copyable_v<Location>);
  return std::bit_cast<Site>(location) | kIsLocation;
}

enum class Kind : uint32_t { kPlain, kAtomic, kPending };  // pending: the target of a cp.async

// When an access was: (epoch, thread, clock). The epoch counts block barriers, and goes on counting
// over blocks and launches, so that old stamps need no clearing; within an epoch only lanes of one
// warp can be ordered, by clocks that __syncwarp joins.
struct Stamp {
  uint32_t epoch = 0;
  uint32_t thread : 10 = 0, clock : 20 = 0, kind : 2 = 0;
  Site site = 0;
};
constexpr uint32_t kMaxClock = (1u << 20) - 1;

// Readers of the latest epoch that has any: one, another lane of its warp, a thread of another
// warp. A writer that is ordered behind all three is ordered behind all readers, unless partial
// warps met in __syncwarp.
struct Cell {
  Stamp write, reads[3];
};

// race_shadow.cpp: a cell for each byte
Cell& cell_of(uintptr_t at);
void limit_cells();  // between launches, which are ordered: forgets all where there are many

// race.cpp
bool is_of_this_block(const Stamp& stamp);
void record_plain(const void* at, size_t bytes, bool writes, const void* instruction);

// race_report.cpp
std::string line_of(Site site);  // " at file:line"
[[noreturn]] void report_race(uintptr_t at, const char* before, const Stamp& stamp,
                              const char* what, Site site);

}  // namespace dalle::emulator
