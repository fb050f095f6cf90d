// gumbel_softmax_cpu.h where the codebook axis is contiguous: lanes are neighbouring codes of one
// row.
//
// A chunk of codes stays in L1: its noisy logits and their maximum first, then exp2 and the sums,
// which are rescaled when the maximum rises. A last pass multiplies by what each chunk still lacks.
#pragma once

#include "gumbel_softmax/gumbel_softmax_vector.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t kRowChunk = 512;  // a multiple of 2 * kLanes
constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr float kInfinity = __builtin_inff();
constexpr double kLn2Double = 0.69314718055994530942;

// Products below the normal range are 0: a denormal would cost an assist on many processors.
inline Float without_denormals(Float v) { return (Float)((Int)v & (v >= kSmallestNormal)); }

// Words of the codes from k (a multiple of 4) to k + count - 1 of a row; returns where they begin.
inline const uint32_t* row_words(const PhiloxKeys& keys, uint64_t row_element, int64_t k,
                                 int64_t count, uint32_t* words) {
  const int64_t shift = static_cast<int64_t>(row_element % 4);
  const uint64_t call = (row_element + static_cast<uint64_t>(k)) / 4;
  for (int64_t i = 0; i < shift + count; i += 2 * kLanes) {
    random_words(keys, call + static_cast<uint64_t>(i) / 4, words + i);
  }
  return words + shift;
}

inline Int lane_numbers() {
  Int v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// Running softmax statistics of one row or, lane by lane, of kLanes rows.
struct Sums {
  Float noisy_max = splat(-kInfinity), logit_max = splat(-kInfinity);
  Float sample{}, plain{}, entropy{};  // sums of 2^x, of p and of p log2 p, relative to the maxima

  // New maxima: multiplies the sums by 2^(old - new).
  inline void raise(Float new_noisy_max, Float new_logit_max, float scale) {
    const Float limit = splat(-1.0e4f);  // the first time, and beyond any exponent
    sample *= exp2_of(maximum((noisy_max - new_noisy_max) * scale, limit));
    const Float drop = maximum((logit_max - new_logit_max) * kLog2E, limit);
    const Float factor = exp2_of(drop);
    entropy = factor * (entropy + drop * plain);
    plain *= factor;
    noisy_max = new_noisy_max;
    logit_max = new_logit_max;
  }

  // Takes over the sums of a part that is relative to the same maxima.
  inline void take(Sums& part) {
    sample += part.sample;
    plain += part.plain;
    entropy += part.entropy;
    part.sample = part.plain = part.entropy = Float{};
  }

  // Adds one vector; returns 2^((noisy - maximum) scale). Lanes outside of `valid` count nothing.
  template <bool kAllValid>
  inline Float add(Float noisy, Float logit, float scale, Int valid) {
    Float e = exp2_of((noisy - noisy_max) * scale);
    const Float t = maximum((logit - logit_max) * kLog2E, splat(-127.0f));
    Float p = exp2_of(t);
    if (!kAllValid) {
      e = (Float)((Int)e & valid);
      p = (Float)((Int)p & valid);
    }
    sample += e;
    plain += p;
    entropy += p * t;
    return e;
  }
};

// What forward keeps of one row; NaN where the row or tau is bad.
struct RowResult {
  float noisy_max, logit_max;
  double sample, plain, entropy;
  bool finite;

  inline void write(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args, int64_t row,
                    int64_t index, float scale) const {
    const double log2_sum = __builtin_log2(plain);
    const double kl =
        kLn2Double * (entropy / plain - log2_sum) + __builtin_log(static_cast<double>(p.num_codes));
    const float nan = __builtin_nanf("");
    args.index[row] = finite ? index : 0;
    args.kl[row] = finite ? static_cast<float>(kl) : nan;
    float* stats = args.stats + row;
    const int64_t stride = num_rows(p);
    stats[kNoisyMax * stride] = noisy_max;
    stats[kInverseSum * stride] = finite && scale == scale ? static_cast<float>(1.0 / sample) : nan;
    stats[kLogitMax * stride] = logit_max;
    stats[kLog2Sum * stride] = static_cast<float>(log2_sum);
  }
};

template <typename scalar_t>
void fill(scalar_t* p, int64_t count, float value) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_float(p + i, splat(value));
  if (i < count) store_some(p + i, count - i, splat(value));
}

inline float* as_float(float* p) { return p; }
inline float* as_float(Half*) { return nullptr; }
inline float* as_float(BFloat16*) { return nullptr; }

template <typename scalar_t>
void forward_row(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args,
                 const PhiloxKeys& keys, float scale, int64_t row, float* scratch) {
  const int64_t num_codes = p.num_codes;
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits) + row * num_codes;
  scalar_t* sample = static_cast<scalar_t*>(args.sample) + row * num_codes;
  float* chunk_max = scratch + num_codes;
  float* unscaled = as_float(sample) ? as_float(sample) : scratch;  // float samples wait in place
  const bool keep = !args.hard;
  const Int lanes = lane_numbers();

  Sums sums;
  Float bad{};
  float best = -kInfinity;
  int64_t index = 0;
  for (int64_t begin = 0; begin < num_codes; begin += kRowChunk) {
    const int64_t count = num_codes - begin < kRowChunk ? num_codes - begin : kRowChunk;
    const int64_t whole = count / kLanes * kLanes, rest = count - whole;
    const Int valid = lanes < static_cast<int32_t>(rest);
    uint32_t words[kRowChunk + 4 * kLanes];
    float noisy[kRowChunk];
    const uint32_t* word =
        row_words(keys, static_cast<uint64_t>(row * num_codes), begin, count, words);
    const scalar_t* l = logits + begin;

    Float noisy_max = splat(-kInfinity), logit_max = splat(-kInfinity), last{};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Float logit = load_float(l + i), n = add_gumbel(logit, load<Word>(word + i));
      bad += logit * 0.0f;
      noisy_max = maximum(noisy_max, n);
      logit_max = maximum(logit_max, logit);
      store(noisy + i, n);
    }
    if (rest) {
      last = load_some(l + whole, rest, 0.0f);
      last = select(valid, last, splat(last[0]));
      const Float n = select(valid, add_gumbel(last, load<Word>(word + whole)), splat(-kInfinity));
      bad += last * 0.0f;
      noisy_max = maximum(noisy_max, n);
      logit_max = maximum(logit_max, last);
      store(noisy + whole, n);
    }

    const float highest = maximum(noisy_max);
    if (highest > best) {
      Int first = splat(static_cast<int32_t>(kRowChunk)), k = lanes;
      for (int64_t i = 0; i < count; i += kLanes, k += kLanes) {
        const Int found = load<Float>(noisy + i) == highest ? k : first;
        first = found < first ? found : first;
      }
      int32_t lowest = first[0];
      for (int i = 1; i < kLanes; ++i) lowest = first[i] < lowest ? first[i] : lowest;
      index = begin + lowest;
      best = highest;
    }
    sums.raise(splat(best), splat(maximum(maximum(sums.logit_max, logit_max))), scale);
    chunk_max[begin / kRowChunk] = best;

    float* out = unscaled + begin;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Float e = sums.add<true>(load<Float>(noisy + i), load_float(l + i), scale, valid);
      if (keep) store(out + i, e);
    }
    if (rest) {
      const Float e = sums.add<false>(load<Float>(noisy + whole), last, scale, valid);
      if (keep) store_some(out + whole, rest, e);
    }
  }

  const float unfit = sum(bad);
  const RowResult result{
      best, sums.logit_max[0], sum(sums.sample), sum(sums.plain), sum(sums.entropy), unfit == 0.0f};
  result.write(p, args, row, index, scale);
  if (!result.finite || scale != scale) return fill(sample, num_codes, __builtin_nanf(""));
  if (args.hard) {
    fill(sample, num_codes, 0.0f);
    return store_some(sample + index, 1, splat(1.0f));
  }
  for (int64_t begin = 0; begin < num_codes; begin += kRowChunk) {
    const int64_t end = num_codes - begin < kRowChunk ? num_codes : begin + kRowChunk;
    const Float factor = exp2_of(splat((chunk_max[begin / kRowChunk] - best) * scale)) *
                         static_cast<float>(1.0 / result.sample);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      store_float(sample + i, without_denormals(load<Float>(unscaled + i) * factor));
    }
    if (i < end) {
      const Float e = load_some(unscaled + i, end - i, 0.0f);
      store_some(sample + i, end - i, without_denormals(e * factor));
    }
  }
}

// The two terms of the gradient, for one vector.
struct Gradient {
  Float inverse_tau{}, dot{};                            // of the sample
  Float grad_kl{}, logit_max{}, log2_sum{}, constant{};  // of the KL term

  inline Float of_sample(Float y, Float grad) const { return y * ((grad - dot) * inverse_tau); }
  inline Float of_kl(Float logit) const {
    const Float t = maximum((logit - logit_max) * kLog2E - log2_sum, splat(-127.0f));
    return grad_kl * (exp2_of(t) * (t * kLn2 + constant));
  }
};

template <typename scalar_t>
void backward_row(const GumbelSoftmaxParams& p, const GumbelSoftmaxBackward& args,
                  const PhiloxKeys& keys, float scale, int64_t row, float* scratch) {
  const int64_t num_codes = p.num_codes, stride = num_rows(p);
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits) + row * num_codes;
  const scalar_t* grads = static_cast<const scalar_t*>(args.grad_sample);
  scalar_t* out = static_cast<scalar_t*>(args.grad_logits) + row * num_codes;
  const float* stats = args.stats + row;
  Gradient gradient;
  if (grads) {
    grads += row * num_codes;
    const Float noisy_max = splat(stats[kNoisyMax * stride]);
    const Float inverse_sum = splat(stats[kInverseSum * stride]);
    const auto sample_of = [&](Float logit, Word word) {
      const Float e = exp2_of((add_gumbel(logit, word) - noisy_max) * scale);
      return e * inverse_sum;
    };
    Float dot{};
    for (int64_t begin = 0; begin < num_codes; begin += kRowChunk) {
      const int64_t count = num_codes - begin < kRowChunk ? num_codes - begin : kRowChunk;
      const int64_t whole = count / kLanes * kLanes, rest = count - whole;
      uint32_t words[kRowChunk + 4 * kLanes];
      const uint32_t* word =
          row_words(keys, static_cast<uint64_t>(row * num_codes), begin, count, words);
      for (int64_t i = 0; i < whole; i += kLanes) {
        const Float y = sample_of(load_float(logits + begin + i), load<Word>(word + i));
        dot += y * load_float(grads + begin + i);
        store(scratch + begin + i, y);
      }
      if (rest) {
        const int64_t k = begin + whole;
        const Float y = sample_of(load_some(logits + k, rest, 0.0f), load<Word>(word + whole));
        const Float grad = load_some(grads + k, rest, 0.0f);
        dot += select(lane_numbers() < static_cast<int32_t>(rest), y * grad, Float{});
        store_some(scratch + k, rest, y);
      }
    }
    gradient.dot = splat(sum(dot));
    gradient.inverse_tau = splat(scale * kLn2);
  }
  if (args.grad_kl) {
    gradient.grad_kl = splat(args.grad_kl[row]);
    gradient.logit_max = splat(stats[kLogitMax * stride]);
    gradient.log2_sum = splat(stats[kLog2Sum * stride]);
    gradient.constant =
        splat(static_cast<float>(__builtin_log(static_cast<double>(num_codes))) - args.kl[row]);
  }
  for (int64_t k = 0; k < num_codes; k += kLanes) {
    const int64_t rest = num_codes - k;
    const bool whole = rest >= kLanes;
    Float grad{};
    if (grads) {
      const Float y = whole ? load<Float>(scratch + k) : load_some(scratch + k, rest, 0.0f);
      grad =
          gradient.of_sample(y, whole ? load_float(grads + k) : load_some(grads + k, rest, 0.0f));
    }
    if (args.grad_kl) {
      grad += gradient.of_kl(whole ? load_float(logits + k) : load_some(logits + k, rest, 0.0f));
    }
    whole ? store_float(out + k, grad) : store_some(out + k, rest, grad);
  }
}

}  // namespace
}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle
