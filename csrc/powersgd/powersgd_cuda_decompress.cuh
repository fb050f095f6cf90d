// decompress of powersgd on CUDA: D = P Q^T and E -= D / machines. No torch here. Not yet measured
// on a GPU.
//
// A block makes 64 rows by 128 columns of D. It walks the rank in slabs of 32: the next slab comes
// by cp.async, each thread to addresses that only it reads, while the warps multiply the previous
// one; each thread splits what it copied into tf32 words, once.
//
//   exact  a factor is the sum of two words: three mma a tile, without low times low
//   fast   a factor is rounded to one word: one mma
#pragma once

#include "powersgd/powersgd_cuda_tile.cuh"

namespace dalle {

constexpr int kDecompressRows = 64, kDecompressColumns = 128, kDecompressSlab = 32;

template <bool kFast>
struct DecompressBlock {
  static constexpr int kWords = kFast ? 1 : 2;         // of a number
  static constexpr int kChunks = kDecompressSlab / 4;  // of 4 numbers, in a row of a tile
  static constexpr int kLines = kDecompressRows + kDecompressColumns;  // rows of P, then of Q
  static constexpr int kTileBytes = tile_bytes<kChunks>(kLines);
  static constexpr int kArrivedBytes = kLines * kChunks * 16;
  static constexpr int kThreadChunks = kLines * kChunks / kProductThreads;
  static constexpr int kPitch =
      kDecompressColumns + 8;  // no two lanes that store a pair in one bank
  static constexpr int kResultBytes = kDecompressRows * kPitch * 4;
  static constexpr int kBytes = kArrivedBytes + kWords * kTileBytes;
  static_assert(kBytes <= kMaxSharedBytes);
  static_assert(kResultBytes <= kBytes, "the results go where the factors were");
  static constexpr int kRowTiles = 2, kColumnTiles = 4;  // 16 x 8, of one warp

  const PowerMatrix& m;
  unsigned char *arrived, *tiles;  // tiles: of high words, and behind them of low ones
  int32_t row, column;             // first of the tile of D
  int32_t rank, lane, warp_row, warp_column;
  bool vectors;  // rows of the factors begin at multiples of 16 bytes
  float sums[kRowTiles][kColumnTiles][4] = {};

  __device__ DecompressBlock(const PowerMatrix& matrix, unsigned char* shared, int32_t tile)
      : m(matrix),
        arrived(shared),
        tiles(shared + kArrivedBytes),
        rank(static_cast<int32_t>(matrix.rank)),
        lane(static_cast<int>(threadIdx.x) % kWarpSize),
        warp_row(static_cast<int>(threadIdx.x) / (4 * kWarpSize) * 32),
        warp_column(static_cast<int>(threadIdx.x) / kWarpSize % 4 * 32),
        vectors(matrix.rank % 4 == 0 && is_aligned_16(matrix.left) && is_aligned_16(matrix.right)) {
    const auto across = static_cast<int32_t>(ceil_div(m.columns, kDecompressColumns));
    row = tile / across * kDecompressRows;
    column = tile % across * kDecompressColumns;
  }

  // Starts copying the numbers k0 .. of the rank; zeros beyond the rank and the factors' ends.
  __device__ __forceinline__ void start(int k0) const {
    if (vectors) {
      copy<4>(k0);
    } else {
      copy<1>(k0);
    }
  }
  template <int kN>  // numbers a copy
  __device__ __forceinline__ void copy(int k0) const {
    constexpr int kStep = kProductThreads / kChunks;  // lines from one chunk to the next
    static_assert(kDecompressRows % kStep == 0);
    const int thread_line = static_cast<int>(threadIdx.x) / kChunks;
    const int k = k0 + static_cast<int>(threadIdx.x) % kChunks * 4;
    unsigned char* to = arrived + threadIdx.x * 16;
#pragma unroll(kN == 4 ? kThreadChunks : 1)
    for (int j = 0; j < kThreadChunks; ++j) {
      const bool left = j * kStep < kDecompressRows;
      const int line = (left ? row : column - kDecompressRows) + thread_line + j * kStep;
      const float* const factor = left ? m.left : m.right;
      const int count = line < (left ? m.rows : m.columns) ? rank - k : 0;  // in range
      const float* const from = factor + int64_t{line} * rank + k;
#pragma unroll
      for (int i = 0; i < 4; i += kN) {
        cp_async<4 * kN>(to + i * 4, i < count ? from + i : factor, i < count ? 4 * kN : 0);
      }
      to += kProductThreads * 16;
    }
  }

  // Splits the numbers that this thread has copied into tf32 words.
  __device__ __forceinline__ void split() const {
#pragma unroll
    for (int j = 0; j < kThreadChunks; ++j) {
      const int id = static_cast<int>(threadIdx.x) + j * kProductThreads;
      const float4 x = load_vector<float4>(arrived + id * 16);
      const SplitTf32 a = split_tf32(x.x), b = split_tf32(x.y);
      const SplitTf32 c = split_tf32(x.z), d = split_tf32(x.w);
      unsigned char* const to = tiles + chunk_offset<kChunks>(id / kChunks, id % kChunks);
      store_vector(to, uint4{a.high, b.high, c.high, d.high});
      if constexpr (!kFast) store_vector(to + kTileBytes, uint4{a.low, b.low, c.low, d.low});
    }
  }

  // Steps of 8 of the rank.
  __device__ __forceinline__ void multiply(int steps) {
    if (row + warp_row >= m.rows) return;
    const int left = (static_cast<int>(m.columns) - column - warp_column + 7) / 8;
#pragma unroll
    for (int step = 0; step < kDecompressSlab / 8; ++step) {
      if (step >= steps) break;
      uint32_t a[kWords][kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kWords * kRowTiles; ++i) {
        const int line = warp_row + i % kRowTiles * 16 + lane % 16;
        ldmatrix(
            a[i / kRowTiles][i % kRowTiles],
            tiles + i / kRowTiles * kTileBytes + chunk_offset<kChunks>(line, 2 * step + lane / 16));
      }
#pragma unroll
      for (int pair = 0; pair < kColumnTiles; pair += 2) {
        if (pair >= left) break;
        uint32_t b[kWords][4];  // two tiles
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int line = kDecompressRows + warp_column + pair * 8 + lane / 16 * 8 + lane % 8;
          ldmatrix(b[w],
                   tiles + w * kTileBytes + chunk_offset<kChunks>(line, 2 * step + lane / 8 % 2));
        }
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          if (pair + which >= left) break;
          float terms[kRowTiles][4] = {};  // from zero and added plainly, as in compress
#pragma unroll
          for (int product = 0; product < (kFast ? 1 : 3); ++product) {
            const int of_a = !kFast && product == 1, of_b = !kFast && product == 0;
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
              mma_m16n8k8_tf32(terms[i], a[of_a][i], {b[of_b][2 * which], b[of_b][2 * which + 1]});
            }
          }
#pragma unroll
          for (int i = 0; i < kRowTiles * 4; ++i) {
            sums[i / 4][pair + which][i % 4] += terms[i / 4][i % 4];
          }
        }
      }
    }
  }

  // Through shared memory, so that a thread has 8 neighbours: 16-byte accesses of D and E.
  __device__ __forceinline__ void store(const PowerFactors& f, float* results) const {
#pragma unroll
    for (int i = 0; i < kRowTiles * kColumnTiles * 2; ++i) {
      const int which = i / 2 / kColumnTiles, tile = i / 2 % kColumnTiles, half = i % 2;
      const int line = warp_row + which * 16 + half * 8 + lane / 4;
      const int at = line * kPitch + warp_column + tile * 8 + lane % 4 * 2;
      const float (&d)[4] = sums[which][tile];
      store_vector(results + at, float2{d[2 * half], d[2 * half + 1]});
    }
    __syncthreads();
    const bool keep = f.feedback == 0.0f || skipped(f);
    if (m.columns % 8 == 0 && is_aligned_16(m.error) && is_aligned_16(m.out)) {
      store_eights(f, results, keep);
      return;
    }
    for (int i = static_cast<int>(threadIdx.x); i < kDecompressRows * kDecompressColumns;
         i += kProductThreads) {
      const int64_t y = row + i / kDecompressColumns, x = column + i % kDecompressColumns;
      if (y >= m.rows || x >= m.columns) continue;
      const int64_t at = y * m.columns + x;
      const float sum = results[i / kDecompressColumns * kPitch + i % kDecompressColumns];
      m.out[at] = sum;
      if (!keep) {
        const float left = decoded_code(m.error[at]) - sum * f.feedback;
        m.error[at] = static_cast<uint16_t>(encoded_code(left));
      }
    }
  }

  __device__ __forceinline__ void store_eights(const PowerFactors& f, const float* results,
                                               bool keep) const {
    constexpr int kEights = kDecompressColumns / 8,
                  kThreadEights = kDecompressRows * kEights / kProductThreads;
    const int x = static_cast<int>(threadIdx.x) % kEights * 8;
    const int y = static_cast<int>(threadIdx.x) / kEights;
    constexpr int kStep = kProductThreads / kEights;
    uint4 codes[kThreadEights];
#pragma unroll
    for (int j = 0; j < kThreadEights; ++j) {  // all loads are issued before the first is used
      const int64_t line = row + y + j * kStep;
      const bool inside = line < m.rows && column + x < m.columns;
      codes[j] =
          !keep && inside ? load_vector<uint4>(m.error + line * m.columns + column + x) : uint4{};
    }
#pragma unroll
    for (int j = 0; j < kThreadEights; ++j) {
      const int64_t line = row + y + j * kStep, at = line * m.columns + column + x;
      if (line >= m.rows || column + x >= m.columns) break;
      const float* const from = results + (y + j * kStep) * kPitch + x;
      const float4 low = load_vector<float4>(from), high = load_vector<float4>(from + 4);
      store_vector(m.out + at, low);
      store_vector(m.out + at + 4, high);
      if (keep) continue;
      const float sum[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      uint32_t words[4] = {codes[j].x, codes[j].y, codes[j].z, codes[j].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = changed_codes(words[w], [&](float value, int which) {
          return value - sum[2 * w + which] * f.feedback;
        });
      }
      store_vector(m.error + at, uint4{words[0], words[1], words[2], words[3]});
    }
  }
};

// A block takes 64 x 128 of one D, each of its 8 warps 32 x 32 over the full rank, a lane its
// elements of the mma fragments (ptx.cuh); then a thread stores 8 neighbours of a row at a time.
template <bool kFast>
__global__ void __launch_bounds__(kProductThreads, kFast ? 3 : 2)
    powersgd_decompress_kernel(PowerGroup group, PowerFactors f) {
  DALLE_DYNAMIC_SHARED(shared);
  const PowerMatrix& m = matrix_of_tile(group, blockIdx.x);
  DecompressBlock<kFast> block(m, shared, static_cast<int32_t>(blockIdx.x - m.tile_begin));
  block.start(0);
  cp_async_commit();
#pragma unroll 1
  for (int k0 = 0; k0 < block.rank; k0 += kDecompressSlab) {
    cp_async_wait<0>();
    __syncthreads();  // the words of the previous slab are read
    block.split();
    if (k0 + kDecompressSlab < block.rank) block.start(k0 + kDecompressSlab);
    cp_async_commit();
    __syncthreads();  // this slab's words are stored
    block.multiply((block.rank - k0 + 7) / 8);
  }
  __syncthreads();
  block.store(f, reinterpret_cast<float*>(shared));
}

// P (m, r), Q (n, r) -> tiles of 64 x 128 of D, matrix by matrix -> a block each -> D (m, n) and E
// (m, n) in place.
inline cudaError_t launch_powersgd_decompress(const PowerMatrix* matrices, int64_t count,
                                              const PowerFactors& f, bool fast, void* stream) {
  const auto tiles = [](const PowerMatrix& m) {
    return ceil_div(m.rows, kDecompressRows) * ceil_div(m.columns, kDecompressColumns);
  };
  return launch_matrices(matrices, count, [&](const PowerMatrix* begin, const PowerMatrix* end) {
    return fast ? launch_group(powersgd_decompress_kernel<true>, DecompressBlock<true>::kBytes,
                               begin, end, f, tiles, stream)
                : launch_group(powersgd_decompress_kernel<false>, DecompressBlock<false>::kBytes,
                               begin, end, f, tiles, stream);
  });
}

}  // namespace dalle
