// What the product kernels of powersgd share: the table of matrices of a launch, tiles in shared
// memory, numbers of the matrix units. No torch here.
#pragma once

#include "common/vec.cuh"
#include "powersgd/powersgd.h"

namespace dalle {

constexpr int kProductThreads = 256;
constexpr int kMaxMatrices = 40;
constexpr int kMaxSharedBytes = 99 * 1024;  // of a block, on every card from sm_80 on

// The matrices of a launch, in its arguments.
struct PowerGroup {
  PowerMatrix matrix[kMaxMatrices];
  int count;
};
static_assert(sizeof(PowerGroup) + sizeof(PowerFactors) <= 4096, "the arguments of a launch");

__device__ __forceinline__ const PowerMatrix& matrix_of_tile(const PowerGroup& group,
                                                             int64_t tile) {
  int at = 0;
  while (at + 1 < group.count && tile >= group.matrix[at + 1].tile_begin) ++at;
  return group.matrix[at];
}

// Byte offset of 16-byte chunk `chunk` of a row of kChunks in a tile. Rows are an odd number of
// chunks apart, so that any one chunk of 8 neighbouring rows is in 8 different groups of banks; and
// offsets differ by constants where rows and chunks do.
template <int kChunks>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  static_assert(kChunks % 2 == 0);
  return (row * (kChunks + 1) + chunk) * 16;
}
template <int kChunks>
constexpr int tile_bytes(int rows) {
  return rows * (kChunks + 1) * 16;
}

__device__ __forceinline__ float decoded_code(uint32_t code) {
  return __uint_as_float(decode<Format::k169>(code));
}
__device__ __forceinline__ uint32_t encoded_code(float x) {
  const uint32_t half_ulp = FormatOf<Format::k169>::kHalfUlp;
  return encode<Format::k169>(__float_as_uint(x), half_ulp);
}

// A word of shared or global memory holds two codes; it is changed by change(value, which).
template <typename Change>
__device__ __forceinline__ uint32_t changed_codes(uint32_t word, const Change& change) {
  const uint32_t low = encoded_code(change(decoded_code(word & 0xFFFFu), 0));
  return low | encoded_code(change(decoded_code(word >> 16), 1)) << 16;
}

// A float is the sum of two tf32 words but for 2^-22 of it.
struct SplitTf32 {
  uint32_t high, low;
};
__device__ __forceinline__ SplitTf32 split_tf32(float x) {
  const uint32_t high = to_tf32(x);
  return {high, to_tf32(x - __uint_as_float(high))};
}

// Launches `kernel` over the tiles of [begin, end), at most kMaxMatrices matrices.
template <typename Kernel, typename Tiles>
cudaError_t launch_group(Kernel kernel, size_t shared_bytes, const PowerMatrix* begin,
                         const PowerMatrix* end, const PowerFactors& f, const Tiles& tiles,
                         void* stream) {
  PowerGroup group{};
  int64_t count = 0;
  for (const PowerMatrix* m = begin; m != end; ++m) {
    group.matrix[group.count] = *m;
    group.matrix[group.count++].tile_begin = count;
    count += tiles(*m);
  }
  if (count == 0) return cudaSuccess;
  return launch(kernel, dim3(static_cast<unsigned>(count)), dim3(kProductThreads), shared_bytes,
                stream, group, f);
}

// Calls launch_of(begin, end) for all matrices, as many of one gradient type at once as a launch
// can take.
template <typename LaunchOf>
cudaError_t launch_matrices(const PowerMatrix* matrices, int64_t count, const LaunchOf& launch_of) {
  for (int64_t i = 0; i < count;) {
    int64_t end = i + 1;
    while (end < count && end - i < kMaxMatrices &&
           matrices[end].grad_kind == matrices[i].grad_kind) {
      ++end;
    }
    const cudaError_t error = launch_of(matrices + i, matrices + end);
    if (error != cudaSuccess) return error;
    i = end;
  }
  return cudaSuccess;
}

}  // namespace dalle
