// What products multiply: float and double as they are, bfloat16 in pairs. A Pair is two neighbours
// along the sum in one word; two words give two products, which are added to one float. v4_bf16 has
// this as one instruction, v4 makes the same sums of shifts and float products. With shorter
// vectors that costs more than it saves: there bfloat16 becomes float when it is packed. No torch
// here.
#pragma once

#include "common/vector.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

struct Pair {
  uint32_t bits;  // the first of the two in the low half
};
template <>
struct Lanes<Pair> : VectorOf<uint32_t> {};
using BFloat16Operand = std::conditional_t<DALLE_ISA_BYTES == 64, Pair, float>;

// Numbers in a word of an operand, and the type its products add up in.
template <typename operand_t>
constexpr int kElements = std::is_same_v<operand_t, Pair> ? 2 : 1;
template <typename operand_t>
using Sum = std::conditional_t<std::is_same_v<operand_t, Pair>, float, operand_t>;

inline Vec<Pair> splat(Pair x) { return x.bits - Vec<Pair>{}; }

// sum + a * b, for pairs sum + a.first * b.first + a.second * b.second.
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> sum) { return sum + a * b; }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> sum) {
  return sum + a * b;
}
inline Vec<float> multiply_add(Vec<Pair> a, Vec<Pair> b, Vec<float> sum) {
#ifdef __AVX512BF16__
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (Vec<float>)(a << 16) * (Vec<float>)(b << 16);
  return sum + (Vec<float>)(a & 0xffff0000u) * (Vec<float>)(b & 0xffff0000u);
#endif
}

// Lane i of the result is lane source(i) of a, b.
template <typename Source, size_t... kLane>
inline Vec<Pair> pick(Vec<Pair> a, Vec<Pair> b, Source source, std::index_sequence<kLane...>) {
  return (Vec<Pair>)__builtin_shufflevector((Vec<uint16_t>)a, (Vec<uint16_t>)b,
                                            source(int(kLane))...);
}
template <typename Source>
inline Vec<Pair> pick(Vec<Pair> a, Vec<Pair> b, Source source) {
  return pick(a, b, source, std::make_index_sequence<2 * Lanes<Pair>::kWidth>{});
}

// The bfloat16 numbers of the low, or high, half of a and b, one of each in a word.
inline Vec<Pair> interleave_low(Vec<Pair> a, Vec<Pair> b) {
  return pick(a, b, [](int i) { return i % 2 * 2 * Lanes<Pair>::kWidth + i / 2; });
}
inline Vec<Pair> interleave_high(Vec<Pair> a, Vec<Pair> b) {
  constexpr int kWidth = Lanes<Pair>::kWidth;
  return pick(a, b, [](int i) { return i % 2 * 2 * kWidth + kWidth + i / 2; });
}

// To bfloat16, to nearest, ties to even. Along: a[0] and a[1] are a pair, a[2] and a[3], then those
// of b. Across: first[i] and second[i] are a pair.
#ifdef __AVX512BF16__
inline Vec<Pair> pairs_along(Vec<float> a, Vec<float> b) {
  return (Vec<Pair>)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
inline Vec<Pair> pairs_across(Vec<float> first, Vec<float> second) {
  const Vec<Pair> both = pairs_along(first, second);
  return pick(both, both, [](int i) { return i % 2 * Lanes<Pair>::kWidth + i / 2; });
}
#else
inline Vec<Pair> pairs_along(Vec<float> a, Vec<float> b) {
  return pick(rounded_to_bfloat16(a), rounded_to_bfloat16(b), [](int i) { return 2 * i + 1; });
}
inline Vec<Pair> pairs_across(Vec<float> first, Vec<float> second) {
  return rounded_to_bfloat16(first) >> 16 | (rounded_to_bfloat16(second) & 0xffff0000u);
}
#endif

// Stores a and b, neighbours along the sum, as operands.
template <typename acc_t>
inline void store_along(acc_t* to, Vec<acc_t> a, Vec<acc_t> b) {
  store(to, a);
  store(to + Lanes<acc_t>::kWidth, b);
}
inline void store_along(Pair* to, Vec<float> a, Vec<float> b) { store(to, pairs_along(a, b)); }

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
