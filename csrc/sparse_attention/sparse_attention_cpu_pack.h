// From strided rows of any storage type to packed panels of operands, and back. Included by
// sparse_attention_cpu.h only.
//
// An operand lies in one of two orders, by what a product sums over: channels, [words][32 rows], or
// rows, [32 / kElements][padded channels]. A word holds kElements neighbours along the sum.
#pragma once

#include <cstring>

#include "sparse_attention/sparse_attention_cpu_pairs.h"

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

// Where one head of a tensor starts.
template <typename storage_t>
inline storage_t* head_of(const AttentionRows& rows, int64_t batch_head, int heads) {
  return static_cast<storage_t*>(rows.data) + batch_head / heads * rows.batch +
         batch_head % heads * rows.head;
}

// Rows of strip or panel `strip`: 32, fewer at the end of the stream.
inline int strip_size(int strip, int length) {
  return length - strip * kTile < kTile ? length - strip * kTile : kTile;
}

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

// to[32][words] = the rows of strip or panel `strip` of one head of q, k, v, out or grad_out, zero
// beyond the end of the stream.
template <typename storage_t, typename operand_t>
inline void gather_strip(const SparseAttentionParams& p, const AttentionTileView& view,
                         const AttentionRows& rows, int64_t batch_head, int strip, int words,
                         operand_t* to) {
  const storage_t* from = head_of<const storage_t>(rows, batch_head, p.heads);
  const int32_t* position = view.position + strip * kTile;
  const int count = strip_size(strip, p.length);
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
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  for (int r = 0; r < count; ++r, from += padded) {
    storage_t* row = to + position[r] * stride;
    int d = 0;
    for (; d + kWidth <= head_size; d += kWidth) narrow(row + d, factor * load(from + d));
    if (d < head_size) store_some(row + d, head_size - d, factor * load(from + d));
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
