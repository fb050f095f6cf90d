// Accesses that kernels make through functions: vectors, atomics, cp.async. Each is checked, and
// the race detector hears of it.
#include <cstring>

#include "emulator/block.h"

namespace dalle::emulator {

// The destination is destroyed at once and written at the wait that covers its group, as late as
// PTX allows: a missing wait reads NaN, a copy that starts too early destroys what others read.
void cp_async(void* shared, const void* global, int bytes, int valid_bytes, Location location) {
  const uintptr_t to = reinterpret_cast<uintptr_t>(shared);
  const uintptr_t from = reinterpret_cast<uintptr_t>(global);
  if (to % bytes || from % bytes) {
    fail("cp.async of " + std::to_string(bytes) + " bytes: addresses must be aligned to it",
         location);
  }
  if (valid_bytes < 0 || valid_bytes > bytes) {
    fail("cp.async: valid_bytes must be 0 .. " + std::to_string(bytes) + ", got " +
             std::to_string(valid_bytes),
         location);
  }
  if (!array_containing(shared, bytes)) fail("cp.async to outside of shared memory", location);
  if (valid_bytes && in_arena(global)) fail("cp.async from shared memory", location);
  if (valid_bytes && first_poisoned(global, valid_bytes)) {
    fail("cp.async from outside of its buffer", location);
  }
  race_access(shared, bytes, Access::kPending, "cp.async", location);
  if (valid_bytes) race_access(global, valid_bytes, Access::kRead, "cp.async", location);
  std::memset(shared, kUninitialised, bytes);
  Thread& self = *block.running;
  self.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes,
                         valid_bytes, self.groups, location});
}

void cp_async_commit() { ++block.running->groups; }

void cp_async_wait(int groups) {
  Thread& self = *block.running;
  size_t kept = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group + groups >= self.groups) {
      self.copies[kept++] = copy;
      continue;
    }
    race_access(copy.to, copy.bytes, Access::kArrival, "the end of cp.async", copy.location);
    std::memcpy(copy.to, copy.from, copy.valid_bytes);
    counts.copied_bytes += static_cast<uint64_t>(copy.valid_bytes);
    std::memset(copy.to + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
  }
  self.copies.resize(kept);
}

void vector_access(const void* at, size_t bytes, bool writes, Location location) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) {
    fail("a vector of " + std::to_string(bytes) + " bytes must be aligned to it", location);
  }
  if (in_arena(at) && !array_containing(at, bytes))
    fail("a vector outside of shared memory", location);
  if (first_poisoned(at, bytes)) fail("a vector outside of its buffer", location);
  race_access(at, bytes, writes ? Access::kWrite : Access::kRead, "a vector access", location);
}

void atomic_access(const void* at, size_t bytes, Location location) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail("an atomic must be aligned", location);
  if (in_arena(at) && !array_containing(at, bytes))
    fail("an atomic outside of shared memory", location);
  if (first_poisoned(at, bytes)) fail("an atomic outside of its buffer", location);
  race_access(at, bytes, Access::kAtomic, "an atomic", location);
}

}  // namespace dalle::emulator
