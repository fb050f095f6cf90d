// From strided rows of any storage type to packed panels of the accumulation type, and back.
// Included by sparse_attention_cpu.h only.
#pragma once

#include <utility>

#include "sparse_attention/sparse_attention_cpu_vector.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return same_bits<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // The exponent moves from bias 15 to bias 127; a product with 2^112 also normalises subnormals.
  const uint32_t finite = same_bits<uint32_t>(same_bits<float>(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return same_bits<float>(bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// All narrowing rounds to nearest, ties to even; NaN stays NaN.
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {
  const uint32_t bits = same_bits<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits =
      static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}
inline void narrow(float x, Half* to) {
  const uint32_t bits = same_bits<uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 adding 0.5 leaves the rounded subnormal in the low bits of the sum.
  const uint32_t small = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? small : normal;
  to->bits = static_cast<uint16_t>(sign | (magnitude >= (143u << 23) ? infinite : finite));
}

// Head sizes are padded to whole vectors, with zeros.
template <typename acc_t>
inline int padded_size(int head_size) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  return (head_size + kWidth - 1) / kWidth * kWidth;
}

// Where one head of a tensor starts.
template <typename storage_t>
inline storage_t* head_of(const AttentionRows& rows, int64_t batch_head, int heads) {
  return static_cast<storage_t*>(rows.data) + batch_head / heads * rows.batch +
         batch_head % heads * rows.head;
}

// The places of the walk that strip or panel `strip` covers: 32, fewer at the end of the stream.
inline int places_of(int strip, int length) {
  return length - strip * kTile < kTile ? length - strip * kTile : kTile;
}

// to[32][padded] = the rows at `position`, zero beyond `count` rows and beyond head_size.
template <typename storage_t, typename acc_t>
inline void gather_rows(const storage_t* from, int64_t stride, const int32_t* position, int count,
                        int head_size, int padded, acc_t* to) {
  for (int r = 0; r < kTile; ++r, to += padded) {
    const int size = r < count ? head_size : 0;
    const storage_t* row = r < count ? from + position[r] * stride : from;
    for (int d = 0; d < size; ++d) to[d] = widen(row[d]);
    for (int d = size; d < padded; ++d) to[d] = 0;
  }
}

// to[32][padded] = the rows of strip or panel `strip` of one head of q, k, v, out or grad_out.
template <typename storage_t, typename acc_t>
inline void gather_strip(const SparseAttentionParams& p, const AttentionTileView& view,
                         const AttentionRows& rows, int64_t batch_head, int strip, int padded,
                         acc_t* to) {
  gather_rows(head_of<const storage_t>(rows, batch_head, p.heads), rows.row,
              view.position + strip * kTile, places_of(strip, p.length), p.head_size, padded, to);
}

// The rows at `position` = factor * from[32][padded].
template <typename storage_t, typename acc_t>
inline void scatter_rows(const acc_t* from, acc_t factor, int padded, const int32_t* position,
                         int count, int head_size, storage_t* to, int64_t stride) {
  for (int r = 0; r < count; ++r, from += padded) {
    storage_t* row = to + position[r] * stride;
    for (int d = 0; d < head_size; ++d) narrow(factor * from[d], row + d);
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

// to[padded][32] = factor * transpose of from[32][padded].
template <typename acc_t>
inline void transpose_panel(const acc_t* from, acc_t factor, int padded, acc_t* to) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  for (int d = 0; d < padded; d += kWidth) {
    for (int r = 0; r < kTile; r += kWidth) {
      Vec<acc_t> rows[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) rows[i] = load<acc_t>(from + (r + i) * padded + d) * factor;
      exchange_all<acc_t, kWidth / 2>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store<acc_t>(to + (d + i) * kTile + r, rows[i]);
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

// Calls body(storage_t{}, acc_t{}) for the types of the tensors.
template <typename Body>
inline void for_type(AttentionType type, const Body& body) {
  if (type == AttentionType::kFloat) body(float{}, float{});
  if (type == AttentionType::kDouble) body(double{}, double{});
  if (type == AttentionType::kHalf) body(Half{}, float{});
  if (type == AttentionType::kBFloat16) body(BFloat16{}, float{});
}

// Bytes that the pieces of a workspace take, ForwardSpace or BackwardSpace.
template <template <typename> class Space>
inline size_t bytes_of(const SparseAttentionParams& p, const AttentionTileView& view) {
  Carver carver{nullptr};
  for_type(p.type, [&](auto, auto acc) {
    using acc_t = decltype(acc);
    Space<acc_t>(carver, view.num_strips, padded_size<acc_t>(p.head_size));
  });
  return carver.used;
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
