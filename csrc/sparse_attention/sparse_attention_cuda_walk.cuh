// How a block walks the queries of one head, 4 warps side by side, and brings them their keys: the
// first tiles of the text stay in shared memory, all others pass through two slots, one tile ahead.
// No torch here.
//
//   per block of queries:  text tiles 0 .. min(text, diagonal), then image tiles from the earliest
//   visible key to the diagonal; per warp a tile is skipped, taken without a mask, or masked
#pragma once

#include "sparse_attention/sparse_attention_cuda_mask.cuh"
#include "sparse_attention/sparse_attention_cuda_tile.cuh"

namespace dalle {

constexpr int kWarps = 4;

// How the queries of B * H heads are dealt out to blocks, and what a block keeps.
struct QueryPlan {
  TilePlan tile;
  int32_t parts;           // blocks of one head
  int32_t resident_tiles;  // of text, in shared memory for the whole life of a block
};

// The tiles that one block of queries visits, ascending.
struct VisitedTiles : TileRange {
  __device__ VisitedTiles(const AttentionMask& mask, int32_t first_query, int32_t num_queries)
      : TileRange(tile_range(mask.rule, mask.length, first_query, num_queries)) {}
  // `tile` if it is to be visited, else the next that is.
  __device__ __forceinline__ int32_t from(int32_t tile) const {
    return tile >= text_tiles && tile < first_image ? first_image : tile;
  }
};

// A tile on the way of a block: for the queries from `query` on.
struct TileStep {
  int32_t query, tile;

  // The first step at or after (query, tile) whose tile passes through the slots; query is `end` or
  // more where there is none.
  __device__ TileStep(const AttentionMask& mask, int32_t resident_tiles, int32_t num_queries,
                      int32_t from_query, int32_t from_tile, int32_t end)
      : query(from_query), tile(from_tile) {
    for (; query < end; query += num_queries, tile = 0) {
      const VisitedTiles range(mask, query, num_queries);
      tile = range.from(tile < resident_tiles ? resident_tiles : tile);
      if (tile <= range.last) return;
    }
  }
};

// The rows of queries of one warp; row i of a lane is 8 * i behind row 0.
template <int kRowTiles>
struct QueryRows {
  static constexpr int kRows = 2 * kRowTiles;
  struct Visible {
    uint32_t bits[kRows];  // of row i: which of 32 keys are visible
  };

  const SparseAttentionParams& p;
  const TilePlan& plan;
  int32_t first_query = 0, last_query = -1;  // of the warp, in the walk
  int32_t lane_query = 0;                    // index of row 0 of the lane
  int32_t earliest[kRows];                   // earliest_image_index of row i

  __device__ QueryRows(const SparseAttentionParams& params, const TilePlan& tile)
      : p(params), plan(tile) {}

  __device__ void begin_rows(int32_t query) {
    first_query = query;
    last_query = query + kRows * 8 - 1 < p.length ? query + kRows * 8 - 1 : p.length - 1;
    if (query >= p.length) last_query = -1;  // no visible key
    lane_query = query + static_cast<int32_t>(threadIdx.x) % kWarpSize / 4;
#pragma unroll
    for (int i = 0; i < kRows; ++i) earliest[i] = earliest_image_index(p.rule, index(i));
  }
  // Index of row i; a row beyond the walk repeats the last query and is not stored.
  __device__ __forceinline__ int32_t index(int i) const {
    return inside(i) ? lane_query + i * 8 : p.length - 1;
  }
  __device__ __forceinline__ bool inside(int i) const { return lane_query + i * 8 < p.length; }

  template <bool kTable>
  __device__ __forceinline__ void find_visible(const AttentionMask& mask, int32_t first,
                                               Visible* visible) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      visible->bits[i] = mask.template visible_keys<kTable>(index(i), earliest[i], first);
    }
  }
};

// Gives `warp` the visible keys of a tile, in pieces: Warp::kWide keys without a mask, or 32 keys
// and for each of its rows a word of bits, set where the key is visible.
template <typename Warp>
__device__ __forceinline__ void visit_tile(Warp& warp, const AttentionMask& mask,
                                           const unsigned char* keys, int32_t tile) {
  const int32_t first = tile * kTileSize;
  if (first > warp.last_query) return;
  if (mask.all_visible(warp.first_query, warp.last_query, first, first + kTileSize - 1)) {
#pragma unroll 1
    for (int row = 0; row < kTileSize; row += Warp::kWide) {
      warp.template attend<Warp::kWide, false>(keys, row, {});
    }
    return;
  }
#pragma unroll 1
  for (int row = 0; row < kTileSize; row += 32) {
    typename Warp::Visible visible;
    if (mask.by_table()) {
      warp.template find_visible<true>(mask, first + row, &visible);
    } else {
      warp.template find_visible<false>(mask, first + row, &visible);
    }
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < Warp::kRows; ++i) any |= visible.bits[i];
    if (__any_sync(kAllLanes, any != 0)) warp.template attend<32, true>(keys, row, visible);
  }
}

// Runs `warp` over this block's share of the queries of its head.
template <typename Warp, typename... More>
__device__ void walk_queries(const SparseAttentionParams& p, const QueryPlan& plan,
                             unsigned char* shared, const AttentionMask& mask, More... more) {
  constexpr int32_t kQueries = Warp::kRows * 8 * kWarps;
  const uint32_t parts = static_cast<uint32_t>(plan.parts), part = blockIdx.x % parts;
  const HeadIndex head(p, blockIdx.x / parts);
  // Indices are below 2^25 and parts at most kMaxParts: the products stay below 2^32.
  const uint32_t blocks = static_cast<uint32_t>(p.length + kQueries - 1) / kQueries;
  const int32_t begin = static_cast<int32_t>(part * blocks / parts) * kQueries;
  const int32_t end = static_cast<int32_t>((part + 1) * blocks / parts) * kQueries;
  using Scalar = typename Warp::Scalar;
  constexpr int kPair = 2 * TileLayout<Warp::kHead>::kBytes;  // keys, behind them values
  const int32_t resident = plan.resident_tiles;
  const auto load = [&](int32_t tile, int32_t slot) {
    const HeadRows<Scalar> k(p.k, head), v(p.v, head);
    load_tiles<Warp::kHead>(shared + slot * kPair, k, v, p, plan.tile.vectors, tile * kTileSize);
    cp_async_commit();
  };
  // The step whose tile is in slot `resident + parity` or, before the first, will be in the other.
  TileStep next(mask, resident, kQueries, begin, 0, end);
  int32_t current = -1, parity = 1;
  for (int32_t i = 0; i <= resident; ++i) {
    if (i < resident || next.query < end) load(i < resident ? i : next.tile, i);
  }
  cp_async_wait<0>();
  __syncthreads();
  const int32_t warp_offset = warp_index() * Warp::kRows * 8;
  Warp warp(p, plan.tile, head, more...);
#pragma unroll 1
  for (int32_t query = begin; query < end; query += kQueries) {
    const VisitedTiles range(mask, query, kQueries);
    warp.begin(query + warp_offset);
#pragma unroll 1
    for (int32_t tile = range.from(0); tile <= range.last; tile = range.from(tile + 1)) {
      int32_t slot = tile;
      if (tile >= resident) {
        if (tile != current) parity ^= 1;
        current = tile;
        slot = resident + parity;
        cp_async_wait<0>();
        __syncthreads();  // the tile is there for all, and all have left the other slot
        next = TileStep(mask, resident, kQueries, query, tile + 1, end);
        if (next.query < end && next.tile != current) load(next.tile, resident + (parity ^ 1));
      }
      visit_tile(warp, mask, shared + slot * kPair, tile);
    }
    warp.finish();
  }
}

}  // namespace dalle
