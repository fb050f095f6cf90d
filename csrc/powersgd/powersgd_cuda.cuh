// CUDA kernels of powersgd and their launch: products on the matrix units in tf32 words, exact to
// float. No torch here. Not yet measured on a GPU.
//
// One launch takes up to kMostMatrices matrices, described in the kernel's own arguments. A block
// makes one tile of one matrix and sums in the order of the depth, so bits do not depend on the
// grid.
//
// A decoded 1-6-9 code has 9 bits of mantissa and so is a tf32 word as it is. A factor is the sum
// of two such words, high and low, which leaves an error of 2^-22.
#pragma once

#include "common/vec.cuh"
#include "powersgd/powersgd.h"
#include "powersgd/powersgd_cuda_householder.cuh"

namespace dalle {

constexpr int kPowerThreads = 256, kPowerSide = 16;  // a tile has kPowerSide rows
constexpr int kPowerWide = 128;
constexpr int kPowerTiles = kPowerWide / 8 / (kPowerThreads / 32);  // 16 x 8, of one warp
constexpr int kPowerDepth = 64, kSpreadDepth = 32;
constexpr int kMostMatrices = 40;

struct PowerGroup {
  PowerMatrix matrix[kMostMatrices];
  int count;
};
static_assert(sizeof(PowerGroup) + sizeof(PowerFactors) <= 4096, "the arguments of a launch");

__device__ __forceinline__ const PowerMatrix& matrix_of_tile(const PowerGroup& group,
                                                             int64_t tile) {
  int at = 0;
  while (at + 1 < group.count && tile >= group.matrix[at + 1].tile_begin) ++at;
  return group.matrix[at];
}

__device__ __forceinline__ float decoded_code(uint16_t code) {
  return __uint_as_float(decode<Format::k169>(static_cast<uint32_t>(code)));
}
__device__ __forceinline__ uint16_t encoded_code(float x) {
  const uint32_t half_ulp = FormatOf<Format::k169>::kHalfUlp;
  return static_cast<uint16_t>(encode<Format::k169>(__float_as_uint(x), half_ulp));
}

struct SplitTf32 {
  uint32_t high, low;
};
__device__ __forceinline__ SplitTf32 split_tf32(float x) {
  const uint32_t high = to_tf32(x);
  return {high, to_tf32(x - __uint_as_float(high))};
}

// A tile of kPowerSide rows of E Q (compress), or of E^T P: kPowerSide columns of E (project). The
// first pass over its part of E adds the gradient; ranks beyond kPowerWide read E again.
template <bool kProject, typename grad_t>
__global__ void __launch_bounds__(kPowerThreads)
    powersgd_factor_kernel(PowerGroup group, PowerFactors f) {
  DALLE_SHARED(float, values, [kPowerDepth][kPowerSide + 1]);
  DALLE_SHARED(float, factors, [kPowerDepth][kPowerWide + 8]);  // no two lanes in one bank
  const PowerMatrix& m = matrix_of_tile(group, blockIdx.x);
  const int64_t first = (blockIdx.x - m.tile_begin) * kPowerSide;
  const int64_t lines = kProject ? m.columns : m.rows, depth = kProject ? m.rows : m.columns;
  const int64_t rank = m.rank;
  const float* const other = kProject ? m.left : m.right;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int wide = threadIdx.x / 32 * kPowerTiles * 8;  // first of this warp's columns
  const bool adds = !kProject && !skipped(f);
  const float factor = adds ? gradient_factor(f) : 0.0f;
  for (int64_t begin = 0; begin < rank; begin += kPowerWide) {
    float sums[kPowerTiles][4] = {};
    for (int64_t k0 = 0; k0 < depth; k0 += kPowerDepth) {
      __syncthreads();
      for (int i = threadIdx.x; i < kPowerSide * kPowerDepth; i += kPowerThreads) {
        // Neighbouring threads take neighbouring columns of E.
        const int own = kProject ? i % kPowerSide : i / kPowerDepth;
        const int k = kProject ? i / kPowerSide : i % kPowerDepth;
        float value = 0.0f;
        if (first + own < lines && k0 + k < depth) {
          const int64_t at =
              kProject ? (k0 + k) * m.columns + first + own : (first + own) * m.columns + k0 + k;
          value = decoded_code(m.error[at]);
          if (adds && begin == 0) {
            value += static_cast<float>(static_cast<const grad_t*>(m.grad)[at]) * factor;
            const uint16_t code = encoded_code(value);
            m.error[at] = code;
            value = decoded_code(code);
          }
        }
        values[k][own] = value;
      }
      for (int i = threadIdx.x; i < kPowerDepth * kPowerWide; i += kPowerThreads) {
        const int k = i / kPowerWide, r = i % kPowerWide;
        factors[k][r] =
            k0 + k < depth && begin + r < rank ? other[(k0 + k) * rank + begin + r] : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kPowerDepth; k += 8) {
        const uint32_t a[] = {
            __float_as_uint(values[k + t][g]), __float_as_uint(values[k + t][g + 8]),
            __float_as_uint(values[k + t + 4][g]), __float_as_uint(values[k + t + 4][g + 8])};
#pragma unroll
        for (int tile = 0; tile < kPowerTiles; ++tile) {
          const int r = wide + 8 * tile + g;
          const SplitTf32 upper = split_tf32(factors[k + t][r]);
          const SplitTf32 lower = split_tf32(factors[k + t + 4][r]);
          mma_m16n8k8_tf32(sums[tile], a, {upper.low, lower.low});
          mma_m16n8k8_tf32(sums[tile], a, {upper.high, lower.high});
        }
      }
    }
    const float inverse = 1.0f / f.error_scale;
#pragma unroll
    for (int i = 0; i < kPowerTiles * 4; ++i) {
      const int64_t row = first + g + i % 4 / 2 * 8;
      const int64_t r = begin + wide + i / 4 * 8 + 2 * t + i % 2;
      if (row < lines && r < rank) m.out[row * rank + r] = sums[i / 4][i % 4] * inverse;
    }
  }
}

// A tile of kPowerSide rows and kPowerWide columns of D = P Q^T, and what is left of E there.
__global__ void __launch_bounds__(kPowerThreads)
    powersgd_decompress_kernel(PowerGroup group, PowerFactors f) {
  DALLE_SHARED(float, lefts, [kPowerSide][kSpreadDepth + 4]);  // no two lanes in one bank
  DALLE_SHARED(float, rights, [kPowerWide][kSpreadDepth + 4]);
  const PowerMatrix& m = matrix_of_tile(group, blockIdx.x);
  const int64_t across = ceil_div(m.columns, kPowerWide);
  const int64_t tile = blockIdx.x - m.tile_begin;
  const int64_t row = tile / across * kPowerSide, first = tile % across * kPowerWide;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int wide = threadIdx.x / 32 * kPowerTiles * 8;
  float sums[kPowerTiles][4] = {};
  for (int64_t k0 = 0; k0 < m.rank; k0 += kSpreadDepth) {
    __syncthreads();
    for (int i = threadIdx.x; i < (kPowerSide + kPowerWide) * kSpreadDepth; i += kPowerThreads) {
      const int own = i / kSpreadDepth, k = i % kSpreadDepth;
      const bool left = own < kPowerSide;
      const int64_t at = left ? row + own : first + own - kPowerSide;
      const bool inside = at < (left ? m.rows : m.columns) && k0 + k < m.rank;
      const float value = inside ? (left ? m.left : m.right)[at * m.rank + k0 + k] : 0.0f;
      if (left) {
        lefts[own][k] = value;
      } else {
        rights[own - kPowerSide][k] = value;
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSpreadDepth; k += 8) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const SplitTf32 left = split_tf32(lefts[g + i % 2 * 8][k + t + i / 2 * 4]);
        high[i] = left.high;
        low[i] = left.low;
      }
#pragma unroll
      for (int tile = 0; tile < kPowerTiles; ++tile) {
        const float* const right = rights[wide + 8 * tile + g] + k + t;
        const SplitTf32 upper = split_tf32(right[0]), lower = split_tf32(right[4]);
        mma_m16n8k8_tf32(sums[tile], low, {upper.high, lower.high});
        mma_m16n8k8_tf32(sums[tile], high, {upper.low, lower.low});
        mma_m16n8k8_tf32(sums[tile], high, {upper.high, lower.high});
      }
    }
  }
  const bool keep = f.feedback == 0.0f || skipped(f);
#pragma unroll
  for (int i = 0; i < kPowerTiles * 4; ++i) {
    const int64_t line = row + g + i % 4 / 2 * 8;
    const int64_t j = first + wide + i / 4 * 8 + 2 * t + i % 2;
    if (line >= m.rows || j >= m.columns) continue;
    const int64_t at = line * m.columns + j;
    const float sum = sums[i / 4][i % 4];
    m.out[at] = sum;
    if (!keep) m.error[at] = encoded_code(decoded_code(m.error[at]) - sum * f.feedback);
  }
}

// Launches `kernel` over the tiles of [begin, end) of the matrices, at most kMostMatrices of them.
template <typename Kernel, typename Tiles>
cudaError_t launch_group(Kernel kernel, const PowerMatrix* begin, const PowerMatrix* end,
                         const PowerFactors& f, const Tiles& tiles, void* stream) {
  PowerGroup group{};
  int64_t count = 0;
  for (const PowerMatrix* m = begin; m != end; ++m) {
    group.matrix[group.count] = *m;
    group.matrix[group.count++].tile_begin = count;
    count += tiles(*m);
  }
  return launch(kernel, dim3(static_cast<unsigned>(count)), dim3(kPowerThreads), 0, stream, group,
                f);
}

// The same over all matrices, a launch for as many of one gradient type as it can take.
template <typename Choose, typename Tiles>
cudaError_t launch_matrices(const PowerMatrix* matrices, int64_t count, const PowerFactors& f,
                            const Choose& kernel_of, const Tiles& tiles, void* stream) {
  for (int64_t i = 0; i < count;) {
    int64_t end = i + 1;
    while (end < count && end - i < kMostMatrices &&
           matrices[end].grad_kind == matrices[i].grad_kind) {
      ++end;
    }
    const cudaError_t error =
        launch_group(kernel_of(matrices[i]), matrices + i, matrices + end, f, tiles, stream);
    if (error != cudaSuccess) return error;
    i = end;
  }
  return cudaSuccess;
}

inline cudaError_t launch_powersgd_compress(const PowerMatrix* matrices, int64_t count,
                                            const PowerFactors& f, void* stream) {
  const auto kernel_of = [](const PowerMatrix& m) {
    if (m.grad_kind == ElementKind::kHalf) return powersgd_factor_kernel<false, __half>;
    if (m.grad_kind == ElementKind::kBFloat16) return powersgd_factor_kernel<false, __nv_bfloat16>;
    return powersgd_factor_kernel<false, float>;
  };
  const auto tiles = [](const PowerMatrix& m) { return ceil_div(m.rows, kPowerSide); };
  return launch_matrices(matrices, count, f, kernel_of, tiles, stream);
}

inline cudaError_t launch_powersgd_project(const PowerMatrix* matrices, int64_t count,
                                           const PowerFactors& f, void* stream) {
  const auto kernel_of = [](const PowerMatrix&) { return powersgd_factor_kernel<true, float>; };
  const auto tiles = [](const PowerMatrix& m) { return ceil_div(m.columns, kPowerSide); };
  return launch_matrices(matrices, count, f, kernel_of, tiles, stream);
}

inline cudaError_t launch_powersgd_decompress(const PowerMatrix* matrices, int64_t count,
                                              const PowerFactors& f, void* stream) {
  const auto kernel_of = [](const PowerMatrix&) { return powersgd_decompress_kernel; };
  const auto tiles = [](const PowerMatrix& m) {
    return ceil_div(m.rows, kPowerSide) * ceil_div(m.columns, kPowerWide);
  };
  return launch_matrices(matrices, count, f, kernel_of, tiles, stream);
}

}  // namespace dalle
