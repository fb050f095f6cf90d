// Rows of any storage type as operands of products, for the CPU kernels of attention. No torch
// here.
#pragma once

#include <cstring>

#include "common/carver.h"
#include "common/pairs.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

// Head sizes are padded to whole vectors, with zeros.
template <typename operand_t>
struct HeadSize {
  int size, padded, depth, words;  // channels, padded; words of a row, padded

  explicit HeadSize(int head_size) : size(head_size) {
    constexpr int kWidth = Lanes<operand_t>::kWidth;
    padded = static_cast<int>(ceil_div(size, kWidth)) * kWidth;
    depth = static_cast<int>(ceil_div(size, kElements<operand_t>));
    words = static_cast<int>(ceil_div(depth, kWidth)) * kWidth;
  }
};

// to[words] = one row, zero beyond its channels.
template <typename storage_t, typename operand_t>
inline void gather_row(const storage_t* row, int size, int words, operand_t* to) {
  constexpr int kWidth = Lanes<operand_t>::kWidth;
  int d = 0;
  for (; d + kWidth <= size; d += kWidth) store(to + d, widen(row + d));
  if (d < words) store(to + d, load_some(row + d, size - d, 0));
}
inline void gather_row(const BFloat16* row, int size, int words, Pair* to) {
  constexpr int kWidth = Lanes<Pair>::kWidth;
  int d = 0;
  for (; d + 2 * kWidth <= size; d += 2 * kWidth, to += kWidth) {
    store(to, load_as<Vec<Pair>>(row + d));
  }
  if (d == words * 2) return;
  std::memset(to, 0, sizeof(Pair) * kWidth);
  std::memcpy(to, row + d, sizeof(BFloat16) * (size - d));
}

// to[padded] = the pairs that two rows of pairs, [words] each, make across.
inline void pair_rows(const Pair* first, const Pair* second, int padded, Pair* to) {
  constexpr int kWidth = Lanes<Pair>::kWidth;
  for (int d = 0; d < padded; d += 2 * kWidth) {
    const Vec<Pair> a = load(first + d / 2), b = load(second + d / 2);
    store(to + d, interleave_low(a, b));
    if (d + kWidth < padded) store(to + d + kWidth, interleave_high(a, b));
  }
}

// Swaps the off-diagonal blocks of kStep lanes of two vectors: one butterfly of a transposition.
template <typename acc_t, int kStep, size_t... kLane>
inline void exchange(Vec<acc_t>& a, Vec<acc_t>& b, std::index_sequence<kLane...>) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  const Vec<acc_t> x = a, y = b;
  a = __builtin_shufflevector(x, y,
                              (int(kLane) & kStep ? kWidth + int(kLane) - kStep : int(kLane))...);
  b = __builtin_shufflevector(x, y,
                              (int(kLane) & kStep ? kWidth + int(kLane) : int(kLane) + kStep)...);
}

template <typename acc_t, int kStep>
inline void exchange_all(Vec<acc_t> (&rows)[Lanes<acc_t>::kWidth]) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kStep) continue;
    exchange<acc_t, kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kWidth>{});
  }
  if constexpr (kStep > 1) exchange_all<acc_t, kStep / 2>(rows);
}

// to[words][rows] = transpose of from[rows][words]; both are whole vectors.
template <typename operand_t>
inline void transpose_panel(const operand_t* from, int rows, int words, operand_t* to) {
  constexpr int kWidth = Lanes<operand_t>::kWidth;
  for (int d = 0; d < words; d += kWidth) {
    for (int r = 0; r < rows; r += kWidth) {
      Vec<operand_t> block[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) block[i] = load(from + (r + i) * words + d);
      exchange_all<operand_t, kWidth / 2>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (d + i) * rows + r, block[i]);
    }
  }
}

// Lane i of the result is the sum of the lanes of rows[i], each added up as `sum_of` does.
template <typename acc_t, int kStep = Lanes<acc_t>::kWidth / 2>
inline Vec<acc_t> sums_of(Vec<acc_t> (&rows)[Lanes<acc_t>::kWidth]) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
#pragma GCC unroll 16
  for (int i = 0; i < kStep; ++i) {
    exchange<acc_t, kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kWidth>{});
    rows[i] += rows[i + kStep];
  }
  if constexpr (kStep > 1) return sums_of<acc_t, kStep / 2>(rows);
  return rows[0];
}

// Calls body(storage_t{}, operand_t{}) for the types of the tensors. v4_bf16 has bfloat16 alone:
// the other types are what v4 makes of them.
template <typename Body>
inline void for_type(ElementKind type, const Body& body) {
  switch (type) {
#ifndef __AVX512BF16__
    case ElementKind::kFloat:
      return body(float{}, float{});
    case ElementKind::kDouble:
      return body(double{}, double{});
    case ElementKind::kHalf:
      return body(Half{}, float{});
#else
    case ElementKind::kFloat:
    case ElementKind::kDouble:
    case ElementKind::kHalf:
#endif
    case ElementKind::kNone:
    case ElementKind::kShort:
    case ElementKind::kLong:
      return;  // the op has refused them, or chosen another build
    case ElementKind::kBFloat16:
      return body(BFloat16{}, BFloat16Operand{});
  }
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
