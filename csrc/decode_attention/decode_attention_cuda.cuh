// Which CUDA kernel takes a call of decode attention, and its launch. No torch here. Not yet
// measured on a GPU.
//
// - fp16 and bf16, D a multiple of 8 up to 128: text on tensor cores, image streamed.
// - fp32, D a multiple of 4 up to 128: the same with plain products.
// - everything else: decode_attention_cuda_exact.cuh.
#pragma once

#include "common/vec.cuh"
#include "decode_attention/decode_attention_cuda_exact.cuh"
#include "decode_attention/decode_attention_cuda_image.cuh"
#include "decode_attention/decode_attention_cuda_text.cuh"

namespace dalle {

// How the host has assigned the chunks to blocks.
struct DecodeSchedule {
  int32_t tiles, splits;  // of DecodePlan
  int32_t image_chunks;   // of a sample
  float* rows;            // (B, H, S, chunks, ChunkRow) of all blocks, where splits > 1
};

// What a block works on: the current of its tiles, the chunks that it has of it.
struct BlockTile : SampleTile {
  int32_t end;            // of the samples of its tiles
  int32_t split, images;  // first chunk of each part, number of chunks of a sample's image

  __device__ void begin(const DecodeAttentionParams& p, const DecodeSchedule& schedule) {
    const int32_t index = static_cast<int32_t>(blockIdx.x / static_cast<uint32_t>(schedule.splits));
    const int32_t step = schedule.tiles * kTileSamples;
    const int32_t groups = (p.samples - 1) / step + 1;  // of tiles, of one head
    batch = index / groups / p.heads;
    head = index / groups % p.heads;
    first = index % groups * step;
    end = p.samples - first < step ? p.samples : first + step;
    split = static_cast<int32_t>(blockIdx.x % static_cast<uint32_t>(schedule.splits));
    images = (schedule.image_chunks - split + schedule.splits - 1) / schedule.splits;
    count_samples();
  }
  __device__ void count_samples() {
    count = end - first < kTileSamples ? end - first : kTileSamples;
  }
  __device__ bool is_last() const { return first + kTileSamples >= end; }
};

// Copies the rows of this block's chunks to where the second kernel reads them.
template <int kStride>
__device__ __forceinline__ void store_chunks(const DecodeAttentionParams& p,
                                             const DecodeSchedule& schedule, const BlockTile& tile,
                                             const float* rows) {
  const int chunks = kTextChunks + schedule.image_chunks;
  const int64_t first = (int64_t{tile.batch} * p.heads + tile.head) * p.samples + tile.first;
  for (int i = static_cast<int>(threadIdx.x); i < chunks * tile.count * (kStride / 4);
       i += kDecodeThreads) {
    const int column = i % (kStride / 4) * 4, row = i / (kStride / 4);
    const int chunk = row / tile.count, sample = row % tile.count;
    const int of_part = chunk < kTextChunks ? chunk : chunk - kTextChunks;
    if (of_part % schedule.splits != tile.split) continue;
    store_vector(schedule.rows + ((first + sample) * chunks + chunk) * kStride + column,
                 load_vector<float4>(rows + (chunk * kTileSamples + sample) * kStride + column));
  }
}

// A block takes `tiles` tiles of 16 samples of one caption and head, or, where there are splits,
// every splits-th chunk of one tile. Of its 8 warps each takes a chunk of the text for all
// samples, then chunks of the image, one sample's at a time; every second warp the other way
// round, so that memory is busy while text comes from L2. All chunks of a query are then added up
// by 16 threads, or left for the second kernel.
template <typename scalar_t, int kHead, bool kCoded>
__global__ void __launch_bounds__(kDecodeThreads, kHead <= 64 ? 2 : 1)
    decode_attention_kernel(const DecodeAttentionParams p, const DecodeSchedule schedule) {
  constexpr int kStride = ChunkRow<kHead>::kStride;
  // In shared memory, because the chunks need all registers.
  DALLE_SHARED(DecodePlaces, places);
  DALLE_SHARED(BlockTile, tile);
  DALLE_DYNAMIC_SHARED(shared);
  float* const rows = reinterpret_cast<float*>(shared);  // of chunks x 16 samples
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) tile.begin(p, schedule);
  const int64_t slot = *p.slot;
  const bool valid = is_image_slot(p.rule, slot);
  if (valid) places.find(p.rule, static_cast<int32_t>(slot));
  __syncthreads();
  if (!valid) {
    for (int32_t s = tile.first; s < tile.end && tile.split == 0; ++s) {
      fill_not_a_number(decode_row<scalar_t>(p.out, tile.batch, s, tile.head), p.head_size, thread,
                        kDecodeThreads);
    }
    return;
  }
#pragma unroll 1
  while (true) {
    const int warp = __shfl_sync(kAllLanes, thread / kWarpSize, 0);
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      if ((pass + warp) % 2 == 0) {
        const int chunk = tile.split + warp * schedule.splits;
        if (chunk >= kTextChunks) continue;
        TextChunk<scalar_t, kHead>::run(p, tile, chunk, rows + chunk * kTileSamples * kStride);
        continue;
      }
#pragma unroll 1
      for (int task = warp; task < tile.images * tile.count; task += kDecodeWarps) {
        const int sample = task / tile.images,
                  chunk = tile.split + task % tile.images * schedule.splits;
        const ImageChunk<scalar_t, kHead, kCoded> image(p, places, tile, sample);
        image.run(chunk, schedule.image_chunks,
                  rows + ((kTextChunks + chunk) * kTileSamples + sample) * kStride);
      }
    }
    __syncthreads();
    if (schedule.splits == 1) {
      const int sample = thread / kMergeLanes;
      if (sample < tile.count) {
        merge_chunks<scalar_t, kHead>(
            rows + sample * kStride, kTileSamples * kStride, kTextChunks + schedule.image_chunks,
            tile.row<scalar_t>(p.out, sample), p.head_size, thread % kMergeLanes);
      }
    } else {
      store_chunks<kStride>(p, schedule, tile, rows);
    }
    if (tile.is_last()) return;
    __syncthreads();  // all have read the rows and the tile
    if (thread == 0) {
      tile.first += kTileSamples;
      tile.count_samples();
    }
    __syncthreads();
  }
}

// Adds up what several blocks of a tile have left: a thread has a 16th of a query's elements.
template <typename scalar_t, int kHead>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_attention_merge_kernel(const DecodeAttentionParams p, const DecodeSchedule schedule) {
  const int64_t query =  // (b * H + h) * S + s
      int64_t{blockIdx.x} * kTileSamples + static_cast<int>(threadIdx.x) / kMergeLanes;
  if (query >= int64_t{p.batch} * p.heads * p.samples || !is_image_slot(p.rule, *p.slot)) return;
  const int64_t head = query / p.samples % p.heads, sample = query % p.samples;
  const int64_t batch = query / p.samples / p.heads;
  const int chunks = kTextChunks + schedule.image_chunks;
  constexpr int kStride = ChunkRow<kHead>::kStride;
  merge_chunks<scalar_t, kHead>(schedule.rows + query * chunks * kStride, kStride, chunks,
                                decode_row<scalar_t>(p.out, batch, sample, head), p.head_size,
                                static_cast<int>(threadIdx.x) % kMergeLanes);
}

// Whether the kernels that walk chunks take such heads.
inline bool fits_chunks(const DecodeAttentionParams& p) {
  const bool wide = p.type == ElementKind::kFloat;
  if (!wide && p.type != ElementKind::kHalf && p.type != ElementKind::kBFloat16) return false;
  return p.head_size <= 128 && p.head_size % (wide ? 4 : 8) == 0;
}

// Whether all their rows begin at multiples of 16 bytes too (of codes: of 8 or 4).
inline bool takes_chunks(const DecodeAttentionParams& p) {
  if (!fits_chunks(p)) return false;
  const int64_t bytes = p.type == ElementKind::kFloat ? 4 : 2;
  uint64_t bits = 0;
  for (const DecodeRows* rows : {&p.q, &p.k, &p.v, &p.out}) {
    bits |= reinterpret_cast<uint64_t>(rows->data);
    bits |= static_cast<uint64_t>((rows->batch | rows->sample | rows->head) * bytes);
  }
  for (const void* data : {p.text_keys, p.text_values, static_cast<const void*>(p.image_keys),
                           static_cast<const void*>(p.image_values)}) {
    bits |= reinterpret_cast<uint64_t>(data);
  }
  return bits % 16 == 0;
}

inline bool is_empty(const DecodeAttentionParams& p) {
  return p.batch == 0 || p.samples == 0 || p.heads == 0;
}

// Rounded up to what the kernels are compiled for.
inline int32_t padded_head(const DecodeAttentionParams& p) { return p.head_size <= 64 ? 64 : 128; }

inline DecodePlan decode_plan(const DecodeAttentionParams& p) {
  if (is_empty(p) || !takes_chunks(p)) return {};
  return plan_decode(decode_shape(p, p.type == ElementKind::kFloat ? 4 : 2), device_limits());
}

// Floats that the blocks of a tile leave for the second kernel; 0 where there is none.
inline int64_t decode_scratch_floats(const DecodeAttentionParams& p, const DecodePlan& plan) {
  if (plan.splits == 1) return 0;
  return int64_t{p.batch} * p.heads * p.samples * (kTextChunks + image_chunks(p.rule)) *
         (padded_head(p) + 4);
}

// q, k, v (B, S, H, D) -> heads b * H + h times tiles of 16 samples, by `plan` -> blocks of 8 warps
// -> out (B, S, H, D), or, where tiles are split, chunks in `scratch` -> 16 queries a block ->
// out.
inline cudaError_t launch_decode_attention(const DecodeAttentionParams& p, const DecodePlan& plan,
                                           float* scratch, void* stream) {
  if (is_empty(p)) return cudaSuccess;
  if (!takes_chunks(p)) return launch_exact_decode(p, stream);
  const int64_t heads = int64_t{p.batch} * p.heads;
  const int64_t tiles = ceil_div(p.samples, kTileSamples);
  const int64_t blocks = heads * ceil_div(tiles, plan.tiles) * plan.splits;
  const int64_t merges = ceil_div(heads * p.samples, kTileSamples);
  if (blocks > 0x7fffffff || merges > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const DecodeSchedule schedule = {plan.tiles, plan.splits, image_chunks(p.rule), scratch};
  return with_cuda_scalar(p.type, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto run = [&](auto size) {
      constexpr int kHead = decltype(size)::value;
      constexpr size_t kRow = sizeof(float) * kTileSamples * ChunkRow<kHead>::kStride;
      const size_t bytes = kRow * static_cast<size_t>(kTextChunks + schedule.image_chunks);
      const auto kernel = p.coded ? decode_attention_kernel<scalar_t, kHead, true>
                                  : decode_attention_kernel<scalar_t, kHead, false>;
      const cudaError_t error =
          launch(kernel, static_cast<unsigned>(blocks), kDecodeThreads, bytes, stream, p, schedule);
      if (error != cudaSuccess || plan.splits == 1) return error;
      return launch(decode_attention_merge_kernel<scalar_t, kHead>, static_cast<unsigned>(merges),
                    kDecodeThreads, 0, stream, p, schedule);
    };
    return p.head_size <= 64 ? run(std::integral_constant<int, 64>{})
                             : run(std::integral_constant<int, 128>{});
  });
}

}  // namespace dalle
