// Contract of grad_scale, shared by host and device: the two ends of a residual block of paper
// Figure 4, the gradients of all its parameters unscaled, and the rule of its scale. No torch here.
#pragma once

#include "common/tensor_table.h"

namespace dalle {

// Magnitudes, as the bits of a float, that separate what rounding to a storage type makes of them.
struct StorageLimits {
  uint32_t zero;      // up to here: zero
  uint32_t normal;    // from here on: normal; between the two subnormal
  uint32_t infinite;  // from here on: infinite
};
DALLE_HOST_DEVICE StorageLimits storage_limits(ElementKind kind) {
  switch (kind) {
    case ElementKind::kHalf:  // ties: 2^-25 rounds to zero, 65520 to infinity
      return {0x33000000u, 0x387FE000u, 0x477FF000u};
    case ElementKind::kBFloat16:
      return {0x00008000u, 0x007F8000u, 0x7F7F8000u};
    case ElementKind::kFloat:
    case ElementKind::kNone:
    case ElementKind::kShort:
    case ElementKind::kLong:
    case ElementKind::kDouble:
      break;  // the op has refused all but float
  }
  return {0u, 0x00800000u, 0x7F800000u};
}

constexpr uint32_t kInfinityBits = 0x7F800000u;

DALLE_HOST_DEVICE uint32_t magnitude_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits & 0x7FFFFFFFu;
}
DALLE_HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The largest magnitude (as bits) that, divided by `scale` in float, becomes zero when stored. So
// that counting them needs no division.
DALLE_HOST_DEVICE uint32_t flushed_by(ElementKind kind, float scale) {
  const uint32_t limit = storage_limits(kind).zero;
  if (!(scale > 0.0f) || magnitude_of(scale) >= kInfinityBits) return 0;
  const double edge = kind == ElementKind::kHalf       ? 0x1.000001p-25
                      : kind == ElementKind::kBFloat16 ? 0x1p-134 + 0x1p-150
                                                       : 0x1p-150;
  uint32_t bits = magnitude_of(static_cast<float>(edge * static_cast<double>(scale)));
  if (bits >= kInfinityBits) bits = kInfinityBits - 1;
  // At most a few units: the edge was rounded, and so is the quotient.
  while (bits > 0 && magnitude_of(float_of(bits) / scale) > limit) --bits;
  while (bits + 1 < kInfinityBits && magnitude_of(float_of(bits + 1) / scale) <= limit) ++bits;
  return bits;
}

// -- the two ends of a block ---------------------------------------------------------------------

// out = grad * scale, not finite results as zero.
struct ScaleArgs {
  const void* grad;    // (N)
  const float* scale;  // (1)
  void* out;           // (N)
  int64_t* counts;     // (kNumScaleCounts), zeroed
  int64_t numel;
  ElementKind from, to;
};

// Of scaling: finite gradients that became infinite, that became zero (and were not), that became
// subnormal; gradients that were not finite.
enum ScaleCount : int { kOverflowed, kFlushedGrads, kSubnormalGrads, kFiltered, kNumScaleCounts };

// out = stream + grad / scale, quotients that are not finite as zero.
struct UnscaleArgs {
  const float* stream;  // (N)
  const void* grad;     // (N)
  const float* scale;   // (1)
  float* out;           // (N)
  int64_t numel;
  ElementKind kind;
};

// -- gradients of parameters ---------------------------------------------------------------------

// Of the gradients of a group: not finite; zero; subnormal as stored; not zero, but zero once
// divided by the scale and stored.
enum GroupCount : int { kNonfiniteGrads, kZeros, kSubnormals, kUnderflowed, kNumGroupCounts };

// Statistics of one chunk of the table; summed in the order of the chunks.
struct ChunkStats {
  double squares;                   // of finite gradients, before the division
  uint32_t max_abs;                 // magnitude of a finite gradient, before the division, as bits
  int32_t counts[kNumGroupCounts];  // of at most kTableChunk elements
  int32_t unused;
};
static_assert(sizeof(ChunkStats) == 4 * sizeof(int64_t), "chunks are kept in an int64 tensor");

// Column 0 of the table: the gradients, divided in place by their group's scale unless check_only.
struct GroupStatsArgs {
  TensorTable table;
  const float* scales;  // (G)
  ChunkStats* chunks;   // (table.num_chunks)
  int64_t* counts;      // (G, kNumGroupCounts)
  double* squares;      // (G), of the unscaled gradients
  float* max_abs;       // (G), of the unscaled gradients
  int64_t num_groups;
  bool check_only;
};

// -- scales --------------------------------------------------------------------------------------

// The rule of paper appendix D: clean scales grow, others fall at most once in `window` updates.
struct UpdateScalesArgs {
  float* scales;             // (G)
  int64_t* since_drop;       // (G), updates since a scale last fell, at most `window`
  const int64_t* nonfinite;  // (G)
  int64_t num_groups, window;
  float growth, backoff, low, high;
  bool grow_on_skip;  // clean scales grow also when another group was not finite
};

DALLE_HOST_DEVICE void update_scale(const UpdateScalesArgs& args, int64_t group, bool skipped) {
  const int64_t since = args.since_drop[group] + 1;
  const bool bad = args.nonfinite[group] != 0, falls = bad && since >= args.window;
  float scale = args.scales[group];
  if (falls) scale *= args.backoff;
  if (!bad && (args.grow_on_skip || !skipped)) scale *= args.growth;
  scale = scale < args.low ? args.low : scale > args.high ? args.high : scale;
  args.scales[group] = scale;
  args.since_drop[group] = falls ? 0 : since < args.window ? since : args.window;
}

}  // namespace dalle
