// The race detector: exact happens-before on shared and global memory, byte by byte.
//
// The kernels' objects are compiled with -fsanitize=thread, and libtsan is not linked: the
// compiler's calls land here. __syncthreads and __syncwarp order accesses, shuffles and votes do
// not, blocks of one launch are never ordered, launches always are.
//
// A stamp says when an access was: (epoch, thread, clock). The epoch counts block barriers, and
// goes on counting over blocks and launches, so that old stamps need no clearing; within an epoch
// only lanes of one warp can be ordered, by clocks that __syncwarp joins.
#if defined(DALLE_EMULATOR_RACES)
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstring>
#include <memory>
#include <type_traits>
#include <unordered_map>

#include "emulator/block.h"

namespace dalle::emulator {
namespace {

enum class Kind : uint32_t { kPlain, kAtomic, kPending };  // pending: a cp.async is under way

// Where an access was: the address of an instruction, or a Place with the top bit set.
using Where = uintptr_t;
constexpr Where kIsPlace = ~(~Where{0} >> 1);
Where where_of(Place place) {
  static_assert(sizeof(Place) == sizeof(Where) && std::is_trivially_copyable_v<Place>);
  return std::bit_cast<Where>(place) | kIsPlace;
}

struct Stamp {
  uint32_t epoch = 0;
  uint32_t thread : 10 = 0, clock : 20 = 0, kind : 2 = 0;
  Where where = 0;
};
constexpr uint32_t kMaxClock = (1u << 20) - 1;

// Readers of the latest epoch that has any: one, another lane of its warp, a thread of another
// warp. A writer that is ordered behind all three is ordered behind all readers, unless partial
// warps met in __syncwarp.
struct Cell {
  Stamp write, reads[3];
};

constexpr size_t kPage = 4096, kMaxPages = 2048, kCached = 256;
using Page = std::array<Cell, kPage>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
struct {
  uintptr_t number = 0;
  Page* page = nullptr;
} cached[kCached];

uint32_t epoch = 1, launch_epoch = 1, block_epoch = 1;
uint32_t clocks[kMaxThreads][kLanes];  // [thread][lane of its warp]

Cell& cell_of(uintptr_t at) {
  const uintptr_t number = at / kPage;
  auto& entry = cached[number % kCached];
  if (entry.number != number || entry.page == nullptr) {
    std::unique_ptr<Page>& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    entry = {number, page.get()};
  }
  return (*entry.page)[at % kPage];
}

bool is_live(const Stamp& stamp, bool shared) {
  return stamp.epoch >= (shared ? block_epoch : launch_epoch);
}

// Whether the access of `stamp` happened before what thread `self` does now.
bool is_ordered(const Stamp& stamp, uint32_t self, bool shared) {
  if (!is_live(stamp, shared)) return true;
  if (stamp.epoch < block_epoch) return false;  // another block
  if (stamp.epoch < epoch || stamp.thread == self) return true;
  return stamp.thread / kLanes == self / kLanes &&
         stamp.clock <= clocks[self][stamp.thread % kLanes];
}

// " at file:line"; the line of an instruction by binutils' addr2line.
std::string line_of(Where where) {
  if (where & kIsPlace) return text_of(std::bit_cast<Place>(where & ~kIsPlace));
  Dl_info found;
  if (!dladdr(reinterpret_cast<const void*>(where), &found) || !found.dli_fname) return "";
  const size_t offset = where - reinterpret_cast<Where>(found.dli_fbase) - 1;
  char command[1024], line[1024] = "";
  std::snprintf(command, sizeof(command), "addr2line -e '%s' %#zx 2>/dev/null", found.dli_fname,
                offset);
  if (FILE* pipe = popen(command, "r")) {
    if (!std::fgets(line, sizeof(line), pipe)) line[0] = '\0';
    pclose(pipe);
  }
  const char* name = std::strrchr(line, '/');
  if (!name || name[1] == '?') return "";
  return " at " + std::string(name + 1, std::strcspn(name + 1, " \n"));
}

std::string memory_of(uintptr_t at) {
  const char* place = reinterpret_cast<const char*>(at);
  if (const SharedArray* array = array_around(place, 1)) {
    return "byte " + std::to_string(place - array->begin) + " of " + array->name;
  }
  return "global memory";
}

std::string other_of(const Stamp& stamp) {
  if (stamp.epoch < block_epoch) return " of another block";
  const unsigned id = stamp.thread, x = blockDim.x, y = blockDim.y;
  return " of thread (" + std::to_string(id % x) + ", " + std::to_string(id / x % y) + ", " +
         std::to_string(id / x / y) + ")";
}

[[noreturn]] void report(uintptr_t at, const char* before, const Stamp& stamp, const char* what,
                         Where where) {
  fail("data race on " + memory_of(at) + ": " + what + line_of(where) +
       " is not ordered behind the " + before + other_of(stamp) + line_of(stamp.where));
}

void record(const void* address, size_t bytes, Access access, const char* what, Where where) {
  const bool shared = in_arena(address);
  const uint32_t self = static_cast<uint32_t>(block.running->id);
  const uint32_t clock = clocks[self][self % kLanes];
  const auto kind = access == Access::kAtomic    ? Kind::kAtomic
                    : access == Access::kPending ? Kind::kPending
                                                 : Kind::kPlain;
  const Stamp now = {epoch, self, clock, static_cast<uint32_t>(kind), where};
  if (shared && !array_around(address, bytes)) {
    fail(what + line_of(where) + " is outside of the arrays in shared memory");
  }
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = first; at < first + bytes; ++at) {
    Cell& cell = cell_of(at);
    const Stamp& write = cell.write;
    const bool pending = is_live(write, shared) &&
                         static_cast<Kind>(write.kind) == Kind::kPending &&
                         write.epoch >= block_epoch;
    if (pending && access != Access::kArrival) {
      report(at, "wait for a cp.async", write, what, where);
    }
    const bool both_atomic =
        access == Access::kAtomic && static_cast<Kind>(write.kind) == Kind::kAtomic;
    if (!both_atomic && !is_ordered(write, self, shared)) {
      report(at, "write", write, what, where);
    }
    if (access == Access::kRead) {
      const Stamp& first = cell.reads[0];
      const bool same_warp = first.thread / kLanes == self / kLanes;
      cell.reads[is_ordered(first, self, shared) ? 0 : same_warp ? 1 : 2] = now;
      continue;
    }
    for (Stamp& read : cell.reads) {
      if (!is_ordered(read, self, shared)) report(at, "read", read, what, where);
      read = {};
    }
    cell.write = now;
  }
}

void record_plain(const void* at, size_t bytes, bool writes, const void* instruction) {
  if (block.running == nullptr || in_stacks(at)) return;
  record(at, bytes, writes ? Access::kWrite : Access::kRead, writes ? "a write" : "a read",
         reinterpret_cast<Where>(instruction));
}

}  // namespace

void race_begin_launch() {
  launch_epoch = ++epoch;
  if (pages.size() > kMaxPages) {
    pages.clear();
    for (auto& entry : cached) entry = {};
  }
}

void race_begin_block() {
  block_epoch = ++epoch;
  std::memset(clocks, 0, sizeof(clocks));
  for (int i = 0; i < kMaxThreads; ++i) clocks[i][i % kLanes] = 1;
}

void race_block_barrier() { ++epoch; }

void race_warp_barrier(uint32_t lanes) {
  const int first = block.running->id / kLanes * kLanes;
  uint32_t joined[kLanes] = {};
  for (uint32_t left = lanes; left; left &= left - 1) {
    const uint32_t* of_lane = clocks[first + std::countr_zero(left)];
    for (int i = 0; i < kLanes; ++i) joined[i] = std::max(joined[i], of_lane[i]);
  }
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    std::memcpy(clocks[first + lane], joined, sizeof(joined));
    if (++clocks[first + lane][lane] > kMaxClock) fail("too many __syncwarp for the race detector");
  }
}

void race_access(const void* at, size_t bytes, Access access, const char* what, Place place) {
  record(at, bytes, access, what, where_of(place));
}

}  // namespace dalle::emulator

// -- what -fsanitize=thread calls ----------------------------------------------------------------
using dalle::emulator::record_plain;
#define DALLE_HOOK __attribute__((visibility("hidden")))
#define DALLE_HOOKS(bytes)                                       \
  DALLE_HOOK void __tsan_read##bytes(void* at) {                 \
    record_plain(at, bytes, false, __builtin_return_address(0)); \
  }                                                              \
  DALLE_HOOK void __tsan_write##bytes(void* at) {                \
    record_plain(at, bytes, true, __builtin_return_address(0));  \
  }                                                              \
  DALLE_HOOK void __tsan_unaligned_read##bytes(void* at) {       \
    record_plain(at, bytes, false, __builtin_return_address(0)); \
  }                                                              \
  DALLE_HOOK void __tsan_unaligned_write##bytes(void* at) {      \
    record_plain(at, bytes, true, __builtin_return_address(0));  \
  }
// Atomics of the host code around the kernels, which one thread runs.
#define DALLE_ATOMIC_HOOKS(bits, type)                                                            \
  DALLE_HOOK type __tsan_atomic##bits##_load(const volatile type* at, int) {                      \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                               \
  DALLE_HOOK void __tsan_atomic##bits##_store(volatile type* at, type x, int) {                   \
    __atomic_store_n(at, x, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                               \
  DALLE_HOOK type __tsan_atomic##bits##_exchange(volatile type* at, type x, int) {                \
    return __atomic_exchange_n(at, x, __ATOMIC_SEQ_CST);                                          \
  }                                                                                               \
  DALLE_HOOK type __tsan_atomic##bits##_fetch_add(volatile type* at, type x, int) {               \
    return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);                                           \
  }                                                                                               \
  DALLE_HOOK type __tsan_atomic##bits##_fetch_sub(volatile type* at, type x, int) {               \
    return __atomic_fetch_sub(at, x, __ATOMIC_SEQ_CST);                                           \
  }                                                                                               \
  DALLE_HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile type* at, type* expected, \
                                                               type x, int, int) {                \
    return __atomic_compare_exchange_n(at, expected, x, false, __ATOMIC_SEQ_CST,                  \
                                       __ATOMIC_SEQ_CST);                                         \
  }

extern "C" {
DALLE_HOOKS(1)
DALLE_HOOKS(2)
DALLE_HOOKS(4)
DALLE_HOOKS(8)
DALLE_HOOKS(16)
DALLE_HOOK void __tsan_read_range(void* at, size_t bytes) {
  record_plain(at, bytes, false, __builtin_return_address(0));
}
DALLE_HOOK void __tsan_write_range(void* at, size_t bytes) {
  record_plain(at, bytes, true, __builtin_return_address(0));
}
DALLE_HOOK void __tsan_init() {}
DALLE_HOOK void __tsan_func_entry(void*) {}
DALLE_HOOK void __tsan_func_exit() {}
DALLE_HOOK void __tsan_vptr_update(void**, void*) {}
DALLE_HOOK void __tsan_vptr_read(void**) {}
DALLE_ATOMIC_HOOKS(8, uint8_t)
DALLE_ATOMIC_HOOKS(32, uint32_t)
DALLE_ATOMIC_HOOKS(64, uint64_t)
}
#endif
