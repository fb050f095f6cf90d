// Kernels that take eight neighbouring elements a thread at a time: their launch, their loop, the
// sum of what their threads counted. Eight 16-bit elements are one 16-byte access. No torch here.
#pragma once

#include "common/vec.cuh"

namespace dalle {

constexpr int kEight = 8;
constexpr int kEightThreads = 256;

// Eight codes, of which the first `count` are there.
__device__ __forceinline__ void load_codes(const uint16_t* p, int64_t count, bool aligned,
                                           uint32_t (&codes)[kEight]) {
  if (count < kEight || !aligned) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) codes[i] = i < count ? p[i] : 0;
    return;
  }
  const uint4 words = load_vector_once<uint4>(p);
  const uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    codes[2 * w] = each[w] & 0xFFFF;
    codes[2 * w + 1] = each[w] >> 16;
  }
}

__device__ __forceinline__ void store_codes(uint16_t* p, int64_t count, bool aligned,
                                            const uint32_t (&codes)[kEight]) {
  if (count < kEight || !aligned) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) p[i] = static_cast<uint16_t>(codes[i]);
    }
    return;
  }
  uint32_t each[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) each[w] = codes[2 * w] | (codes[2 * w + 1] << 16);
  store_vector_once(p, uint4{each[0], each[1], each[2], each[3]});
}

// Calls body(i) for the eights of this thread.
template <typename Body>
__device__ __forceinline__ void for_eights(int64_t numel, const Body& body) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kEightThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kEightThreads * kEight;
  for (int64_t i = thread * kEight; i < numel; i += step) body(i);
}

// Adds the counts of the threads of a block to counts[0 .. kN). Every thread of the block calls
// this; integers, so that their order does not matter.
template <int kN>
__device__ __forceinline__ void add_counts(const int (&thread_counts)[kN], int64_t* counts) {
  DALLE_SHARED(int, warp_counts, [kEightThreads / kWarpSize][kN]);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
#pragma unroll
  for (int c = 0; c < kN; ++c) {
    const int sum = __reduce_add_sync(kAllLanes, thread_counts[c]);
    if (lane == 0) warp_counts[warp][c] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kN) {
    int sum = 0;
    for (int w = 0; w < kEightThreads / kWarpSize; ++w) sum += warp_counts[w][threadIdx.x];
    if (sum != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(counts) + threadIdx.x,
                static_cast<unsigned long long>(sum));
    }
  }
}

// A block for every 4 eights of its threads, and not more than a card can hold several times over.
template <typename kernel_t, typename args_t>
cudaError_t launch_eights(kernel_t kernel, const args_t& args, void* stream) {
  if (args.numel == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(args.numel, int64_t{4} * kEight * kEightThreads);
  return launch(kernel, static_cast<unsigned>(blocks < 8192 ? blocks : 8192), kEightThreads, 0,
                stream, args);
}

}  // namespace dalle
