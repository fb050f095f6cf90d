// The backward of sparse attention for fp16 and bf16 on tensor cores, split in two so that every
// sum has one owner: no atomics, the same bits every time. The query kernel walks as the forward
// does and writes grad_q; the key kernel takes one tile of keys through all queries that see it and
// writes grad_k and grad_v. Both make the probabilities again from lse. No torch here. Not yet
// measured on a GPU.
#pragma once

#include "sparse_attention/sparse_attention_cuda_forward.cuh"

namespace dalle {

// What the key kernel needs of a query, by its index in the walk: written by the query kernel.
struct QueryStats {
  float lse_log2;  // log-sum-exp of the scaled scores, to base 2
  float delta;     // sum over D of out * grad_out
};

template <typename scalar_t, int kHeadSize, int kRowTiles>
struct BackwardWarp : QueryRows<kRowTiles> {
  using Scalar = scalar_t;
  using Rows = QueryRows<kRowTiles>;
  using Rows::kRows;
  using Rows::p;
  using Rows::plan;
  using typename Rows::Visible;
  static constexpr int kHead = kHeadSize;
  static constexpr int kWide = 32;

  HeadIndex head;
  QueryStats* stats;
  HeldRows<kHeadSize, kRowTiles> queries, grad_out;
  float grad_q[kRowTiles][kHeadSize / 8][4];
  QueryStats row_stats[kRows];

  __device__ BackwardWarp(const SparseAttentionParams& params, const TilePlan& tile,
                          const HeadIndex& at, QueryStats* to)
      : Rows(params, tile), head(at), stats(to) {}

  __device__ void begin(int32_t query) {
    this->begin_rows(query);
    int32_t positions[kRows];
    positions_of(p, this->lane_query, positions);
    HeldRows<kHeadSize, kRowTiles>& out = queries;  // before the queries come
    out.load(HeadRows<scalar_t>(p.out, head), p.head_size, positions);
    grad_out.load(HeadRows<scalar_t>(p.grad_out, head), p.head_size, positions);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float delta = 0.0f;
#pragma unroll
      for (int j = 0; j < kHeadSize / 8; ++j) {
        const int word = j % 2 * 2 + i % 2;
        const float2 a = unpack_pair<scalar_t>(out.fragments[i / 2][j / 2].words[word]);
        const float2 b = unpack_pair<scalar_t>(grad_out.fragments[i / 2][j / 2].words[word]);
        delta += a.x * b.x + a.y * b.y;
      }
      delta += __shfl_xor_sync(kAllLanes, delta, 1);
      delta += __shfl_xor_sync(kAllLanes, delta, 2);
      const int64_t first = head.first(p);
      const double lse = positions[i] < 0 ? 0.0 : p.lse[first + positions[i]];
      row_stats[i] = {static_cast<float>(lse * kLog2E), delta};
      if (positions[i] >= 0 && threadIdx.x % 4 == 0) stats[first + this->index(i)] = row_stats[i];
    }
    queries.load(HeadRows<scalar_t>(p.q, head), p.head_size, positions);
    clear(grad_q);
  }

  template <int kKeys, bool kMasked>
  __device__ __forceinline__ void attend(const unsigned char* keys, int row,
                                         const Visible& visible) {
    const unsigned char* values = keys + TileLayout<kHeadSize>::kBytes;
#pragma unroll 1
    for (int part = 0; part < kKeys; part += 16) {  // 16 keys at a time, to fit the registers
      // ds holds the scores first, then the gradient of the scores.
      float ds[kRowTiles][2][4], dp[kRowTiles][2][4];
      clear(ds);
      clear(dp);
      multiply_transposed<scalar_t, kHeadSize, 16>(ds, queries, keys, row + part);
      multiply_transposed<scalar_t, kHeadSize, 16>(dp, grad_out, values, row + part);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const uint32_t bits = kMasked ? visible.bits[i] >> (part + threadIdx.x % 4 * 2) : 0u;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int e = i % 2 * 2 + j % 2;
          float& x = ds[i / 2][j / 2][e];
          const float probability = exp2_approx(fmaf(x, plan.scale_log2, -row_stats[i].lse_log2));
          const bool is_visible = !kMasked || (bits >> (j / 2 * 8 + j % 2) & 1u) != 0;
          x = is_visible ? probability * (dp[i / 2][j / 2][e] - row_stats[i].delta) : 0.0f;
        }
      }
      multiply<scalar_t, kHeadSize, 16>(grad_q, ds, keys, row + part);
    }
  }

  __device__ void finish() {
    float factor[kRows];
    int32_t positions[kRows];
    positions_of(p, this->lane_query, positions);
#pragma unroll
    for (int i = 0; i < kRows; ++i) factor[i] = static_cast<float>(p.scale);
    store_rows(HeadRows<scalar_t>(p.grad_q, head), p.head_size, positions, grad_q, factor);
  }
};

// A warp takes 16 * kRowTiles queries of one head at a time, a lane the rows and columns that it
// has in the forward, of q, grad_out and grad_q.
template <typename scalar_t, int kHeadSize, int kRowTiles>
__global__ void __launch_bounds__(kWarps* kWarpSize, 2)
    sparse_attention_backward_query_mma_kernel(const SparseAttentionParams p, const QueryPlan plan,
                                               QueryStats* stats) {
  DALLE_SHARED(uint32_t, offsets, [kOffsetWords]);
  DALLE_DYNAMIC_SHARED(tiles);
  const AttentionMask mask(p, offsets);
  walk_queries<BackwardWarp<scalar_t, kHeadSize, kRowTiles>>(p, plan, tiles, mask, stats);
}

// The queries that a block brings to its tile of keys, two tiles of them in shared memory.
template <typename scalar_t, int kHeadSize>
struct QueryTiles {
  static constexpr int kStats = 2 * TileLayout<kHeadSize>::kBytes;
  static constexpr int kSlot = kStats + kTileSize * static_cast<int>(sizeof(QueryStats));

  const SparseAttentionParams& p;
  HeadRows<scalar_t> q, grad_out;
  const QueryStats* stats;  // of this head
  unsigned char* shared;
  bool vectors;

  __device__ void load(int32_t tile) const {
    unsigned char* slot = shared + tile % kSlots * kSlot;
    const int32_t first = tile * kTileSize;
    load_tiles<kHeadSize>(slot, q, grad_out, p, vectors, first);
    for (int i = static_cast<int>(threadIdx.x); i < kTileSize; i += static_cast<int>(blockDim.x)) {
      const bool inside = first + i < p.length;
      cp_async<8>(slot + kStats + i * 8, stats + (inside ? first + i : 0), inside ? 8 : 0);
    }
    cp_async_commit();
  }
};

// grad_k and grad_v of 16 keys. Held, their K and V stay in registers; else in shared memory.
template <typename scalar_t, int kHeadSize, typename Rows>
struct KeyWarp {
  const SparseAttentionParams& p;
  const TilePlan& plan;
  int32_t lane_key;   // index of the key of row 0 of a lane, row 1 is 8 behind
  int32_t latest[2];  // latest_index of the key of row i; -1 beyond the walk
  Rows keys, values;
  float grad_k[1][kHeadSize / 8][4], grad_v[1][kHeadSize / 8][4];

  __device__ KeyWarp(const SparseAttentionParams& params, const TilePlan& tile, int32_t first)
      : p(params), plan(tile), lane_key(first + static_cast<int32_t>(threadIdx.x) % kWarpSize / 4) {
    clear(grad_k);
    clear(grad_v);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      latest[i] =
          lane_key + i * 8 < p.length ? latest_index(p.rule, p.length, lane_key + i * 8) : -1;
    }
  }

  __device__ __forceinline__ void visit(const AttentionMask& mask, const unsigned char* slot,
                                        int32_t first) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const unsigned char* grad_out = slot + TileLayout<kHeadSize>::kBytes;
    const float2* stats = reinterpret_cast<const float2*>(grad_out + TileLayout<kHeadSize>::kBytes);
#pragma unroll 1
    for (int row = 0; row < kTileSize; row += 32) {
      uint32_t bits[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bits[i] = mask.visible_queries(lane_key + i * 8, latest[i], first + row);
      }
      if (!__any_sync(kAllLanes, (bits[0] | bits[1]) != 0)) continue;
#pragma unroll 1
      for (int part = row; part < row + 32; part += 16) {
        // They hold the scores and dp = grad_out v^T first, then what their names say.
        float probability[1][2][4], ds[1][2][4];
        clear(probability);
        clear(ds);
        multiply_transposed<scalar_t, kHeadSize, 16>(probability, keys, slot, part);
        multiply_transposed<scalar_t, kHeadSize, 16>(ds, values, grad_out, part);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int n = j / 2, column = n * 8 + j % 2 + lane % 4 * 2;
          const float2 lse_delta = load_vector<float2>(stats + part + column);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float &p_ij = probability[0][n][i * 2 + j % 2], &ds_ij = ds[0][n][i * 2 + j % 2];
            const bool is_visible = (bits[i] >> (part - row + column) & 1u) != 0;
            p_ij = is_visible ? exp2_approx(fmaf(p_ij, plan.scale_log2, -lse_delta.x)) : 0.0f;
            ds_ij = is_visible ? p_ij * (ds_ij - lse_delta.y) : 0.0f;
          }
        }
        multiply<scalar_t, kHeadSize, 16>(grad_v, probability, grad_out, part);
        multiply<scalar_t, kHeadSize, 16>(grad_k, ds, slot, part);
      }
    }
  }
};

// A block takes a tile of 64 keys of one head through all queries that see one of them, a warp 16
// of the keys; a lane holds their rows lane / 4 and lane / 4 + 8, and of every 8 columns two.
template <typename scalar_t, int kHeadSize, bool kHeld>
__global__ void __launch_bounds__(kWarps* kWarpSize, 2)
    sparse_attention_backward_key_mma_kernel(const SparseAttentionParams p, const TilePlan plan,
                                             const QueryStats* stats) {
  DALLE_SHARED(uint32_t, offsets, [kOffsetWords]);
  DALLE_DYNAMIC_SHARED(shared);
  const AttentionMask mask(p, offsets);
  const uint32_t num_tiles = static_cast<uint32_t>(p.length + kTileSize - 1) / kTileSize;
  const HeadIndex head(p, blockIdx.x / num_tiles);
  const int32_t tile = static_cast<int32_t>(blockIdx.x % num_tiles);
  const int32_t first = tile * kTileSize;
  const int32_t end = first + kTileSize < p.length ? first + kTileSize : p.length;
  const int32_t last_key = first < p.rule.text_len ? first : end - 1;
  const int32_t last_tile = latest_index(p.rule, p.length, last_key) / kTileSize;

  const HeadRows<scalar_t> k(p.k, head), v(p.v, head);
  const QueryTiles<scalar_t, kHeadSize> tiles = {p,
                                                 HeadRows<scalar_t>(p.q, head),
                                                 HeadRows<scalar_t>(p.grad_out, head),
                                                 stats + head.first(p),
                                                 shared,
                                                 plan.vectors};
  using Rows = std::conditional_t<kHeld, HeldRows<kHeadSize, 1>, TileRows<kHeadSize>>;
  const int row = warp_index() * 16;
  KeyWarp<scalar_t, kHeadSize, Rows> warp(p, plan, first + row);
  int32_t positions[2];
  positions_of(p, warp.lane_key, positions);
  if constexpr (kHeld) {
    warp.keys.load(k, p.head_size, positions);
    warp.values.load(v, p.head_size, positions);
  } else {
    unsigned char* kv_tiles = shared + kSlots * tiles.kSlot;
    load_tiles<kHeadSize>(kv_tiles, k, v, p, plan.vectors, first);
    warp.keys = {kv_tiles, row};
    warp.values = {kv_tiles + TileLayout<kHeadSize>::kBytes, row};
  }
  tiles.load(tile);
  for (int32_t query_tile = tile; query_tile <= last_tile; ++query_tile) {
    cp_async_wait<0>();
    __syncthreads();
    if (query_tile < last_tile) tiles.load(query_tile + 1);
    warp.visit(mask, shared + query_tile % kSlots * tiles.kSlot, query_tile * kTileSize);
  }
  const float scale = static_cast<float>(p.scale);
  store_rows(HeadRows<scalar_t>(p.grad_k, head), p.head_size, positions, warp.grad_k,
             {scale, scale});
  store_rows(HeadRows<scalar_t>(p.grad_v, head), p.head_size, positions, warp.grad_v, {1.0f, 1.0f});
}

}  // namespace dalle
