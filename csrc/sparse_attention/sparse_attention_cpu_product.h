// The product of a strip and a panel (sparse_attention_cpu_pack.h). Included by
// sparse_attention_cpu.h only.
#pragma once

#include "common/micro_tile.h"
#include "sparse_attention/sparse_attention_cpu_pack.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

// to[32][32 of kLead] = factor * the product of a transposed strip [depth][32] and a transposed
// panel [depth][32].
template <typename operand_t, int kLead>
inline void strip_by_panel(const operand_t* strip, const operand_t* panel, Sum<operand_t> factor,
                           int depth, int num_rows, Sum<operand_t>* to) {
  constexpr int kBlock = kMicroVectors * Lanes<Sum<operand_t>>::kWidth;
  for (int c = 0; c < kTile; c += kBlock) {
    for (int r = 0; r < num_rows; r += kMicroRows) {
      scaled_product<operand_t, kMicroVectors>(strip + r, 1, kTile, panel + c, kTile, depth, factor,
                                               to + r * kLead + c, kLead);
    }
  }
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
