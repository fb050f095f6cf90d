// Contract of adam16, shared by host and device: AdamW whose mean is kept in 1-6-9 and whose
// variance in 0-6-10 (paper, sections 2.4, 2.5 and appendix D). No torch here.
//
// One row of the table is one parameter. Arithmetic is in float; the update takes mean and variance
// before they are rounded to be stored. Every processor and device must compute the same bits, so
// that the replicas of a model stay equal: this op is compiled without contraction to fused
// products, and calls no function of a library whose last bit is not laid down.
//
// The moments are rounded stochastically. To nearest, a moment that an update changes by less than
// half a unit in the last place would stay where it is: the variance at 14 % too little for beta2 =
// .999 and constant gradients, at 4.2 times too much after gradients have fallen tenfold.
#pragma once

#include <cmath>

#include "common/stochastic.h"
#include "common/tensor_table.h"
#include "formats/formats.h"

namespace dalle {

// Columns of the table. Mean and variance are codes, or floats (both); the step is one int64, the
// number of updates so far.
enum AdamColumn : int { kParam, kGrad, kMean, kVariance, kStep };

struct AdamArgs {
  TensorTable table;
  const float* scales;       // by group: the gradient is this many times too large; or null
  const float* clip_factor;  // (1) factor of all gradients, or null
  const float* skip;         // (1) not zero: nothing changes; or null
  const float* lr_pointer;   // (1) in place of lr, or null
  const int64_t* seed;       // (1) of stochastic rounding
  bool stochastic;           // whether 16-bit parameters are rounded so too
  double lr, beta1, beta2, eps, weight_decay, variance_clip;
};

DALLE_HOST_DEVICE bool skipped(const AdamArgs& args) {
  return args.skip != nullptr && *args.skip != 0.0f;
}

// What the elements of one chunk have in common.
struct AdamFactors {
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float grad_factor;               // clip_factor / scale
  float decay;                     // 1 - lr * weight_decay
  float step_size;                 // lr / (1 - beta1^t)
  float inverse_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
  float eps, variance_max;
  uint64_t seed;    // of the parameters
  uint32_t offset;  // of the moments
};

// base^n from products alone.
DALLE_HOST_DEVICE double power(double base, int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1, base *= base) {
    if (n & 1) result *= base;
  }
  return result;
}

// Random words of the moments: ten rounds of Philox for every four elements cost half as much as
// the update itself, so that Philox gives one word a chunk and update, and a multiplicative hash
// spreads it. For every element that is a bijection: its draws are uniform, and independent from
// update to update.
DALLE_HOST_DEVICE uint32_t moments_offset(uint64_t seed, int64_t chunk) {
  return philox_subsequence(static_cast<uint64_t>(chunk), seed ^ 0xD1B54A32D192ED03u).word[0];
}

// The random word of element i of a chunk, hashed from term i of a Weyl sequence, offset + i *
// kWeylIncrement. Its high bits are mixed best: 13 round the variance, the next 14 the mean.
inline constexpr uint32_t kWeylIncrement = 0x9E3779B9u;
template <typename word_t>
DALLE_HOST_DEVICE word_t moments_word(word_t weyl) {
  return (weyl ^ (weyl >> 15)) * 0x846CA68Bu;
}

DALLE_HOST_DEVICE AdamFactors adam_factors(const AdamArgs& args, const TableRow& row,
                                           int64_t chunk) {
  const double lr = args.lr_pointer != nullptr ? static_cast<double>(*args.lr_pointer) : args.lr;
  const int64_t t = *data_of<const int64_t>(row, kStep) + 1;
  const double correction1 = 1.0 - power(args.beta1, t), correction2 = 1.0 - power(args.beta2, t);
  const double clip = args.clip_factor != nullptr ? static_cast<double>(*args.clip_factor) : 1.0;
  const double scale = args.scales != nullptr ? static_cast<double>(args.scales[row.group]) : 1.0;
  AdamFactors f;
  f.beta1 = static_cast<float>(args.beta1);
  f.one_minus_beta1 = static_cast<float>(1.0 - args.beta1);
  f.beta2 = static_cast<float>(args.beta2);
  f.one_minus_beta2 = static_cast<float>(1.0 - args.beta2);
  f.grad_factor = static_cast<float>(clip / scale);
  f.decay = static_cast<float>(1.0 - lr * args.weight_decay);
  f.step_size = static_cast<float>(lr / correction1);
  f.inverse_sqrt_correction2 = static_cast<float>(1.0 / sqrt(correction2));
  f.eps = static_cast<float>(args.eps);
  f.variance_max = static_cast<float>(args.variance_clip);
  constexpr float kMaxCode = 16.0f - 0x1p-7f;  // of 0-6-10
  if (kind_of(row, kVariance) == ElementKind::kShort && f.variance_max > kMaxCode) {
    f.variance_max = kMaxCode;
  }
  f.seed = static_cast<uint64_t>(*args.seed) + static_cast<uint64_t>(t) * 0x9E3779B97F4A7C15u;
  f.offset = moments_offset(f.seed, chunk);
  return f;
}

// Philox call of the first element of a chunk; chunks are numbered through the table, so no two
// elements of it share a word.
DALLE_HOST_DEVICE uint64_t first_call(int64_t chunk) {
  return static_cast<uint64_t>(chunk) * (kTableChunk / 4);
}

// What is added below the last bit of a mean's code.
template <typename word_t>
DALLE_HOST_DEVICE word_t mean_bits(word_t random) {
  return (random >> 5) & (2 * FormatOf<Format::k169>::kHalfUlp - 1);
}
template <typename word_t>
DALLE_HOST_DEVICE word_t mean_code(word_t bits, word_t random) {
  return encode<Format::k169>(bits, mean_bits(random));
}

// A variance v below code 1, which is 2^-60 (1 + 2^-10), becomes code 1 with probability v / code
// 1, else zero, so that its mean is right. In 30 bits that probability is v * kProbabilityScale.
inline constexpr uint32_t kCode1 = FormatOf<Format::k0610>::kMin + (1u << 13);
inline constexpr float kProbabilityScale = 0x1p90f / (1.0f + 0x1p-10f);

// The code of a variance, 0 or more.
template <typename word_t>
DALLE_HOST_DEVICE word_t variance_code(word_t bits, word_t probability, word_t random) {
  const word_t code = encode<Format::k0610>(bits, stochastic<Format::k0610>(random));
  const word_t kept = (random >> 2) < probability ? word_t{} + 1 : word_t{};
  return bits < kCode1 ? kept : code;
}

// Whether a magnitude lies between code 1 and the largest value, as nearly all do. There is then
// nothing to clamp, to flush or to filter.
template <Format kFormat, typename word_t>
DALLE_HOST_DEVICE word_t beyond_codes(word_t magnitude) {
  using F = FormatOf<kFormat>;
  constexpr uint32_t kLow = F::kMin + (1u << F::kDropped);
  return word_t(magnitude - kLow > F::kMax - kLow);
}
template <Format kFormat, typename word_t>
DALLE_HOST_DEVICE word_t magnitude_code(word_t magnitude, word_t added) {
  return (magnitude - FormatOf<kFormat>::kMin + added) >> FormatOf<kFormat>::kDropped;
}

}  // namespace dalle
