// Vectors of DALLE_ISA_BYTES and 2^x. Included by sparse_attention_cpu.h only; everything has
// internal linkage (see common/host_device.h).
#pragma once

#include <cmath>  // INFINITY
#include <cstdint>
#include <cstring>
#include <utility>

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

template <typename acc_t>
struct Lanes;
template <>
struct Lanes<float> {
  using word_t = int32_t;
  typedef float vec __attribute__((vector_size(DALLE_ISA_BYTES)));
  typedef float loose __attribute__((vector_size(DALLE_ISA_BYTES), aligned(4), may_alias));
  typedef int32_t ivec __attribute__((vector_size(DALLE_ISA_BYTES)));
  static constexpr int kWidth = DALLE_ISA_BYTES / 4, kMantissa = 23, kBias = 127, kDegree = 6;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  // Minimax for the relative error on [-1/2, 1/2]: 1.9e-9 before rounding.
  static constexpr float kExp2[] = {1.0f,           0.693147206f,   0.240226469f,   0.0555032878f,
                                    0.00961848896f, 0.00133999312f, 0.000153458122f};
};
template <>
struct Lanes<double> {
  using word_t = int64_t;
  typedef double vec __attribute__((vector_size(DALLE_ISA_BYTES)));
  typedef double loose __attribute__((vector_size(DALLE_ISA_BYTES), aligned(8), may_alias));
  typedef int64_t ivec __attribute__((vector_size(DALLE_ISA_BYTES)));
  static constexpr int kWidth = DALLE_ISA_BYTES / 8, kMantissa = 52, kBias = 1023, kDegree = 11;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExp2[] = {                   // 3.1e-18 before rounding
                                     1.0,
                                     0.6931471805599453,
                                     0.24022650695910155,
                                     0.055504108664819925,
                                     0.009618129107588335,
                                     0.0013333558146789923,
                                     0.00015403530462514432,
                                     1.5252733489988525e-05,
                                     1.32154330896764e-06,
                                     1.0178198021671931e-07,
                                     7.074105613508143e-09,
                                     4.435282706957277e-10};
};
template <typename acc_t>
using Vec = typename Lanes<acc_t>::vec;
template <typename acc_t>
using IVec = typename Lanes<acc_t>::ivec;

template <typename acc_t>
inline Vec<acc_t> load(const acc_t* p) {
  return *reinterpret_cast<const typename Lanes<acc_t>::loose*>(p);
}
template <typename acc_t>
inline void store(acc_t* p, Vec<acc_t> x) {
  *reinterpret_cast<typename Lanes<acc_t>::loose*>(p) = x;
}
template <typename acc_t>
inline Vec<acc_t> splat(acc_t x) {
  return x - Vec<acc_t>{};  // unlike 0 + x the identity, so nothing is left of it
}
// 2^x for x up to the top of the range; below the normal range exactly 0; NaN stays NaN.
template <typename acc_t>
inline Vec<acc_t> exp2_vector(Vec<acc_t> x) {
  using L = Lanes<acc_t>;
  const Vec<acc_t> least = splat<acc_t>(1 - L::kBias);
  const IVec<acc_t> under = x < least;
  const Vec<acc_t> clamped = under ? least : x;
  const Vec<acc_t> shifted = clamped + L::kRound;  // the integer part sits in the low bits
  const Vec<acc_t> f = clamped - (shifted - L::kRound);
  Vec<acc_t> p = splat<acc_t>(L::kExp2[L::kDegree]);
#pragma GCC unroll 16
  for (int i = L::kDegree - 1; i >= 0; --i) p = p * f + L::kExp2[i];
  const IVec<acc_t> exponent = ((IVec<acc_t>)shifted + L::kBias) << L::kMantissa;
  return under ? Vec<acc_t>{} : p * (Vec<acc_t>)exponent;
}

// Lanes i and i + kStep change places, for a tree over the lanes.
template <typename acc_t, int kStep, size_t... kLane>
inline Vec<acc_t> turned(Vec<acc_t> x, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(x, x, (int(kLane) ^ kStep)...);
}

template <typename acc_t, int kStep = Lanes<acc_t>::kWidth / 2>
inline acc_t max_of(Vec<acc_t> x) {
  const Vec<acc_t> y = turned<acc_t, kStep>(x, std::make_index_sequence<Lanes<acc_t>::kWidth>{});
  const Vec<acc_t> z = x > y ? x : y;
  if constexpr (kStep > 1) return max_of<acc_t, kStep / 2>(z);
  return z[0];
}
template <typename acc_t, int kStep = Lanes<acc_t>::kWidth / 2>
inline acc_t sum_of(Vec<acc_t> x) {
  const Vec<acc_t> y = turned<acc_t, kStep>(x, std::make_index_sequence<Lanes<acc_t>::kWidth>{});
  if constexpr (kStep > 1) return sum_of<acc_t, kStep / 2>(x + y);
  return x[0] + y[0];
}

// All ones in lane i where bit `first + i` of `bits` is set.
template <typename acc_t>
inline IVec<acc_t> lanes_of(uint32_t bits, int first) {
  IVec<acc_t> bit;
#pragma GCC unroll 16
  for (int i = 0; i < Lanes<acc_t>::kWidth; ++i) bit[i] = typename Lanes<acc_t>::word_t{1} << i;
  const IVec<acc_t> word =
      IVec<acc_t>{} + static_cast<typename Lanes<acc_t>::word_t>(bits >> first);
  return (word & bit) != 0;
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
