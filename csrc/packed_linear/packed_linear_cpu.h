// The CPU kernel: what it offers (always) and, once per instruction set, how it does it (under
// DALLE_ISA). No torch here.
//
// A task is a panel of 16 outputs, for all rows. With __AVX512BF16__ pairs are multiplied at once.
#pragma once

#include "common/isa.h"
#include "packed_linear/packed_linear.h"

namespace dalle {

struct PackedLinearCpu {
  // Rows of x, normed and in the form that the products read.
  void (*prepare)(const PackedLinearArgs& args, int64_t row_begin, int64_t row_end);
  void (*run)(const PackedLinearArgs& args, int64_t panel_begin, int64_t panel_end);
};

DALLE_FOR_EACH_ISA(PackedLinearCpu, packed_linear_cpu)

}  // namespace dalle

#ifdef DALLE_ISA

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/pairs.h"
#include "common/vector.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int kPanelVectors = static_cast<int>(kLinearColumns) / kLanes;
constexpr int64_t kLinearBlock = 384;  // inputs at a time: panels of a tile stay in the L1 cache

// Rows and panels of a tile of accumulators: 24 of 32 registers, or 12 of 16. Few rows take more
// panels, since a chain of products waits for itself.
constexpr int kTileRows = kBytes == 64 ? 8 : kBytes == 32 ? 6 : 3;
constexpr int tile_panels(int rows) {
  if (kBytes == 64) return rows <= 2 ? 4 : 3;
  if (kBytes == 32) return rows == 1 ? 4 : rows == 2 ? 2 : 1;
  return rows == 1 ? 2 : 1;
}

inline Float product(Float a, Float b, Float sum) { return sum + a * b; }
inline Float product(Vec<Pair> a, Vec<Pair> b, Float sum) { return multiply_add(a, b, sum); }

// x sigmoid(slope x).
inline Float swish(Float x, float slope) {
  const Float least = splat(-126.0f);  // 2^126 is finite, and x / 2^126 as good as 0
  return x / (1.0f + exp2_of<float>(-maximum(x * (slope * static_cast<float>(kLog2E)), least)));
}

// Weights that are asked for meanwhile, into the L2 cache: from `at` on, `step` bytes further with
// each input. Not with four panels at once, which the hardware's own prefetcher reads as fast as
// the memory gives.
struct WeightsAhead {
  const char* at;
  int64_t step;
};

// out[r][column] of kRows rows and kPanels panels from `panel` on, over inputs k_begin .. k_end;
// what came before stands in out. step_t is float, or a pair of bfloat16.
template <typename step_t, int kRows, int kPanels>
inline void linear_tile(const PackedLinearArgs& args, int64_t row, int64_t panel, int64_t steps,
                        int64_t k_begin, int64_t k_end, WeightsAhead ahead) {
  const step_t* x = reinterpret_cast<const step_t*>(args.normed) + row * steps;
  const step_t* w = static_cast<const step_t*>(args.weight) + panel * steps * kLinearColumns;
  float* out = args.out + row * args.outputs + panel * kLinearColumns;
  const int64_t left = args.outputs - panel * kLinearColumns;
  float edge[kRows][kLinearColumns];  // of a panel that is wider than what is left
  const bool whole = kPanels > 1 || left >= kLinearColumns;
  Float sum[kRows][kPanels * kPanelVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < kPanels * kPanelVectors; ++j) {
      sum[r][j] = k_begin == 0 ? Float{} : load(out + r * args.outputs + j * kLanes);
    }
  }
  for (int64_t k = k_begin; k < k_end; ++k) {
    if constexpr (kPanels < 4) {
#pragma GCC unroll 4
      for (int64_t p = 0; p < kPanels; ++p) {
        __builtin_prefetch(ahead.at + p * steps * kLinearColumns * sizeof(step_t), 0, 2);
      }
      ahead.at += ahead.step;
    }
    Vec<step_t> column[kPanels * kPanelVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kPanels * kPanelVectors; ++j) {
      const int64_t p = j / kPanelVectors, part = j % kPanelVectors;
      column[j] = load(w + (p * steps + k) * kLinearColumns + part * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<step_t> factor = splat(x[r * steps + k]);
#pragma GCC unroll 16
      for (int j = 0; j < kPanels * kPanelVectors; ++j) {
        sum[r][j] = product(factor, column[j], sum[r][j]);
      }
    }
  }
  const bool last = k_end == steps;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int j = 0; j < kPanels * kPanelVectors; ++j) {
      float* at = whole ? out + r * args.outputs + j * kLanes : edge[r] + j * kLanes;
      Float y = sum[r][j];
      if (last && whole) {
        if (args.bias) y += load(args.bias + panel * kLinearColumns + j * kLanes);
        if (args.slope != 0) y = swish(y, args.slope);
        if (args.residual) y += load(args.residual + (at - args.out));
      }
      store(at, y);
    }
  }
  if (whole) return;
  for (int r = 0; r < kRows; ++r) {  // one panel, and all of k: see linear_rows
    for (int64_t n = 0; n < left; ++n) {
      Float y = splat(edge[r][n]);
      if (args.bias) y += args.bias[panel * kLinearColumns + n];
      if (args.slope != 0) y = swish(y, args.slope);
      const int64_t at = r * args.outputs + n;
      if (args.residual) y += (args.residual + (out - args.out))[at];
      out[at] = y[0];
    }
  }
}

// A tile of `rows` rows, kRows at most and half as many at least.
template <typename step_t, int kRows, int kPanels, int kLeast = (kRows + 1) / 2>
inline void linear_rows_of(int64_t rows, const PackedLinearArgs& args, int64_t row, int64_t panel,
                           int64_t steps, int64_t k_begin, int64_t k_end, WeightsAhead ahead) {
  if (kRows == kLeast || rows == kRows) {
    linear_tile<step_t, kRows, kPanels>(args, row, panel, steps, k_begin, k_end, ahead);
  } else if constexpr (kRows > kLeast) {
    linear_rows_of<step_t, kRows - 1, kPanels, kLeast>(rows, args, row, panel, steps, k_begin,
                                                       k_end, ahead);
  }
}

// All rows, of kPanels panels and a block of inputs, in tiles as equal as can be; what they ask for
// is shared among them.
template <typename step_t, int kRows, int kPanels>
inline void linear_block(const PackedLinearArgs& args, int64_t panel, int64_t steps,
                         int64_t k_begin, int64_t k_end, const char* next) {
  constexpr int64_t kLine = kLinearColumns * sizeof(step_t);
  const int64_t tiles = ceil_div(args.rows, kRows);
  WeightsAhead ahead = {next, kLine / tiles};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = tile * args.rows / tiles, row_end = (tile + 1) * args.rows / tiles;
    if constexpr (kRows == kTileRows) {
      linear_rows_of<step_t, kRows, kPanels>(row_end - row, args, row, panel, steps, k_begin, k_end,
                                             ahead);
    } else {
      linear_tile<step_t, kRows, kPanels>(args, row, panel, steps, k_begin, k_end, ahead);
    }
    ahead.at += ahead.step * (k_end - k_begin);
  }
}

// Panels begin .. end, some at a time: a weight is read from memory once, whatever the rows.
template <typename step_t, int kRows>
void linear_rows(const PackedLinearArgs& args, int64_t steps, int64_t begin, int64_t end) {
  constexpr int kPanels = tile_panels(kRows);
  const int64_t whole = args.outputs / kLinearColumns;
  const step_t* const weight = static_cast<const step_t*>(args.weight);
  int64_t panel = begin;
  while (panel < end) {
    const bool full = panel + kPanels <= end && panel + kPanels <= whole;
    const int64_t some = full ? kPanels : 1;
    // The sums of an edge have no place in out: all of k at once.
    const int64_t block = panel < whole ? kLinearBlock : steps;
    for (int64_t k = 0; k < steps; k += block) {
      const int64_t k_end = std::min(steps, k + block);
      // The block behind this one, or the first of the next panels.
      const int64_t behind = std::min(panel + some, end - 1);
      const int64_t next = k_end < steps ? panel * steps + k_end : behind * steps;
      const char* at = reinterpret_cast<const char*>(weight + next * kLinearColumns);
      if (full) {
        linear_block<step_t, kRows, kPanels>(args, panel, steps, k, k_end, at);
      } else {
        linear_block<step_t, kRows, 1>(args, panel, steps, k, k_end, at);
      }
    }
    panel += some;
  }
}

// With fewer rows than a tile has, tiles are as low as they are.
template <typename step_t, int kRows = kTileRows>
void linear_panels(const PackedLinearArgs& args, int64_t steps, int64_t begin, int64_t end) {
  if (args.rows >= kRows) {
    linear_rows<step_t, kRows>(args, steps, begin, end);
  } else if constexpr (kRows > 1) {
    linear_panels<step_t, kRows - 1>(args, steps, begin, end);
  }
}

void run_linear(const PackedLinearArgs& args, int64_t panel_begin, int64_t panel_end) {
  if (args.pairs) {
    linear_panels<Pair>(args, ceil_div(args.inputs, 2), panel_begin, panel_end);
  } else {
    linear_panels<float>(args, args.inputs, panel_begin, panel_end);
  }
}

// The vector at x + k of a row of `size`; zeros behind its end.
inline Float load_row(const float* x, int64_t k, int64_t size) {
  if (k + kLanes <= size) return load(x + k);
  float rest[kLanes] = {};
  std::copy(x + k, x + size, rest);
  return load(rest);
}

// Rows as the products read them; of bfloat16 rounded, an odd row with a zero behind it.
void prepare_linear(const PackedLinearArgs& args, int64_t row_begin, int64_t row_end) {
  const int64_t size = args.inputs, width = args.pairs ? size + size % 2 : size;
  const float count = static_cast<float>(size);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* x = args.x + row * size;
    float mean = 0, inverse = 1;
    if (args.gain) {
      Float sum{}, squares{};
      for (int64_t k = 0; k < size; k += kLanes) sum += load_row(x, k, size);
      mean = sum_of<float>(sum) / count;
      for (int64_t k = 0; k < size; k += kLanes) {
        Float v = load_row(x, k, size) - mean;
        for (int64_t i = size - k; i < kLanes; ++i) v[i] = 0;
        squares += v * v;
      }
      inverse = 1.0f / std::sqrt(sum_of<float>(squares) / count + args.eps);
    }
    for (int64_t k = 0; k < size; k += kLanes) {
      Float v = load_row(x, k, size);
      if (args.gain) {
        v = (v - mean) * inverse * load_row(args.gain, k, size) + load_row(args.shift, k, size);
      }
      if (args.pairs) {
        BFloat16* out = reinterpret_cast<BFloat16*>(args.normed) + row * width + k;
        BFloat16 rest[kLanes];
        narrow(rest, v);
        std::copy_n(rest, std::min<int64_t>(kLanes, width - k), out);
      } else {
        float rest[kLanes];
        store(rest, v);
        std::copy_n(rest, std::min<int64_t>(kLanes, width - k), args.normed + row * width + k);
      }
    }
  }
}

}  // namespace

const PackedLinearCpu packed_linear_cpu = {prepare_linear, run_linear};

}  // namespace dalle::DALLE_ISA_NAMESPACE

#endif  // DALLE_ISA
