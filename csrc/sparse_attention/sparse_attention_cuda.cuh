// Which CUDA kernel takes a call of sparse attention, and its launch. No torch here.
//
// - fp16 and bf16 with an even D <= 128: tensor cores, D padded with zeros to 32, 64, 80, 96
//   or 128.
// - fp32 with D <= 128: tiles of 64 x 64 (sparse_attention_cuda_float.cuh), by plain products, or
//   from D = 17 on, where DALLE_EXT_CUDA_FP32=3xtf32, by 3xTF32 on tensor cores.
// - fp64, a larger or (16 bits) odd D, rows that begin between multiples of 4 bytes, offsets over
//   8,096: the kernels of sparse_attention_cuda_exact.cuh.
#pragma once

#include "sparse_attention/sparse_attention_cuda_backward.cuh"
#include "sparse_attention/sparse_attention_cuda_exact.cuh"
#include "sparse_attention/sparse_attention_cuda_float.cuh"

namespace dalle {

// The largest power of two up to 16 bytes at which every row of 16-bit elements begins.
inline uint64_t row_alignment(const SparseAttentionParams& p) {
  uint64_t bits = 16;
  for (const AttentionRows* rows :
       {&p.q, &p.k, &p.v, &p.out, &p.grad_out, &p.grad_q, &p.grad_k, &p.grad_v}) {
    if (rows->data == nullptr) continue;
    bits |= reinterpret_cast<uint64_t>(rows->data);
    bits |= static_cast<uint64_t>(rows->batch | rows->head | rows->row) * 2;
  }
  return bits & (~bits + 1);
}

inline bool takes_tensor_cores(const SparseAttentionParams& p) {
  const int32_t reach = reads_runs(p.rule.kind) ? end_of_runs(p.rule) : 0;
  return (p.type == ElementKind::kHalf || p.type == ElementKind::kBFloat16) && p.head_size <= 128 &&
         p.head_size % 2 == 0 && row_alignment(p) >= 4 && reach <= kMaxReach;
}

// Returns call(scalar_t{}, integral constant of the compiled head size).
template <typename scalar_t, typename Call>
cudaError_t for_padded_head(const SparseAttentionParams& p, const Call& call) {
  if (p.head_size <= 32) return call(scalar_t{}, std::integral_constant<int, 32>{});
  if (p.head_size <= 64) return call(scalar_t{}, std::integral_constant<int, 64>{});
  if (p.head_size <= 80) return call(scalar_t{}, std::integral_constant<int, 80>{});
  if (p.head_size <= 96) return call(scalar_t{}, std::integral_constant<int, 96>{});
  return call(scalar_t{}, std::integral_constant<int, 128>{});
}
template <typename Call>
cudaError_t for_tensor_cores(const SparseAttentionParams& p, const Call& call) {
  if (p.type == ElementKind::kHalf) return for_padded_head<__half>(p, call);
  return for_padded_head<__nv_bfloat16>(p, call);
}

inline TilePlan tile_plan(const SparseAttentionParams& p, double scale) {
  return {static_cast<float>(scale * kLog2E), row_alignment(p) == 16};
}

// Launches a kernel that walks queries, kQueries at a time, as plan_walk deals them out.
template <int kQueries, int kHeadSize, typename... parameters_t, typename... arguments_t>
cudaError_t launch_walk(void (*kernel)(parameters_t...), const SparseAttentionParams& p,
                        double scale, void* stream, const arguments_t&... arguments) {
  const int64_t pair_bytes = 2 * TileLayout<kHeadSize>::kBytes, heads = int64_t{p.batch} * p.heads;
  const WalkPlan walk =
      plan_walk(p.rule, {heads, p.length, kQueries, pair_bytes, kOffsetWords * sizeof(uint32_t)},
                device_limits());
  if (walk.parts == 0 || heads * walk.parts > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const QueryPlan plan = {tile_plan(p, scale), static_cast<int32_t>(walk.parts),
                          static_cast<int32_t>(walk.resident)};
  return launch(kernel, static_cast<unsigned>(heads * walk.parts), kWarps * kWarpSize,
                static_cast<size_t>((walk.resident + kSlots) * pair_bytes), stream, p, plan,
                arguments...);
}

template <int kHeadSize>
constexpr int row_tiles() {  // accumulators of 32 rows of a larger head do not fit into registers
  return kHeadSize <= 64 ? 2 : 1;
}

// q, k, v (B, H, T, D) -> heads b * H + h times parts of T -> blocks -> 4 warps of 16 or 32 queries
// -> out (B, H, T, D) and lse (B, H, T).
inline cudaError_t launch_sparse_attention_forward(const SparseAttentionParams& p, void* stream) {
  if (takes_float_tiles(p)) return launch_float_forward(p, stream);
  if (!takes_tensor_cores(p)) return launch_exact_forward(p, stream);
  return for_tensor_cores(p, [&](auto scalar, auto size) {
    constexpr int kHeadSize = decltype(size)::value, kRowTiles = row_tiles<kHeadSize>();
    return launch_walk<kRowTiles * 16 * kWarps, kHeadSize>(
        sparse_attention_forward_mma_kernel<decltype(scalar), kHeadSize, kRowTiles>, p,
        std::fabs(p.scale), stream);
  });
}

// grad_out, q, k, v, out (B, H, T, D) and lse (B, H, T) -> queries as in the forward -> grad_q
// (B, H, T, D) and a QueryStats a query in `scratch`, 8 bytes each -> tiles of 64 keys, one a block
// -> grad_k, grad_v (B, H, T, D).
inline cudaError_t launch_sparse_attention_backward(const SparseAttentionParams& p, void* scratch,
                                                    void* stream) {
  if (takes_float_tiles(p)) return launch_float_backward(p, static_cast<double*>(scratch), stream);
  if (!takes_tensor_cores(p)) {
    return launch_exact_backward(p, static_cast<double*>(scratch), stream);
  }
  QueryStats* stats = static_cast<QueryStats*>(scratch);
  return for_tensor_cores(p, [&](auto scalar, auto size) {
    constexpr int kHeadSize = decltype(size)::value, kRowTiles = row_tiles<kHeadSize>();
    constexpr bool kHeld = kHeadSize <= 64;
    using scalar_t = decltype(scalar);
    const cudaError_t error = launch_walk<kRowTiles * 16 * kWarps, kHeadSize>(
        sparse_attention_backward_query_mma_kernel<scalar_t, kHeadSize, kRowTiles>, p, p.scale,
        stream, stats);
    if (error != cudaSuccess) return error;
    const int64_t blocks = int64_t{p.batch} * p.heads * ceil_div(p.length, kTileSize);
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    constexpr size_t kBytes = kSlots * QueryTiles<scalar_t, kHeadSize>::kSlot +
                              (kHeld ? 0 : 2 * TileLayout<kHeadSize>::kBytes);
    return launch(sparse_attention_backward_key_mma_kernel<scalar_t, kHeadSize, kHeld>,
                  static_cast<unsigned>(blocks), kWarps * kWarpSize, kBytes, stream, p,
                  tile_plan(p, p.scale), stats);
  });
}

}  // namespace dalle
