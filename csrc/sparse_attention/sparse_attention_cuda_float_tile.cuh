// Tiles of 64 rows x kHeadSize floats in shared memory, and what a thread of 128 does with them:
// loads, the mask, sums over a row, and the two products of attention by plain products (the same
// on tensor cores: sparse_attention_cuda_tf32.cuh). No torch here.
//
// A thread has rows row + 8 i of a tile; the threads of a row are neighbours in one warp. How many
// rows and which columns it has is up to its Part, PlainPart or Tf32Part:
//   kRows, kColumns        of a 64 x 64 product: rows and columns of a thread
//   bit(j)                 column j of the thread, of each half of the 64 columns
//   kOutColumns, column(n) columns of a thread of a 64 x kHeadSize product
//   Weights                a tile of 64 x 64 weights: put, at; in shared memory or in registers
//   multiply_rows, add_weighted_rows
// Tiles are in indices of the walk.
#pragma once

#include "common/simt.h"
#include "sparse_attention/sparse_attention_cuda_mask.cuh"
#include "sparse_attention/sparse_attention_cuda_walk.cuh"

namespace dalle {

constexpr int kFloatThreads = 128;

// 64 rows of D elements in shared memory, padded so that 8 neighbouring rows are in other banks.
template <int kHeadSize>
struct FloatTile {
  static constexpr int kStride = kHeadSize + 4;
  static constexpr int kFloats = kTileSize * kStride;
};

// Starts copying the 64 rows from `first` on; zeros beyond D and beyond the end of the walk. The
// threads of a block take neighbouring groups of 4 elements. The caller waits.
template <int kHeadSize>
__device__ void load_float_tile(float* tile, const HeadRows<float>& rows,
                                const SparseAttentionParams& p, int32_t first) {
  constexpr int kGroups = kHeadSize / 4;
  const bool vectors = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % 4 == 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kTileSize * kGroups; i += kFloatThreads) {
    const int row = i / kGroups, d = i % kGroups * 4;
    const bool inside = first + row < p.length && d < p.head_size;
    const int32_t position = inside ? walked_position(p.rule, first + row) : 0;
    const int32_t left = inside ? p.head_size - d : 0, valid = left < 4 ? left : 4;
    float* to = tile + row * FloatTile<kHeadSize>::kStride + d;
    const float* from = rows.row(position) + (inside ? d : 0);
    if (vectors) {
      cp_async<16>(to, from, valid * 4);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        cp_async<4>(to + j, from + (j < valid ? j : 0), j < valid ? 4 : 0);
      }
    }
  }
  cp_async_commit();
}

// The rows of a thread; the kLanes threads of a row are neighbours.
template <int kLanes>
struct RowsOfThread {
  int row, lane;

  __device__ __forceinline__ int at(int i) const { return row + i * 8; }
  // Combines a value of the threads of a row: all get the result.
  template <typename Combine>
  __device__ static __forceinline__ float over_row(float x, const Combine& combine) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      x = combine(x, __shfl_xor_sync(kAllLanes, x, step));
    }
    return x;
  }
  __device__ static __forceinline__ float sum_over_row(float x) {
    return over_row(x, [](float a, float b) { return a + b; });
  }
};

template <typename Part>
__device__ __forceinline__ int tile_column(const Part& part, int j) {
  return j / (Part::kColumns / 2) * 32 + part.bit(j);
}

// Bits j of row i: whether the thread's element (i, j) of a tile of queries x keys is visible.
template <typename Part>
struct VisiblePart {
  uint32_t words[Part::kRows][2];

  __device__ __forceinline__ bool operator()(const Part& part, int i, int j) const {
    return (words[i][j / (Part::kColumns / 2)] >> part.bit(j) & 1u) != 0;
  }
  __device__ __forceinline__ bool any() const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < Part::kRows; ++i) bits |= words[i][0] | words[i][1];
    return __any_sync(kAllLanes, bits != 0);
  }
  // Rows are queries from `query` on, columns keys from `key` on.
  __device__ __forceinline__ void find_keys(const AttentionMask& mask, const Part& part,
                                            int32_t query, int32_t key) {
#pragma unroll
    for (int i = 0; i < Part::kRows; ++i) {
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
  __device__ __forceinline__ void find_queries(const AttentionMask& mask, const Part& part,
                                               int32_t key, int32_t query) {
#pragma unroll
    for (int i = 0; i < Part::kRows; ++i) {
      const int32_t row = key + part.at(i);
      const int32_t latest = row < mask.length ? latest_index(mask.rule, mask.length, row) : -1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words[i][half] = mask.visible_queries(row, latest, query + half * 32);
      }
    }
  }
};

template <typename Part>
__device__ __forceinline__ void clear_rows(float (&x)[Part::kRows][Part::kOutColumns]) {
#pragma unroll
  for (int i = 0; i < Part::kRows; ++i) {
#pragma unroll
    for (int n = 0; n < Part::kOutColumns; ++n) x[i][n] = 0.0f;
  }
}

// Stores factor[i] times the thread's part of 64 rows.
template <typename Part>
__device__ __forceinline__ void store_float_rows(const HeadRows<float>& rows,
                                                 const SparseAttentionParams& p, const Part& part,
                                                 int32_t first,
                                                 const float (&sum)[Part::kRows][Part::kOutColumns],
                                                 const float (&factor)[Part::kRows]) {
#pragma unroll
  for (int i = 0; i < Part::kRows; ++i) {
    const int32_t index = first + part.at(i);
    if (index >= p.length) continue;
    float* row = rows.row(walked_position(p.rule, index));
#pragma unroll
    for (int n = 0; n < Part::kOutColumns; ++n) {
      const int d = part.column(n);
      if (d < p.head_size) row[d] = factor[i] * sum[i][n];
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

// Plain products: a thread has 8 rows and, of 64 columns, lane + 16 j (j < 4), 16 threads a row.
template <int kHeadSize>
struct PlainPart : RowsOfThread<16> {
  using Tile = FloatTile<kHeadSize>;
  static constexpr int kHead = kHeadSize;
  static constexpr int kRows = 8, kColumns = 4, kLanes = 16;
  static constexpr int kOutColumns = kHeadSize / kLanes;
  static constexpr int kVector = kOutColumns < 4 ? kOutColumns : 4;  // of them neighbours
  static constexpr int kWeightStride = kTileSize + 4;                // floats; rows 4 banks apart
  static constexpr int kWeightFloats = kTileSize * kWeightStride;

  __device__ PlainPart()
      : RowsOfThread<16>{static_cast<int>(threadIdx.x) / kLanes,
                         static_cast<int>(threadIdx.x) % kLanes} {}
  __device__ __forceinline__ int bit(int j) const { return lane + j % 2 * kLanes; }
  // kVector neighbours, then the next ones 16 * kVector behind.
  __device__ __forceinline__ int column(int n) const {
    return n / kVector * (kLanes * kVector) + lane * kVector + n % kVector;
  }

  // In shared memory, where the other threads of a row read them.
  struct Weights {
    float* words;

    __device__ explicit Weights(float* shared) : words(shared) {}
    __device__ __forceinline__ float* place(const PlainPart& part, int i, int j) const {
      return words + part.at(i) * kWeightStride + part.lane + j * kLanes;
    }
    __device__ __forceinline__ float at(const PlainPart& part, int i, int j) const {
      return *place(part, i, j);
    }
    __device__ __forceinline__ void put(const PlainPart& part, const float (&x)[kRows][kColumns]) {
      __syncwarp();  // all have read what was there
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) *place(part, i, j) = x[i][j];
      }
      __syncwarp();
    }
  };

  // product[i][j] = sum over d of a[row + 8 i][d] * b[lane + 16 j][d].
  __device__ __forceinline__ void multiply_rows(float (&product)[kRows][kColumns], const float* a,
                                                const float* b) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) product[i][j] = 0.0f;
    }
#pragma unroll kHeadSize> 64 ? 1 : 2
    for (int d = 0; d < kHeadSize; d += 4) {
      float4 y[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        y[j] = load_vector<float4>(b + (lane + j * kLanes) * Tile::kStride + d);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 x = load_vector<float4>(a + at(i) * Tile::kStride + d);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          float sum = fmaf(x.x, y[j].x, product[i][j]);
          sum = fmaf(x.y, y[j].y, sum);
          sum = fmaf(x.z, y[j].z, sum);
          product[i][j] = fmaf(x.w, y[j].w, sum);
        }
      }
    }
  }

  // sum[i][n] += sum over k of weights[row + 8 i][k] * b[k][column n]. The 64 terms are added up on
  // their own first: a thousand added one after another would round too much.
  __device__ __forceinline__ void add_weighted_rows(float (&sum)[kRows][kOutColumns],
                                                    const Weights& weights, const float* b) const {
    float terms[kRows][kOutColumns];
    clear_rows<PlainPart>(terms);
    // Four keys of a weight at once, or, where the sums of 128 columns leave no registers, one.
    constexpr int kKeys = kHeadSize > 64 ? 1 : 4;
#pragma unroll 1
    for (int k = 0; k < kTileSize; k += kKeys) {
      float w[kRows][kKeys];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        load_columns<kKeys>(weights.words + at(i) * kWeightStride + k, w[i]);
      }
#pragma unroll
      for (int kk = 0; kk < kKeys; ++kk) {
        float y[kOutColumns];
#pragma unroll
        for (int n = 0; n < kOutColumns; n += kVector) {
          load_columns<kVector>(b + (k + kk) * Tile::kStride + column(n), y + n);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int n = 0; n < kOutColumns; ++n) terms[i][n] = fmaf(w[i][kk], y[n], terms[i][n]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int n = 0; n < kOutColumns; ++n) sum[i][n] += terms[i][n];
    }
  }
};

}  // namespace dalle
