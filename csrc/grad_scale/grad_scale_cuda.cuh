// CUDA kernels of grad_scale and their launch. No torch here. Not yet measured on a GPU.
//
// The ends of a block take eight neighbouring elements a thread (common/eights.cuh). Gradients of
// parameters are cut into chunks, one a thread block, each of which leaves a ChunkStats; a second
// launch adds them up, one block a group, in an order that hangs on the table alone.
#pragma once

#include "common/eights.cuh"
#include "grad_scale/grad_scale.h"

namespace dalle {

// A thread scales eight neighbouring elements at a time, and counts them for its block.
template <typename from_t, typename to_t>
__global__ void __launch_bounds__(kEightThreads) grad_scale_scale_kernel(ScaleArgs args) {
  const auto* const grad = static_cast<const from_t*>(args.grad);
  auto* const out = static_cast<to_t*>(args.out);
  const StorageLimits limits = storage_limits(args.to);
  const float scale = *args.scale;
  int thread_counts[kNumScaleCounts] = {};
  for_eights(args.numel, [&](int64_t i) {
    float x[kEight];
    Neighbours<from_t, kEight>::load(grad + i, args.numel - i, 0.0f, x);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const float y = x[j] * scale;
      const uint32_t before = magnitude_of(x[j]), after = magnitude_of(y);
      const bool finite = before < kInfinityBits, fits = after < limits.infinite;
      thread_counts[kOverflowed] += finite && !fits;
      thread_counts[kFlushedGrads] += finite && before != 0 && after <= limits.zero;
      thread_counts[kSubnormalGrads] += finite && after > limits.zero && after < limits.normal;
      thread_counts[kFiltered] += !finite;
      x[j] = finite && fits ? y : 0.0f;
    }
    Neighbours<to_t, kEight>::store(out + i, args.numel - i, x);
  });
  add_counts(thread_counts, args.counts);
}

// A thread unscales eight neighbouring elements at a time and adds them to the stream.
template <typename grad_t>
__global__ void __launch_bounds__(kEightThreads) grad_scale_unscale_kernel(UnscaleArgs args) {
  const auto* const grad = static_cast<const grad_t*>(args.grad);
  const float scale = *args.scale;
  for_eights(args.numel, [&](int64_t i) {
    float x[kEight], stream[kEight];
    Neighbours<grad_t, kEight>::load(grad + i, args.numel - i, 0.0f, x);
    Neighbours<float, kEight>::load(args.stream + i, args.numel - i, 0.0f, stream);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const float quotient = x[j] / scale;
      stream[j] += magnitude_of(quotient) < kInfinityBits ? quotient : 0.0f;
    }
    Neighbours<float, kEight>::store(args.out + i, args.numel - i, stream);
  });
}

// Sums the statistics of a block's threads: the lanes of a warp, then the warps, each in order.
// Every thread of the block calls it; thread 0 returns the sum.
__device__ __forceinline__ ChunkStats block_sum(ChunkStats stats) {
  DALLE_SHARED(ChunkStats, parts, [kEightThreads / kWarpSize]);
  stats.max_abs = __reduce_max_sync(kAllLanes, stats.max_abs);
#pragma unroll
  for (int c = 0; c < kNumGroupCounts; ++c) {
    stats.counts[c] = __reduce_add_sync(kAllLanes, stats.counts[c]);
  }
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    stats.squares += __shfl_down_sync(kAllLanes, stats.squares, step);
  }
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = stats;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kEightThreads / kWarpSize; ++w) {
      stats.squares += parts[w].squares;
      stats.max_abs = parts[w].max_abs > stats.max_abs ? parts[w].max_abs : stats.max_abs;
      for (int c = 0; c < kNumGroupCounts; ++c) stats.counts[c] += parts[w].counts[c];
    }
  }
  return stats;
}

template <typename scalar_t>
__device__ __forceinline__ ChunkStats unscale_chunk(const GroupStatsArgs& args, const TableRow& row,
                                                    int64_t chunk) {
  const ElementKind kind = kind_of(row, 0);
  const ChunkSpan span = span_of(row, chunk);
  scalar_t* const data = data_of<scalar_t>(row, 0) + span.begin;
  const float scale = args.scales[row.group];
  const uint32_t normal = storage_limits(kind).normal, flushed = flushed_by(kind, scale);
  const int count = static_cast<int>(span.count);
  float squares = 0;  // of at most kTableChunk / kEightThreads = 128 elements
  ChunkStats stats = {};
  for (int i = static_cast<int>(threadIdx.x) * kEight; i < count; i += kEightThreads * kEight) {
    float x[kEight];
    Neighbours<scalar_t, kEight>::load(data + i, count - i, 1.0f, x);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const uint32_t bits = magnitude_of(x[j]);
      const bool inside = j < count - i, finite = bits < kInfinityBits;
      const uint32_t finite_bits = inside && finite ? bits : 0;
      stats.counts[kNonfiniteGrads] += inside && !finite;
      stats.counts[kZeros] += inside && bits == 0;
      stats.counts[kSubnormals] += inside && bits != 0 && bits < normal;
      stats.counts[kUnderflowed] += inside && bits != 0 && bits <= flushed;
      stats.max_abs = finite_bits > stats.max_abs ? finite_bits : stats.max_abs;
      squares = fmaf(float_of(finite_bits), float_of(finite_bits), squares);
    }
    if (args.check_only) continue;
#pragma unroll
    for (int j = 0; j < kEight; ++j) x[j] /= scale;
    Neighbours<scalar_t, kEight>::store(data + i, count - i, x);
  }
  stats.squares = static_cast<double>(squares);
  return stats;
}

// A block takes one chunk of one gradient, a thread eight neighbouring elements of it at a time.
__global__ void __launch_bounds__(kEightThreads) grad_scale_chunks_kernel(GroupStatsArgs args) {
  const int64_t chunk = blockIdx.x;
  const TableRow row = args.table.rows[row_of_chunk(args.table, chunk)];
  ChunkStats stats = {};
  switch (kind_of(row, 0)) {
    case ElementKind::kHalf:
      stats = unscale_chunk<__half>(args, row, chunk);
      break;
    case ElementKind::kBFloat16:
      stats = unscale_chunk<__nv_bfloat16>(args, row, chunk);
      break;
    case ElementKind::kFloat:
    case ElementKind::kNone:
    case ElementKind::kShort:
    case ElementKind::kLong:
    case ElementKind::kDouble:
      stats = unscale_chunk<float>(args, row, chunk);  // the op has refused all others
  }
  stats = block_sum(stats);
  if (threadIdx.x == 0) args.chunks[chunk] = stats;
}

// A block takes one group; a thread adds every 256th of its chunks: 65,536 times 32,768 elements
// fit its counts.
__global__ void __launch_bounds__(kEightThreads) grad_scale_groups_kernel(GroupStatsArgs args) {
  const int64_t group = blockIdx.x;
  const int64_t begin = first_chunk_of_group(args.table, group);
  const int64_t end = first_chunk_of_group(args.table, group + 1);
  ChunkStats stats = {};
  for (int64_t chunk = begin + threadIdx.x; chunk < end; chunk += kEightThreads) {
    const ChunkStats& part = args.chunks[chunk];
    stats.squares += part.squares;
    stats.max_abs = part.max_abs > stats.max_abs ? part.max_abs : stats.max_abs;
#pragma unroll
    for (int c = 0; c < kNumGroupCounts; ++c) stats.counts[c] += part.counts[c];
  }
  stats = block_sum(stats);
  if (threadIdx.x != 0) return;
  const float scale = args.scales[group];
  args.squares[group] = stats.squares / scale / scale;
  args.max_abs[group] = float_of(stats.max_abs) / scale;
  for (int c = 0; c < kNumGroupCounts; ++c) {
    args.counts[group * kNumGroupCounts + c] = stats.counts[c];
  }
}

// The one block takes all scales; a thread updates every 256th.
__global__ void __launch_bounds__(kEightThreads) grad_scale_update_kernel(UpdateScalesArgs args) {
  int bad = 0;
  for (int64_t g = threadIdx.x; g < args.num_groups; g += kEightThreads) {
    bad |= args.nonfinite[g] != 0;
  }
  const bool skipped = __syncthreads_or(bad) != 0;
  for (int64_t g = threadIdx.x; g < args.num_groups; g += kEightThreads) {
    update_scale(args, g, skipped);
  }
}

// grad (N) -> eights of a thread, 2,048 elements of a block -> out (N), counts (kNumScaleCounts).
inline cudaError_t launch_grad_scale_scale(const ScaleArgs& args, void* stream) {
  return with_cuda_scalar(args.from, [&](auto from) {
    return with_cuda_scalar(args.to, [&](auto to) {
      return launch_eights(grad_scale_scale_kernel<decltype(from), decltype(to)>, args, stream);
    });
  });
}

// stream, grad (N) -> eights of a thread -> out (N).
inline cudaError_t launch_grad_scale_unscale(const UnscaleArgs& args, void* stream) {
  return with_cuda_scalar(args.kind, [&](auto grad) {
    return launch_eights(grad_scale_unscale_kernel<decltype(grad)>, args, stream);
  });
}

// Table of gradients (N_i), scales (G) -> chunks of 32,768 elements -> a block each -> gradients in
// place and a ChunkStats a chunk -> a block a group -> counts (G, kNumGroupCounts), squares (G),
// max_abs (G).
inline cudaError_t launch_grad_scale_stats(const GroupStatsArgs& args, void* stream) {
  if (args.table.num_chunks > 0) {
    const cudaError_t error =
        launch(grad_scale_chunks_kernel, static_cast<unsigned>(args.table.num_chunks),
               kEightThreads, 0, stream, args);
    if (error != cudaSuccess) return error;
  }
  if (args.num_groups == 0) return cudaSuccess;
  return launch(grad_scale_groups_kernel, static_cast<unsigned>(args.num_groups), kEightThreads, 0,
                stream, args);
}

// nonfinite (G) -> one block -> scales (G), since_drop (G) in place.
inline cudaError_t launch_grad_scale_update(const UpdateScalesArgs& args, void* stream) {
  if (args.num_groups == 0) return cudaSuccess;
  return launch(grad_scale_update_kernel, 1, kEightThreads, 0, stream, args);
}

}  // namespace dalle
