// kN neighbouring elements of float, half or bfloat16 memory as floats, in 16-byte accesses where
// the address allows them. No torch here.
#pragma once

#include "common/element.h"
#include "common/simt.h"

namespace dalle {

// Calls launch_of with an element of the storage type: of those that all ops but attention take.
template <typename Launch>
cudaError_t with_cuda_scalar(ElementKind kind, const Launch& launch_of) {
  switch (kind) {
    case ElementKind::kFloat:
      return launch_of(float());
    case ElementKind::kHalf:
      return launch_of(__half());
    case ElementKind::kBFloat16:
      return launch_of(__nv_bfloat16());
    case ElementKind::kNone:
    case ElementKind::kShort:
    case ElementKind::kLong:
    case ElementKind::kDouble:
      break;  // the op has refused them
  }
  return cudaErrorInvalidValue;
}

__device__ __forceinline__ bool is_aligned_16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <typename scalar_t, int kN>
struct Neighbours {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(scalar_t));  // of one access
  static_assert(kN % kWidth == 0, "full accesses");

  // The first `count` of them (kN or more: all); `rest` in the other elements.
  __device__ __forceinline__ static void load(const scalar_t* p, int64_t count, float rest,
                                              float (&out)[kN]) {
    if (count < kN || !is_aligned_16(p)) {
#pragma unroll
      for (int i = 0; i < kN; ++i) out[i] = i < count ? static_cast<float>(p[i]) : rest;
      return;
    }
#pragma unroll
    for (int v = 0; v < kN / kWidth; ++v) {
      const uint4 words = load_vector_once<uint4>(p + v * kWidth);
      const uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (kWidth == 4) {
          out[v * 4 + w] = __uint_as_float(each[w]);
        } else {
          const float2 pair = unpack_pair<scalar_t>(each[w]);
          out[v * 8 + 2 * w] = pair.x;
          out[v * 8 + 2 * w + 1] = pair.y;
        }
      }
    }
  }

  __device__ __forceinline__ static void store(scalar_t* p, int64_t count, const float (&in)[kN]) {
    if (count < kN || !is_aligned_16(p)) {
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        if (i < count) p[i] = static_cast<scalar_t>(in[i]);
      }
      return;
    }
#pragma unroll
    for (int v = 0; v < kN / kWidth; ++v) {
      uint32_t each[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (kWidth == 4) {
          each[w] = __float_as_uint(in[v * 4 + w]);
        } else {
          each[w] = pack_pair<scalar_t>(in[v * 8 + 2 * w], in[v * 8 + 2 * w + 1]);
        }
      }
      store_vector_once(p + v * kWidth, uint4{each[0], each[1], each[2], each[3]});
    }
  }
};

}  // namespace dalle
