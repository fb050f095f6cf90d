// Words that mean the same under nvcc and under g++. No torch here.
#pragma once

#include <cstdint>

// Internal linkage on purpose: the CPU kernels are compiled once per instruction set, and a weak
// symbol compiled with AVX-512 must not be the one that an older machine runs.
#if defined(__CUDACC__)
#define DALLE_HOST_DEVICE static inline __host__ __device__
#else
#define DALLE_HOST_DEVICE static inline
#endif

namespace dalle {

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

DALLE_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dalle
