// What a chunk of decode attention leaves behind, and how the chunks of a query become its
// output: in one order, whoever computed them. No torch here.
#pragma once

#include "common/simt.h"
#include "decode_attention/decode_attention_plan.h"

namespace dalle {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;
constexpr int kMergeLanes = kDecodeThreads / kTileSamples;  // threads of a sample in a merge

// Weights of 16-bit numbers are powers of 2, one instruction each, of scores times log2 e; those of
// fp32 are exponentials to the last bits, as no rounding of log2 e lies between.
template <typename scalar_t>
__device__ __forceinline__ float score_factor(double scale) {
  return static_cast<float>(sizeof(scalar_t) == 4 ? scale : scale * kLog2E);
}
template <typename scalar_t>
__device__ __forceinline__ float weight_of(float x) {
  if constexpr (sizeof(scalar_t) == 4) {
    return expf(x);
  } else {
    return exp2_approx(x);
  }
}

// A maximum as it is subtracted: no -inf - (-inf) where there is no key yet.
__device__ __forceinline__ float shift_of(float m) { return m == -INFINITY ? 0.0f : m; }

// A row of floats: the sum of values by the weights of score - m, then m, then the sum of the
// weights. 8 rows of 16-byte accesses lie in different banks.
template <int kHead>
struct ChunkRow {
  static constexpr int kStride = kHead + 4;  // floats

  __device__ __forceinline__ static void end(float* row, float m, float l) {
    store_vector(row + kHead, float4{m, l, 0.0f, 0.0f});
  }
};

// Adds up the rows of a query, `stride` floats apart, the text's before the image's, for the
// elements that `lane` of kMergeLanes has, and stores them.
template <typename scalar_t, int kHead>
__device__ __forceinline__ void merge_chunks(const float* rows, int64_t stride, int count,
                                             scalar_t* out, int head_size, int lane) {
  constexpr int kMine = kHead / kMergeLanes;
  static_assert(kMine % 4 == 0, "16-byte accesses");
  float m = -INFINITY;
  for (int i = 0; i < count; ++i) m = fmaxf(m, rows[i * stride + kHead]);
  const float shift = shift_of(m);
  float l = 0.0f, sum[kMine];
#pragma unroll
  for (int d = 0; d < kMine; ++d) sum[d] = 0.0f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float* row = rows + i * stride;
    const float4 last = load_vector<float4>(row + kHead);  // m, l
    const float weight = weight_of<scalar_t>(last.x - shift);
    l = fmaf(weight, last.y, l);
#pragma unroll
    for (int d = 0; d < kMine; d += 4) {
      const float4 x = load_vector<float4>(row + lane * kMine + d);
      sum[d] = fmaf(weight, x.x, sum[d]);
      sum[d + 1] = fmaf(weight, x.y, sum[d + 1]);
      sum[d + 2] = fmaf(weight, x.z, sum[d + 2]);
      sum[d + 3] = fmaf(weight, x.w, sum[d + 3]);
    }
  }
  const float factor = 1.0f / l;
#pragma unroll
  for (int d = 0; d < kMine; d += 4) {  // D is a multiple of 4
    const int column = lane * kMine + d;
    if (column >= head_size) continue;
    if constexpr (sizeof(scalar_t) == 4) {
      store_vector(out + column, float4{factor * sum[d], factor * sum[d + 1], factor * sum[d + 2],
                                        factor * sum[d + 3]});
    } else {
      store_vector(out + column,
                   uint2{pack_pair<scalar_t>(factor * sum[d], factor * sum[d + 1]),
                         pack_pair<scalar_t>(factor * sum[d + 2], factor * sum[d + 3])});
    }
  }
}

// The row of one sample and head in a (B, S, H, D) tensor.
template <typename scalar_t>
__device__ __forceinline__ scalar_t* decode_row(const DecodeRows& rows, int64_t batch,
                                                int64_t sample, int64_t head) {
  return static_cast<scalar_t*>(rows.data) + batch * rows.batch + sample * rows.sample +
         head * rows.head;
}

// The samples of one caption and head that a block has at a time.
struct SampleTile {
  int32_t batch, head, first;
  int32_t count;  // of kTileSamples

  // The row of a sample of the tile; of the last one beyond it.
  template <typename scalar_t>
  __device__ __forceinline__ scalar_t* row(const DecodeRows& rows, int sample) const {
    const int32_t last = first + count - 1, at = first + sample;
    return decode_row<scalar_t>(rows, batch, at < last ? at : last, head);
  }
};

__device__ __forceinline__ bool is_image_slot(const AttentionRule& rule, int64_t slot) {
  return slot >= 0 && slot < int64_t{rule.rows} * rule.columns;
}

}  // namespace dalle
