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

inline int64_t total(Word lanes) {
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
  Word found[kNumScaleCounts] = {};
  for_vectors(span.begin, span.end, [&](int64_t i, int64_t count) {
    const Float x = load_up_to(grad + i, count, 0.0f);
    const Float y = x * scale;
    const Word before = magnitude(x), after = magnitude(y);
    const Word finite = (Word)(before < kInfinityBits);
    const Word fits = (Word)(after < limits.infinite);
    const Word small = (Word)(after < limits.normal), zero = (Word)(after <= limits.zero);
    found[kOverflowed] -= finite & ~fits;  // a mask is -1 where it holds
    found[kFlushedGrads] -= finite & zero & (Word)(before != 0);
    found[kSubnormalGrads] -= finite & small & ~zero;
    found[kFiltered] -= ~finite;
    store_up_to(out + i, count, (Float)((Word)y & fits & finite));
  });
  for (int c = 0; c < kNumScaleCounts; ++c) {
    __atomic_fetch_add(args.counts + c, total(found[c]), __ATOMIC_RELAXED);
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

// The magnitudes that separate kinds of elements, as bits of a float.
struct Edges {
  uint32_t normal, flushed;
  uint16_t flushed_half;  // the largest half not above `flushed`, as its own bits
};

// Squares are added in one order on every instruction set, and no addition is fused with a product
// (same_bits_ops in CMakeLists.txt): element i of a part in sum i % kSums.
constexpr int kSums = 16, kSumVectors = kSums / kLanes;

// What neighbouring elements held. Zeros count as subnormal and as underflowed until the end.
struct PartStats {
  Word nonfinite, zeros, subnormals, underflowed, largest;
  Float squares[kSumVectors];
};

// Adds elements to what was found; the first belongs to the first of the sums.
template <bool kAllFinite, typename scalar_t>
PartStats examine(const scalar_t* data, int64_t count, const Edges& edges, PartStats found) {
  // As signed numbers, which magnitudes are as well: AVX2 and SSE compare no others.
  const auto normal = static_cast<int32_t>(edges.normal);
  const auto flushed = static_cast<int32_t>(edges.flushed);
  const auto add = [&](int64_t i, int64_t some, int sum) DALLE_INLINE {
    const Word bits = magnitude(load_up_to(data + i, some, 0.0f));
    Word kept = bits;
    if constexpr (!kAllFinite) {
      const Word finite = (Word)(bits < kInfinityBits);
      found.nonfinite -= ~finite;  // a mask is -1 where it holds
      kept &= finite;
    }
    found.zeros -= (Word)(bits == 0);
    found.subnormals -= (Word)((Int)bits < normal);
    found.underflowed -= (Word)((Int)bits <= flushed);
    found.largest = kept > found.largest ? kept : found.largest;
    found.squares[sum] += (Float)kept * (Float)kept;
  };
  const int64_t whole = count / kSums * kSums;
  for (int64_t i = 0; i < whole; i += kSums) {
#pragma GCC unroll 4
    for (int sum = 0; sum < kSumVectors; ++sum) add(i + sum * kLanes, kLanes, sum);
  }
#pragma GCC unroll 4
  for (int sum = 0; sum < kSumVectors; ++sum) {
    const int64_t left = count - whole - sum * kLanes;
    if (left > 0) add(whole + sum * kLanes, left < kLanes ? left : kLanes, sum);
  }
  return found;
}

inline uint32_t float_of_half(uint32_t bits) {  // of a finite magnitude
  return bits < 0x0400 ? magnitude_of(static_cast<float>(bits) * 0x1p-24f)
                       : (bits << 13) + (112u << 23);
}

inline Edges edges_of(ElementKind kind, float scale) {
  Edges edges = {storage_limits(kind).normal, flushed_by(kind, scale), 0};
  for (uint32_t bit = 1u << 14; kind == ElementKind::kHalf && bit != 0; bit >>= 1) {
    const uint32_t bits = edges.flushed_half | bit;
    if (bits < 0x7C00 && float_of_half(bits) <= edges.flushed) edges.flushed_half = bits;
  }
  return edges;
}

// Of elements that are all finite. Where they are not `largest` tells, and nothing else counts.
template <typename scalar_t>
PartStats examine_finite(const scalar_t* data, int64_t count, const Edges& edges) {
  const PartStats found = {};
  return examine<true>(data, count, edges, found);
}

// Halves are compared and counted as they are, twice as many in a vector as floats.
typedef uint16_t Halves __attribute__((vector_size(kBytes)));

inline Word in_pairs(Halves lanes) { return ((Word)lanes & 0xFFFF) + ((Word)lanes >> 16); }

inline PartStats examine_finite(const Half* data, int64_t count, const Edges& edges) {
  const Halves flushed = Halves{} + edges.flushed_half;
  Halves zeros = {}, subnormals = {}, underflowed = {}, largest = {};
  PartStats found = {};
  Float squares[kSumVectors] = {};
  constexpr int kStep = 2 * kLanes > kSums ? 2 * kLanes : kSums;
  const int64_t whole = count / kStep * kStep;  // of a part: the lanes cannot wrap around
  for (int64_t i = 0; i < whole; i += kStep) {
#pragma GCC unroll 4
    for (int at = 0; at < kStep; at += 2 * kLanes) {
      const Halves bits = load_as<Halves>(data + i + at) & 0x7FFF;
      zeros -= (Halves)(bits == 0);
      subnormals -= (Halves)(bits < 0x0400);
      underflowed -= (Halves)(bits <= flushed);
      largest = bits > largest ? bits : largest;
    }
#pragma GCC unroll 4
    for (int at = 0; at < kStep; at += kLanes) {
      const Float x = widen(data + i + at);
      squares[at / kLanes % kSumVectors] += x * x;
    }
  }
  for (int sum = 0; sum < kSumVectors; ++sum) found.squares[sum] = squares[sum];
  found = examine<true>(data + whole, count - whole, edges, found);
  found.zeros += in_pairs(zeros);
  found.subnormals += in_pairs(subnormals);
  found.underflowed += in_pairs(underflowed);
  const Word low = (Word)largest & 0xFFFF, high = (Word)largest >> 16;
  const Word most = (Word)widened_half(__builtin_convertvector(low > high ? low : high, Short));
  found.largest = most > found.largest ? most : found.largest;
  return found;
}

inline bool any_nonfinite(const PartStats& found) {
  return any((Word)(found.largest >= kInfinityBits));
}

template <typename scalar_t>
void unscale_chunk(const GroupStatsArgs& args, const TableRow& row, int64_t chunk) {
  const ElementKind kind = kind_of(row, 0);
  const ChunkSpan span = span_of(row, chunk);
  scalar_t* const data = data_of<scalar_t>(row, 0) + span.begin;
  const float scale = args.scales[row.group];
  const Edges edges = edges_of(kind, scale);
  const PartStats nothing = {};
  PartStats all = {};
  double squares[kSums] = {};
  constexpr int64_t kPart = 4096;  // stays in the first cache; sums of more stay in double
  for (int64_t begin = 0; begin < span.count; begin += kPart) {
    scalar_t* const part = data + begin;
    const int64_t count = span.count - begin < kPart ? span.count - begin : kPart;
    // Nearly all parts are finite, and need half as many instructions then.
    PartStats found = examine_finite(part, count, edges);
    if (any_nonfinite(found)) found = examine<false>(part, count, edges, nothing);
    all.nonfinite += found.nonfinite;
    all.zeros += found.zeros;
    all.subnormals += found.subnormals;
    all.underflowed += found.underflowed;
    all.largest = found.largest > all.largest ? found.largest : all.largest;
    const auto* const sums = reinterpret_cast<const float*>(found.squares);
    for (int i = 0; i < kSums; ++i) squares[i] += static_cast<double>(sums[i]);
    if (args.check_only) continue;
    for_vectors(0, count, [&](int64_t i, int64_t some) {
      store_up_to(part + i, some, load_up_to(part + i, some, 0.0f) / scale);
    });
  }
  // The places beyond the end held zeros; zeros are not subnormal, and do not underflow.
  const int64_t padding = ceil_div(span.count, kLanes) * kLanes - span.count;
  ChunkStats& stats = args.chunks[chunk];
  const int64_t zeros = total(all.zeros);
  stats.squares = 0;
  for (const double sum : squares) stats.squares += sum;
  stats.largest = 0;
  for (int i = 0; i < kLanes; ++i) {
    stats.largest = all.largest[i] > stats.largest ? all.largest[i] : stats.largest;
  }
  stats.counts[kNonfiniteGrads] = static_cast<int32_t>(total(all.nonfinite));
  stats.counts[kZeros] = static_cast<int32_t>(zeros - padding);
  stats.counts[kSubnormals] = static_cast<int32_t>(total(all.subnormals) - zeros);
  stats.counts[kUnderflowed] = static_cast<int32_t>(total(all.underflowed) - zeros);
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
