// From strided rows of any storage type to packed panels of operands, and back. Included by
// sparse_attention_cpu.h only.
//
// An operand lies in one of two orders, by what a product sums over: channels, [words][32 rows], or
// rows, [32 / kElements][padded channels]. A word holds kElements neighbours along the sum.
#pragma once

#include "common/operands.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

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
    gather_strip<storage_t>(p, view, rows, batch_head, strip, size.words, scratch);
    for (int r = 0; r < kTile; r += 2, to += size.padded) {
      const operand_t* first = scratch + r * size.words;
      pair_rows(first, first + size.words, size.padded, to);
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
