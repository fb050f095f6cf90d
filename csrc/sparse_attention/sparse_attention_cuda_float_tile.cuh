// Tiles of 64 rows x kHeadSize floats in shared memory, and what a thread of 128 does with them:
// the two products of attention, the mask, sums over a row. No torch here.
//
// A thread has rows row + 8 i (i < 8) of a tile and, of 64 columns, lane + 16 j (j < 4); the 16
// threads of a row are neighbours in one warp. Tiles are in indices of the walk.
#pragma once

#include "common/simt.h"
#include "sparse_attention/sparse_attention_cuda_mask.cuh"
#include "sparse_attention/sparse_attention_cuda_walk.cuh"

namespace dalle {

constexpr int kFloatThreads = 128;
constexpr int kRowLanes = 16;                 // threads that share a row
constexpr int kThreadRows = 8;                // of 64
constexpr int kThreadColumns = 4;             // of 64
constexpr int kWeightStride = kTileSize + 4;  // floats; rows 4 banks apart
constexpr int kWeightFloats = kTileSize * kWeightStride;

// 64 rows of D elements in shared memory, padded so that 8 neighbouring rows are in other banks.
template <int kHeadSize>
struct FloatTile {
  static constexpr int kStride = kHeadSize + 4;
  static constexpr int kFloats = kTileSize * kStride;
  static constexpr int kColumns = kHeadSize / kRowLanes;       // of a thread
  static constexpr int kVector = kColumns < 4 ? kColumns : 4;  // of them neighbours

  // Column n of a thread: kVector neighbours, then the next ones 16 * kVector behind.
  __device__ static __forceinline__ int column(int lane, int n) {
    return n / kVector * (kRowLanes * kVector) + lane * kVector + n % kVector;
  }
};

// Which rows and columns of a tile this thread has.
struct TilePart {
  int row, lane;

  __device__ TilePart()
      : row(static_cast<int>(threadIdx.x) / kRowLanes),
        lane(static_cast<int>(threadIdx.x) % kRowLanes) {}
  __device__ __forceinline__ int at(int i) const { return row + i * kThreadRows; }
};

// Copies the 64 rows from `first` on; zeros beyond D and beyond the end of the walk. The threads of
// a block take neighbouring elements.
template <int kHeadSize>
__device__ void load_float_tile(float* tile, const HeadRows<float>& rows,
                                const SparseAttentionParams& p, int32_t first) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kTileSize * kHeadSize; i += kFloatThreads) {
    const int row = i / kHeadSize, d = i % kHeadSize;
    const bool inside = first + row < p.length && d < p.head_size;
    const int32_t position = inside ? walked_position(p.rule, first + row) : 0;
    tile[row * FloatTile<kHeadSize>::kStride + d] = inside ? rows.row(position)[d] : 0.0f;
  }
}

// product[i][j] = sum over d of a[row + 8 i][d] * b[lane + 16 j][d].
template <int kHeadSize>
__device__ __forceinline__ void multiply_rows(float (&product)[kThreadRows][kThreadColumns],
                                              const float* a, const float* b,
                                              const TilePart& part) {
  constexpr int kStride = FloatTile<kHeadSize>::kStride;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) product[i][j] = 0.0f;
  }
#pragma unroll kHeadSize> 64 ? 1 : 2
  for (int d = 0; d < kHeadSize; d += 4) {
    float4 y[kThreadColumns];
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
      y[j] = load_vector<float4>(b + (part.lane + j * kRowLanes) * kStride + d);
    }
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const float4 x = load_vector<float4>(a + part.at(i) * kStride + d);
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) {
        float sum = fmaf(x.x, y[j].x, product[i][j]);
        sum = fmaf(x.y, y[j].y, sum);
        sum = fmaf(x.z, y[j].z, sum);
        product[i][j] = fmaf(x.w, y[j].w, sum);
      }
    }
  }
}

// One load of 1, 2 or 4 neighbouring floats.
template <int kCount>
__device__ __forceinline__ void load_columns(const float* from, float* to) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  if constexpr (kCount == 4) {
    const float4 x = load_vector<float4>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (kCount == 2) {
    const float2 x = load_vector<float2>(from);
    to[0] = x.x, to[1] = x.y;
  } else {
    to[0] = *from;
  }
}

// sum[i][n] += sum over k of weights[row + 8 i][k] * b[k][column n]. The 64 terms are added up on
// their own first: a thousand added one after another would round too much.
template <int kHeadSize>
__device__ __forceinline__ void add_weighted_rows(
    float (&sum)[kThreadRows][FloatTile<kHeadSize>::kColumns], const float* weights, const float* b,
    const TilePart& part) {
  using Tile = FloatTile<kHeadSize>;
  float terms[kThreadRows][Tile::kColumns];
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int n = 0; n < Tile::kColumns; ++n) terms[i][n] = 0.0f;
  }
  // Four keys of a weight at once, or, where the sums of 128 columns leave no registers, one.
  constexpr int kKeys = kHeadSize > 64 ? 1 : 4;
#pragma unroll 1
  for (int k = 0; k < kTileSize; k += kKeys) {
    float w[kThreadRows][kKeys];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      load_columns<kKeys>(weights + part.at(i) * kWeightStride + k, w[i]);
    }
#pragma unroll
    for (int kk = 0; kk < kKeys; ++kk) {
      float y[Tile::kColumns];
      const float* row = b + (k + kk) * Tile::kStride;
#pragma unroll
      for (int n = 0; n < Tile::kColumns; n += Tile::kVector) {
        load_columns<Tile::kVector>(row + Tile::column(part.lane, n), y + n);
      }
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int n = 0; n < Tile::kColumns; ++n) terms[i][n] = fmaf(w[i][kk], y[n], terms[i][n]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int n = 0; n < Tile::kColumns; ++n) sum[i][n] += terms[i][n];
  }
}

// Combines a value of the 16 threads of a row: all get the result.
template <typename Combine>
__device__ __forceinline__ float over_row(float x, const Combine& combine) {
#pragma unroll
  for (int step = kRowLanes / 2; step > 0; step /= 2) {
    x = combine(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}
__device__ __forceinline__ float sum_over_row(float x) {
  return over_row(x, [](float a, float b) { return a + b; });
}

// Bits j of row i: whether the thread's element (i, j) of a tile of queries x keys is visible.
struct VisiblePart {
  uint32_t words[kThreadRows][2];

  __device__ __forceinline__ bool operator()(const TilePart& part, int i, int j) const {
    return (words[i][j / 2] >> (part.lane + j % 2 * kRowLanes) & 1u) != 0;
  }
  __device__ __forceinline__ bool any() const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) bits |= words[i][0] | words[i][1];
    return __any_sync(kAllLanes, bits != 0);
  }
  // Rows are queries from `query` on, columns keys from `key` on.
  __device__ __forceinline__ void find_keys(const AttentionMask& mask, const TilePart& part,
                                            int32_t query, int32_t key) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int32_t index = query + part.at(i), last = mask.length - 1;
      const int32_t row = index < last ? index : last;
      const int32_t earliest = earliest_image_index(mask.rule, row);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t first = key + half * 32;
        words[i][half] = mask.by_table() ? mask.visible_keys<true>(row, earliest, first)
                                         : mask.visible_keys<false>(row, earliest, first);
      }
    }
  }
  // Rows are keys from `key` on, columns queries from `query` on.
  __device__ __forceinline__ void find_queries(const AttentionMask& mask, const TilePart& part,
                                               int32_t key, int32_t query) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int32_t row = key + part.at(i);
      const int32_t latest = row < mask.length ? latest_index(mask.rule, mask.length, row) : -1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words[i][half] = mask.visible_queries(row, latest, query + half * 32);
      }
    }
  }
};

// Stores factor[i] times the thread's part of 64 rows.
template <int kHeadSize>
__device__ __forceinline__ void store_float_rows(
    const HeadRows<float>& rows, const SparseAttentionParams& p, const TilePart& part,
    int32_t first, const float (&sum)[kThreadRows][FloatTile<kHeadSize>::kColumns],
    const float (&factor)[kThreadRows]) {
  using Tile = FloatTile<kHeadSize>;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int32_t index = first + part.at(i);
    if (index >= p.length) continue;
    float* row = rows.row(walked_position(p.rule, index));
#pragma unroll
    for (int n = 0; n < Tile::kColumns; ++n) {
      const int d = Tile::column(part.lane, n);
      if (d < p.head_size) row[d] = factor[i] * sum[i][n];
    }
  }
}

// Where element (i, j) of the thread's part lies in a tile of weights.
__device__ __forceinline__ float* weight_at(float* weights, const TilePart& part, int i, int j) {
  return weights + part.at(i) * kWeightStride + part.lane + j * kRowLanes;
}

// Puts the thread's part of a tile of weights where the other threads of its rows read it.
__device__ __forceinline__ void share_weights(float* weights, const TilePart& part,
                                              const float (&x)[kThreadRows][kThreadColumns]) {
  __syncwarp();  // all have read what was there
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) *weight_at(weights, part, i, j) = x[i][j];
  }
  __syncwarp();
}

}  // namespace dalle
