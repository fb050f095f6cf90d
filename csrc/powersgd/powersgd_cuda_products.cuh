// compress and project of powersgd on CUDA: E += G / scale and P = E Q; Q = E^T P. No torch here.
// Not yet measured on a GPU.
//
// A block makes 128 lines (rows of P, or of Q) by 128 columns of the rank, over one part of the
// depth, the dimension that is summed over. It walks the depth in slabs of 32: raw codes
// of E and the factor's numbers come by cp.async, a slab or two ahead. ldmatrix loads the
// raw codes (transposed for E^T), and they are decoded in registers; the factor is made
// into words of the matrix units in shared memory, once.
//
//   exact  A code has 9 bits of mantissa and so is a tf32 word as it is. The factor is the sum of
//          two such words: two mma a tile.
//   fast   Codes times 2^11 (at most 32736) and the factor, both rounded to half: one mma of twice
//          the depth.
//
// The parts of the depth depend on the shape of a matrix alone; a second kernel adds their sums in
// order. So bits depend neither on the device nor on the other matrices of the launch.
#pragma once

#include "powersgd/powersgd_cuda_window.cuh"

namespace dalle {

constexpr int kFactorRanks = 128;
constexpr float kHalfScale = 2048.0f;  // moves codes into the range of half
constexpr int kSumTile = 4 * kProductThreads;

// Into how many parts the depth is split: so that about 256 blocks work on one matrix, but none on
// less than 128 of the depth, whose partial sums would cost more than they bring.
DALLE_HOST_DEVICE int factor_parts(int64_t lines, int64_t depth) {
  const int64_t tiles = ceil_div(lines, kFactorLines), slabs = ceil_div(depth, kFactorSlab);
  int64_t parts = 256 / tiles;
  if (parts > slabs / 4) parts = slabs / 4;
  if (parts > 16) parts = 16;
  if (parts < 1) parts = 1;
  return static_cast<int>(ceil_div(slabs, ceil_div(slabs, parts)));
}

template <bool kProject, bool kFast, typename grad_t>
struct FactorBlock {
  // fast has less to do in the time that a copy takes.
  static constexpr int kAhead = kFast && (kProject || sizeof(grad_t) == 2) ? 2 : 1;
  using Windows = ErrorWindows<kProject, kAhead, grad_t>;
  // A column of the factor is one row of its tile. exact: of every 8 of the depth a chunk of the
  // even ones and one of the odd ones, and the same of the low words behind; fast: halves in order.
  static constexpr int kChunks = kFast ? kFactorSlab / 8 : 2 * kFactorSlab / 4;
  static constexpr int kFactorBytes = tile_bytes<kChunks>(kFactorRanks);
  static constexpr int kArrivedBytes = kFactorSlab * kFactorRanks * 4;
  static constexpr int kBytes = Windows::kBytes + kFactorBytes + kAhead * kArrivedBytes;
  static constexpr int kLineTiles = 2, kRankTiles = 8;  // 16 x 8, of one warp
  static constexpr int kStep = kFast ? 16 : 8;          // of the depth, of one mma
  static_assert(kBytes <= kMaxSharedBytes);
  static_assert(kProductThreads == 2 * kFactorRanks, "half a slab of a column each");

  const PowerMatrix& m;
  int32_t first, k0;  // line of the tile; of this part of the depth
  Windows windows;
  unsigned char *factors, *arrived;  // words; numbers on their way
  bool vectors;                      // rows of the factor begin at multiples of 16 bytes
  int32_t begin = 0;                 // column of the rank
  int32_t tiles = 0;                 // of 8 columns, of this warp
  float sums[kLineTiles][kRankTiles][4];

  __device__ __forceinline__ FactorBlock(const PowerMatrix& matrix, unsigned char* shared,
                                         int32_t tile)
      : m(matrix),
        first(tile / matrix.parts * kFactorLines),
        k0(tile % matrix.parts * slabs_of_part() * kFactorSlab),
        windows(matrix, shared, first, k0),
        factors(shared + Windows::kBytes),
        arrived(factors + kFactorBytes),
        vectors(matrix.rank % 4 == 0 && is_aligned_16(kProject ? matrix.left : matrix.right)) {}

  __device__ __forceinline__ int32_t lines() const {
    return static_cast<int32_t>(kProject ? m.columns : m.rows);
  }
  __device__ __forceinline__ int32_t depth() const {
    return static_cast<int32_t>(kProject ? m.rows : m.columns);
  }
  __device__ __forceinline__ int32_t slabs_of_part() const {
    return (((depth() + kFactorSlab - 1) / kFactorSlab) + m.parts - 1) / m.parts;
  }
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  // Warps are 4 x 2. One has 32 lines and every other 8 columns, so that both have as many.
  __device__ __forceinline__ static int warp_line() {
    return static_cast<int>(threadIdx.x) / (2 * kWarpSize) * 32;
  }
  __device__ __forceinline__ static int warp_column() {
    return static_cast<int>(threadIdx.x) / kWarpSize % 2 * 8;
  }

  // Starts copying a slab of the factor's columns, a row of kFactorRanks for each of the depth.
  __device__ __forceinline__ void start_factor(int slab) const {
    unsigned char* const to = arrived + slab % kAhead * kArrivedBytes;
    if (vectors) {
      copy_factor<4>(to, slab);
    } else {
      copy_factor<1>(to, slab);
    }
  }
  template <int kN>  // numbers a copy
  __device__ __forceinline__ void copy_factor(unsigned char* to, int slab) const {
    constexpr int kRow = kFactorRanks / kN, kStep = kProductThreads / kRow;
    const int rank = static_cast<int>(m.rank), thread_row = static_cast<int>(threadIdx.x) / kRow;
    const int column = begin + static_cast<int>(threadIdx.x) % kRow * kN;
    const float* const other = kProject ? m.left : m.right;
    const int k = k0 + slab * kFactorSlab + thread_row, left = column < rank ? depth() - k : 0;
    const float* from = other + int64_t{k} * rank + column;
    to += static_cast<int>(threadIdx.x) * kN * 4;
#pragma unroll(kN)
    for (int row = 0; row < kFactorSlab; row += kStep) {
      cp_async<4 * kN>(to, row < left ? from : other, row < left ? 4 * kN : 0);
      to += kProductThreads * kN * 4;
      from += kStep * rank;
    }
  }

  __device__ __forceinline__ void start(int slab) const {
    windows.start(slab);
    start_factor(slab);
  }

  // Converts a slab of the factor to the words of mma: each thread half a slab of one column.
  __device__ __forceinline__ void split_factor(int slab) const {
    const int row = static_cast<int>(threadIdx.x) % kFactorRanks;
    const int half = static_cast<int>(threadIdx.x) / kFactorRanks;
    const float* const from =
        reinterpret_cast<const float*>(arrived + slab % kAhead * kArrivedBytes) + row;
#pragma unroll
    for (int eight = 2 * half; eight < 2 * half + 2; ++eight) {
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = from[(eight * 8 + i) * kFactorRanks];
      if constexpr (kFast) {
        const uint4 words{
            pack_pair<__half>(values[0], values[1]), pack_pair<__half>(values[2], values[3]),
            pack_pair<__half>(values[4], values[5]), pack_pair<__half>(values[6], values[7])};
        store_vector(factors + chunk_offset<kChunks>(row, eight), words);
      } else {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const SplitTf32 a = split_tf32(values[odd]), b = split_tf32(values[2 + odd]);
          const SplitTf32 c = split_tf32(values[4 + odd]), d = split_tf32(values[6 + odd]);
          const int high = 2 * eight + odd, low = high + kChunks / 2;
          store_vector(factors + chunk_offset<kChunks>(row, high),
                       uint4{a.high, b.high, c.high, d.high});
          store_vector(factors + chunk_offset<kChunks>(row, low),
                       uint4{a.low, b.low, c.low, d.low});
        }
      }
    }
  }

  // Codes of 16 lines from `line` on and 8 of the depth from 8 `eight` on, for each of two: word
  // 2 i + j has lines g + 8 j and 2t, 2t + 1 of the depth. The two differ in the one or the other.
  template <int kLineStep, int kEightStep>
  __device__ __forceinline__ void load_codes(const unsigned char* window, int line, int eight,
                                             uint32_t (&words)[4]) const {
    const int which = lane() / 16, at = line + which * kLineStep + lane() / 8 % 2 * 8;
    const int k = (eight + which * kEightStep) * 8;
    if constexpr (kProject) {
      ldmatrix_trans(words, window + chunk_offset<Windows::kChunks>(k + lane() % 8, at / 8));
    } else {
      ldmatrix(words, window + chunk_offset<Windows::kChunks>(at + lane() % 8, k / 8));
    }
  }

  // Two codes as halves, times kHalfScale. A code's exponent and mantissa are those of a float that
  // is 2^67 times too small; codes under 2^-59 convert wrongly, but as halves they are zero.
  __device__ __forceinline__ static uint32_t halves_of(uint32_t word) {
    constexpr float kMove = 0x1p67f * kHalfScale;
    const uint32_t low = (word << 14 & 0x1FFFC000u) | (word << 16 & 0x80000000u);
    const uint32_t high = (word >> 2 & 0x1FFFC000u) | (word & 0x80000000u);
    return pack_pair<__half>(__uint_as_float(low) * kMove, __uint_as_float(high) * kMove);
  }

  __device__ __forceinline__ void multiply(int slab) {
    if (first + warp_line() >= lines()) return;
    const unsigned char* const window = windows.window(slab);
    const int left = depth() - k0 - slab * kFactorSlab;
#pragma unroll 1
    for (int k = 0; k < kFactorSlab && k < left; k += kStep) {
      if constexpr (kFast) {
        multiply_halves(window, k);
      } else {
        multiply_words(window, k);
      }
    }
  }

  __device__ __forceinline__ void multiply_halves(const unsigned char* window, int k) {
    uint32_t a[kLineTiles][4];
#pragma unroll
    for (int i = 0; i < kLineTiles; ++i) {
      load_codes<0, 1>(window, warp_line() + 16 * i, k / 8, a[i]);
#pragma unroll
      for (int w = 0; w < 4; ++w) a[i][w] = halves_of(a[i][w]);
    }
    const unsigned char* const fragments =
        factors + chunk_offset<kChunks>(lane() / 16 * 16 + warp_column() + lane() % 8,
                                        k / 8 + lane() / 8 % 2);
    uint32_t b[2][4];  // of two tiles, one pair ahead
    ldmatrix(b[0], fragments);
#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile) {
      if (tile >= tiles) break;
      const int pair = tile / 2;
      if (tile % 2 == 0 && tile + 2 < kRankTiles) {
        ldmatrix(b[(pair + 1) % 2], fragments + chunk_offset<kChunks>((tile + 2) * 16, 0));
      }
      const uint32_t words[2] = {b[pair % 2][tile % 2 * 2], b[pair % 2][tile % 2 * 2 + 1]};
#pragma unroll
      for (int i = 0; i < kLineTiles; ++i) mma_m16n8k16<__half>(sums[i][tile], a[i], words);
    }
  }

  // A lane's word holds neighbours of the depth, 2t and 2t + 1, where mma takes t and t + 4: their
  // order does not matter as long as the factor has the same.
  __device__ __forceinline__ void multiply_words(const unsigned char* window, int k) {
    uint32_t codes[4], a[kLineTiles][4];
    load_codes<16, 0>(window, warp_line(), k / 8, codes);
#pragma unroll
    for (int i = 0; i < kLineTiles * 4; ++i) {
      const uint32_t word = codes[i / 4 * 2 + i % 2];
      a[i / 4][i % 4] = decode<Format::k169>(i % 4 < 2 ? word & 0xFFFFu : word >> 16);
    }
    const unsigned char* const fragments =
        factors + chunk_offset<kChunks>(warp_column() + lane() % 8,
                                        k / 4 + lane() / 8 % 2 + lane() / 16 * (kChunks / 2));
    uint32_t b[2][4];  // high and low of a tile, one tile ahead
    ldmatrix(b[0], fragments);
#pragma unroll
    for (int tile = 0; tile < kRankTiles; ++tile) {
      if (tile >= tiles) break;
      if (tile + 1 < kRankTiles) {
        ldmatrix(b[(tile + 1) % 2], fragments + chunk_offset<kChunks>((tile + 1) * 16, 0));
      }
      const uint32_t (&words)[4] = b[tile % 2];
      // From zero and added plainly: mma truncates, and what it cuts from a long sum piles up.
      float terms[kLineTiles][4] = {};
#pragma unroll
      for (int i = 0; i < kLineTiles; ++i) {
        mma_m16n8k8_tf32(terms[i], a[i], {words[2], words[3]});
      }
#pragma unroll
      for (int i = 0; i < kLineTiles; ++i) {
        mma_m16n8k8_tf32(terms[i], a[i], {words[0], words[1]});
      }
#pragma unroll
      for (int i = 0; i < kLineTiles * 4; ++i) sums[i / 4][tile][i % 4] += terms[i / 4][i % 4];
    }
  }

  __device__ __forceinline__ void store(float* out, float scale) const {
    const int rank = static_cast<int>(m.rank);
    const bool pairs = rank % 2 == 0 && reinterpret_cast<uintptr_t>(out) % 8 == 0;
#pragma unroll
    for (int i = 0; i < kLineTiles * 2; ++i) {
      const int line = first + warp_line() + i * 8 + lane() / 4;
      if (line >= lines()) break;
      const int column = begin + warp_column() + lane() % 4 * 2;
      float* const to = out + int64_t{line} * rank + column;
#pragma unroll
      for (int tile = 0; tile < kRankTiles; ++tile) {
        const int left = rank - column - tile * 16;
        const float (&d)[4] = sums[i / 2][tile];
        const float2 pair{d[i % 2 * 2] * scale, d[i % 2 * 2 + 1] * scale};
        if (pairs && left > 0) store_vector(to + tile * 16, pair);
        if (!pairs && left > 0) to[tile * 16] = pair.x;
        if (!pairs && left > 1) to[tile * 16 + 1] = pair.y;
      }
    }
  }

  // The first columns of the rank add the gradients; those beyond kFactorRanks read E again.
  __device__ __forceinline__ void run(const PowerFactors& f, float* out) {
    const bool wanted = !kProject && !skipped(f);
    windows.factor = wanted ? gradient_factor(f) : 0.0f;
    const int each = slabs_of_part(), left = (depth() - k0 + kFactorSlab - 1) / kFactorSlab;
    const int slabs = left < each ? left : each;
#pragma unroll 1
    for (begin = 0; begin < m.rank; begin += kFactorRanks) {
      windows.adds = wanted && begin == 0;
      const int columns = static_cast<int>(m.rank) - begin - warp_column();
      tiles = (columns + 15) / 16;
#pragma unroll
      for (int i = 0; i < kLineTiles * kRankTiles * 4; ++i) {
        sums[i / 4 / kRankTiles][i / 4 % kRankTiles][i % 4] = 0.0f;
      }
      __syncthreads();  // E is written and its windows are read
#pragma unroll
      for (int slab = 0; slab < kAhead; ++slab) {
        if (slab < slabs) start(slab);
        cp_async_commit();
      }
#pragma unroll 1
      for (int slab = 0; slab < slabs; ++slab) {
        cp_async_wait<kAhead - 1>();
        windows.add(slab);
        __syncthreads();  // this slab has arrived; the previous one is read
        split_factor(slab);
        __syncthreads();  // its words are stored; its buffer is free
        if (slab + kAhead < slabs) start(slab + kAhead);
        cp_async_commit();
        multiply(slab);
      }
      store(out, (kFast ? 1.0f / kHalfScale : 1.0f) / f.error_scale);
    }
  }
};

// A block takes 128 lines of one matrix over one part of its depth, for all columns of the rank.
// Each of its 8 warps has 32 lines and every other 8 columns, a lane its elements of the mma
// fragments (ptx.cuh).
template <bool kProject, bool kFast, typename grad_t>
__global__ void __launch_bounds__(kProductThreads, 2)
    powersgd_factor_kernel(PowerGroup group, PowerFactors f) {
  DALLE_DYNAMIC_SHARED(shared);
  const PowerMatrix& m = matrix_of_tile(group, blockIdx.x);
  const int32_t tile = static_cast<int32_t>(blockIdx.x - m.tile_begin);
  FactorBlock<kProject, kFast, grad_t> block(m, shared, tile);
  const bool split = m.parts > 1;
  block.run(f, split ? m.partials + tile % m.parts * m.rank * block.lines() : m.out);
}

// Adds the partial sums of split matrices, in the order of their parts: a thread takes every 256th
// of the 1,024 numbers of its block.
template <bool kProject>
__global__ void __launch_bounds__(kProductThreads)
    powersgd_sum_kernel(PowerGroup group, PowerFactors) {
  const PowerMatrix& m = matrix_of_tile(group, blockIdx.x);
  const int64_t size = (kProject ? m.columns : m.rows) * m.rank;
  const int64_t begin = (blockIdx.x - m.tile_begin) * kSumTile + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kSumTile / kProductThreads; ++j) {
    const int64_t at = begin + j * kProductThreads;
    if (at >= size) break;
    float sum = m.partials[at];
#pragma unroll 4
    for (int part = 1; part < m.parts; ++part) sum += m.partials[part * size + at];
    m.out[at] = sum;
  }
}

// Chooses the parts of each matrix; returns how many floats their partial sums take.
template <bool kProject>
int64_t split_matrices(PowerMatrix* matrices, int64_t count) {
  int64_t floats = 0;
  for (PowerMatrix* m = matrices; m != matrices + count; ++m) {
    const int64_t lines = kProject ? m->columns : m->rows;
    m->parts = factor_parts(lines, kProject ? m->rows : m->columns);
    if (m->parts > 1) floats += m->parts * lines * m->rank;
  }
  return floats;
}

// compress: E, G (m, n) and Q (n, r); project: E^T (n, m) and P (m, r). Both: lines x depth ->
// tiles of 128 lines times parts of the depth -> a block each -> P (m, r) or Q (n, r), or partial
// sums (parts, lines, r) in `work`, as many as split_matrices says -> 1,024 sums a block -> P or Q.
template <bool kProject>
cudaError_t launch_powersgd_factor(PowerMatrix* matrices, int64_t count, const PowerFactors& f,
                                   float* work, bool fast, void* stream) {
  for (PowerMatrix* m = matrices; m != matrices + count; ++m) {
    if (m->parts == 1) continue;
    m->partials = work;
    work += m->parts * (kProject ? m->columns : m->rows) * m->rank;
  }
  const auto tiles = [](const PowerMatrix& m) {
    return ceil_div(kProject ? m.columns : m.rows, kFactorLines) * m.parts;
  };
  const auto sums = [](const PowerMatrix& m) {
    const int64_t size = (kProject ? m.columns : m.rows) * m.rank;
    return m.parts > 1 ? ceil_div(size, kSumTile) : 0;
  };
  return launch_matrices(matrices, count, [&](const PowerMatrix* begin, const PowerMatrix* end) {
    const auto launch_of = [&](auto grad) {
      using grad_t = decltype(grad);
      using Exact = FactorBlock<kProject, false, grad_t>;
      using Fast = FactorBlock<kProject, true, grad_t>;
      return fast ? launch_group(powersgd_factor_kernel<kProject, true, grad_t>, Fast::kBytes,
                                 begin, end, f, tiles, stream)
                  : launch_group(powersgd_factor_kernel<kProject, false, grad_t>, Exact::kBytes,
                                 begin, end, f, tiles, stream);
    };
    cudaError_t error;
    if constexpr (kProject) {
      error = launch_of(float());  // it has no gradients
    } else {
      error = with_cuda_scalar(begin->grad_kind, launch_of);
    }
    if (error != cudaSuccess) return error;
    return launch_group(powersgd_sum_kernel<kProject>, 0, begin, end, f, sums, stream);
  });
}

}  // namespace dalle
