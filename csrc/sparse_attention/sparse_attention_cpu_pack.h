// From strided rows of any storage type to packed panels of operands, and back. Included by
// sparse_attention_cpu.h only.
//
// An operand lies in one of two orders, by what a product sums over: channels, [words][32 rows], or
// rows, [32 / kElements][padded channels]. A word holds kElements neighbours along the sum.
#pragma once

#include "sparse_attention/sparse_attention_cpu_pairs.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return same_bits<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // The exponent moves from bias 15 to bias 127; a product with 2^112 also normalises subnormals.
  const uint32_t finite = same_bits<uint32_t>(same_bits<float>(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return same_bits<float>(bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// All narrowing rounds to nearest, ties to even; NaN stays NaN.
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {
  const uint32_t bits = same_bits<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits =
      static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}
inline void narrow(float x, Half* to) {
  const uint32_t bits = same_bits<uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 adding 0.5 leaves the rounded subnormal in the low bits of the sum.
  const uint32_t small = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? small : normal;
  to->bits = static_cast<uint16_t>(sign | (magnitude >= (143u << 23) ? infinite : finite));
}

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

// Where one head of a tensor starts.
template <typename storage_t>
inline storage_t* head_of(const AttentionRows& rows, int64_t batch_head, int heads) {
  return static_cast<storage_t*>(rows.data) + batch_head / heads * rows.batch +
         batch_head % heads * rows.head;
}

// The places of the walk that strip or panel `strip` covers: 32, fewer at the end of the stream.
inline int places_of(int strip, int length) {
  return length - strip * kTile < kTile ? length - strip * kTile : kTile;
}

// to[words] = one row, zero beyond its channels.
template <typename storage_t, typename operand_t>
inline void gather_row(const storage_t* row, int size, int words, operand_t* to) {
  for (int d = 0; d < size; ++d) to[d] = widen(row[d]);
  for (int d = size; d < words; ++d) to[d] = 0;
}
inline void gather_row(const BFloat16* row, int size, int words, Pair* to) {
  constexpr int kWidth = Lanes<Pair>::kWidth;
  int d = 0;
  for (; d + 2 * kWidth <= size; d += 2 * kWidth, to += kWidth) {
    store(to, load(reinterpret_cast<const Pair*>(row + d)));
  }
  if (d == words * 2) return;
  std::memset(to, 0, sizeof(Pair) * kWidth);
  std::memcpy(to, row + d, sizeof(BFloat16) * (size - d));
}

// to[32][words] = the rows of strip or panel `strip` of one head of q, k, v, out or grad_out, zero
// beyond the end of the stream.
template <typename storage_t, typename operand_t>
inline void gather_strip(const SparseAttentionParams& p, const AttentionTileView& view,
                         const AttentionRows& rows, int64_t batch_head, int strip, int words,
                         operand_t* to) {
  const storage_t* from = head_of<const storage_t>(rows, batch_head, p.heads);
  const int32_t* position = view.position + strip * kTile;
  const int count = places_of(strip, p.length);
  for (int r = 0; r < count; ++r) {
    gather_row(from + position[r] * rows.row, p.head_size, words, to + r * words);
  }
  std::memset(to + count * words, 0, sizeof(operand_t) * (kTile - count) * words);
}

// Gathers a strip and brings it into the order of sums over rows, to[32 / kElements][padded].
// Returns the gathered rows, [32][words]: `to` itself, or `scratch`.
template <typename storage_t, typename operand_t>
inline const operand_t* gather_across(const SparseAttentionParams& p, const AttentionTileView& view,
                                      const AttentionRows& rows, int64_t batch_head, int strip,
                                      const HeadSize<operand_t>& size, operand_t* scratch,
                                      operand_t* to) {
  if constexpr (kElements<operand_t> == 1) {
    gather_strip<storage_t>(p, view, rows, batch_head, strip, size.words, to);
    return to;
  } else {
    constexpr int kWidth = Lanes<operand_t>::kWidth;
    gather_strip<storage_t>(p, view, rows, batch_head, strip, size.words, scratch);
    const operand_t* first = scratch;
    for (int r = 0; r < kTile; r += 2, first += 2 * size.words, to += size.padded) {
      const operand_t* second = first + size.words;
      for (int d = 0; d < size.padded; d += 2 * kWidth) {
        const Vec<operand_t> a = load(first + d / 2), b = load(second + d / 2);
        store(to + d, interleave_low(a, b));
        if (d + kWidth < size.padded) store(to + d + kWidth, interleave_high(a, b));
      }
    }
    return scratch;
  }
}

// The rows at `position` = factor * from[32][padded].
template <typename storage_t, typename acc_t>
inline void scatter_rows(const acc_t* from, acc_t factor, int padded, const int32_t* position,
                         int count, int head_size, storage_t* to, int64_t stride) {
  for (int r = 0; r < count; ++r, from += padded) {
    storage_t* row = to + position[r] * stride;
    for (int d = 0; d < head_size; ++d) narrow(factor * from[d], row + d);
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

// to[words][32] = transpose of from[32][words].
template <typename operand_t>
inline void transpose_panel(const operand_t* from, int words, operand_t* to) {
  constexpr int kWidth = Lanes<operand_t>::kWidth;
  for (int d = 0; d < words; d += kWidth) {
    for (int r = 0; r < kTile; r += kWidth) {
      Vec<operand_t> rows[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) rows[i] = load(from + (r + i) * words + d);
      exchange_all<operand_t, kWidth / 2>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (d + i) * kTile + r, rows[i]);
    }
  }
}

// Hands out 64-byte aligned pieces of the workspace; counts bytes where there is none.
struct Carver {
  char* base;
  size_t used = 0;

  template <typename T>
  T* take(size_t count) {
    char* piece = base == nullptr ? nullptr : base + used;
    used += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
};

// Calls body(storage_t{}, operand_t{}) for the types of the tensors. v4_bf16 has bfloat16 alone:
// the other types are what v4 makes of them.
template <typename Body>
inline void for_type(AttentionType type, const Body& body) {
#ifndef __AVX512BF16__
  if (type == AttentionType::kFloat) body(float{}, float{});
  if (type == AttentionType::kDouble) body(double{}, double{});
  if (type == AttentionType::kHalf) body(Half{}, float{});
#endif
  if (type == AttentionType::kBFloat16) body(BFloat16{}, BFloat16Operand{});
}

// Bytes that the pieces of a workspace take, ForwardSpace or BackwardSpace.
template <template <typename> class Space>
inline size_t bytes_of(const SparseAttentionParams& p, const AttentionTileView& view) {
  Carver carver{nullptr};
  for_type(p.type, [&](auto, auto operand) {
    using operand_t = decltype(operand);
    Space<operand_t>(carver, view.num_strips, HeadSize<operand_t>(p.head_size));
  });
  return carver.used;
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
