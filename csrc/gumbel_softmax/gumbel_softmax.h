// Contract of gumbel_softmax, shared by host and device. No torch here.
//
//   outer, K, inner   logits are (outer, K, inner), contiguous; softmax runs over K
//   row               outer_idx * inner + inner_idx, in [0, R)
//   element           (first_row + row) * K + k, whatever the layout: which random word it gets
//
//   noisy             l - log E, E = -log u, u = (word + 1/2) 2^-32; in float, not rounded
//
//   y                 softmax of noisy / tau, p = softmax(l), kl = sum p ln p + ln K
//
//   stats             (4, R) float, what backward needs besides logits and seed: see below
//
// A row with a logit that is not finite gets sample and kl NaN and index 0.
#pragma once

#include "common/element.h"
#include "common/philox.h"

namespace dalle {

struct GumbelSoftmaxParams {
  int64_t outer, num_codes, inner;
  ElementKind dtype;  // of logits, sample and their gradients
  int64_t first_row;  // rows of a larger batch before these
};

// Rows of stats: maximum of noisy; 1 / sum exp((noisy - maximum) / tau); maximum of l; the
// logarithm to base 2 of sum exp(l - maximum).
enum GumbelSoftmaxStat : int { kNoisyMax, kInverseSum, kLogitMax, kLog2Sum, kNumStats };

struct GumbelSoftmaxForward {
  const void* logits;
  const double* tau;
  const int64_t* seed;
  void* sample;
  int64_t* index;
  float* kl;
  float* stats;
  bool hard;  // sample is the one-hot vector of index
};

struct GumbelSoftmaxBackward {
  const void* grad_sample;  // or null
  const float* grad_kl;     // or null
  const void* logits;
  const double* tau;
  const int64_t* seed;
  const float* kl;
  const float* stats;
  void* grad_logits;
};

DALLE_HOST_DEVICE int64_t num_rows(const GumbelSoftmaxParams& p) { return p.outer * p.inner; }

// Element number of code 0 of a row.
DALLE_HOST_DEVICE uint64_t element_of(const GumbelSoftmaxParams& p, int64_t row) {
  return static_cast<uint64_t>((p.first_row + row) * p.num_codes);
}

// Offset of (row, k) in memory, in elements.
DALLE_HOST_DEVICE int64_t offset_of(const GumbelSoftmaxParams& p, int64_t row, int64_t k) {
  const int64_t outer_idx = row / p.inner, inner_idx = row - outer_idx * p.inner;
  return (outer_idx * p.num_codes + k) * p.inner + inner_idx;
}

// Above this word, u is so near 1 that its float would lose the digits of 1 - u: 2^32 / sqrt(2).
inline constexpr uint32_t kNearOne = 0xB504F334u;

inline constexpr float kLog2EFloat = static_cast<float>(kLog2E);
inline constexpr float kLn2Float = static_cast<float>(kLn2);

// log2(e) / tau as the factor of exponents to base 2; finite, or NaN where tau is not positive.
DALLE_HOST_DEVICE float exponent_scale(double tau) {
  if (!(tau > 0.0)) return __builtin_nanf("");
  const double scale = kLog2E / tau;
  return scale < 3.0e38 ? static_cast<float>(scale) : 3.0e38f;
}

}  // namespace dalle
