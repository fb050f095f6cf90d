// CPU kernels of grad_scale on raw pointers. The table below is what grad_scale.cpp sees; the
// kernels are compiled once per instruction set (csrc/common/isa.h). No torch here.
#pragma once

#include "common/isa.h"
#include "grad_scale/grad_scale.h"

namespace dalle {

inline constexpr int64_t kGradScaleUnit = 4096;  // elements

struct GradScaleCpu {
  void (*scale)(const ScaleArgs& args, int64_t unit_begin, int64_t unit_end);
  void (*unscale)(const UnscaleArgs& args, int64_t unit_begin, int64_t unit_end);
  void (*chunks)(const GroupStatsArgs& args, int64_t chunk_begin, int64_t chunk_end);
};

DALLE_FOR_EACH_ISA(GradScaleCpu, grad_scale_cpu)

}  // namespace dalle

#ifdef DALLE_ISA

#include "common/vector.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

inline Word magnitude(Float x) { return (Word)x & 0x7FFFFFFFu; }

inline int64_t sum_of_lanes(Word lanes) {
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// Elements of units [begin, end) of numel.
struct Span {
  int64_t begin, end;
};
inline Span span_of_units(int64_t numel, int64_t begin, int64_t end) {
  return {begin * kGradScaleUnit, end * kGradScaleUnit < numel ? end * kGradScaleUnit : numel};
}

template <typename from_t, typename to_t>
void scale_units(const ScaleArgs& args, int64_t begin, int64_t end) {
  const auto* const grad = static_cast<const from_t*>(args.grad);
  auto* const out = static_cast<to_t*>(args.out);
  const StorageLimits limits = storage_limits(args.to);
  const float scale = *args.scale;
  const Span span = span_of_units(args.numel, begin, end);
  Word lane_counts[kNumScaleCounts] = {};
  for_vectors(span.begin, span.end, [&](int64_t i, int64_t count) {
    const Float x = load_up_to(grad + i, count, 0.0f);
    const Float y = x * scale;
    const Word before = magnitude(x), after = magnitude(y);
    const Word finite = (Word)(before < kInfinityBits);
    const Word fits = (Word)(after < limits.infinite);
    const Word small = (Word)(after < limits.normal), zero = (Word)(after <= limits.zero);
    lane_counts[kOverflowed] -= finite & ~fits;  // a mask is -1 where it holds
    lane_counts[kFlushedGrads] -= finite & zero & (Word)(before != 0);
    lane_counts[kSubnormalGrads] -= finite & small & ~zero;
    lane_counts[kFiltered] -= ~finite;
    store_up_to(out + i, count, (Float)((Word)y & fits & finite));
  });
  for (int c = 0; c < kNumScaleCounts; ++c) {
    __atomic_fetch_add(args.counts + c, sum_of_lanes(lane_counts[c]), __ATOMIC_RELAXED);
  }
}

template <typename grad_t>
void unscale_units(const UnscaleArgs& args, int64_t begin, int64_t end) {
  const auto* const grad = static_cast<const grad_t*>(args.grad);
  const float scale = *args.scale;
  const Span span = span_of_units(args.numel, begin, end);
  for_vectors(span.begin, span.end, [&](int64_t i, int64_t count) {
    const Float quotient = load_up_to(grad + i, count, 0.0f) / scale;
    const Word finite = (Word)(magnitude(quotient) < kInfinityBits);
    const Float stream = load_up_to(args.stream + i, count, 0.0f);
    store_up_to(args.out + i, count, stream + (Float)((Word)quotient & finite));
  });
}

// Magnitudes at which elements become subnormal or zero, as bits of a float.
struct Thresholds {
  uint32_t normal, flushed;
  uint16_t flushed_half;  // the largest half not above `flushed`, as bits of a half
};

// Squares are added in one order on every instruction set, and no addition is fused with a product
// (same_bits_ops in CMakeLists.txt): element i of a block in sum i % kSums.
constexpr int kSums = 16, kSumVectors = kSums / kLanes;

// Counts and sums by lane. Zeros count as subnormal and as underflowed until the end.
struct BlockStats {
  Word nonfinite, zeros, subnormals, underflowed, max_abs;
  Float squares[kSumVectors];
};

// `stats` with `count` elements added; element 0 goes to the first of the sums.
template <bool kAllFinite, typename scalar_t>
BlockStats add_stats(const scalar_t* data, int64_t count, const Thresholds& thresholds,
                     BlockStats stats) {
  // As signed numbers, which magnitudes are as well: AVX2 and SSE compare no others.
  const auto normal = static_cast<int32_t>(thresholds.normal);
  const auto flushed = static_cast<int32_t>(thresholds.flushed);
  const auto add = [&](int64_t i, int64_t some, int sum) DALLE_INLINE {
    const Word bits = magnitude(load_up_to(data + i, some, 0.0f));
    Word finite_bits = bits;
    if constexpr (!kAllFinite) {
      const Word finite = (Word)(bits < kInfinityBits);
      stats.nonfinite -= ~finite;  // a mask is -1 where it holds
      finite_bits &= finite;
    }
    stats.zeros -= (Word)(bits == 0);
    stats.subnormals -= (Word)((Int)bits < normal);
    stats.underflowed -= (Word)((Int)bits <= flushed);
    stats.max_abs = finite_bits > stats.max_abs ? finite_bits : stats.max_abs;
    stats.squares[sum] += (Float)finite_bits * (Float)finite_bits;
  };
  const int64_t full = count / kSums * kSums;
  for (int64_t i = 0; i < full; i += kSums) {
#pragma GCC unroll 4
    for (int sum = 0; sum < kSumVectors; ++sum) add(i + sum * kLanes, kLanes, sum);
  }
#pragma GCC unroll 4
  for (int sum = 0; sum < kSumVectors; ++sum) {
    const int64_t left = count - full - sum * kLanes;
    if (left > 0) add(full + sum * kLanes, left < kLanes ? left : kLanes, sum);
  }
  return stats;
}

inline uint32_t float_of_half(uint32_t bits) {  // of a finite magnitude
  return bits < 0x0400 ? magnitude_of(static_cast<float>(bits) * 0x1p-24f)
                       : (bits << 13) + (112u << 23);
}

inline Thresholds thresholds_of(ElementKind kind, float scale) {
  Thresholds thresholds = {storage_limits(kind).normal, flushed_by(kind, scale), 0};
  for (uint32_t bit = 1u << 14; kind == ElementKind::kHalf && bit != 0; bit >>= 1) {
    const uint32_t bits = thresholds.flushed_half | bit;
    if (bits < 0x7C00 && float_of_half(bits) <= thresholds.flushed) thresholds.flushed_half = bits;
  }
  return thresholds;
}

// The same for elements that are all finite. Where one is not, `max_abs` shows it and the rest is
// undefined.
template <typename scalar_t>
BlockStats stats_of_finite(const scalar_t* data, int64_t count, const Thresholds& thresholds) {
  const BlockStats stats = {};
  return add_stats<true>(data, count, thresholds, stats);
}

// Halves are compared and counted as they are, twice as many in a vector as floats.
typedef uint16_t Halves __attribute__((vector_size(kBytes)));

inline Word in_pairs(Halves lanes) { return ((Word)lanes & 0xFFFF) + ((Word)lanes >> 16); }

inline BlockStats stats_of_finite(const Half* data, int64_t count, const Thresholds& thresholds) {
  const Halves flushed = Halves{} + thresholds.flushed_half;
  Halves zeros = {}, subnormals = {}, underflowed = {}, max_abs = {};
  BlockStats stats = {};
  Float squares[kSumVectors] = {};
  constexpr int kStep = 2 * kLanes > kSums ? 2 * kLanes : kSums;
  const int64_t full = count / kStep * kStep;  // of a block: 16-bit counts cannot wrap around
  for (int64_t i = 0; i < full; i += kStep) {
#pragma GCC unroll 4
    for (int at = 0; at < kStep; at += 2 * kLanes) {
      const Halves bits = load_as<Halves>(data + i + at) & 0x7FFF;
      zeros -= (Halves)(bits == 0);
      subnormals -= (Halves)(bits < 0x0400);
      underflowed -= (Halves)(bits <= flushed);
      max_abs = bits > max_abs ? bits : max_abs;
    }
#pragma GCC unroll 4
    for (int at = 0; at < kStep; at += kLanes) {
      const Float x = widen(data + i + at);
      squares[at / kLanes % kSumVectors] += x * x;
    }
  }
  for (int sum = 0; sum < kSumVectors; ++sum) stats.squares[sum] = squares[sum];
  stats = add_stats<true>(data + full, count - full, thresholds, stats);
  stats.zeros += in_pairs(zeros);
  stats.subnormals += in_pairs(subnormals);
  stats.underflowed += in_pairs(underflowed);
  const Word low = (Word)max_abs & 0xFFFF, high = (Word)max_abs >> 16;
  const Word max_abs_bits =
      (Word)widened_half(__builtin_convertvector(low > high ? low : high, Short));
  stats.max_abs = max_abs_bits > stats.max_abs ? max_abs_bits : stats.max_abs;
  return stats;
}

inline bool any_nonfinite(const BlockStats& stats) {
  return any((Word)(stats.max_abs >= kInfinityBits));
}

template <typename scalar_t>
void unscale_chunk(const GroupStatsArgs& args, const TableRow& row, int64_t chunk) {
  const ElementKind kind = kind_of(row, 0);
  const ChunkSpan span = span_of(row, chunk);
  scalar_t* const data = data_of<scalar_t>(row, 0) + span.begin;
  const float scale = args.scales[row.group];
  const Thresholds thresholds = thresholds_of(kind, scale);
  const BlockStats zero = {};
  BlockStats all = {};
  double squares[kSums] = {};
  constexpr int64_t kBlock = 4096;  // stays in L1; sums over blocks are in double
  for (int64_t begin = 0; begin < span.count; begin += kBlock) {
    scalar_t* const block = data + begin;
    const int64_t count = span.count - begin < kBlock ? span.count - begin : kBlock;
    // Nearly all blocks are finite, and need half as many instructions then.
    BlockStats block_stats = stats_of_finite(block, count, thresholds);
    if (any_nonfinite(block_stats)) block_stats = add_stats<false>(block, count, thresholds, zero);
    all.nonfinite += block_stats.nonfinite;
    all.zeros += block_stats.zeros;
    all.subnormals += block_stats.subnormals;
    all.underflowed += block_stats.underflowed;
    all.max_abs = block_stats.max_abs > all.max_abs ? block_stats.max_abs : all.max_abs;
    const auto* const sums = reinterpret_cast<const float*>(block_stats.squares);
    for (int i = 0; i < kSums; ++i) squares[i] += static_cast<double>(sums[i]);
    if (args.check_only) continue;
    for_vectors(0, count, [&](int64_t i, int64_t some) {
      store_up_to(block + i, some, load_up_to(block + i, some, 0.0f) / scale);
    });
  }
  // Elements beyond the end were zeros; zeros are not subnormal and do not underflow.
  const int64_t padding = ceil_div(span.count, kLanes) * kLanes - span.count;
  ChunkStats& stats = args.chunks[chunk];
  const int64_t zeros = sum_of_lanes(all.zeros);
  stats.squares = 0;
  for (const double sum : squares) stats.squares += sum;
  stats.max_abs = 0;
  for (int i = 0; i < kLanes; ++i) {
    stats.max_abs = all.max_abs[i] > stats.max_abs ? all.max_abs[i] : stats.max_abs;
  }
  stats.counts[kNonfiniteGrads] = static_cast<int32_t>(sum_of_lanes(all.nonfinite));
  stats.counts[kZeros] = static_cast<int32_t>(zeros - padding);
  stats.counts[kSubnormals] = static_cast<int32_t>(sum_of_lanes(all.subnormals) - zeros);
  stats.counts[kUnderflowed] = static_cast<int32_t>(sum_of_lanes(all.underflowed) - zeros);
}

void scale(const ScaleArgs& args, int64_t begin, int64_t end) {
  with_scalar(args.from, [&](auto from) {
    with_scalar(args.to,
                [&](auto to) { scale_units<decltype(from), decltype(to)>(args, begin, end); });
  });
}

void unscale(const UnscaleArgs& args, int64_t begin, int64_t end) {
  with_scalar(args.kind, [&](auto grad) { unscale_units<decltype(grad)>(args, begin, end); });
}

void chunks(const GroupStatsArgs& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const TableRow& row = args.table.rows[row_of_chunk(args.table, chunk)];
    with_scalar(kind_of(row, 0),
                [&](auto scalar) { unscale_chunk<decltype(scalar)>(args, row, chunk); });
  }
}

}  // namespace

extern const GradScaleCpu grad_scale_cpu = {scale, unscale, chunks};

}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle

#endif  // DALLE_ISA
