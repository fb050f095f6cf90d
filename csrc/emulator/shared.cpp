// Shared memory: the arrays of a block in one arena with red zones between them.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>

#include "emulator/block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dalle::emulator {
namespace {

constexpr unsigned char kRedZone = 0xa5;
constexpr size_t kRedZoneBytes = 64, kAlignment = 128;
constexpr size_t kGuardBytes = size_t{1} << 20;  // without access, on both sides

// A multiple of the page size, so that the last array ends where the guard begins; room for red
// zones.
size_t arena_bytes() {
  static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (kMaxShared + kMaxStaticShared + (size_t{64} << 10) + page - 1) / page * page;
}

void poison([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(at, bytes);
#endif
}
void unpoison([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(at, bytes);
#endif
}

// Arrays grow downwards from the end of the arena, where a page without access begins: the dynamic
// array, which kernels carve up by hand, ends there.
char* arena_end() { return block.arena + arena_bytes(); }

void* add_array(const void* declaration, const char* name, size_t bytes, size_t alignment) {
  const size_t step = alignment > kAlignment ? alignment : kAlignment;
  char* const top = arena_end() - block.arena_used;
  const uintptr_t upper = reinterpret_cast<uintptr_t>(top) - (block.arena_used ? kRedZoneBytes : 0);
  char* const begin = reinterpret_cast<char*>((upper - bytes) / step * step);
  block.arena_used = static_cast<size_t>(arena_end() - begin);
  unpoison(begin, static_cast<size_t>(top - begin));
  std::memset(begin, kUninitialised, bytes);
  std::memset(begin + bytes, kRedZone, static_cast<size_t>(top - begin) - bytes);
  poison(begin + bytes, static_cast<size_t>(top - begin) - bytes);
  block.arrays.push_back({declaration, name, begin, bytes});
  return begin;
}

}  // namespace

const void* first_poisoned([[maybe_unused]] const void* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  return __asan_region_is_poisoned(const_cast<void*>(at), bytes);
#else
  return nullptr;
#endif
}

void open_arena(size_t dynamic_bytes) {
  if (block.arena == nullptr) {
    void* memory = mmap(nullptr, arena_bytes() + 2 * kGuardBytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for an arena");
    block.arena = static_cast<char*>(memory) + kGuardBytes;
    mprotect(block.arena, arena_bytes(), PROT_READ | PROT_WRITE);
  }
  poison(block.arena, arena_bytes());
  block.arrays.clear();
  block.arena_used = 0;
  if (dynamic_bytes) add_array(nullptr, "dynamic shared memory", dynamic_bytes, kAlignment);
}

void check_red_zones() {
  char* top = arena_end();
  for (const SharedArray& array : block.arrays) {
    char* const end = array.begin + array.bytes;
    unpoison(end, static_cast<size_t>(top - end));
    for (const char* at = end; at < top; ++at) {
      if (static_cast<unsigned char>(*at) != kRedZone) {
        fail("shared memory was written " + std::to_string(at - end) + " bytes behind the end of " +
             array.name);
      }
    }
    top = array.begin;
  }
}

bool in_arena(const void* at) {
  const char* const address = static_cast<const char*>(at);
  return block.arena && address >= block.arena - kGuardBytes && address < arena_end() + kGuardBytes;
}

const SharedArray* array_containing(const void* at, size_t bytes) {
  const char* const address = static_cast<const char*>(at);
  for (const SharedArray& array : block.arrays) {
    if (address >= array.begin && address + bytes <= array.begin + array.bytes) return &array;
  }
  return nullptr;
}

void* static_shared(const void* declaration, const char* name, size_t bytes, size_t alignment) {
  size_t total = bytes;
  for (const SharedArray& array : block.arrays) {
    if (declaration && array.declaration == declaration) return array.begin;
    total += array.declaration ? array.bytes : 0;
  }
  if (total > kMaxStaticShared || total + block.shared_bytes > block.max_shared_bytes) {
    fail("static shared memory must be at most " + std::to_string(kMaxStaticShared) +
         " bytes, with dynamic " + std::to_string(block.max_shared_bytes) + ", got " +
         std::to_string(total));
  }
  return add_array(declaration, name, bytes, alignment);
}

unsigned char* dynamic_shared() {
  if (block.shared_bytes == 0) fail("the launch gives no dynamic shared memory");
  return reinterpret_cast<unsigned char*>(block.arrays.front().begin);
}

}  // namespace dalle::emulator
