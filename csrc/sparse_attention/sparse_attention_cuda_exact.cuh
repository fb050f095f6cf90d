// CUDA kernels of sparse attention without tensor cores, for every type, head size and stride: one
// warp a query (forward, grad_q) or a key (grad_k, grad_v), which walks what it attends by the
// rules of sparse_attention.h. Lane l holds the elements l, l + 32, ... of a head. No atomics, so
// results repeat bit for bit. No torch here.
//
// Letters: B batch, H heads, T positions, D head size (at most 32 * kPerLane).
#pragma once

#include "common/simt.h"
#include "sparse_attention/sparse_attention.h"

namespace dalle {

constexpr int kWarpsPerBlock = 4;

template <typename scalar_t>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(double x, double* to) { *to = x; }
__device__ inline void narrow(float x, __half* to) { *to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// The elements of one (D) row that this lane holds; zero beyond D.
template <typename acc_t, int kPerLane>
struct LaneRow {
  acc_t x[kPerLane];

  __device__ void clear() {
    for (int i = 0; i < kPerLane; ++i) x[i] = 0;
  }
  template <typename scalar_t>
  __device__ void load(const scalar_t* row, int head_size, int lane) {
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + i * kWarpSize;
      x[i] = d < head_size ? widen(row[d]) : acc_t{0};
    }
  }
  template <typename scalar_t>
  __device__ void store(scalar_t* row, acc_t factor, int head_size, int lane) const {
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + i * kWarpSize;
      if (d < head_size) narrow(factor * x[i], row + d);
    }
  }
  __device__ void add(acc_t factor, const LaneRow& other) {
    for (int i = 0; i < kPerLane; ++i) x[i] += factor * other.x[i];
  }
  // Sum over the whole row, the same bits in every lane.
  __device__ acc_t dot(const LaneRow& other) const {
    acc_t sum = 0;
    for (int i = 0; i < kPerLane; ++i) sum += x[i] * other.x[i];
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
    return sum;
  }
};

// A sum of many rows, in parts: a thousand terms added one after another round too much.
template <typename acc_t, int kPerLane>
struct LaneSum {
  static constexpr int kPart = 32;
  LaneRow<acc_t, kPerLane> sum, part;
  int count = 0;

  __device__ LaneSum() {
    sum.clear();
    part.clear();
  }
  __device__ void add(acc_t factor, const LaneRow<acc_t, kPerLane>& row) {
    part.add(factor, row);
    if (++count == kPart) finish();
  }
  __device__ const LaneRow<acc_t, kPerLane>& finish() {
    sum.add(acc_t{1}, part);
    part.clear();
    count = 0;
    return sum;
  }
};

// The (b, h, position) of this warp, and where its head starts in each tensor.
struct WarpRow {
  int64_t head;  // b * H + h
  int32_t position;
  int lane;
  bool inside;

  __device__ explicit WarpRow(const SparseAttentionParams& p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
    lane = static_cast<int>(threadIdx.x % kWarpSize);
    inside = row < static_cast<int64_t>(p.batch) * p.heads * p.length;
    head = row / p.length;
    position = static_cast<int32_t>(row % p.length);
  }
  template <typename scalar_t>
  __device__ scalar_t* row(const SparseAttentionParams& p, const AttentionRows& rows,
                           int32_t index) const {
    return static_cast<scalar_t*>(rows.data) + head / p.heads * rows.batch +
           head % p.heads * rows.head + index * rows.row;
  }
};

// Calls visit(key) for every key the query sees, ascending.
template <typename Visit>
__device__ void for_keys(const AttentionRule& rule, int32_t query, const Visit& visit) {
  const int32_t text_end = query < rule.text_len ? query + 1 : rule.text_len;
  for (int32_t key = 0; key < text_end; ++key) visit(key);
  if (query < rule.text_len) return;
  for (int32_t key = next_image_key(rule, query, rule.text_len); key <= query;
       key = next_image_key(rule, query, key + 1)) {
    visit(key);
  }
}

// Calls visit(query) for every query that sees the key, ascending.
template <typename Visit>
__device__ void for_queries(const AttentionRule& rule, int32_t length, int32_t key,
                            const Visit& visit) {
  if (key < rule.text_len) {
    for (int32_t query = key; query < length; ++query) visit(query);
    return;
  }
  for (int32_t query = next_image_query(rule, length, key, key); query < length;
       query = next_image_query(rule, length, key, query + 1)) {
    visit(query);
  }
}

// A warp takes one query; lane l holds the elements l, l + 32, ... of its rows.
template <typename scalar_t, int kPerLane>
__global__ void sparse_attention_forward_kernel(const SparseAttentionParams p) {
  using acc_t = typename Accumulator<scalar_t>::type;
  const WarpRow warp(p);
  if (!warp.inside) return;
  LaneRow<acc_t, kPerLane> q, k, v, out;
  q.load(warp.row<scalar_t>(p, p.q, warp.position), p.head_size, warp.lane);
  out.clear();
  const acc_t minus_infinity = -INFINITY;
  acc_t m = minus_infinity, l = 0;
  for_keys(p.rule, warp.position, [&](int32_t key) {
    k.load(warp.row<scalar_t>(p, p.k, key), p.head_size, warp.lane);
    v.load(warp.row<scalar_t>(p, p.v, key), p.head_size, warp.lane);
    const acc_t score = q.dot(k) * static_cast<acc_t>(p.scale);
    const acc_t m_new = score > m ? score : m;
    const acc_t shift = m_new == minus_infinity ? acc_t{0} : m_new;  // no -inf - (-inf)
    const acc_t rescale = exponential(m - shift), weight = exponential(score - shift);
    for (int i = 0; i < kPerLane; ++i) out.x[i] *= rescale;
    out.add(weight, v);
    l = l * rescale + weight;
    m = m_new;
  });
  out.store(warp.row<scalar_t>(p, p.out, warp.position), 1 / l, p.head_size, warp.lane);
  if (warp.lane == 0) {
    p.lse[warp.head * p.length + warp.position] =
        static_cast<double>(m) + log(static_cast<double>(l));
  }
}

// A warp takes one query, as in the forward, and lane 0 leaves delta = sum over D of out * grad_out
// for the other kernel.
template <typename scalar_t, int kPerLane>
__global__ void sparse_attention_backward_query_kernel(const SparseAttentionParams p,
                                                       double* delta) {
  using acc_t = typename Accumulator<scalar_t>::type;
  const WarpRow warp(p);
  if (!warp.inside) return;
  LaneRow<acc_t, kPerLane> q, k, v, grad_out, grad_q;
  k.load(warp.row<scalar_t>(p, p.out, warp.position), p.head_size, warp.lane);
  grad_out.load(warp.row<scalar_t>(p, p.grad_out, warp.position), p.head_size, warp.lane);
  const acc_t row_delta = k.dot(grad_out);
  q.load(warp.row<scalar_t>(p, p.q, warp.position), p.head_size, warp.lane);
  grad_q.clear();
  const int64_t row = warp.head * p.length + warp.position;
  const double lse = p.lse[row];
  if (warp.lane == 0) delta[row] = row_delta;
  for_keys(p.rule, warp.position, [&](int32_t key) {
    k.load(warp.row<scalar_t>(p, p.k, key), p.head_size, warp.lane);
    v.load(warp.row<scalar_t>(p, p.v, key), p.head_size, warp.lane);
    const acc_t score = q.dot(k) * static_cast<acc_t>(p.scale);
    const acc_t probability = exponential(static_cast<acc_t>(score - lse));
    grad_q.add(probability * (grad_out.dot(v) - row_delta), k);
  });
  grad_q.store(warp.row<scalar_t>(p, p.grad_q, warp.position), static_cast<acc_t>(p.scale),
               p.head_size, warp.lane);
}

// A warp takes one key through every query that sees it; lane l holds the elements l, l + 32, ...
template <typename scalar_t, int kPerLane>
__global__ void sparse_attention_backward_key_kernel(const SparseAttentionParams p,
                                                     const double* delta) {
  using acc_t = typename Accumulator<scalar_t>::type;
  const WarpRow warp(p);
  if (!warp.inside) return;
  LaneRow<acc_t, kPerLane> q, k, v, grad_out;
  LaneSum<acc_t, kPerLane> grad_k, grad_v;
  k.load(warp.row<scalar_t>(p, p.k, warp.position), p.head_size, warp.lane);
  v.load(warp.row<scalar_t>(p, p.v, warp.position), p.head_size, warp.lane);
  for_queries(p.rule, p.length, warp.position, [&](int32_t query) {
    q.load(warp.row<scalar_t>(p, p.q, query), p.head_size, warp.lane);
    grad_out.load(warp.row<scalar_t>(p, p.grad_out, query), p.head_size, warp.lane);
    const int64_t row = warp.head * p.length + query;
    const acc_t score = q.dot(k) * static_cast<acc_t>(p.scale);
    const acc_t probability = exponential(static_cast<acc_t>(score - p.lse[row]));
    grad_v.add(probability, grad_out);
    grad_k.add(probability * (grad_out.dot(v) - static_cast<acc_t>(delta[row])), q);
  });
  grad_k.finish().store(warp.row<scalar_t>(p, p.grad_k, warp.position), static_cast<acc_t>(p.scale),
                        p.head_size, warp.lane);
  grad_v.finish().store(warp.row<scalar_t>(p, p.grad_v, warp.position), acc_t{1}, p.head_size,
                        warp.lane);
}

// Returns call(scalar_t{}, integral constant of kPerLane) for the type and head size of `p`.
template <int kSize>
struct PerLane {
  static constexpr int value = kSize;
};
template <typename scalar_t, typename Call>
cudaError_t for_head_size(const SparseAttentionParams& p, const Call& call) {
  if (p.head_size <= 32) return call(scalar_t{}, PerLane<1>{});
  if (p.head_size <= 64) return call(scalar_t{}, PerLane<2>{});
  if (p.head_size <= 128) return call(scalar_t{}, PerLane<4>{});
  return call(scalar_t{}, PerLane<8>{});
}
template <typename Call>
cudaError_t for_exact(const SparseAttentionParams& p, const Call& call) {
  if (p.type == ElementKind::kFloat) return for_head_size<float>(p, call);
  if (p.type == ElementKind::kDouble) return for_head_size<double>(p, call);
  if (p.type == ElementKind::kHalf) return for_head_size<__half>(p, call);
  return for_head_size<__nv_bfloat16>(p, call);
}

// Blocks of kWarpsPerBlock rows; 0 where the grid would not fit.
inline unsigned num_blocks(const SparseAttentionParams& p) {
  const int64_t blocks =
      ceil_div(static_cast<int64_t>(p.batch) * p.heads * p.length, kWarpsPerBlock);
  return blocks > 0x7fffffff ? 0u : static_cast<unsigned>(blocks);
}

// q, k, v (B, H, T, D) -> B * H * T queries -> a warp each, 4 a block -> out (B, H, T, D) and lse
// (B, H, T).
inline cudaError_t launch_exact_forward(const SparseAttentionParams& p, void* stream) {
  const unsigned blocks = num_blocks(p);
  if (blocks == 0) return cudaErrorInvalidConfiguration;
  return for_exact(p, [&](auto scalar, auto per_lane) {
    constexpr int kPerLane = decltype(per_lane)::value;
    return launch(sparse_attention_forward_kernel<decltype(scalar), kPerLane>, blocks,
                  kWarpsPerBlock * kWarpSize, 0, stream, p);
  });
}

// grad_out, q, k, v, out (B, H, T, D) and lse (B, H, T) -> a warp a query -> grad_q (B, H, T, D)
// and `delta`, scratch of (B, H, T) doubles -> a warp a key -> grad_k, grad_v (B, H, T, D).
inline cudaError_t launch_exact_backward(const SparseAttentionParams& p, double* delta,
                                         void* stream) {
  const unsigned blocks = num_blocks(p);
  if (blocks == 0) return cudaErrorInvalidConfiguration;
  return for_exact(p, [&](auto scalar, auto per_lane) {
    constexpr int kPerLane = decltype(per_lane)::value;
    constexpr int kThreads = kWarpsPerBlock * kWarpSize;
    const cudaError_t error =
        launch(sparse_attention_backward_query_kernel<decltype(scalar), kPerLane>, blocks, kThreads,
               0, stream, p, delta);
    if (error != cudaSuccess) return error;
    return launch(sparse_attention_backward_key_kernel<decltype(scalar), kPerLane>, blocks,
                  kThreads, 0, stream, p, delta);
  });
}

}  // namespace dalle
