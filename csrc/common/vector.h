// Vectors of DALLE_ISA_BYTES for the CPU kernels (<op>_cpu.h), what they have in common: types,
// loads and stores, the storage formats float, half and bfloat16. GCC vector extensions, so that
// one source serves every instruction set; the only intrinsics are the 32 x 32 -> 64 bit product
// (GCC finds none for a vector), max, square root, and half precision. Everything has internal
// linkage; see host_device.h. No torch here.
#pragma once

// GCC 12 takes the "undefined" vectors of its own immintrin.h, and vectors that are filled lane by
// lane, for uninitialized ones.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <immintrin.h>

#include "common/element.h"
#include "common/host_device.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

// After the arguments of a lambda that is called in two places, one of them with whole vectors: the
// compiler must see the count in each.
#define DALLE_INLINE __attribute__((always_inline))

constexpr int kBytes = DALLE_ISA_BYTES;
constexpr int kLanes = kBytes / 4;  // of 32 bits

typedef float Float __attribute__((vector_size(kBytes)));
typedef int32_t Int __attribute__((vector_size(kBytes)));
typedef uint32_t Word __attribute__((vector_size(kBytes)));
typedef uint64_t Wide __attribute__((vector_size(kBytes)));
typedef uint16_t Short __attribute__((vector_size(kBytes / 2)));

template <typename vector_t>
inline vector_t load(const void* p) {
  vector_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename vector_t>
inline void store(void* p, vector_t v) {
  __builtin_memcpy(p, &v, sizeof v);
}

inline Float splat(float x) { return x - Float{}; }
inline Int splat(int32_t x) { return x - Int{}; }
inline Float select(Int mask, Float a, Float b) { return mask ? a : b; }

inline Float maximum(Float a, Float b) {
#if DALLE_ISA_BYTES == 64
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif DALLE_ISA_BYTES == 32
  return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return (Float)_mm_max_ps((__m128)a, (__m128)b);
#endif
}

inline Float square_root(Float v) {
#if DALLE_ISA_BYTES == 64
  return (Float)_mm512_sqrt_ps((__m512)v);
#elif DALLE_ISA_BYTES == 32
  return (Float)_mm256_sqrt_ps((__m256)v);
#else
  return (Float)_mm_sqrt_ps((__m128)v);
#endif
}

// Products of the low halves of each 64-bit lane.
inline Wide multiply_low(Wide a, Wide b) {
#if DALLE_ISA_BYTES == 64
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif DALLE_ISA_BYTES == 32
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

inline Word widened(Short v) {
#if DALLE_ISA_BYTES == 64
  return (Word)_mm512_cvtepu16_epi32((__m256i)v);  // GCC takes four instructions
#else
  return __builtin_convertvector(v, Word);
#endif
}

// Whether a mask, -1 where it holds, holds in any lane.
inline bool any(Word mask) {
#if DALLE_ISA_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif DALLE_ISA_BYTES == 32
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  return _mm_movemask_ps((__m128)mask) != 0;
#endif
}

inline float sum(Float v) {
  float parts[kLanes], total = 0;
  store(parts, v);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
  }
  total = parts[0];
  return total;
}
inline float maximum(Float v) {
  float parts[kLanes];
  store(parts, v);
  for (int i = 1; i < kLanes; ++i) parts[0] = parts[i] > parts[0] ? parts[i] : parts[0];
  return parts[0];
}

// -- storage formats ------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline Float load_float(const float* p) { return load<Float>(p); }
inline void store_float(float* p, Float v) { store(p, v); }

inline Float load_float(const BFloat16* p) { return (Float)(widened(load<Short>(p)) << 16); }
inline void store_float(BFloat16* p, Float v) {
  const Word bits = (Word)v;
  const Word rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Word kept = (Word)(v == v) ? rounded : Word{} + 0x7FC0;
  store(p, __builtin_convertvector(kept, Short));
}

// By F16C where there is one (v3 and later): besides being one instruction, it does not stumble
// over subnormals, of which scaled gradients are full.
#if DALLE_ISA_BYTES == 64
inline Float widened_half(Short v) { return (Float)_mm512_cvtph_ps((__m256i)v); }
inline void store_float(Half* p, Float v) {
  store(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif DALLE_ISA_BYTES == 32
inline Float widened_half(Short v) { return (Float)_mm256_cvtph_ps((__m128i)v); }
inline void store_float(Half* p, Float v) {
  store(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Float widened_half(Short v) {
  const Word half = widened(v);
  const Word magnitude = (half & 0x7FFF) << 13;
  const Word scaled = (Word)((Float)magnitude * 0x1p112f);  // moves the bias, subnormals as well
  const Word special = (Word)(magnitude >= (0x7C00u << 13)) & 0x7F800000;
  return (Float)(scaled | special | ((half & 0x8000) << 16));
}
inline void store_float(Half* p, Float v) {
  const Word sign = (Word)v & 0x80000000u, magnitude = (Word)v ^ sign;
  // Below 2^-14 the addition of 1/2 leaves the subnormal in the low bits, rounded to even.
  const Word tiny = (Word)((Float)magnitude + 0.5f) - 0x3F000000u;
  const Word normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  const Word infinite = ((Word)(magnitude > 0x7F800000u) & 0x200) | 0x7C00;
  const Word half = (Word)(magnitude >= 0x477FF000u)  ? infinite
                    : (Word)(magnitude < 0x38800000u) ? tiny
                                                      : normal;
  store(p, __builtin_convertvector(half | (sign >> 16), Short));
}
#endif

inline Float load_float(const Half* p) { return widened_half(load<Short>(p)); }

// Calls body with an element of the storage type, which must be one of these three.
template <typename Body>
inline void with_scalar(ElementKind kind, const Body& body) {
  switch (kind) {
    case ElementKind::kFloat:
      return body(float());
    case ElementKind::kHalf:
      return body(Half());
    case ElementKind::kBFloat16:
      return body(BFloat16());
    default:
      return;
  }
}

// The first `count` of the lanes, and the others as `rest`.
template <typename scalar_t>
inline Float load_some(const scalar_t* p, int64_t count, float rest) {
  scalar_t some[kLanes];
  store_float(some, splat(rest));
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return load_float(some);
}
template <typename scalar_t>
inline void store_some(scalar_t* p, int64_t count, Float v) {
  scalar_t some[kLanes];
  store_float(some, v);
  for (int64_t i = 0; i < count; ++i) p[i] = some[i];
}

// The same where the first count of them may be all: kLanes.
template <typename scalar_t>
inline Float load_up_to(const scalar_t* p, int64_t count, float rest) {
  return count == kLanes ? load_float(p) : load_some(p, count, rest);
}
template <typename scalar_t>
inline void store_up_to(scalar_t* p, int64_t count, Float v) {
  if (count == kLanes) {
    store_float(p, v);
  } else {
    store_some(p, count, v);
  }
}

// 16-bit words, of which the first `count` are there.
inline void store_codes(uint16_t* p, int64_t count, Word codes) {
  const Short packed = __builtin_convertvector(codes, Short);
  __builtin_memcpy(p, &packed, count < kLanes ? 2 * static_cast<size_t>(count) : sizeof packed);
}
inline Word load_codes(const uint16_t* p, int64_t count) {
  Short packed = {};
  __builtin_memcpy(&packed, p, count < kLanes ? 2 * static_cast<size_t>(count) : sizeof packed);
  return widened(packed);
}

// Calls body(i, count) for the vectors of [begin, end); the last may hold fewer than kLanes.
template <typename Body>
inline void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, kLanes);
  if (i < end) body(i, end - i);
}

// Calls body(i, counts of its two vectors) for every two vectors of `numel` elements.
// Always inlined: what the body has captured stays in registers.
template <typename Body>
DALLE_INLINE inline void for_pairs(int64_t numel, const Body& body) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= numel; i += 2 * kLanes) body(i, kLanes, kLanes);
  if (i < numel) {
    const int64_t left = numel - i;
    body(i, left < kLanes ? left : kLanes, left < kLanes ? 0 : left - kLanes);
  }
}

}  // namespace
}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle
