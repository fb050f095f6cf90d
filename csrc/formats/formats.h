// Contract of formats, shared by host and device, and the one codec of 1-6-9 and 0-6-10: every
// kernel that keeps numbers in these formats includes this file. No torch here.
//
//   1-6-9   sign in bit 15, exponent in bits 14-9, mantissa in bits 8-0   Adam mean, PowerSGD
//   0-6-10  exponent in bits 15-10, mantissa in bits 9-0                  Adam variance
//
// Both: value 2^(e - 60) (1 + m / 2^bits), so 2^-60 to just under 16; no subnormals, infinities or
// NaN, no reserved exponent; code 0 is zero (2^-60 itself has no code), and -0 is code 0 too.
// Encoding rounds to nearest, ties away from zero, or stochastically; magnitudes below 2^-60 become
// zero without rounding up, those above the largest value (infinities as well) that value; 0-6-10
// turns negative numbers into zero. NaN becomes zero. (Definition: paper section 2.4; bias and
// rounding: the storage types of blocksparse, except for its NaN, which became the maximum.)
#pragma once

#include "common/element.h"
#include "common/philox.h"

namespace dalle {

enum class Format : int { k169, k0610 };

struct PackArgs {
  const void* x;        // (N) of the dtype
  const int64_t* seed;  // null: to nearest. Element e takes word e % 4 of Philox call e / 4.
  uint16_t* codes;      // (N)
  int64_t* counts;      // (kNumCounts) zeroed, or null
  int64_t numel;
  Format format;
  ElementKind dtype;
};

struct UnpackArgs {
  const uint16_t* codes;  // (N)
  void* x;                // (N) of the dtype
  int64_t numel;
  Format format;
  ElementKind dtype;
};

// The sum of R buffers of codes, in float from buffer 0 on, encoded again.
struct ReduceArgs {
  const uint16_t* codes;  // (R, N)
  const int64_t* seed;    // as in PackArgs
  uint16_t* sum;          // (N)
  int64_t* counts;        // as in PackArgs
  int64_t num_buffers, numel;
  Format format;
};

// What packing counts: finite numbers beyond the largest value; numbers other than zero whose code
// is zero (NaN apart); infinities and NaN.
enum FormatsCount : int { kSaturated, kFlushed, kNonfinite, kNumCounts };

template <Format kFormat>
struct FormatOf {
  static constexpr bool kSigned = kFormat == Format::k169;
  static constexpr int kMantissa = kSigned ? 9 : 10;
  static constexpr int kDropped = 23 - kMantissa;                    // bits of a float's mantissa
  static constexpr uint32_t kMin = 67u << 23;                        // 2^-60 as the bits of a float
  static constexpr uint32_t kMax = (131u << 23) - (1u << kDropped);  // the largest value
  static constexpr uint32_t kHalfUlp = 1u << (kDropped - 1);
};

// The code of the float with these bits. `added` is what rounding adds below the code's last bit:
// kHalfUlp for nearest, a uniform number of [0, 2 kHalfUlp) for stochastic. word_t is uint32_t or a
// vector of them.
template <Format kFormat, typename word_t>
DALLE_HOST_DEVICE word_t encode(word_t bits, word_t added) {
  using F = FormatOf<kFormat>;
  constexpr uint32_t kInfinity = 0x7F800000u;
  // From the least magnitude on. What is smaller wraps around, to beyond all numbers where NaN is;
  // and so do negative numbers where there is no sign.
  const word_t above = (F::kSigned ? bits & 0x7FFFFFFFu : bits) - F::kMin;
  const word_t range = word_t{} + (F::kMax - F::kMin);
  const word_t code = ((above < range ? above : range) + added) >> F::kDropped;
  const word_t kept = above <= kInfinity - F::kMin ? code : word_t{};
  if constexpr (F::kSigned) return kept != 0 ? kept | ((bits >> 16) & 0x8000u) : word_t{};
  return kept;
}

// The bits of the float that a code stands for; exact.
template <Format kFormat, typename word_t>
DALLE_HOST_DEVICE word_t decode(word_t code) {
  using F = FormatOf<kFormat>;
  const word_t magnitude = F::kSigned ? code & 0x7FFFu : code;
  const word_t bits = (magnitude << F::kDropped) + F::kMin;
  if constexpr (F::kSigned) return code != 0 ? bits | ((code & 0x8000u) << 16) : word_t{};
  return code != 0 ? bits : word_t{};
}

// What is added to a float before its code is cut off, of a random word: its upper bits.
template <Format kFormat, typename word_t>
DALLE_HOST_DEVICE word_t stochastic(word_t word) {
  return word >> (32 - FormatOf<kFormat>::kDropped);
}

}  // namespace dalle
