// The one micro-kernel behind the products of attention, on rows of operands. No torch here.
#pragma once

#include "common/operands.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

// Rows of a micro-tile, and how many vectors wide it is: 8 x 2 of 32 registers with AVX-512, 4 x 2
// of 16.
constexpr int kMicroRows = DALLE_ISA_BYTES == 64 ? 8 : 4;
constexpr int kMicroVectors = 2;
constexpr int kMaxDepth = 128;  // products added up before they meet another sum

template <typename acc_t, int kVectors, int kRows = kMicroRows>
using MicroTile = Vec<acc_t>[kRows][kVectors];

// What a product asks for meanwhile, a little at each step: nothing.
struct NothingAhead {
  void operator()() const {}
};

// sum[r][j] += sum over k < depth of a[r * row_step + k * step] * vector j of row b + k * ldb.
// Inlined, so that steps which the caller knows are constants.
template <typename operand_t, int kVectors, int kRows = kMicroRows, typename Ahead = NothingAhead>
DALLE_INLINE inline void micro_tile(const operand_t* a, int64_t row_step, int64_t step,
                                    const operand_t* b, int64_t ldb, int depth,
                                    MicroTile<Sum<operand_t>, kVectors, kRows>& sum,
                                    Ahead&& ahead = Ahead{}) {
  constexpr int kWidth = Lanes<operand_t>::kWidth;
  for (int k = 0; k < depth; ++k, a += step, b += ldb) {
    ahead();
    Vec<operand_t> row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + j * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<operand_t> factor = splat(a[r * row_step]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[r][j] = multiply_add(row[j], factor, sum[r][j]);
    }
  }
}

template <typename acc_t, int kVectors, int kRows = kMicroRows>
inline void store_tile(acc_t* c, int64_t ldc, const MicroTile<acc_t, kVectors, kRows>& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      store(c + r * ldc + j * Lanes<acc_t>::kWidth, sum[r][j]);
    }
  }
}

// sum = c, or c with each row times its factor in `beta`.
template <typename acc_t, int kVectors, int kRows = kMicroRows>
inline void load_tile(const acc_t* c, int64_t ldc, const acc_t* beta,
                      MicroTile<acc_t, kVectors, kRows>& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vec<acc_t> x = load(c + r * ldc + j * Lanes<acc_t>::kWidth);
      sum[r][j] = beta == nullptr ? x : x * beta[r];
    }
  }
}

// c[kRows][kVectors vectors] = factor * the product, a and b as in `micro_tile`.
template <typename operand_t, int kVectors, int kRows = kMicroRows, int kPart = kMaxDepth,
          typename Ahead = NothingAhead>
DALLE_INLINE inline void scaled_product(const operand_t* a, int64_t row_step, int64_t step,
                                        const operand_t* b, int64_t ldb, int depth,
                                        Sum<operand_t> factor, Sum<operand_t>* c, int64_t ldc,
                                        Ahead&& ahead = Ahead{}) {
  using acc_t = Sum<operand_t>;
  // Two shorter sums, of kPart products, round less than one long one.
  for (int d = 0; d < depth; d += kPart) {
    const int part = depth - d < kPart ? depth - d : kPart;
    MicroTile<acc_t, kVectors, kRows> sum = {}, before = {};
    micro_tile<operand_t, kVectors, kRows>(a + d * step, row_step, step, b + d * ldb, ldb, part,
                                           sum, ahead);
    if (d > 0) load_tile<acc_t, kVectors, kRows>(c, ldc, nullptr, before);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = sum[i][j] * factor + before[i][j];
    }
    store_tile<acc_t, kVectors, kRows>(c, ldc, sum);
  }
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
