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

// How the host has dealt the strands out.
struct DecodeDeal {
  int32_t tiles, splits;  // of DecodePlan
  int32_t image_strands;  // of a sample
  float* rows;            // (B, H, S, strands, StrandRow) of all blocks, where splits > 1
};

// What a block works on: the current of its tiles, the strands that it has of it.
struct BlockTile : SampleTile {
  int32_t end;            // of the samples of its tiles
  int32_t split, images;  // first strand of each part, number of strands of a sample's image

  __device__ void begin(const DecodeAttentionParams& p, const DecodeDeal& deal) {
    const int32_t index = static_cast<int32_t>(blockIdx.x / static_cast<uint32_t>(deal.splits));
    const int32_t step = deal.tiles * kTileSamples;
    const int32_t groups = (p.samples - 1) / step + 1;  // of tiles, of one head
    batch = index / groups / p.heads;
    head = index / groups % p.heads;
    first = index % groups * step;
    end = p.samples - first < step ? p.samples : first + step;
    split = static_cast<int32_t>(blockIdx.x % static_cast<uint32_t>(deal.splits));
    images = (deal.image_strands - split + deal.splits - 1) / deal.splits;
    count_samples();
  }
  __device__ void count_samples() {
    count = end - first < kTileSamples ? end - first : kTileSamples;
  }
  __device__ bool is_last() const { return first + kTileSamples >= end; }
};

// Copies the rows of this block's strands to where the second kernel reads them.
template <int kStride>
__device__ __forceinline__ void leave_strands(const DecodeAttentionParams& p,
                                              const DecodeDeal& deal, const BlockTile& tile,
                                              const float* rows) {
  const int strands = kTextStrands + deal.image_strands;
  const int64_t first = (int64_t{tile.batch} * p.heads + tile.head) * p.samples + tile.first;
  for (int i = static_cast<int>(threadIdx.x); i < strands * tile.count * (kStride / 4);
       i += kDecodeThreads) {
    const int column = i % (kStride / 4) * 4, row = i / (kStride / 4);
    const int strand = row / tile.count, sample = row % tile.count;
    const int of_part = strand < kTextStrands ? strand : strand - kTextStrands;
    if (of_part % deal.splits != tile.split) continue;
    store_vector(deal.rows + ((first + sample) * strands + strand) * kStride + column,
                 load_vector<float4>(rows + (strand * kTileSamples + sample) * kStride + column));
  }
}

// A block takes `tiles` tiles of 16 samples of one caption and head, or, where there are splits,
// every splits-th strand of one tile. Of its 8 warps each takes a strand of the text for all
// samples, then strands of the image, one sample's at a time; every second warp the other way
// round, so that memory is busy while text comes from L2. All strands of a query are then added up
// by 16 threads, or left for the second kernel.
template <typename scalar_t, int kHead, bool kCoded>
__global__ void __launch_bounds__(kDecodeThreads, kHead <= 64 ? 2 : 1)
    decode_attention_kernel(const DecodeAttentionParams p, const DecodeDeal deal) {
  constexpr int kStride = StrandRow<kHead>::kStride;
  // In shared memory, because the strands need all registers.
  DALLE_SHARED(DecodePlaces, places);
  DALLE_SHARED(BlockTile, tile);
  DALLE_DYNAMIC_SHARED(shared);
  float* const rows = reinterpret_cast<float*>(shared);  // of strands x 16 samples
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) tile.begin(p, deal);
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
        const int strand = tile.split + warp * deal.splits;
        if (strand >= kTextStrands) continue;
        TextStrand<scalar_t, kHead>::run(p, tile, strand, rows + strand * kTileSamples * kStride);
        continue;
      }
#pragma unroll 1
      for (int task = warp; task < tile.images * tile.count; task += kDecodeWarps) {
        const int sample = task / tile.images,
                  strand = tile.split + task % tile.images * deal.splits;
        const ImageStrand<scalar_t, kHead, kCoded> image(p, places, tile, sample);
        image.run(strand, deal.image_strands,
                  rows + ((kTextStrands + strand) * kTileSamples + sample) * kStride);
      }
    }
    __syncthreads();
    if (deal.splits == 1) {
      const int sample = thread / kMergeLanes;
      if (sample < tile.count) {
        merge_strands<scalar_t, kHead>(
            rows + sample * kStride, kTileSamples * kStride, kTextStrands + deal.image_strands,
            tile.row<scalar_t>(p.out, sample), p.head_size, thread % kMergeLanes);
      }
    } else {
      leave_strands<kStride>(p, deal, tile, rows);
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
    decode_attention_merge_kernel(const DecodeAttentionParams p, const DecodeDeal deal) {
  const int64_t query =  // (b * H + h) * S + s
      int64_t{blockIdx.x} * kTileSamples + static_cast<int>(threadIdx.x) / kMergeLanes;
  if (query >= int64_t{p.batch} * p.heads * p.samples || !is_image_slot(p.rule, *p.slot)) return;
  const int64_t head = query / p.samples % p.heads, sample = query % p.samples;
  const int64_t batch = query / p.samples / p.heads;
  const int strands = kTextStrands + deal.image_strands;
  constexpr int kStride = StrandRow<kHead>::kStride;
  merge_strands<scalar_t, kHead>(deal.rows + query * strands * kStride, kStride, strands,
                                 decode_row<scalar_t>(p.out, batch, sample, head), p.head_size,
                                 static_cast<int>(threadIdx.x) % kMergeLanes);
}

// Whether the kernels that walk strands take such heads.
inline bool fits_strands(const DecodeAttentionParams& p) {
  const bool wide = p.type == ElementKind::kFloat;
  if (!wide && p.type != ElementKind::kHalf && p.type != ElementKind::kBFloat16) return false;
  return p.head_size <= 128 && p.head_size % (wide ? 4 : 8) == 0;
}

// Whether all their rows begin at multiples of 16 bytes too (of codes: of 8 or 4).
inline bool takes_strands(const DecodeAttentionParams& p) {
  if (!fits_strands(p)) return false;
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
  if (is_empty(p) || !takes_strands(p)) return {};
  return plan_decode(decode_shape(p, p.type == ElementKind::kFloat ? 4 : 2), device_limits());
}

// Floats that the blocks of a tile leave for the second kernel; 0 where there is none.
inline int64_t decode_scratch_floats(const DecodeAttentionParams& p, const DecodePlan& plan) {
  if (plan.splits == 1) return 0;
  return int64_t{p.batch} * p.heads * p.samples * (kTextStrands + image_strands(p.rule)) *
         (padded_head(p) + 4);
}

// q, k, v (B, S, H, D) -> heads b * H + h times tiles of 16 samples, by `plan` -> blocks of 8 warps
// -> out (B, S, H, D), or, where tiles are split, strands in `scratch` -> 16 queries a block ->
// out.
inline cudaError_t launch_decode_attention(const DecodeAttentionParams& p, const DecodePlan& plan,
                                           float* scratch, void* stream) {
  if (is_empty(p)) return cudaSuccess;
  if (!takes_strands(p)) return launch_exact_decode(p, stream);
  const int64_t heads = int64_t{p.batch} * p.heads;
  const int64_t tiles = ceil_div(p.samples, kTileSamples);
  const int64_t blocks = heads * ceil_div(tiles, plan.tiles) * plan.splits;
  const int64_t merges = ceil_div(heads * p.samples, kTileSamples);
  if (blocks > 0x7fffffff || merges > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const DecodeDeal deal = {plan.tiles, plan.splits, image_strands(p.rule), scratch};
  return with_cuda_scalar(p.type, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto run = [&](auto size) {
      constexpr int kHead = decltype(size)::value;
      constexpr size_t kRow = sizeof(float) * kTileSamples * StrandRow<kHead>::kStride;
      const size_t bytes = kRow * static_cast<size_t>(kTextStrands + deal.image_strands);
      const auto kernel = p.coded ? decode_attention_kernel<scalar_t, kHead, true>
                                  : decode_attention_kernel<scalar_t, kHead, false>;
      const cudaError_t error =
          launch(kernel, static_cast<unsigned>(blocks), kDecodeThreads, bytes, stream, p, deal);
      if (error != cudaSuccess || plan.splits == 1) return error;
      return launch(decode_attention_merge_kernel<scalar_t, kHead>, static_cast<unsigned>(merges),
                    kDecodeThreads, 0, stream, p, deal);
    };
    return p.head_size <= 64 ? run(std::integral_constant<int, 64>{})
                             : run(std::integral_constant<int, 128>{});
  });
}

}  // namespace dalle
