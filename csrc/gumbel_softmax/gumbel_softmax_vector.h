// Vectors of DALLE_ISA_BYTES for gumbel_softmax_cpu.h: Philox in parallel lanes, the Gumbel
// transform, exp2, 16-bit formats. GCC vector extensions, so that one source serves every
// instruction set; the only intrinsics are the 32 x 32 -> 64 bit product (GCC finds none for a
// vector), max and the shuffles.
//
// Accuracy against exact arithmetic, largest over all inputs (tests/cpp measures it): exp2 2 ulp,
// the noise 2e-7 absolute besides one rounding of the sum. Everything has internal linkage; see
// csrc/common/host_device.h.
#pragma once

// GCC 12 takes the "undefined" vectors of its own immintrin.h, and vectors that are filled lane by
// lane, for uninitialized ones.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <immintrin.h>

#include "gumbel_softmax/gumbel_softmax.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

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

// -- Philox ---------------------------------------------------------------------------------------

struct PhiloxKeys {
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];
};

inline PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
    keys.key0[r] = static_cast<uint32_t>(seed) + r * kPhiloxWeyl0;
    keys.key1[r] = static_cast<uint32_t>(seed >> 32) + r * kPhiloxWeyl1;
  }
  return keys;
}

// Words of kLanes / 2 subsequences, one in each 64-bit lane. Only the low half of a lane counts;
// what stands in the high half falls out of the next product, so nothing is masked.
struct PhiloxLanes {
  Wide c0, c1, c2, c3;

  explicit PhiloxLanes(Wide subsequence, const PhiloxKeys& keys) {
    // The first round knows that c0 = c1 = 0.
    const Wide first = multiply_low(subsequence, Wide{} + kPhiloxMultiply1);
    c0 = (first >> 32) ^ (uint64_t)keys.key0[0];
    c1 = first;
    c2 = (subsequence >> 32) ^ (uint64_t)keys.key1[0];
    c3 = Wide{};
#pragma GCC unroll 9
    for (int r = 1; r < kPhiloxRounds; ++r) {
      const Wide product0 = multiply_low(c0, Wide{} + kPhiloxMultiply0);
      const Wide product1 = multiply_low(c2, Wide{} + kPhiloxMultiply1);
      c0 = (product1 >> 32) ^ c1 ^ (uint64_t)keys.key0[r];
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ (uint64_t)keys.key1[r];
      c3 = product0;
    }
  }
};

constexpr uint64_t kLowHalf = 0xFFFFFFFFu;

// Low halves of `even` into the even 32-bit lanes, of `odd` into the odd ones.
inline Wide interleave(Wide even, Wide odd) { return (even & kLowHalf) | (odd << 32); }

// Words of the 2 * kLanes consecutive elements from 4 * call on.
inline void random_words(const PhiloxKeys& keys, uint64_t call, uint32_t* out) {
  constexpr int kCalls = kLanes / 2;
  Wide subsequence;  // such that unpacking pairs of lanes gives the elements in order
  for (int i = 0; i < kCalls; ++i) subsequence[i] = call + (i % 2) * (kCalls / 2) + i / 2;
  const PhiloxLanes lanes(subsequence, keys);
  const Wide a = interleave(lanes.c0, lanes.c1), b = interleave(lanes.c2, lanes.c3);
#if DALLE_ISA_BYTES == 64
  store(out, _mm512_unpacklo_epi64((__m512i)a, (__m512i)b));
  store(out + kLanes, _mm512_unpackhi_epi64((__m512i)a, (__m512i)b));
#elif DALLE_ISA_BYTES == 32
  store(out, _mm256_unpacklo_epi64((__m256i)a, (__m256i)b));
  store(out + kLanes, _mm256_unpackhi_epi64((__m256i)a, (__m256i)b));
#else
  store(out, _mm_unpacklo_epi64((__m128i)a, (__m128i)b));
  store(out + kLanes, _mm_unpackhi_epi64((__m128i)a, (__m128i)b));
#endif
}

// -- functions
// --------------------------------------------------------------------------------------

// log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)]; relative error below 2^-23.
inline Float log1p_reduced(Float f) {
  Float q = splat(-0.076230556f);
  q = q * f + 0.1290562f;
  q = q * f - 0.13243042f;
  q = q * f + 0.14181617f;
  q = q * f - 0.16609046f;
  q = q * f + 0.20001985f;
  q = q * f - 0.25001585f;
  q = q * f + 0.33333325f;
  q = q * f - 0.49999988f;
  return f * f * q + f;
}

// x = m 2^e with m in [sqrt(1/2), sqrt(2)); x positive and normal. Returns m - 1.
inline Float split(Float x, Float& exponent) {
  const Int bits = (Int)x, e = (bits - 0x3F3504F3) >> 23;
  exponent = __builtin_convertvector(e, Float);
  return (Float)(bits - (e << 23)) - 1.0f;
}

// logit - log(-log u), u = (word + 1/2) 2^-32: for u near 1, log u = log(1 - v) with v = 1 - u made
// of the complement of the word, so that no digit is lost at either end. The large part comes last,
// so that only one rounding has the size of the result.
inline Float add_gumbel(Float logit, Word word) {
  const Int near_one = (Int)(word >= kNearOne);
  const Word folded = word ^ (Word)near_one;
  const Float v = __builtin_convertvector(folded, Float) * 0x1p-32f + 0x1p-33f;
  Float exponent;
  Float f = split(v, exponent);
  f = select(near_one, -v, f);
  exponent = (Float)((Int)exponent & ~near_one);
  const Float exponential = -(exponent * kLn2 + log1p_reduced(f));
  f = split(exponential, exponent);
  return (logit - log1p_reduced(f)) - exponent * kLn2;
}

// 2^x for x <= 0 (or slightly above): 0 below 2^-126, so that no denormal arises.
inline Float exp2_of(Float x) {
  const Int vanishes = (Int)(x < -126.0f);
  x = maximum(x, splat(-126.0f));
  const Float shifted =
      x + 0x1.8p23f;  // rounds to the nearest integer, which the low bits then hold
  const Float f = x - (shifted - 0x1.8p23f);
  Float q = splat(0.00015353357593994588f);
  q = q * f + 0.0013398876180872321f;
  q = q * f + 0.009618437848985195f;
  q = q * f + 0.055503323674201965f;
  q = q * f + 0.24022647738456726f;
  q = q * f + 0.6931471824645996f;
  q = q * f + 1.0f;
  // Unsigned, since what comes of NaN and infinity wraps around.
  const Word power = (Word)q + ((Word)shifted << 23);
  return (Float)(power & ~(Word)vanishes);
}

inline float log2_of(float x) { return __builtin_log2f(x); }

// -- storage formats
// ----------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline Float load_float(const float* p) { return load<Float>(p); }
inline void store_float(float* p, Float v) { store(p, v); }

inline Float load_float(const BFloat16* p) {
  return (Float)(__builtin_convertvector(load<Short>(p), Word) << 16);
}
inline void store_float(BFloat16* p, Float v) {
  const Word bits = (Word)v;
  const Word rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Word kept = (Word)(v == v) ? rounded : Word{} + 0x7FC0;
  store(p, __builtin_convertvector(kept, Short));
}

inline Float load_float(const Half* p) {
  const Word half = __builtin_convertvector(load<Short>(p), Word);
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

}  // namespace
}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle
