// Vectors of DALLE_ISA_BYTES for the CPU kernels (<op>_cpu.h), what they have in common: types,
// loads and stores, the storage formats float, half and bfloat16. Vector extensions of GCC and
// clang, so that one source serves every processor; the few intrinsics of x86-64, each with its
// portable twin, are in common/vector_intrinsics.h. Everything has internal linkage; see
// host_device.h. No torch here.
#pragma once

// GCC 12 takes the "undefined" vectors of its own immintrin.h, and vectors that are filled lane by
// lane, for uninitialized ones.
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <stddef.h>

#include <concepts>
#include <iterator>
#include <type_traits>
#include <utility>

#include "common/element.h"
#include "common/host_device.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

// After the arguments of a lambda that has two callers, one of them with full vectors: the compiler
// must see the count in each.
#define DALLE_INLINE __attribute__((always_inline))

constexpr int kBytes = DALLE_ISA_BYTES;

// A vector of T, and how many it holds. Only for the types below, so that an overload that asks for
// a vector of something else is no candidate.
template <typename T>
struct VectorOf {
  typedef T vec __attribute__((vector_size(kBytes)));
  static constexpr int kWidth = kBytes / static_cast<int>(sizeof(T));
};
template <typename T>
struct Lanes;
template <>
struct Lanes<float> : VectorOf<float> {
  using word_t = int32_t;  // as wide: masks, and the bits of a number
};
template <>
struct Lanes<double> : VectorOf<double> {
  using word_t = int64_t;
};
template <std::integral T>
struct Lanes<T> : VectorOf<T> {};

template <typename T>
using Vec = typename Lanes<T>::vec;
template <typename T>
using IVec = Vec<typename Lanes<T>::word_t>;

using Float = Vec<float>;
using Double = Vec<double>;
using Int = Vec<int32_t>;
using Word = Vec<uint32_t>;
using Wide = Vec<uint64_t>;
typedef uint16_t Short __attribute__((vector_size(kBytes / 2)));  // as many as floats
constexpr int kLanes = Lanes<float>::kWidth;                      // of 32 bits

// The elements at p, at any address; load_as<Short>(p): the bytes at p as another vector.
template <typename vector_t>
inline vector_t load_as(const void* p) {
  vector_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline Vec<T> load(const T* p) {
  return load_as<Vec<T>>(p);
}
template <typename vector_t>
inline void store(void* p, vector_t v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // unlike 0 + x the identity, so nothing is left of it
}
inline Float select(Int mask, Float a, Float b) { return mask ? a : b; }

// All ones in lane i where bit `first + i` of `bits` is set.
template <typename T>
inline IVec<T> lanes_of(uint32_t bits, int first) {
  using word_t = typename Lanes<T>::word_t;
  IVec<T> bit;
#pragma GCC unroll 16
  for (int i = 0; i < Lanes<T>::kWidth; ++i) bit[i] = word_t{1} << i;
  const IVec<T> word = IVec<T>{} + static_cast<word_t>(bits >> first);
  return (word & bit) != 0;
}

}  // namespace
}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle

#include "common/vector_intrinsics.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

// Over all lanes, as a tree: lanes i and i + kStep first.
template <int kStep, typename vector_t, size_t... kLane>
inline vector_t swapped(vector_t v, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(v, v, (int(kLane) ^ kStep)...);
}
template <typename T, int kStep = Lanes<T>::kWidth / 2>
inline T sum_of(Vec<T> v) {
  const Vec<T> w = swapped<kStep>(v, std::make_index_sequence<Lanes<T>::kWidth>{});
  if constexpr (kStep > 1) return sum_of<T, kStep / 2>(v + w);
  return v[0] + w[0];
}
template <typename T, int kStep = Lanes<T>::kWidth / 2>
inline T max_of(Vec<T> v) {
  const Vec<T> w = swapped<kStep>(v, std::make_index_sequence<Lanes<T>::kWidth>{});
  const Vec<T> larger = v > w ? v : w;
  if constexpr (kStep > 1) return max_of<T, kStep / 2>(larger);
  return larger[0];
}

// -- exp2 -----------------------------------------------------------------------------------------

// The layout of T, and the polynomial for 2^f on [-1/2, 1/2], lowest degree first: minimax for the
// relative error, 3.0e-9 and 3.1e-18. Each coefficient of float was fitted after those before it
// had been rounded.
template <typename T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // added, it leaves the integer part in the low bits
  static constexpr float kPolynomial[] = {1.0f,           0.693147182f,   0.240226477f,
                                          0.0555035956f,  0.00961849838f, 0.00133909716f,
                                          0.000153297267f};
};
template <>
struct Exp2<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kPolynomial[] = {
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
      4.435282706957277e-10,
  };
};

// Each x becomes 2^x, for x up to the top of the range; below the normal range 0, so that no
// denormal arises; NaN stays NaN. One vector alone is a chain of steps, each waiting for the one
// before; kN of them go side by side. Error of float against exact results (tests/cpp measures it):
// 0.8 ulp with fused products, else 1.1.
template <typename T, int kN>
inline void exp2_of(Vec<T> (&x)[kN]) {
  using E = Exp2<T>;
  constexpr int kDegree = static_cast<int>(std::size(E::kPolynomial)) - 1;
  const Vec<T> least = splat<T>(1 - E::kBias);
  IVec<T> under[kN];
  Vec<T> f[kN], shifted[kN], power[kN];
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) {
    under[j] = x[j] < least;
    const Vec<T> clamped = maximum(least, x[j]);  // in this order: of NaN it is the second
    shifted[j] = clamped + E::kRound;
    f[j] = clamped - (shifted[j] - E::kRound);
    power[j] = splat(E::kPolynomial[kDegree]);
  }
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) {
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) power[j] = power[j] * f[j] + E::kPolynomial[i];
  }
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) {
    const IVec<T> exponent = ((IVec<T>)shifted[j] + E::kBias) << E::kMantissa;
    x[j] = under[j] ? Vec<T>{} : power[j] * (Vec<T>)exponent;
  }
}
template <typename T>
inline Vec<T> exp2_of(Vec<T> x) {
  Vec<T> one[1] = {x};
  exp2_of<T>(one);
  return one[0];
}

// -- storage formats ------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What numbers of a storage type are computed in.
template <typename scalar_t>
using Computed = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// widen(p) is a vector of what lies at p as numbers to compute with; narrow(p, v) rounds to
// nearest, ties to even, and stores. NaN stays NaN; of bfloat16 it is 0x7FC0, as torch writes it.
inline Float widen(const float* p) { return load(p); }
inline Double widen(const double* p) { return load(p); }
inline void narrow(float* p, Float v) { store(p, v); }
inline void narrow(double* p, Double v) { store(p, v); }

inline Float widen(const BFloat16* p) { return (Float)(widened(load_as<Short>(p)) << 16); }
// The rounded number in the high half of each word; the low half is what was there, or more.
inline Word rounded_to_bfloat16(Float v) {
  const Word bits = (Word)v;
  return (Word)(v == v) ? bits + 0x7FFF + ((bits >> 16) & 1) : Word{} + 0x7FC00000u;
}
inline void narrow(BFloat16* p, Float v) {
  store(p, __builtin_convertvector(rounded_to_bfloat16(v) >> 16, Short));
}

inline Float widen(const Half* p) { return widened_half(load_as<Short>(p)); }
inline void narrow(Half* p, Float v) { store(p, narrowed_half(v)); }

// Calls body with an element of the storage type: of those that all ops but attention take.
template <typename Body>
inline void with_scalar(ElementKind kind, const Body& body) {
  switch (kind) {
    case ElementKind::kFloat:
      return body(float());
    case ElementKind::kHalf:
      return body(Half());
    case ElementKind::kBFloat16:
      return body(BFloat16());
    case ElementKind::kNone:
    case ElementKind::kShort:
    case ElementKind::kLong:
    case ElementKind::kDouble:
      return;  // the op has refused them
  }
}

// The first `count` of the lanes, and the others as `rest`.
template <typename scalar_t>
inline auto load_some(const scalar_t* p, int64_t count, Computed<scalar_t> rest) {
  scalar_t some[Lanes<Computed<scalar_t>>::kWidth];
  narrow(some, splat(rest));
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return widen(some);
}
template <typename scalar_t>
inline void store_some(scalar_t* p, int64_t count, Vec<Computed<scalar_t>> v) {
  scalar_t some[Lanes<Computed<scalar_t>>::kWidth];
  narrow(some, v);
  for (int64_t i = 0; i < count; ++i) p[i] = some[i];
}

// The same where the first count of them may be all.
template <typename scalar_t>
inline auto load_up_to(const scalar_t* p, int64_t count, Computed<scalar_t> rest) {
  return count == Lanes<Computed<scalar_t>>::kWidth ? widen(p) : load_some(p, count, rest);
}
template <typename scalar_t>
inline void store_up_to(scalar_t* p, int64_t count, Vec<Computed<scalar_t>> v) {
  if (count == Lanes<Computed<scalar_t>>::kWidth) {
    narrow(p, v);
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
