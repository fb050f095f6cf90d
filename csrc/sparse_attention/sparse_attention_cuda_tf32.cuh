// The two products of attention in fp32 on tensor cores: 3xTF32 (Ootomo and Yokota, "Recovering
// single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
// performance", 2022). No torch here. Not yet measured on a GPU.
//
// x = high + 2^-12 low but for the last bit of one float in four: high is x rounded to the 11 bits
// of tf32, low the exact rest times 2^12 (so that it does not vanish where x is small), of which
// mma reads 11 bits. Then x y = high high + 2^-12 (high low + low high), and what is left out is
// at most 2^-22 of |x y|. Where y is a value, not a weight, the bit that `low` lacks is a word of
// its own: a query that sees one key copies its value exactly.
//
// mma truncates: products are cut to a grid of 2^-24 of the power of two of the largest one, and
// the sum to a float (Fasi et al. 2021; Xie et al. 2025). So each k8 product of high words starts
// at zero and is added to the sum by a plain addition, which rounds to nearest: what is cut is of 8
// terms, not of the whole sum, and does not pile up towards zero. The products with low words add
// up in mma itself, where an error counts 2^-12.
#pragma once

#include "sparse_attention/sparse_attention_cuda_float_tile.cuh"

namespace dalle {

constexpr float kLowScale = 4096.0f;

struct Tf32Words {
  uint32_t high, low;
};
// As to_tf32 for finite x, without its test for others: those have NaN in `low`. The 13 low bits of
// `low` are not zero; mma ignores them.
__device__ __forceinline__ Tf32Words tf32_words(float x) {
  const uint32_t high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  return {high, __float_as_uint((x - __uint_as_float(high)) * kLowScale)};
}
// What mma does not read of `low`.
__device__ __forceinline__ uint32_t rest_of(uint32_t low) {
  return __float_as_uint(__uint_as_float(low) - __uint_as_float(low & 0xffffe000u));
}

// An A operand, 16 x 8, and a B operand, 8 x 8.
struct Tf32Left {
  uint32_t high[4], low[4];

  __device__ __forceinline__ void set(int i, float x) {
    const Tf32Words words = tf32_words(x);
    high[i] = words.high, low[i] = words.low;
  }
};
struct Tf32Right {
  uint32_t high[2], low[2];

  __device__ __forceinline__ void set(int i, float x) {
    const Tf32Words words = tf32_words(x);
    high[i] = words.high, low[i] = words.low;
  }
};

// Sums of a 16 x 8 product: of high words, rounded to nearest, and of those with a low word.
struct Tf32Sums {
  float high[4], low[4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int e = 0; e < 4; ++e) high[e] = low[e] = 0.0f;
  }
  __device__ __forceinline__ void add(const Tf32Left& a, const Tf32Right& b) {
    float terms[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_m16n8k8_tf32(low, a.low, b.high);
    mma_m16n8k8_tf32(terms, a.high, b.high);
    mma_m16n8k8_tf32(low, a.high, b.low);
#pragma unroll
    for (int e = 0; e < 4; ++e) high[e] += terms[e];
  }
  __device__ __forceinline__ void add_rest(const Tf32Left& a, const Tf32Right& b) {
    const uint32_t rest[2] = {rest_of(b.low[0]), rest_of(b.low[1])};
    mma_m16n8k8_tf32(low, a.high, rest);
  }
  __device__ __forceinline__ float total(int e) const {
    return fmaf(low[e], 1.0f / kLowScale, high[e]);
  }
};

// A warp has 16 neighbouring rows; a thread, lane 4 g + t, has rows g and g + 8 of them and, of
// every 8 columns, 2 t and 2 t + 1: what mma gives it of D.
template <int kHeadSize>
struct Tf32Part : RowsOfThread<4> {
  static_assert(kHeadSize % 16 == 0);
  static constexpr int kHead = kHeadSize, kStride = FloatTile<kHeadSize>::kStride;
  static constexpr int kRows = 2, kColumns = 16, kLanes = 4;
  static constexpr int kOutColumns = kHeadSize / kLanes;
  static constexpr int kWeightFloats = kTileSize * kTileSize;
  // 8 x 8 operands of scores and of sums at once, as the registers allow.
  static constexpr int kScores = kHeadSize > 64 ? 2 : 4, kSums = kHeadSize == 64 ? 8 : 4;

  __device__ Tf32Part()
      : RowsOfThread<4>{static_cast<int>(threadIdx.x) / kWarpSize * 16 +
                            static_cast<int>(threadIdx.x) % kWarpSize / kLanes,
                        static_cast<int>(threadIdx.x) % kLanes} {}
  __device__ __forceinline__ int bit(int j) const { return j / 2 % 4 * 8 + lane * 2 + j % 2; }
  __device__ __forceinline__ int column(int n) const { return n / 2 * 8 + lane * 2 + n % 2; }

  // What a thread has of a product is what it needs as an A operand, if step s takes column 8 s + 2
  // t for k = t and column 8 s + 2 t + 1 for k = t + 4. So it finds its own numbers again, four a
  // step; they are in shared memory because a loop cannot index registers.
  struct Weights {
    float* words;

    __device__ explicit Weights(float* shared) : words(shared + threadIdx.x * 4) {}
    __device__ __forceinline__ float* step(int s) const { return words + s * kFloatThreads * 4; }
    __device__ __forceinline__ float at(const Tf32Part&, int i, int j) const {
      return step(j / 2)[j % 2 * 2 + i];
    }
    __device__ __forceinline__ void put(const Tf32Part&, const float (&x)[kRows][kColumns]) {
#pragma unroll
      for (int s = 0; s < kColumns / 2; ++s) {
        store_vector(step(s), float4{x[0][2 * s], x[1][2 * s], x[0][2 * s + 1], x[1][2 * s + 1]});
      }
    }
  };

  // product = the warp's rows of a times the 64 rows of b, both over D. ldmatrix brings 8 rows x 4
  // floats, a word a lane: lane l gives the address of row l % 8 of matrix l / 8.
  __device__ __forceinline__ void multiply_rows(float (&product)[kRows][kColumns], const float* a,
                                                const float* b) const {
    const int l = static_cast<int>(threadIdx.x) % kWarpSize;
    const float* a_row = a + (row - l / kLanes + l % 16) * kStride + l / 16 * 4;
    const float* b_row = b + l % 8 * kStride + l / 8 * 4;
#pragma unroll
    for (int first = 0; first < kTileSize / 8; first += kScores) {
      Tf32Sums sums[kScores];
#pragma unroll
      for (int n = 0; n < kScores; ++n) sums[n].clear();
#pragma unroll 1
      for (int d = 0; d < kHeadSize; d += 16) {
        Tf32Left left[2];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          uint32_t words[4];
          ldmatrix(words, a_row + d + step * 8);
#pragma unroll
          for (int i = 0; i < 4; ++i) left[step].set(i, __uint_as_float(words[i]));
        }
#pragma unroll
        for (int n = 0; n < kScores; ++n) {
          uint32_t words[4];
          ldmatrix(words, b_row + (first + n) * 8 * kStride + d);
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            Tf32Right right;
            right.set(0, __uint_as_float(words[step * 2]));
            right.set(1, __uint_as_float(words[step * 2 + 1]));
            sums[n].add(left[step], right);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kScores; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) product[e / 2][(first + n) * 2 + e % 2] = sums[n].total(e);
      }
    }
  }

  // sum += the warp's rows of weights times the 64 rows of b, which are added up on their own
  // first, as in PlainPart.
  __device__ __forceinline__ void add_weighted_rows(float (&sum)[kRows][kOutColumns],
                                                    const Weights& weights, const float* b) const {
    const int g = static_cast<int>(threadIdx.x) % kWarpSize / kLanes;
    const float* b_row = b + lane * 2 * kStride + g;
#pragma unroll
    for (int first = 0; first < kHeadSize / 8; first += kSums) {
      Tf32Sums sums[kSums];
#pragma unroll
      for (int n = 0; n < kSums; ++n) sums[n].clear();
#pragma unroll 1
      for (int step = 0; step < kTileSize / 8; ++step) {
        const float4 words = load_vector<float4>(weights.step(step));
        Tf32Left left;
        left.set(0, words.x), left.set(1, words.y), left.set(2, words.z), left.set(3, words.w);
        const float* from = b_row + step * 8 * kStride + first * 8;
#pragma unroll
        for (int n = 0; n < kSums; ++n) {
          Tf32Right right;
          right.set(0, from[n * 8]);
          right.set(1, from[n * 8 + kStride]);
          sums[n].add_rest(left, right);
          sums[n].add(left, right);
        }
      }
#pragma unroll
      for (int n = 0; n < kSums; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e / 2][(first + n) * 2 + e % 2] += sums[n].total(e);
      }
    }
  }
};

}  // namespace dalle
