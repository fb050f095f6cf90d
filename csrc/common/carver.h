// Pieces of one block of memory. No torch here.
#pragma once

#include <cstddef>

namespace dalle {
namespace {  // internal linkage: see host_device.h

// Hands out 64-byte aligned pieces of a workspace; counts bytes where there is none.
struct Carver {
  char* base;
  size_t used = 0;

  template <typename T>
  T* take(size_t count) {
    char* piece = base == nullptr ? nullptr : base + used;
    used += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
};

}  // namespace
}  // namespace dalle
