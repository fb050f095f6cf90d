// The Gumbel transform of vectors, for gumbel_softmax_cpu.h.
//
// Accuracy against exact arithmetic, largest over all inputs (tests/cpp measures it): the noise
// 3e-7 absolute besides one rounding of the sum.
#pragma once

#include "common/philox_lanes.h"
#include "gumbel_softmax/gumbel_softmax.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

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

// ln 2 in two parts. High has 15 bits, so that its product with an exponent of 6 is exact, with
// fused products and without.
constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;

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
  for (int j = 0; j < kN; ++j) f[j] = split(-(exponent[j] * kLn2Float + log[j]), exponent[j]);
  log1p_reduced<kN>(f, log);
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j)
    noisy[j] = (logit[j] - (exponent[j] * kLn2Low + log[j])) - exponent[j] * kLn2High;
}
inline Float add_gumbel(Float logit, Word word) {
  Float noisy;
  add_gumbel<1>(&logit, &word, &noisy);
  return noisy;
}

}  // namespace
}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle
