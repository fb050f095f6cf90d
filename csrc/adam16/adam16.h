// Contract of adam16, shared by host and device: AdamW whose mean is kept in 1-6-9 and whose
// variance in 0-6-10 (paper, sections 2.4, 2.5 and appendix D). No torch here.
//
// One row of the table is one parameter. Arithmetic is in float; the update takes mean and variance
// before they are rounded to be kept.
#pragma once

#include <cmath>

#include "common/stochastic.h"
#include "common/tensor_table.h"
#include "formats/formats.h"

namespace dalle {

// Columns of the table. Mean and variance are codes, or floats (both); the step is one float, the
// number of updates so far.
enum AdamColumn : int { kParam, kGrad, kMean, kVariance, kStep };

struct AdamArgs {
  TensorTable table;
  const float* scales;       // by group: the gradient is this many times too large; or null
  const float* clip_factor;  // (1) factor of all gradients, or null
  const float* skip;         // (1) not zero: nothing changes; or null
  const float* lr_pointer;   // (1) in place of lr, or null
  const int64_t* seed;       // (1) stochastic rounding of all that is kept in 16 bits, or null
  double lr, beta1, beta2, eps, weight_decay, variance_clip;
};

DALLE_HOST_DEVICE bool skipped(const AdamArgs& args) {
  return args.skip != nullptr && *args.skip != 0.0f;
}

// What the elements of one row have in common.
struct AdamFactors {
  float keep_mean, add_mean;          // beta1, 1 - beta1
  float keep_variance, add_variance;  // beta2, 1 - beta2
  float grad, decay, step_size, root, eps, most;
  uint64_t seed;  // of mean and variance; parameters take its complement
};

DALLE_HOST_DEVICE AdamFactors adam_factors(const AdamArgs& args, const TableRow& row) {
  const double lr = args.lr_pointer != nullptr ? static_cast<double>(*args.lr_pointer) : args.lr;
  const double t = static_cast<double>(*data_of<const float>(row, kStep)) + 1.0;
  const double correction1 = 1.0 - pow(args.beta1, t), correction2 = 1.0 - pow(args.beta2, t);
  const double clip = args.clip_factor != nullptr ? static_cast<double>(*args.clip_factor) : 1.0;
  const double scale = args.scales != nullptr ? static_cast<double>(args.scales[row.group]) : 1.0;
  AdamFactors f;
  f.keep_mean = static_cast<float>(args.beta1);
  f.add_mean = static_cast<float>(1.0 - args.beta1);
  f.keep_variance = static_cast<float>(args.beta2);
  f.add_variance = static_cast<float>(1.0 - args.beta2);
  f.grad = static_cast<float>(clip / scale);
  f.decay = static_cast<float>(1.0 - lr * args.weight_decay);
  f.step_size = static_cast<float>(lr / correction1);
  f.root = static_cast<float>(1.0 / sqrt(correction2));
  f.eps = static_cast<float>(args.eps);
  f.most = static_cast<float>(args.variance_clip);
  f.seed = args.seed == nullptr
               ? 0
               : static_cast<uint64_t>(*args.seed) + static_cast<uint64_t>(t) * 0x9E3779B97F4A7C15u;
  return f;
}

// Philox call of the first element of a chunk; chunks are numbered through the table, so no two
// elements of it share a word.
DALLE_HOST_DEVICE uint64_t first_call(int64_t chunk) {
  return static_cast<uint64_t>(chunk) * (kTableChunk / 4);
}

// A word rounds both moments: its upper 14 bits the mean, the next 13 the variance.
template <typename word_t>
DALLE_HOST_DEVICE word_t mean_bits(word_t word) {
  return stochastic<Format::k169>(word);
}
template <typename word_t>
DALLE_HOST_DEVICE word_t variance_bits(word_t word) {
  return stochastic<Format::k0610>(word << 14);
}

}  // namespace dalle
