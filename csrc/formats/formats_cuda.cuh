// CUDA kernels of formats and their launch. No torch here. Not yet measured on a GPU.
//
// A thread takes kEight neighbouring elements at a time: two Philox calls, and 16-byte accesses to
// the codes. Bytes are what the kernels are bound by (11 instructions encode an element, 4 decode).
#pragma once

#include "common/eights.cuh"
#include "formats/formats.h"

namespace dalle {

// Encodes eight elements of a thread at a time and counts saturated, flushed and nonfinite ones.
template <Format kFormat>
struct EightEncoder {
  uint64_t seed;
  bool stochastic_rounding;
  int thread_counts[kNumCounts] = {};

  __device__ __forceinline__ explicit EightEncoder(const int64_t* seed_pointer)
      : seed(seed_pointer ? static_cast<uint64_t>(*seed_pointer) : 0),
        stochastic_rounding(seed_pointer != nullptr) {}

  // `element` is a multiple of 8; elements beyond the end are 0.
  __device__ __forceinline__ void encode_eight(int64_t element, const float (&x)[kEight],
                                               uint32_t (&codes)[kEight]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      PhiloxWords words{};
      if (stochastic_rounding) {
        words = philox_subsequence(static_cast<uint64_t>(element) / 4 + half, seed);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = __float_as_uint(x[half * 4 + i]);
        const uint32_t added =
            stochastic_rounding ? stochastic<kFormat>(words.word[i]) : FormatOf<kFormat>::kHalfUlp;
        const uint32_t code = encode<kFormat>(bits, added);
        const uint32_t magnitude = bits & 0x7FFFFFFFu;
        const bool finite = magnitude < 0x7F800000u;
        const bool flushed = finite && magnitude != 0 && code == 0;
        thread_counts[kSaturated] += finite && !flushed && magnitude > FormatOf<kFormat>::kMax;
        thread_counts[kFlushed] += flushed;
        thread_counts[kNonfinite] += !finite;
        codes[half * 4 + i] = code;
      }
    }
  }

  // Every thread of the block calls this.
  __device__ __forceinline__ void add_to(int64_t* counts) const {
    if (counts != nullptr) add_counts(thread_counts, counts);
  }
};

// A thread encodes eight neighbouring elements at a time, and counts them for its block.
template <Format kFormat, typename scalar_t>
__global__ void __launch_bounds__(kEightThreads) formats_pack_kernel(PackArgs args) {
  const scalar_t* const x = static_cast<const scalar_t*>(args.x);
  const bool aligned = is_aligned_16(args.codes);
  EightEncoder<kFormat> encoder(args.seed);
  for_eights(args.numel, [&](int64_t i) {
    float values[kEight];
    uint32_t codes[kEight];
    Neighbours<scalar_t, kEight>::load(x + i, args.numel - i, 0.0f, values);
    encoder.encode_eight(i, values, codes);
    store_codes(args.codes + i, args.numel - i, aligned, codes);
  });
  encoder.add_to(args.counts);
}

// A thread decodes eight neighbouring codes at a time.
template <Format kFormat, typename scalar_t>
__global__ void __launch_bounds__(kEightThreads) formats_unpack_kernel(UnpackArgs args) {
  scalar_t* const x = static_cast<scalar_t*>(args.x);
  const bool aligned = is_aligned_16(args.codes);
  for_eights(args.numel, [&](int64_t i) {
    float values[kEight];
    uint32_t codes[kEight];
    load_codes(args.codes + i, args.numel - i, aligned, codes);
#pragma unroll
    for (int j = 0; j < kEight; ++j) values[j] = __uint_as_float(decode<kFormat>(codes[j]));
    Neighbours<scalar_t, kEight>::store(x + i, args.numel - i, values);
  });
}

// A thread adds eight neighbouring codes of every buffer at a time, from buffer 0 on, and encodes
// the sums.
template <Format kFormat>
__global__ void __launch_bounds__(kEightThreads) formats_sum_kernel(ReduceArgs args) {
  // Later buffers begin aligned only where their length is a multiple of eight.
  const bool aligned = is_aligned_16(args.codes) && args.numel % kEight == 0;
  EightEncoder<kFormat> encoder(args.seed);
  for_eights(args.numel, [&](int64_t i) {
    float total[kEight] = {};
    uint32_t codes[kEight];
    for (int64_t r = 0; r < args.num_buffers; ++r) {
      load_codes(args.codes + r * args.numel + i, args.numel - i, aligned, codes);
#pragma unroll
      for (int j = 0; j < kEight; ++j) total[j] += __uint_as_float(decode<kFormat>(codes[j]));
    }
    encoder.encode_eight(i, total, codes);
    store_codes(args.sum + i, args.numel - i, is_aligned_16(args.sum), codes);
  });
  encoder.add_to(args.counts);
}

// Calls launch_of with the format and an element of the type.
template <typename Launch>
cudaError_t choose_formats(Format format, ElementKind dtype, const Launch& launch_of) {
  return with_cuda_scalar(dtype, [&](auto scalar) {
    if (format == Format::k169) {
      return launch_of(std::integral_constant<Format, Format::k169>(), scalar);
    }
    return launch_of(std::integral_constant<Format, Format::k0610>(), scalar);
  });
}

// x (N) -> eights of a thread, 2,048 elements of a block -> codes (N), counts (kNumCounts).
inline cudaError_t launch_formats_pack(const PackArgs& args, void* stream) {
  return choose_formats(args.format, args.dtype, [&](auto format, auto scalar) {
    return launch_eights(formats_pack_kernel<decltype(format)::value, decltype(scalar)>, args,
                         stream);
  });
}

// codes (N) -> eights of a thread -> x (N).
inline cudaError_t launch_formats_unpack(const UnpackArgs& args, void* stream) {
  return choose_formats(args.format, args.dtype, [&](auto format, auto scalar) {
    return launch_eights(formats_unpack_kernel<decltype(format)::value, decltype(scalar)>, args,
                         stream);
  });
}

// codes (R, N) -> eights of a thread, R rows of each -> sum (N), counts (kNumCounts).
inline cudaError_t launch_formats_sum(const ReduceArgs& args, void* stream) {
  if (args.format == Format::k169) {
    return launch_eights(formats_sum_kernel<Format::k169>, args, stream);
  }
  return launch_eights(formats_sum_kernel<Format::k0610>, args, stream);
}

}  // namespace dalle
