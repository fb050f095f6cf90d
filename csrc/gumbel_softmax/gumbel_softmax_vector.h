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

// The functions below come for kMany vectors that do not depend on each other, step by step side by
// side: one alone is a chain of some fifty steps, each waiting for the one before, and the chain of
// the next vector begins too far behind it for the processor to see.
constexpr int kMany = kBytes == 64 ? 4 : 2;  // as the registers allow
template <int kN>
struct Count {
  static constexpr int kCount = kN;
};

// Calls body(Count<kN>, i) for the vectors of [0, count), count a multiple of kLanes.
template <typename Body>
inline void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kMany * kLanes <= count; i += kMany * kLanes) body(Count<kMany>{}, i);
  for (; i < count; i += kLanes) body(Count<1>{}, i);
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

// Words of kN times kLanes / 2 subsequences, one in each 64-bit lane. Only the low half of a lane
// counts; what stands in the high half falls out of the next product, so nothing is masked.
template <int kN>
struct PhiloxLanes {
  Wide c0[kN], c1[kN], c2[kN], c3[kN];

  PhiloxLanes(const Wide (&subsequence)[kN], const PhiloxKeys& keys) {
    // The first round knows that c0 = c1 = 0.
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      const Wide first = multiply_low(subsequence[j], Wide{} + kPhiloxMultiply1);
      c0[j] = (first >> 32) ^ (uint64_t)keys.key0[0];
      c1[j] = first;
      c2[j] = (subsequence[j] >> 32) ^ (uint64_t)keys.key1[0];
      c3[j] = Wide{};
    }
#pragma GCC unroll 9
    for (int r = 1; r < kPhiloxRounds; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) {
        const Wide product0 = multiply_low(c0[j], Wide{} + kPhiloxMultiply0);
        const Wide product1 = multiply_low(c2[j], Wide{} + kPhiloxMultiply1);
        c0[j] = (product1 >> 32) ^ c1[j] ^ (uint64_t)keys.key0[r];
        c1[j] = product1;
        c2[j] = (product0 >> 32) ^ c3[j] ^ (uint64_t)keys.key1[r];
        c3[j] = product0;
      }
    }
  }
};

constexpr uint64_t kLowHalf = 0xFFFFFFFFu;

// Low halves of `even` into the even 32-bit lanes, of `odd` into the odd ones.
inline Wide interleave(Wide even, Wide odd) { return (even & kLowHalf) | (odd << 32); }

// Words of the 2 * kLanes * kN consecutive elements from 4 * call on.
template <int kN = 1>
inline void random_words(const PhiloxKeys& keys, uint64_t call, uint32_t* out) {
  constexpr int kCalls = kLanes / 2;
  Wide places;  // such that unpacking pairs of lanes gives the elements in order
  for (int i = 0; i < kCalls; ++i) places[i] = (i % 2) * (kCalls / 2) + i / 2;
  Wide subsequence[kN];
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) subsequence[j] = places + (call + j * kCalls);
  const PhiloxLanes<kN> lanes(subsequence, keys);
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j, out += 2 * kLanes) {
    const Wide a = interleave(lanes.c0[j], lanes.c1[j]), b = interleave(lanes.c2[j], lanes.c3[j]);
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
}

// -- functions
// --------------------------------------------------------------------------------------

// result = log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)]; relative error below 2^-23.
template <int kN>
inline void log1p_reduced(const Float (&f)[kN], Float (&result)[kN]) {
  constexpr float kTerms[] = {-0.076230556f, 0.1290562f,   -0.13243042f, 0.14181617f, -0.16609046f,
                              0.20001985f,   -0.25001585f, 0.33333325f,  -0.49999988f};
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) result[j] = splat(kTerms[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 9; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) result[j] = result[j] * f[j] + kTerms[i];
  }
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) result[j] = f[j] * f[j] * result[j] + f[j];
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
template <int kN>
inline void add_gumbel(const Float* logit, const Word* word, Float* noisy) {
  Float f[kN], exponent[kN], log[kN];
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) {
    const Int near_one = (Int)(word[j] >= kNearOne);
    const Word folded = word[j] ^ (Word)near_one;
    const Float v = __builtin_convertvector(folded, Float) * 0x1p-32f + 0x1p-33f;
    f[j] = split(v, exponent[j]);
    f[j] = select(near_one, -v, f[j]);
    exponent[j] = (Float)((Int)exponent[j] & ~near_one);
  }
  log1p_reduced<kN>(f, log);
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) f[j] = split(-(exponent[j] * kLn2 + log[j]), exponent[j]);
  log1p_reduced<kN>(f, log);
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) noisy[j] = (logit[j] - log[j]) - exponent[j] * kLn2;
}
inline Float add_gumbel(Float logit, Word word) {
  Float noisy;
  add_gumbel<1>(&logit, &word, &noisy);
  return noisy;
}

// x becomes 2^x for x <= 0 (or slightly above): 0 below 2^-126, so that no denormal arises.
template <int kN>
inline void exp2_of(Float (&x)[kN]) {
  constexpr float kTerms[] = {0.00015353357593994588f,
                              0.0013398876180872321f,
                              0.009618437848985195f,
                              0.055503323674201965f,
                              0.24022647738456726f,
                              0.6931471824645996f,
                              1.0f};
  Float f[kN], q[kN], shifted[kN];
  Int vanishes[kN];
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) {
    vanishes[j] = (Int)(x[j] < -126.0f);
    const Float clamped = maximum(x[j], splat(-126.0f));
    shifted[j] = clamped + 0x1.8p23f;  // to the nearest integer, which the low bits then hold
    f[j] = clamped - (shifted[j] - 0x1.8p23f);
    q[j] = splat(kTerms[0]);
  }
#pragma GCC unroll 8
  for (int i = 1; i < 7; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) q[j] = q[j] * f[j] + kTerms[i];
  }
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) {
    // Unsigned, since what comes of NaN and infinity wraps around.
    const Word power = (Word)q[j] + ((Word)shifted[j] << 23);
    x[j] = (Float)(power & ~(Word)vanishes[j]);
  }
}
inline Float exp2_of(Float x) {
  Float many[1] = {x};
  exp2_of<1>(many);
  return many[0];
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
