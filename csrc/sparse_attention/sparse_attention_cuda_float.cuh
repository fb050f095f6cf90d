// CUDA kernels of sparse attention in fp32, in tiles of 64 queries x 64 keys that a block of 128
// threads keeps in shared memory. A kernel's Part says who multiplies: PlainPart, plain products
// and sums (a thread has 8 x 4 elements of a tile), or Tf32Part, tensor cores (2 x 16, as mma has
// them). Exponentials are exact to an ulp. No atomics, so results repeat bit for bit. No torch
// here.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "sparse_attention/sparse_attention_cuda_float_tile.cuh"
#include "sparse_attention/sparse_attention_cuda_tf32.cuh"

namespace dalle {

// A block takes 64 queries of one head through the tiles of keys that one of them sees; a thread
// has kRows of the queries and, of each tile, kColumns keys.
template <typename Part>
__global__ void __launch_bounds__(kFloatThreads, 2)
    sparse_attention_forward_float_kernel(const SparseAttentionParams p) {
  constexpr int kHeadSize = Part::kHead, kRows = Part::kRows, kColumns = Part::kColumns;
  using Tile = FloatTile<kHeadSize>;
  DALLE_SHARED(uint32_t, offsets, [kOffsetWords]);
  DALLE_DYNAMIC_SHARED(shared);
  const AttentionMask mask(p, offsets);
  float* q_tile = reinterpret_cast<float*>(shared);
  float *k_tile = q_tile + Tile::kFloats, *v_tile = k_tile + Tile::kFloats;
  typename Part::Weights weights(v_tile + Tile::kFloats);
  const uint32_t num_tiles = static_cast<uint32_t>(p.length + kTileSize - 1) / kTileSize;
  const HeadIndex head(p, blockIdx.x / num_tiles);
  const int32_t first = static_cast<int32_t>(blockIdx.x % num_tiles) * kTileSize;
  const Part part;
  const HeadRows<float> k(p.k, head), v(p.v, head);
  load_float_tile<kHeadSize>(q_tile, HeadRows<float>(p.q, head), p, first);
  const float scale = static_cast<float>(p.scale);
  float out[kRows][Part::kOutColumns], m[kRows], l[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    m[i] = -INFINITY, l[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < Part::kOutColumns; ++n) out[i][n] = 0.0f;
  }
  const VisitedTiles range(mask, first, kTileSize);
  for (int32_t tile = range.from(0); tile <= range.last; tile = range.from(tile + 1)) {
    __syncthreads();  // all have left the last tiles
    load_float_tile<kHeadSize>(k_tile, k, p, tile * kTileSize);
    load_float_tile<kHeadSize>(v_tile, v, p, tile * kTileSize);
    cp_async_wait<0>();
    __syncthreads();
    VisiblePart<Part> visible;
    visible.find_keys(mask, part, first, tile * kTileSize);
    if (!visible.any()) continue;
    float score[kRows][kColumns];
    part.multiply_rows(score, q_tile, k_tile);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float most = -INFINITY;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        score[i][j] = visible(part, i, j) ? score[i][j] * scale : -INFINITY;
        most = fmaxf(most, score[i][j]);
      }
      const float m_new =
          fmaxf(m[i], part.over_row(most, [](float a, float b) { return fmaxf(a, b); }));
      const float shift = m_new == -INFINITY ? 0.0f : m_new;  // no -inf - (-inf)
      const float rescale = expf(m[i] - shift);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        score[i][j] = expf(score[i][j] - shift);
        sum += score[i][j];
      }
      m[i] = m_new, l[i] = l[i] * rescale + sum;
#pragma unroll
      for (int n = 0; n < Part::kOutColumns; ++n) out[i][n] *= rescale;
    }
    weights.put(part, score);
    part.add_weighted_rows(out, weights, v_tile);
  }
  float factor[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    l[i] = part.sum_over_row(l[i]);
    factor[i] = 1.0f / l[i];
    const int32_t index = first + part.at(i);
    if (part.lane == 0 && index < p.length) {
      p.lse[head.first(p) + walked_position(p.rule, index)] =
          static_cast<double>(m[i]) + log(static_cast<double>(l[i]));
    }
  }
  store_float_rows(HeadRows<float>(p.out, head), p, part, first, out, factor);
}

// A block takes 64 queries of one head and a thread kRows of them with kColumns keys of a tile, as
// in the forward; lane 0 of a row leaves delta = sum over D of out * grad_out for the other kernel,
// in the order of the walk.
template <typename Part>
__global__ void __launch_bounds__(kFloatThreads, 2)
    sparse_attention_backward_query_float_kernel(const SparseAttentionParams p, double* delta) {
  constexpr int kHeadSize = Part::kHead, kRows = Part::kRows, kColumns = Part::kColumns;
  using Tile = FloatTile<kHeadSize>;
  DALLE_SHARED(uint32_t, offsets, [kOffsetWords]);
  DALLE_DYNAMIC_SHARED(shared);
  const AttentionMask mask(p, offsets);
  float* q_tile = reinterpret_cast<float*>(shared);
  float *grad_tile = q_tile + Tile::kFloats, *k_tile = grad_tile + Tile::kFloats;
  float* v_tile = k_tile + Tile::kFloats;
  typename Part::Weights weights(v_tile + Tile::kFloats);
  const uint32_t num_tiles = static_cast<uint32_t>(p.length + kTileSize - 1) / kTileSize;
  const HeadIndex head(p, blockIdx.x / num_tiles);
  const int32_t first = static_cast<int32_t>(blockIdx.x % num_tiles) * kTileSize;
  const Part part;
  const HeadRows<float> k(p.k, head), v(p.v, head), out(p.out, head);
  load_float_tile<kHeadSize>(q_tile, HeadRows<float>(p.q, head), p, first);
  load_float_tile<kHeadSize>(grad_tile, HeadRows<float>(p.grad_out, head), p, first);
  cp_async_wait<0>();
  __syncthreads();
  const float scale = static_cast<float>(p.scale);
  float grad_q[kRows][Part::kOutColumns], row_delta[kRows], factor[kRows];
  double lse[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int32_t index = first + part.at(i);
    const int32_t position = index < p.length ? walked_position(p.rule, index) : 0;
    const float* row = out.row(position);
    float sum = 0.0f;
    for (int d = part.lane; d < p.head_size; d += Part::kLanes) {
      sum = fmaf(row[d], grad_tile[part.at(i) * Tile::kStride + d], sum);
    }
    row_delta[i] = part.sum_over_row(sum), factor[i] = scale;
    lse[i] = p.lse[head.first(p) + position];
    if (part.lane == 0 && index < p.length) delta[head.first(p) + index] = row_delta[i];
#pragma unroll
    for (int n = 0; n < Part::kOutColumns; ++n) grad_q[i][n] = 0.0f;
  }
  const VisitedTiles range(mask, first, kTileSize);
  for (int32_t tile = range.from(0); tile <= range.last; tile = range.from(tile + 1)) {
    __syncthreads();  // all have left the last tiles
    load_float_tile<kHeadSize>(k_tile, k, p, tile * kTileSize);
    load_float_tile<kHeadSize>(v_tile, v, p, tile * kTileSize);
    cp_async_wait<0>();
    __syncthreads();
    VisiblePart<Part> visible;
    visible.find_keys(mask, part, first, tile * kTileSize);
    if (!visible.any()) continue;
    float score[kRows][kColumns], ds[kRows][kColumns];
    part.multiply_rows(score, q_tile, k_tile);
    part.multiply_rows(ds, grad_tile, v_tile);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float probability = expf(static_cast<float>(score[i][j] * scale - lse[i]));
        ds[i][j] = visible(part, i, j) ? probability * (ds[i][j] - row_delta[i]) : 0.0f;
      }
    }
    weights.put(part, ds);
    part.add_weighted_rows(grad_q, weights, k_tile);
  }
  store_float_rows(HeadRows<float>(p.grad_q, head), p, part, first, grad_q, factor);
}

// A block takes 64 keys of one head through the tiles of queries that see one of them; a thread has
// kRows of the keys and, of each tile, kColumns queries.
template <typename Part>
__global__ void __launch_bounds__(kFloatThreads, 2)
    sparse_attention_backward_key_float_kernel(const SparseAttentionParams p, const double* delta) {
  constexpr int kHeadSize = Part::kHead, kRows = Part::kRows, kColumns = Part::kColumns;
  using Tile = FloatTile<kHeadSize>;
  DALLE_SHARED(uint32_t, offsets, [kOffsetWords]);
  DALLE_SHARED(double, lse, [kTileSize]);
  DALLE_SHARED(float, deltas, [kTileSize]);
  DALLE_DYNAMIC_SHARED(shared);
  const AttentionMask mask(p, offsets);
  float* k_tile = reinterpret_cast<float*>(shared);
  float *v_tile = k_tile + Tile::kFloats, *q_tile = v_tile + Tile::kFloats;
  float* grad_tile = q_tile + Tile::kFloats;
  typename Part::Weights weights(grad_tile + Tile::kFloats);
  const uint32_t num_tiles = static_cast<uint32_t>(p.length + kTileSize - 1) / kTileSize;
  const HeadIndex head(p, blockIdx.x / num_tiles);
  const int32_t tile = static_cast<int32_t>(blockIdx.x % num_tiles);
  const int32_t first = tile * kTileSize;
  const int32_t end = first + kTileSize < p.length ? first + kTileSize : p.length;
  const int32_t last_key = first < p.rule.text_len ? first : end - 1;
  const int32_t last_tile = latest_index(p.rule, p.length, last_key) / kTileSize;
  const Part part;
  const HeadRows<float> q(p.q, head), grad_out(p.grad_out, head);
  load_float_tile<kHeadSize>(k_tile, HeadRows<float>(p.k, head), p, first);
  load_float_tile<kHeadSize>(v_tile, HeadRows<float>(p.v, head), p, first);
  const float scale = static_cast<float>(p.scale);
  float grad_k[kRows][Part::kOutColumns], grad_v[kRows][Part::kOutColumns];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int n = 0; n < Part::kOutColumns; ++n) grad_k[i][n] = grad_v[i][n] = 0.0f;
  }
  for (int32_t query_tile = tile; query_tile <= last_tile; ++query_tile) {
    const int32_t query = query_tile * kTileSize;
    __syncthreads();  // all have left the last tiles
    load_float_tile<kHeadSize>(q_tile, q, p, query);
    load_float_tile<kHeadSize>(grad_tile, grad_out, p, query);
    for (int i = static_cast<int>(threadIdx.x); i < kTileSize; i += kFloatThreads) {
      const bool inside = query + i < p.length;
      const int32_t position = inside ? walked_position(p.rule, query + i) : 0;
      lse[i] = inside ? p.lse[head.first(p) + position] : 0.0;
      deltas[i] = inside ? static_cast<float>(delta[head.first(p) + query + i]) : 0.0f;
    }
    cp_async_wait<0>();
    __syncthreads();
    VisiblePart<Part> visible;
    visible.find_queries(mask, part, first, query);
    if (!visible.any()) continue;
    float x[kRows][kColumns];  // scores, then probabilities
    part.multiply_rows(x, k_tile, q_tile);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const double row_lse = lse[tile_column(part, j)];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float probability = expf(static_cast<float>(x[i][j] * scale - row_lse));
        x[i][j] = visible(part, i, j) ? probability : 0.0f;
      }
    }
    weights.put(part, x);
    part.add_weighted_rows(grad_v, weights, grad_tile);
    part.multiply_rows(x, v_tile, grad_tile);  // now dp, then ds
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float row_delta = deltas[tile_column(part, j)];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        x[i][j] = weights.at(part, i, j) * (x[i][j] - row_delta);
      }
    }
    weights.put(part, x);
    part.add_weighted_rows(grad_k, weights, q_tile);
  }
  float factor[kRows], one[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) factor[i] = scale, one[i] = 1.0f;
  store_float_rows(HeadRows<float>(p.grad_k, head), p, part, first, grad_k, factor);
  store_float_rows(HeadRows<float>(p.grad_v, head), p, part, first, grad_v, one);
}

// Dynamic shared memory of a kernel with so many tiles of rows.
template <typename Part>
constexpr size_t float_tile_bytes(int tiles) {
  return (tiles * FloatTile<Part::kHead>::kFloats + Part::kWeightFloats) * sizeof(float);
}

// Whether a call in fp32 multiplies on tensor cores: where the environment variable
// DALLE_EXT_CUDA_FP32 is 3xtf32 (plain otherwise) and D is at least 17. Not by default: as much as
// mma may truncate, scores in the hundreds are further off than in plain sums (docs/ops.md). At a
// smaller D half of the products would be with zeros.
inline bool multiplies_in_tf32(const SparseAttentionParams& p) {
  const char* const wish = std::getenv("DALLE_EXT_CUDA_FP32");
  const std::string name = wish == nullptr || *wish == '\0' ? "plain" : wish;
  if (name != "3xtf32" && name != "plain") {
    throw std::runtime_error("DALLE_EXT_CUDA_FP32 must be 3xtf32 or plain, got " + name);
  }
  return name == "3xtf32" && p.head_size > 16;
}

// Returns call(the Part that takes p).
template <typename Call>
cudaError_t for_float_part(const SparseAttentionParams& p, const Call& call) {
  if (multiplies_in_tf32(p)) {
    if (p.head_size <= 32) return call(std::type_identity<Tf32Part<32>>{});
    if (p.head_size <= 64) return call(std::type_identity<Tf32Part<64>>{});
    return call(std::type_identity<Tf32Part<128>>{});
  }
  if (p.head_size <= 32) return call(std::type_identity<PlainPart<32>>{});
  if (p.head_size <= 64) return call(std::type_identity<PlainPart<64>>{});
  return call(std::type_identity<PlainPart<128>>{});
}

// Whether the tiles of `p` fit: fp32, D at most 128, offsets that fit the table, and shared memory.
inline bool takes_float_tiles(const SparseAttentionParams& p) {
  const int32_t reach = reads_runs(p.rule.kind) ? end_of_runs(p.rule) : 0;
  if (p.type != ElementKind::kFloat || p.head_size > 128 || reach > kMaxReach) return false;
  const int64_t blocks = int64_t{p.batch} * p.heads * ceil_div(p.length, kTileSize);
  if (blocks > 0x7fffffff) return false;
  size_t bytes = kOffsetWords * sizeof(uint32_t) + kTileSize * 12;
  for_float_part(p, [&](auto part) {
    bytes += float_tile_bytes<typename decltype(part)::type>(4);
    return cudaSuccess;
  });
  return static_cast<int64_t>(bytes) <= device_limits().shared_per_block;
}

inline unsigned float_blocks(const SparseAttentionParams& p) {
  return static_cast<unsigned>(int64_t{p.batch} * p.heads * ceil_div(p.length, kTileSize));
}

// q, k, v (B, H, T, D) -> heads b * H + h times tiles of 64 queries, one a block -> out (B, H, T,
// D) and lse (B, H, T).
inline cudaError_t launch_float_forward(const SparseAttentionParams& p, void* stream) {
  return for_float_part(p, [&](auto part) {
    using Part = typename decltype(part)::type;
    return launch(sparse_attention_forward_float_kernel<Part>, float_blocks(p), kFloatThreads,
                  float_tile_bytes<Part>(3), stream, p);
  });
}

// grad_out, q, k, v, out (B, H, T, D) and lse (B, H, T) -> tiles of 64 queries -> grad_q
// (B, H, T, D) and `delta`, scratch of (B, H, T) doubles -> tiles of 64 keys -> grad_k, grad_v.
inline cudaError_t launch_float_backward(const SparseAttentionParams& p, double* delta,
                                         void* stream) {
  return for_float_part(p, [&](auto part) {
    using Part = typename decltype(part)::type;
    const cudaError_t error =
        launch(sparse_attention_backward_query_float_kernel<Part>, float_blocks(p), kFloatThreads,
               float_tile_bytes<Part>(4), stream, p, delta);
    if (error != cudaSuccess) return error;
    return launch(sparse_attention_backward_key_float_kernel<Part>, float_blocks(p), kFloatThreads,
                  float_tile_bytes<Part>(4), stream, p, delta);
  });
}

}  // namespace dalle
