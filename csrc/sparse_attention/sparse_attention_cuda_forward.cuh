// The forward of sparse attention for fp16 and bf16 on tensor cores (mma.sync, fp32 sums): each
// warp takes 16 * kRowTiles queries and an online softmax over the tiles with keys visible to them.
// No torch here. Not yet measured on a GPU.
#pragma once

#include "sparse_attention/sparse_attention_cuda_walk.cuh"

namespace dalle {

template <typename scalar_t, int kHeadSize, int kRowTiles>
struct ForwardWarp : QueryRows<kRowTiles> {
  using Scalar = scalar_t;
  using Rows = QueryRows<kRowTiles>;
  using Rows::kRows;
  using Rows::p;
  using Rows::plan;
  using typename Rows::Visible;
  static constexpr int kHead = kHeadSize;
  static constexpr int kWide = 64;

  HeadIndex head;
  HeldRows<kHeadSize, kRowTiles> queries;
  float out[kRowTiles][kHeadSize / 8][4];
  float m[kRows];  // running maximum of the unscaled scores
  float l[kRows];  // running sum of the weights of this lane's columns

  __device__ ForwardWarp(const SparseAttentionParams& params, const TilePlan& tile,
                         const HeadIndex& at)
      : Rows(params, tile), head(at) {}

  __device__ void begin(int32_t query) {
    this->begin_rows(query);
    int32_t positions[kRows];
    positions_of(p, this->lane_query, positions);
    queries.load(HeadRows<scalar_t>(p.q, head), p.head_size, positions);
    // Scores are then scaled by |p.scale|, so that m is the maximum before and after.
    if (p.scale < 0) queries.for_each([](uint32_t& word) { word ^= 0x80008000u; });
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      m[i] = -INFINITY;
      l[i] = 0.0f;
    }
    clear(out);
  }

  // m as it is subtracted from scaled scores; 0 where all are -inf so far: no -inf - (-inf).
  __device__ __forceinline__ float scaled_max(float row_m) const {
    return row_m == -INFINITY ? 0.0f : row_m * plan.scale_log2;
  }

  template <int kKeys, bool kMasked>
  __device__ __forceinline__ void attend(const unsigned char* keys, int row,
                                         const Visible& visible) {
    const unsigned char* values = keys + TileLayout<kHeadSize>::kBytes;
    float score[kRowTiles][kKeys / 8][4];
    clear(score);
    multiply_transposed<scalar_t, kHeadSize, kKeys>(score, queries, keys, row);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int tile = i / 2, half = i % 2;
      const uint32_t bits = kMasked ? visible.bits[i] >> (threadIdx.x % 4 * 2) : 0u;
      const auto is_visible = [bits](int n, int e) {
        return !kMasked || (bits >> (n * 8 + e) & 1u) != 0;
      };
      float row_max = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (is_visible(n, e)) row_max = fmaxf(row_max, score[tile][n][half * 2 + e]);
        }
      }
      row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 1));
      row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 2));
      const float m_old = m[i];
      const float m_new = fmaxf(m_old, row_max);
      m[i] = m_new;
      const float max_scaled = scaled_max(m_new);
      float row_sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[tile][n][half * 2 + e];
          const float weight = exp2_approx(fmaf(x, plan.scale_log2, -max_scaled));
          x = is_visible(n, e) ? weight : 0.0f;
          row_sum += x;
        }
      }
      // Scores rarely grow after the first tiles; a whole warp skips the multiplication then.
      if (__any_sync(kAllLanes, m_new > m_old)) {
        const float rescale =
            m_old == -INFINITY ? 0.0f : exp2_approx(fmaf(m_old, plan.scale_log2, -max_scaled));
        l[i] *= rescale;
#pragma unroll
        for (int n = 0; n < kHeadSize / 8; ++n) {
          out[tile][n][half * 2] *= rescale;
          out[tile][n][half * 2 + 1] *= rescale;
        }
      }
      l[i] += row_sum;
    }
    multiply<scalar_t, kHeadSize, kKeys>(out, score, values, row);
  }

  __device__ void finish() {
    float factor[kRows];
    int32_t positions[kRows];
    positions_of(p, this->lane_query, positions);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float row_sum = l[i];
      row_sum += __shfl_xor_sync(kAllLanes, row_sum, 1);
      row_sum += __shfl_xor_sync(kAllLanes, row_sum, 2);
      factor[i] = 1.0f / row_sum;
      if (threadIdx.x % 4 == 0 && positions[i] >= 0) {
        const double log2_l = log2f(row_sum);
        p.lse[head.first(p) + positions[i]] = (scaled_max(m[i]) + log2_l) * kLn2;
      }
    }
    store_rows(HeadRows<scalar_t>(p.out, head), p.head_size, positions, out, factor);
  }
};

// A warp takes 16 * kRowTiles queries of one head at a time; a lane holds their rows lane / 4 + 8
// i, and of every 8 columns two from lane % 4 * 2 on.
template <typename scalar_t, int kHeadSize, int kRowTiles>
__global__ void __launch_bounds__(kWarps* kWarpSize, 2)
    sparse_attention_forward_mma_kernel(const SparseAttentionParams p, const QueryPlan plan) {
  DALLE_SHARED(uint32_t, offsets, [kOffsetWords]);
  DALLE_DYNAMIC_SHARED(tiles);
  const AttentionMask mask(p, offsets);
  walk_queries<ForwardWarp<scalar_t, kHeadSize, kRowTiles>>(p, plan, tiles, mask);
}

}  // namespace dalle
