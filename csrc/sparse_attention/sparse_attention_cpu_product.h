// The one micro-kernel behind all seven products, on packed operands (sparse_attention_cpu_pack.h).
// Included by sparse_attention_cpu.h only.
#pragma once

#include "sparse_attention/sparse_attention_cpu_pack.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

// Rows of a micro-tile, and how many vectors wide it is: 8 x 2 of 32 registers with AVX-512, 4 x 2
// of 16.
constexpr int kMicroRows = DALLE_ISA_BYTES == 64 ? 8 : 4;
constexpr int kMicroVectors = 2;
constexpr int kMaxDepth = 128;  // products added up before they meet another sum

template <typename acc_t, int kVectors>
using MicroTile = Vec<acc_t>[kMicroRows][kVectors];

// sum[r][j] += sum over k < depth of a[r * kRowStep + k * kStep] * vector j of row b + k * ldb.
template <typename operand_t, int kVectors, int kRowStep, int kStep>
inline void micro_tile(const operand_t* a, const operand_t* b, int64_t ldb, int depth,
                       MicroTile<Sum<operand_t>, kVectors>& sum) {
  constexpr int kWidth = Lanes<operand_t>::kWidth;
  for (int k = 0; k < depth; ++k, a += kStep, b += ldb) {
    Vec<operand_t> row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + j * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const Vec<operand_t> factor = splat(a[r * kRowStep]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[r][j] = multiply_add(row[j], factor, sum[r][j]);
    }
  }
}

template <typename acc_t, int kVectors>
inline void store_tile(acc_t* c, int64_t ldc, const MicroTile<acc_t, kVectors>& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      store(c + r * ldc + j * Lanes<acc_t>::kWidth, sum[r][j]);
    }
  }
}

// sum = c, or c with each row times its factor in `beta`.
template <typename acc_t, int kVectors>
inline void load_tile(const acc_t* c, int64_t ldc, const acc_t* beta,
                      MicroTile<acc_t, kVectors>& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vec<acc_t> x = load(c + r * ldc + j * Lanes<acc_t>::kWidth);
      sum[r][j] = beta == nullptr ? x : x * beta[r];
    }
  }
}

// to[32][32 of kLead] = factor * the product of a transposed strip [depth][32] and a transposed
// panel [depth][32].
template <typename operand_t, int kLead>
inline void strip_by_panel(const operand_t* strip, const operand_t* panel, Sum<operand_t> factor,
                           int depth, int num_rows, Sum<operand_t>* to) {
  using acc_t = Sum<operand_t>;
  constexpr int kBlock = kMicroVectors * Lanes<acc_t>::kWidth;
  for (int c = 0; c < kTile; c += kBlock) {
    for (int r = 0; r < num_rows; r += kMicroRows) {
      acc_t* block = to + r * kLead + c;
      // Two shorter sums round less than one long one.
      for (int d = 0; d < depth; d += kMaxDepth) {
        const int step = depth - d < kMaxDepth ? depth - d : kMaxDepth;
        MicroTile<acc_t, kMicroVectors> sum = {}, before = {};
        micro_tile<operand_t, kMicroVectors, 1, kTile>(strip + d * kTile + r, panel + d * kTile + c,
                                                       kTile, step, sum);
        if (d > 0) load_tile<acc_t, kMicroVectors>(block, kLead, nullptr, before);
#pragma GCC unroll 8
        for (int i = 0; i < kMicroRows; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kMicroVectors; ++j) sum[i][j] = sum[i][j] * factor + before[i][j];
        }
        store_tile<acc_t, kMicroVectors>(block, kLead, sum);
      }
    }
  }
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
