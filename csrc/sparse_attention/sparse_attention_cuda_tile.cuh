// Tiles of 64 rows x kHeadSize 16-bit elements in shared memory, and what a warp does with them:
// fragments of mma.m16n8k16 and the two products of attention. No torch here.
#pragma once

#include <type_traits>

#include "common/simt.h"
#include "sparse_attention/sparse_attention_plan.h"

namespace dalle {

// What the host worked out for a launch.
struct TilePlan {
  float scale_log2;  // on scores, so that exp2 takes them; without sign in the forward
  bool vectors;      // all rows begin at multiples of 16 bytes
};

// Index of this thread's warp, by a shuffle, so that the compiler knows it is the same in all
// lanes.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpSize, 0);
}

// Which head of the batch a block works on.
struct HeadIndex {
  int32_t batch, head;

  __device__ HeadIndex(const SparseAttentionParams& p, uint32_t index)
      : batch(static_cast<int32_t>(index / static_cast<uint32_t>(p.heads))),
        head(static_cast<int32_t>(index % static_cast<uint32_t>(p.heads))) {}
  // Of its first query in a (B, H, T) array.
  __device__ __forceinline__ int64_t first(const SparseAttentionParams& p) const {
    return (int64_t{batch} * p.heads + head) * p.length;
  }
};

// One head of one tensor: where its position 0 is and how many elements positions are apart. Rows
// begin at multiples of 4 bytes and D is even.
template <typename scalar_t>
struct HeadRows {
  scalar_t* data;
  int64_t stride;

  __device__ __forceinline__ HeadRows(const AttentionRows& rows, const HeadIndex& at)
      : data(static_cast<scalar_t*>(rows.data) + at.batch * rows.batch + at.head * rows.head),
        stride(rows.row) {}
  __device__ __forceinline__ scalar_t* row(int32_t position) const {
    return data + position * stride;
  }
};

// Where 16-byte chunk `chunk` of a row lies in a tile: chunks are permuted within a row so that 8
// neighbouring rows have any one chunk in 8 different groups of banks.
template <int kHeadSize>
struct TileLayout {
  static_assert(kHeadSize % 16 == 0);
  static constexpr int kChunks = kHeadSize / 8;
  static constexpr int kSpan = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kRepeat = 8 / kSpan;  // neighbouring rows with the same permutation
  static constexpr int kBytes = kTileSize * kHeadSize * 2;

  // Of row first + row, `first` a multiple of 8: the permutation depends on `row` alone, which is
  // what differs between lanes, so addresses of different tiles and rows differ by constants.
  __device__ static __forceinline__ int at(int first, int row, int chunk) {
    return first * (kChunks * 16) + row * (kChunks * 16) + (chunk ^ (row / kRepeat % kSpan)) * 16;
  }
};

// Starts copying the 64 rows from `first` on of two tensors into two tiles; zeros beyond D and
// beyond the end of the walk. `vectors`: rows begin at multiples of 16 bytes. The caller commits
// and waits.
template <int kHeadSize, typename scalar_t>
__device__ void load_tiles(unsigned char* tiles, const HeadRows<scalar_t>& a,
                           const HeadRows<scalar_t>& b, const SparseAttentionParams& p,
                           bool vectors, int32_t first) {
  using Layout = TileLayout<kHeadSize>;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kTileSize * Layout::kChunks;
       i += static_cast<int>(blockDim.x)) {
    const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    const bool inside = first + row < p.length;
    const int32_t position = inside ? walked_position(p.rule, first + row) : 0;
    const int32_t left = inside ? p.head_size - chunk * 8 : 0;
    const int32_t valid = left < 0 ? 0 : left > 8 ? 8 : left;
    unsigned char* to = tiles + Layout::at(0, row, chunk);
    const int column = valid ? chunk * 8 : 0;
    const scalar_t *from_a = a.row(position) + column, *from_b = b.row(position) + column;
    if (vectors) {
      cp_async<16>(to, from_a, valid * 2);
      cp_async<16>(to + Layout::kBytes, from_b, valid * 2);
    } else {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int at = pair * 2 < valid ? pair * 2 : 0, bytes = pair * 2 < valid ? 4 : 0;
        cp_async<4>(to + pair * 4, from_a + at, bytes);
        cp_async<4>(to + Layout::kBytes + pair * 4, from_b + at, bytes);
      }
    }
  }
}

// An A operand of m16n8k16, 16 rows x 16 elements.
struct Fragment {
  uint32_t words[4];
};

// Rows of a tile as A operands, read from shared memory whenever they are needed.
template <int kHeadSize>
struct TileRows {
  const unsigned char* tile;
  int row;

  __device__ __forceinline__ Fragment fragment(int m, int step) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    Fragment a;
    ldmatrix(a.words,
             tile + TileLayout<kHeadSize>::at(row + m * 16, lane % 16, step * 2 + lane / 16));
    return a;
  }
};

// The same held in registers.
template <int kHeadSize, int kRowTiles>
struct HeldRows {
  Fragment fragments[kRowTiles][kHeadSize / 16];

  __device__ __forceinline__ const Fragment& fragment(int m, int step) const {
    return fragments[m][step];
  }
  // From global memory: positions[i] is that of the lane's row i, -1 for a row of zeros.
  template <typename scalar_t>
  __device__ void load(const HeadRows<scalar_t>& rows, int32_t head_size,
                       const int32_t (&positions)[2 * kRowTiles]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const scalar_t* from = rows.row(positions[i] < 0 ? 0 : positions[i]) + lane % 4 * 2;
      const int32_t left = positions[i] < 0 ? 0 : head_size - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kHeadSize / 8; ++j) {
        fragments[i / 2][j / 2].words[j % 2 * 2 + i % 2] =
            j * 8 < left ? load_vector<uint32_t>(from + j * 8) : 0u;
      }
    }
  }
  template <typename Change>
  __device__ __forceinline__ void for_each(const Change& change) {
#pragma unroll
    for (int i = 0; i < kRowTiles * kHeadSize / 4; ++i) {
      change(fragments[i / (kHeadSize / 4)][i / 4 % (kHeadSize / 16)].words[i % 4]);
    }
  }
};

// acc (rows x kColumns) += a (rows x kHeadSize) tile[row .. row + kColumns - 1]^T.
template <typename scalar_t, int kHeadSize, int kColumns, int kRowTiles, typename A>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kRowTiles][kColumns / 8][4],
                                                    const A& a, const unsigned char* tile,
                                                    int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int step = 0; step < kHeadSize / 16; ++step) {
    Fragment left[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) left[m] = a.fragment(m, step);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t b[4];
      ldmatrix(b, tile + TileLayout<kHeadSize>::at(row + n * 8, lane % 8 + lane / 16 * 8,
                                                   step * 2 + lane / 8 % 2));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_m16n8k16<scalar_t>(acc[m][n], left[m].words, low);
        mma_m16n8k16<scalar_t>(acc[m][n + 1], left[m].words, high);
      }
    }
  }
}

// acc (rows x kHeadSize) += w (rows x kColumns) tile[row .. row + kColumns - 1], w rounded to
// scalar_t. w is an accumulator of multiply_transposed: its layout is that of two A fragments.
template <typename scalar_t, int kHeadSize, int kColumns, int kRowTiles>
__device__ __forceinline__ void multiply(float (&acc)[kRowTiles][kHeadSize / 8][4],
                                         const float (&w)[kRowTiles][kColumns / 8][4],
                                         const unsigned char* tile, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&pair)[4] = w[m][step * 2 + i / 2];
        a[m][i] = pack_pair<scalar_t>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kHeadSize / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_trans(b,
                     tile + TileLayout<kHeadSize>::at(row + step * 16, lane % 16, n + lane / 16));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_m16n8k16<scalar_t>(acc[m][n], a[m], low);
        mma_m16n8k16<scalar_t>(acc[m][n + 1], a[m], high);
      }
    }
  }
}

template <int kRowTiles, int kCount>
__device__ __forceinline__ void clear(float (&x)[kRowTiles][kCount][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kCount * 4; ++i) x[i / 4 / kCount][i / 4 % kCount][i % 4] = 0.0f;
}

// The positions of a lane's rows, -1 beyond the walk: row i is at index first + 8 * i.
template <int kRows>
__device__ void positions_of(const SparseAttentionParams& p, int32_t first,
                             int32_t (&positions)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    positions[i] = first + i * 8 < p.length ? walked_position(p.rule, first + i * 8) : -1;
  }
}

// Writes factor[i] * acc to the rows of a lane.
template <typename scalar_t, int kRowTiles, int kCount>
__device__ void store_rows(const HeadRows<scalar_t>& rows, int32_t head_size,
                           const int32_t (&positions)[2 * kRowTiles],
                           const float (&acc)[kRowTiles][kCount][4],
                           const float (&factor)[2 * kRowTiles]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    if (positions[i] < 0) continue;
    scalar_t* to = rows.row(positions[i]) + lane % 4 * 2;
    const int32_t left = head_size - lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const float (&x)[4] = acc[i / 2][n];
      const uint32_t pair =
          pack_pair<scalar_t>(factor[i] * x[i % 2 * 2], factor[i] * x[i % 2 * 2 + 1]);
      if (n * 8 < left) store_vector(to + n * 8, pair);
    }
  }
}

}  // namespace dalle
