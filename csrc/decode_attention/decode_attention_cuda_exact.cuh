// CUDA kernel of decode attention for every type, head size and stride: fp64, D over 128, rows that
// 16-byte accesses do not fit. No torch here.
#pragma once

#include <type_traits>

#include "decode_attention/decode_attention_cuda_image.cuh"

namespace dalle {

template <typename scalar_t, int kPerLane>
struct ExactDecode {
  using acc_t = std::conditional_t<sizeof(scalar_t) == 8, double, float>;
  struct Row {
    acc_t x[kPerLane];
  };

  const DecodeAttentionParams& p;
  int lane;

  __device__ static acc_t weight_of(acc_t x) {
    if constexpr (sizeof(acc_t) == 8) {
      return exp(x);
    } else {
      return expf(x);
    }
  }
  __device__ static acc_t shift(acc_t m) { return m == -static_cast<acc_t>(INFINITY) ? 0 : m; }

  // Zero beyond D; `factor` is the scale of codes.
  template <typename stored_t>
  __device__ Row load(const stored_t* from, acc_t factor = 1) const {
    Row row;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + i * kWarpSize;
      row.x[i] = d < p.head_size ? factor * static_cast<acc_t>(from[d]) : acc_t{0};
    }
    return row;
  }
  __device__ acc_t sum(acc_t x) const {
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
  }
  __device__ acc_t dot(const Row& a, const Row& b) const {
    acc_t products = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) products += a.x[i] * b.x[i];
    return sum(products);
  }

  // The new row, put into the cache at `at`, as it is read from there.
  __device__ Row put_new(const scalar_t* from, void* cache, float* scales, int64_t at) const {
    Row row = load(from);
    if (!p.coded) {
      auto* to = static_cast<scalar_t*>(cache) + at * p.head_size;
      for (int d = lane; d < p.head_size; d += kWarpSize) to[d] = from[d];
      return row;
    }
    acc_t largest = 0;
    bool number = true;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const acc_t size = row.x[i] < 0 ? -row.x[i] : row.x[i];
      number = number && size == size;
      largest = size > largest ? size : largest;
    }
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      const acc_t other = __shfl_xor_sync(kAllLanes, largest, step);
      largest = other > largest ? other : largest;
    }
    number = __all_sync(kAllLanes, number) != 0;
    const float size = static_cast<float>(largest);
    const float scale = number && size < INFINITY ? size / kMaxCode : NAN;
    const bool codes = scale > 0.0f;
    auto* to = static_cast<int8_t*>(cache) + at * p.head_size;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + i * kWarpSize;
      const acc_t code = codes ? rint(row.x[i] / scale) : acc_t{0};
      if (d < p.head_size) to[d] = static_cast<int8_t>(static_cast<int>(code));
      row.x[i] = d < p.head_size ? code * scale : acc_t{0};
    }
    if (lane == 0) scales[at] = scale;
    return row;
  }
  __device__ Row old(const void* cache, const float* scales, int64_t at) const {
    if (!p.coded) return load(static_cast<const scalar_t*>(cache) + at * p.head_size);
    return load(static_cast<const int8_t*>(cache) + at * p.head_size, scales[at]);
  }
};

template <typename scalar_t>
__device__ __forceinline__ void fill_not_a_number(scalar_t* row, int head_size, int lane,
                                                  int lanes) {
  for (int d = lane; d < head_size; d += lanes) row[d] = static_cast<scalar_t>(NAN);
}

// A warp takes every 8th key of a sample and head, and lane l the elements l, l + 32, ... of its
// rows.
template <typename scalar_t, int kPerLane>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_attention_exact_kernel(const DecodeAttentionParams p) {
  using Exact = ExactDecode<scalar_t, kPerLane>;
  using acc_t = typename Exact::acc_t;
  using Row = typename Exact::Row;
  DALLE_SHARED(DecodePlaces, places);
  DALLE_SHARED(acc_t, sums, [kDecodeWarps][kPerLane * kWarpSize + 2]);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int64_t index = blockIdx.x;  // (b * S + s) * H + h
  const int64_t head = index % p.heads, sample = index / p.heads % p.samples;
  const int64_t batch = index / p.heads / p.samples;
  scalar_t* const to = decode_row<scalar_t>(p.out, batch, sample, head);
  const int64_t slot = *p.slot;
  if (!is_image_slot(p.rule, slot)) {
    fill_not_a_number(to, p.head_size, thread, kDecodeThreads);
    return;
  }
  places.find(p.rule, static_cast<int32_t>(slot));
  __syncthreads();
  const Exact exact{p, lane};
  const Row q = exact.load(decode_row<scalar_t>(p.q, batch, sample, head));
  const acc_t factor = static_cast<acc_t>(p.scale);
  acc_t m = -static_cast<acc_t>(INFINITY), l = 0;
  Row out = {};
  const auto attend = [&](const Row& key, const Row& value) {
    const acc_t score = factor * exact.dot(q, key);
    const acc_t m_new = score > m ? score : m, shift = Exact::shift(m_new);
    const acc_t rescale = Exact::weight_of(m - shift), weight = Exact::weight_of(score - shift);
    m = m_new;
    l = l * rescale + weight;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) out.x[i] = out.x[i] * rescale + weight * value.x[i];
  };
  const int64_t text = (batch * p.heads + head) * p.rule.text_len;
  for (int64_t key = warp; key < p.rule.text_len; key += kDecodeWarps) {
    const int64_t at = (text + key) * p.head_size;
    attend(exact.load(static_cast<const scalar_t*>(p.text_keys) + at),
           exact.load(static_cast<const scalar_t*>(p.text_values) + at));
  }
  PlaceCursor cursor(places);
  for (int32_t key = warp;; key += kDecodeWarps) {
    const int32_t place = cursor.find(key);
    if (place < 0) break;
    const int64_t at = index * p.capacity + place;
    if (place == places.new_place) {
      attend(exact.put_new(decode_row<scalar_t>(p.k, batch, sample, head), p.image_keys,
                           p.key_scales, at),
             exact.put_new(decode_row<scalar_t>(p.v, batch, sample, head), p.image_values,
                           p.value_scales, at));
    } else {
      attend(exact.old(p.image_keys, p.key_scales, at),
             exact.old(p.image_values, p.value_scales, at));
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sums[warp][lane + i * kWarpSize] = out.x[i];
  if (lane == 0) {
    sums[warp][kPerLane * kWarpSize] = m;
    sums[warp][kPerLane * kWarpSize + 1] = l;
  }
  __syncthreads();
  for (int w = 0; w < kDecodeWarps; ++w) {
    const acc_t other = sums[w][kPerLane * kWarpSize];
    m = w == 0 || other > m ? other : m;
  }
  for (int d = thread; d < p.head_size; d += kDecodeThreads) {
    acc_t total = 0, weights = 0;
    for (int w = 0; w < kDecodeWarps; ++w) {
      const acc_t weight = Exact::weight_of(sums[w][kPerLane * kWarpSize] - Exact::shift(m));
      total += weight * sums[w][d];
      weights += weight * sums[w][kPerLane * kWarpSize + 1];
    }
    to[d] = static_cast<scalar_t>(total / weights);
  }
}

// q, k, v (B, S, H, D) -> B * S * H blocks of 8 warps -> out (B, S, H, D).
inline cudaError_t launch_exact_decode(const DecodeAttentionParams& p, void* stream) {
  const int64_t blocks = int64_t{p.batch} * p.samples * p.heads;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const auto of = [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const unsigned grid = static_cast<unsigned>(blocks);
    if (p.head_size <= 64) {
      return launch(decode_attention_exact_kernel<scalar_t, 2>, grid, kDecodeThreads, 0, stream, p);
    }
    return launch(decode_attention_exact_kernel<scalar_t, 8>, grid, kDecodeThreads, 0, stream, p);
  };
  if (p.type == ElementKind::kDouble) return of(double());
  return with_cuda_scalar(p.type, of);
}

}  // namespace dalle
