// CPU kernels of powersgd on raw pointers. The table below is what powersgd.cpp sees; the kernels
// are compiled once per instruction set (csrc/common/isa.h). No torch here.
//
// A task is a panel of a matrix: kPanelRows rows of E, or kPanelColumns of its columns. It decodes
// what it needs of E into the cache and multiplies it there. The other factor comes packed: blocks
// of kPowerBlock columns, each (depth, kPowerBlock), padded with zeros. In compress, a last
// block of few columns is stored transposed after the others instead (tail_columns).
#pragma once

#include "common/isa.h"
#include "powersgd/powersgd.h"

namespace dalle {

inline constexpr int64_t kPowerBlock = 32, kPanelRows = 12, kPanelColumns = 96, kPanelDepth = 64;

DALLE_HOST_DEVICE int64_t padded_to_block(int64_t columns) {
  return ceil_div(columns, kPowerBlock) * kPowerBlock;
}

// Columns of Q in compress that are left after the full blocks, where they are few; else 0. Their
// products are sums along the depth: each column lies padded_to_block(depth) from the next, with
// zeros behind the depth, and behind the last of every kTailColumns columns.
inline constexpr int64_t kMaxTail = 8, kTailColumns = 4;

DALLE_HOST_DEVICE int64_t tail_columns(int64_t rank) {
  return rank % kPowerBlock <= kMaxTail ? rank % kPowerBlock : 0;
}

struct PowersgdCpu {
  // `packed` is the other factor; `scratch` has scratch_floats() of the matrix.
  void (*compress)(const PowerMatrix& m, const PowerFactors& f, const float* packed, float* scratch,
                   int64_t panel);
  void (*project)(const PowerMatrix& m, const PowerFactors& f, const float* packed, float* scratch,
                  int64_t panel);
  void (*decompress)(const PowerMatrix& m, const PowerFactors& f, const float* packed,
                     float* scratch, int64_t panel);
};

inline int64_t scratch_floats(const PowerMatrix& m) {
  const int64_t rows = kPanelRows * (padded_to_block(m.columns) + padded_to_block(m.rank));
  const int64_t columns = kPanelColumns * (kPanelDepth + padded_to_block(m.rank));
  return rows > columns ? rows : columns;
}

DALLE_FOR_EACH_ISA(PowersgdCpu, powersgd_cpu)

}  // namespace dalle

#ifdef DALLE_ISA

#include "common/vector.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

constexpr int kRows = 6;  // of a product that stay in registers
static_assert(kPanelRows % kRows == 0 && kPanelColumns % kRows == 0, "full products");

// The first `columns` of out (kRows, width) += A B, in full blocks. A's element (row, k) lies at
// a[row * a_row + k * a_depth]; the blocks of B lie `block_step` apart, and `depth` of their rows
// are taken.
inline void product(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                    int64_t block_step, int64_t depth, float* out, int64_t width, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 2 * kLanes) {
    const float* const block = b + j / kPowerBlock * block_step + j % kPowerBlock;
    Float sums[kRows][2];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < 2; ++v) sums[i][v] = load(out + i * width + j + v * kLanes);
    }
    for (int64_t k = 0; k < depth; ++k) {
      const Float first = load(block + k * kPowerBlock);
      const Float second = load(block + k * kPowerBlock + kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const Float factor = splat(a[i * a_row + k * a_depth]);
        sums[i][0] += factor * first;
        sums[i][1] += factor * second;
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < 2; ++v) store(out + i * width + j + v * kLanes, sums[i][v]);
    }
  }
}

// Columns of out (rows, width) = A B for kTailColumns columns of B, which are `pitch` apart;
// A's rows are `stride` apart; both are padded with zeros to full vectors.
inline void tail_product(const float* a, int64_t stride, const float* b, int64_t pitch,
                         int64_t depth, float* out, int64_t width) {
  constexpr int kTailRows = kBytes == 64 ? kRows : kRows / 2;  // sums stay in registers
  constexpr int kColumns = kTailColumns;
  for (int row = 0; row < kRows; row += kTailRows) {
    Float sums[kTailRows][kColumns] = {};
    for (int64_t k = 0; k < depth; k += kLanes) {
      Float lines[kTailRows];
#pragma GCC unroll 6
      for (int i = 0; i < kTailRows; ++i) lines[i] = load(a + (row + i) * stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const Float column = load(b + c * pitch + k);
#pragma GCC unroll 6
        for (int i = 0; i < kTailRows; ++i) sums[i][c] += lines[i] * column;
      }
    }
    for (int i = 0; i < kTailRows; ++i) {
      for (int c = 0; c < kColumns; ++c) out[(row + i) * width + c] = sum_of<float>(sums[i][c]);
    }
  }
}

inline Float decoded(const uint16_t* codes, int64_t count) {
  return (Float)decode<Format::k169>(load_codes(codes, count));
}

inline Word encoded(Float x) {
  return encode<Format::k169>((Word)x, Word{} + FormatOf<Format::k169>::kHalfUlp);
}

inline void fill_zeros(float* p, int64_t count) {
  __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(float));
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Adds the gradient times `factor` to one row of E, and decodes the row into `out`.
template <typename grad_t>
void accumulate_row(uint16_t* error, const grad_t* grad, float factor, int64_t count, float* out) {
  for_vectors(0, count, [&](int64_t i, int64_t some) DALLE_INLINE {
    const Float sum = decoded(error + i, some) + load_up_to(grad + i, some, 0.0f) * factor;
    const Word codes = encoded(sum);
    store_codes(error + i, some, codes);
    store(out + i, (Float)decode<Format::k169>(codes));
  });
}

void compress(const PowerMatrix& m, const PowerFactors& f, const float* packed, float* scratch,
              int64_t panel) {
  const int64_t width = padded_to_block(m.rank), stride = padded_to_block(m.columns);
  const int64_t begin = panel * kPanelRows, count = smaller(kPanelRows, m.rows - begin);
  float* const values = scratch;
  float* const sums = scratch + kPanelRows * stride;
  fill_zeros(scratch, kPanelRows * (stride + width));
  const float factor = gradient_factor(f);
  const bool keep = skipped(f);
  with_scalar(m.grad_kind, [&](auto scalar) {
    const auto* const grads = static_cast<const decltype(scalar)*>(m.grad);
    for (int64_t i = 0; i < count; ++i) {
      uint16_t* const error = m.error + (begin + i) * m.columns;
      float* const out = values + i * stride;
      if (keep) {
        for_vectors(0, m.columns, [&](int64_t j, int64_t some) DALLE_INLINE {
          store(out + j, decoded(error + j, some));
        });
      } else {
        accumulate_row(error, grads + (begin + i) * m.columns, factor, m.columns, out);
      }
    }
  });
  const int64_t tail = tail_columns(m.rank), full = padded_to_block(m.rank - tail);
  const int64_t pitch = padded_to_block(m.columns);
  for (int64_t i = 0; i < kPanelRows; i += kRows) {
    const float* const lines = values + i * stride;
    float* const out = sums + i * width;
    product(lines, stride, 1, packed, m.columns * kPowerBlock, m.columns, out, width, full);
    for (int64_t c = 0; c < tail; c += kTailColumns) {
      tail_product(lines, stride, packed + full * m.columns + c * pitch, pitch, m.columns,
                   out + full + c, width);
    }
  }
  const float inverse = 1.0f / f.error_scale;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < m.rank; ++j) {
      m.out[(begin + i) * m.rank + j] = sums[i * width + j] * inverse;
    }
  }
}

void project(const PowerMatrix& m, const PowerFactors& f, const float* packed, float* scratch,
             int64_t panel) {
  const int64_t width = padded_to_block(m.rank);
  const int64_t begin = panel * kPanelColumns, count = smaller(kPanelColumns, m.columns - begin);
  float* const values = scratch;
  float* const sums = scratch + kPanelDepth * kPanelColumns;
  fill_zeros(scratch, kPanelColumns * (kPanelDepth + width));
  for (int64_t row = 0; row < m.rows; row += kPanelDepth) {
    const int64_t depth = smaller(kPanelDepth, m.rows - row);
    for (int64_t i = 0; i < depth; ++i) {
      const uint16_t* const error = m.error + (row + i) * m.columns + begin;
      float* const out = values + i * kPanelColumns;
      for_vectors(0, count, [&](int64_t j, int64_t some) DALLE_INLINE {
        store(out + j, decoded(error + j, some));
      });
    }
    for (int64_t j = 0; j < count; j += kRows) {
      product(values + j, 1, kPanelColumns, packed + row * kPowerBlock, m.rows * kPowerBlock, depth,
              sums + j * width, width, width);
    }
  }
  const float inverse = 1.0f / f.error_scale;
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t r = 0; r < m.rank; ++r) {
      m.out[(begin + j) * m.rank + r] = sums[j * width + r] * inverse;
    }
  }
}

void decompress(const PowerMatrix& m, const PowerFactors& f, const float* packed, float* scratch,
                int64_t panel) {
  const int64_t width = padded_to_block(m.columns), stride = padded_to_block(m.rank);
  const int64_t begin = panel * kPanelRows, count = smaller(kPanelRows, m.rows - begin);
  float* const values = scratch;
  float* const sums = scratch + kPanelRows * stride;
  fill_zeros(scratch, kPanelRows * (stride + width));
  for (int64_t i = 0; i < count; ++i) {
    __builtin_memcpy(values + i * stride, m.left + (begin + i) * m.rank,
                     static_cast<size_t>(m.rank) * sizeof(float));
  }
  for (int64_t i = 0; i < kPanelRows; i += kRows) {
    product(values + i * stride, stride, 1, packed, m.rank * kPowerBlock, m.rank, sums + i * width,
            width, width);
  }
  const bool keep = f.feedback == 0.0f || skipped(f);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (begin + i) * m.columns;
    __builtin_memcpy(m.out + at, sums + i * width, static_cast<size_t>(m.columns) * sizeof(float));
    if (keep) continue;
    for_vectors(0, m.columns, [&](int64_t j, int64_t some) DALLE_INLINE {
      const Float sum = load(sums + i * width + j);
      const Float rest = decoded(m.error + at + j, some) - sum * f.feedback;
      store_codes(m.error + at + j, some, encoded(rest));
    });
  }
}

}  // namespace

extern const PowersgdCpu powersgd_cpu = {compress, project, decompress};

}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle

#endif  // DALLE_ISA
