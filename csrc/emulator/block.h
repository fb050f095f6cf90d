// The state of the block that runs, for the emulator's sources. One block at a time, one thread
// of it at a time, so none of this is atomic. No torch here.
#pragma once

#include <string>
#include <vector>

#include "emulator/api.h"
#include "emulator/fiber.h"

namespace dalle::emulator {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kMaxStaticShared = size_t{48} << 10;  // what ptxas accepts

struct Copy {  // a pending cp.async
  char* to;
  const char* from;
  int bytes, valid_bytes;
  int64_t group;
  Location location;
};

struct Thread {
  Fiber fiber;
  char* stack = nullptr;
  uint3 index = {};
  int id = 0;
  bool waits = false;
  const char* waits_for = "";
  Location location;
  int64_t groups = 0;  // of cp.async, committed
  std::vector<Copy> copies;
};

// A collective that some lanes of its mask have reached. `arguments` point into their stacks.
struct Collective {
  uint32_t lanes = 0, arrived = 0;
  const char* what = nullptr;
  void (*finish)(void* const* arguments, uint32_t lanes) = nullptr;
  void* arguments[kWarpSize];
};

struct Warp {
  uint32_t ready = 0, exited = 0, pending = 0;  // masks of lanes, lanes, collectives
  uint32_t priority = 0;                        // of the random schedule
  Collective collectives[kWarpSize];            // enough: a lane waits in each pending one
};

struct SharedArray {
  const void* declaration;
  const char* name;
  char* begin;
  size_t bytes;
};

struct Block {
  const void* kernel = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  int num_threads = 0, num_live = 0, num_warps = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* running = nullptr;
  Fiber main;

  int barrier_arrived = 0, barrier_value = 0, barrier_result = 0;
  Vote barrier_vote = Vote::kNone;
  Location barrier_location;

  char* arena = nullptr;
  size_t arena_used = 0;
  std::vector<SharedArray> arrays;  // the dynamic one first
  size_t shared_bytes = 0, max_shared_bytes = 0;

  uint64_t random = 0;  // state of the random schedule; 0 for the ordered one
  std::string failure;
};
extern Block block;

// What was run since the library was loaded; tests read it through dalle_emulator_counts.
struct Counts {
  uint64_t blocks, barriers;
  uint64_t mma;  // one a warp
  uint64_t ldmatrix,
      conflicts;          // 8 x 8 matrices; bank conflicts of their rows
  uint64_t copied_bytes;  // by cp.async, zeros not counted
};
extern Counts counts;

constexpr unsigned char kUninitialised = 0xff;  // NaN as half, bfloat16, tf32 and float

// fault.cpp
// Ends the launch with one line that names kernel, block and thread; does not return.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const std::string& what, Location location);
std::string text_of(Location location);

// stacks.cpp
void make_threads();
bool in_stacks(const void* at);

// threads.cpp
void run_threads();                   // from the kernel's first line to its end or first failure
[[noreturn]] void abandon_threads();  // from a thread of the kernel, to run_threads()'s caller
void make_ready(Thread& thread);
void wait_for(const char* what, Location location);  // until make_ready

// schedule.cpp
Thread* next_thread();  // null where none is ready
uint64_t next_random();

// barrier.cpp
void release_waiters_for(const Thread& exited);  // for it alone
// The lanes of the running thread's warp that are set in `lanes` wait here; the last one runs
// finish(arguments, lanes that arrived): those that have not exited.
using Finish = void (*)(void* const* arguments, uint32_t lanes);
void rendezvous(const char* what, uint32_t lanes, void* argument, Finish finish, Location location);

// warp.cpp
// The .sync.aligned instructions are undefined unless all 32 lanes run them.
void require_warp(const char* what, uint32_t lanes);

// shared.cpp
void open_arena(size_t dynamic_bytes);
void check_red_zones();
bool in_arena(const void* at);
const SharedArray* array_containing(const void* at, size_t bytes);
const void* first_poisoned(const void* at, size_t bytes);  // to AddressSanitizer; else null

// race.cpp, nothing outside the build that looks for races
enum class Access : int { kRead, kWrite, kAtomic, kPending, kArrival };  // the last two of cp.async
#if defined(DALLE_EMULATOR_RACES)
void race_begin_launch();
void race_begin_block();
void race_block_barrier();
void race_warp_barrier(uint32_t lanes);
void race_access(const void* at, size_t bytes, Access access, const char* what, Location location);
#else
inline void race_begin_launch() {}
inline void race_begin_block() {}
inline void race_block_barrier() {}
inline void race_warp_barrier(uint32_t) {}
inline void race_access(const void*, size_t, Access, const char*, Location) {}
#endif

}  // namespace dalle::emulator
