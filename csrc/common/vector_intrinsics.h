// What vector extensions do not say, or GCC does not find in them: max, square root, the 32 x 32 ->
// 64 bit product, half precision. By intrinsics on x86-64, each with a portable twin of the same
// bits, which the generic build uses (DALLE_ISA_GENERIC; aarch64 and all else). Included by
// common/vector.h only.
#pragma once

// Bytes of the vectors that intrinsics take; 0: the portable twins.
#ifdef DALLE_ISA_GENERIC
#define DALLE_X86_BYTES 0
#else
#define DALLE_X86_BYTES DALLE_ISA_BYTES
#include <immintrin.h>
#endif

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

// The larger; b where one of them is NaN.
inline Float maximum(Float a, Float b) {
#if DALLE_X86_BYTES == 64
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif DALLE_X86_BYTES == 32
  return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#elif DALLE_X86_BYTES == 16
  return (Float)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
inline Double maximum(Double a, Double b) {
#if DALLE_X86_BYTES == 64
  return (Double)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif DALLE_X86_BYTES == 32
  return (Double)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif DALLE_X86_BYTES == 16
  return (Double)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

inline Float square_root(Float v) {
#if DALLE_X86_BYTES == 64
  return (Float)_mm512_sqrt_ps((__m512)v);
#elif DALLE_X86_BYTES == 32
  return (Float)_mm256_sqrt_ps((__m256)v);
#elif DALLE_X86_BYTES == 16
  return (Float)_mm_sqrt_ps((__m128)v);
#else
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Products of the low halves of each 64-bit lane.
constexpr uint64_t kLowHalf = 0xFFFFFFFFu;
inline Wide multiply_low(Wide a, Wide b) {
#if DALLE_X86_BYTES == 64
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif DALLE_X86_BYTES == 32
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif DALLE_X86_BYTES == 16
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & kLowHalf) * (b & kLowHalf);
#endif
}

inline Word widened(Short v) {
#if DALLE_X86_BYTES == 64
  return (Word)_mm512_cvtepu16_epi32((__m256i)v);  // GCC takes four instructions
#else
  return __builtin_convertvector(v, Word);
#endif
}

// As many signed bytes as there are lanes.
inline Int widened_bytes(const int8_t* p) {
#if DALLE_X86_BYTES == 64
  return (Int)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif DALLE_X86_BYTES == 32
  return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#elif DALLE_X86_BYTES == 16
  return (Int)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load_as<int32_t>(p)));
#else
  Int v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// Whether a mask, -1 where it holds, holds in any lane.
inline bool any(Word mask) {
#if DALLE_X86_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif DALLE_X86_BYTES == 32
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif DALLE_X86_BYTES == 16
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes / 2; ++i) bits |= ((Wide)mask)[i];
  return bits != 0;
#endif
}

// A half as its bits: to a float, and rounded to nearest, ties to even; NaN becomes quiet and keeps
// its other digits. By F16C where there is one (v3 and later): besides being one instruction, it
// does not stumble over subnormals, of which scaled gradients are full.
#if DALLE_X86_BYTES == 64
inline Float widened_half(Short v) { return (Float)_mm512_cvtph_ps((__m256i)v); }
inline Short narrowed_half(Float v) {
  return (Short)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif DALLE_X86_BYTES == 32
inline Float widened_half(Short v) { return (Float)_mm256_cvtph_ps((__m128i)v); }
inline Short narrowed_half(Float v) {
  return (Short)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
inline Float widened_half(Short v) {
  const Word half = widened(v);
  const Word magnitude = (half & 0x7FFF) << 13;
  const Word scaled = (Word)((Float)magnitude * 0x1p112f);  // moves the bias, subnormals as well
  const Word special = ((Word)(magnitude >= (0x7C00u << 13)) & 0x7F800000) |
                       ((Word)(magnitude > (0x7C00u << 13)) & 0x00400000);  // NaN becomes quiet
  return (Float)(scaled | special | ((half & 0x8000) << 16));
}
inline Short narrowed_half(Float v) {
  const Word sign = (Word)v & 0x80000000u, magnitude = (Word)v ^ sign;
  // Below 2^-14 the addition of 1/2 leaves the subnormal in the low bits, rounded to even.
  const Word tiny = (Word)((Float)magnitude + 0.5f) - 0x3F000000u;
  const Word normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  const Word digits = ((magnitude >> 13) & 0x3FF) | 0x200;  // of NaN: the upper ones stay
  const Word infinite = ((Word)(magnitude > 0x7F800000u) & digits) | 0x7C00;
  const Word half = (Word)(magnitude >= 0x477FF000u)  ? infinite
                    : (Word)(magnitude < 0x38800000u) ? tiny
                                                      : normal;
  return __builtin_convertvector(half | (sign >> 16), Short);
}
#endif

}  // namespace
}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle
