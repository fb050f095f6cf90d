// gumbel_softmax_cpu.h where the codebook axis is contiguous: lanes are neighbours of one row.
//
// A chunk of codes stays in L1: its noisy logits and their maximum first, then exp2 and the sums,
// which are rescaled when the maximum rises. A last pass rescales each chunk to the row's maximum.
#pragma once

#include "gumbel_softmax/gumbel_softmax_vector.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t kRowChunk = 512;  // a multiple of 2 * kLanes
constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr float kInfinity = __builtin_inff();

// Sets values below the normal range to 0: a denormal is slow on many processors.
inline Float without_denormals(Float v) { return (Float)((Int)v & (v >= kSmallestNormal)); }

// Words of the codes from k (a multiple of 4) to k + count - 1 of a row; returns where they begin.
inline const uint32_t* row_words(const PhiloxKeys& keys, uint64_t row_element, int64_t k,
                                 int64_t count, uint32_t* words) {
  const int64_t shift = static_cast<int64_t>(row_element % 4);
  const uint64_t call = (row_element + static_cast<uint64_t>(k)) / 4;
  int64_t i = 0;
  for (; i + 2 * kLanes * kMany <= shift + count; i += 2 * kLanes * kMany) {
    random_words<kMany>(keys, call + static_cast<uint64_t>(i) / 4, words + i);
  }
  for (; i < shift + count; i += 2 * kLanes) {
    random_words(keys, call + static_cast<uint64_t>(i) / 4, words + i);
  }
  return words + shift;
}

template <int kN, typename scalar_t>
inline void load_many(const scalar_t* p, Float (&v)[kN]) {
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) v[j] = widen(p + j * kLanes);
}

template <int kN>
inline void add_noise(const Float (&logit)[kN], const uint32_t* words, Float (&noisy)[kN]) {
  Word word[kN];
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) word[j] = load(words + j * kLanes);
  add_gumbel<kN>(logit, word, noisy);
}

inline Int lane_numbers() {
  Int v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// Running softmax statistics of one row or, lane by lane, of kLanes rows.
struct Sums {
  Float noisy_max = splat(-kInfinity), logit_max = splat(-kInfinity);
  Float noisy_sum{};             // of exp((noisy - noisy_max) / tau)
  Float logit_sum{}, entropy{};  // of p = exp(logit - logit_max), and of p log2 p

  // Takes new maxima: multiplies the sums by 2^(old - new).
  inline void rescale(Float new_noisy_max, Float new_logit_max, float scale) {
    const Float limit = splat(-1.0e4f);  // the first time, and beyond any exponent
    noisy_sum *= exp2_of<float>(maximum((noisy_max - new_noisy_max) * scale, limit));
    const Float drop = maximum((logit_max - new_logit_max) * kLog2EFloat, limit);
    const Float factor = exp2_of<float>(drop);
    entropy = factor * (entropy + drop * logit_sum);
    logit_sum *= factor;
    noisy_max = new_noisy_max;
    logit_max = new_logit_max;
  }

  // Adds the sums of a part with the same maxima, and clears the part.
  inline void merge(Sums& part) {
    noisy_sum += part.noisy_sum;
    logit_sum += part.logit_sum;
    entropy += part.entropy;
    part.noisy_sum = part.logit_sum = part.entropy = Float{};
  }

  // Adds kN vectors, of which the lanes of `valid` count; noisy becomes 2^((noisy - max) scale).
  template <bool kAllValid, int kN>
  inline void add(Float (&noisy)[kN], const Float (&logit)[kN], float scale, Int valid) {
    Float t[kN], p[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      noisy[j] = (noisy[j] - noisy_max) * scale;
      t[j] = p[j] = maximum((logit[j] - logit_max) * kLog2EFloat, splat(-127.0f));
    }
    exp2_of<float>(noisy);
    exp2_of<float>(p);
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      if (!kAllValid) {
        noisy[j] = (Float)((Int)noisy[j] & valid);
        p[j] = (Float)((Int)p[j] & valid);
      }
      noisy_sum += noisy[j];
      logit_sum += p[j];
      entropy += p[j] * t[j];
    }
  }
};

// What forward writes of one row; NaN where a logit is not finite or tau is not positive.
struct RowResult {
  float noisy_max, logit_max;
  double noisy_sum, logit_sum, entropy;
  bool finite;

  inline void write(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args, int64_t row,
                    int64_t index, float scale) const {
    const double log2_sum = __builtin_log2(logit_sum);
    const double kl =
        kLn2 * (entropy / logit_sum - log2_sum) + __builtin_log(static_cast<double>(p.num_codes));
    const float nan = __builtin_nanf("");
    args.index[row] = finite ? index : 0;
    args.kl[row] = finite ? static_cast<float>(kl) : nan;
    float* stats = args.stats + row;
    const int64_t stride = num_rows(p);
    stats[kNoisyMax * stride] = noisy_max;
    stats[kInverseSum * stride] =
        finite && scale == scale ? static_cast<float>(1.0 / noisy_sum) : nan;
    stats[kLogitMax * stride] = logit_max;
    stats[kLog2Sum * stride] = static_cast<float>(log2_sum);
  }
};

template <typename scalar_t>
void fill(scalar_t* p, int64_t count, float value) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) narrow(p + i, splat(value));
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
  float* unscaled = as_float(sample) ? as_float(sample) : scratch;  // float samples: in place
  const bool soft = !args.hard;
  const Int lanes = lane_numbers();

  Sums sums;
  Float nonfinite{};
  float row_max = -kInfinity;
  int64_t index = 0;
  for (int64_t begin = 0; begin < num_codes; begin += kRowChunk) {
    const int64_t count = num_codes - begin < kRowChunk ? num_codes - begin : kRowChunk;
    const int64_t full = count / kLanes * kLanes, rest = count - full;
    const Int valid = lanes < static_cast<int32_t>(rest);
    uint32_t words[kRowChunk + 4 * kLanes];
    float noisy[kRowChunk];
    const uint32_t* word = row_words(keys, element_of(p, row), begin, count, words);
    const scalar_t* chunk_logits = logits + begin;

    Float noisy_max = splat(-kInfinity), logit_max = splat(-kInfinity), last{};
    for_vectors(full, [&](auto many, int64_t i) {
      constexpr int kN = many.kCount;
      Float logit[kN], n[kN];
      load_many<kN>(chunk_logits + i, logit);
      add_noise<kN>(logit, word + i, n);
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) {
        nonfinite += logit[j] * 0.0f;
        noisy_max = maximum(noisy_max, n[j]);
        logit_max = maximum(logit_max, logit[j]);
        store(noisy + i + j * kLanes, n[j]);
      }
    });
    if (rest) {
      last = load_some(chunk_logits + full, rest, 0.0f);
      last = select(valid, last, splat(last[0]));
      const Float n = select(valid, add_gumbel(last, load(word + full)), splat(-kInfinity));
      nonfinite += last * 0.0f;
      noisy_max = maximum(noisy_max, n);
      logit_max = maximum(logit_max, last);
      store(noisy + full, n);
    }

    const float new_max = max_of<float>(noisy_max);
    if (new_max > row_max) {
      Int first = splat(static_cast<int32_t>(kRowChunk)), k = lanes;
      for (int64_t i = 0; i < count; i += kLanes, k += kLanes) {
        const Int candidate = load(noisy + i) == new_max ? k : first;
        first = candidate < first ? candidate : first;
      }
      int32_t lowest = first[0];
      for (int i = 1; i < kLanes; ++i) lowest = first[i] < lowest ? first[i] : lowest;
      index = begin + lowest;
      row_max = new_max;
    }
    sums.rescale(splat(row_max), splat(max_of<float>(maximum(sums.logit_max, logit_max))), scale);
    chunk_max[begin / kRowChunk] = row_max;

    float* out = unscaled + begin;
    for_vectors(full, [&](auto many, int64_t i) {
      constexpr int kN = many.kCount;
      Float logit[kN], e[kN];
      load_many<kN>(chunk_logits + i, logit);
      load_many<kN>(noisy + i, e);
      sums.add<true, kN>(e, logit, scale, valid);
      if (!soft) return;
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) store(out + i + j * kLanes, e[j]);
    });
    if (rest) {
      Float e[] = {load(noisy + full)};
      sums.add<false, 1>(e, {last}, scale, valid);
      if (soft) store_some(out + full, rest, e[0]);
    }
  }

  const float nonfinite_sum = sum_of<float>(nonfinite);
  const RowResult result{row_max,
                         sums.logit_max[0],
                         sum_of<float>(sums.noisy_sum),
                         sum_of<float>(sums.logit_sum),
                         sum_of<float>(sums.entropy),
                         nonfinite_sum == 0.0f};
  result.write(p, args, row, index, scale);
  if (!result.finite || scale != scale) return fill(sample, num_codes, __builtin_nanf(""));
  if (args.hard) {
    fill(sample, num_codes, 0.0f);
    return store_some(sample + index, 1, splat(1.0f));
  }
  for (int64_t begin = 0; begin < num_codes; begin += kRowChunk) {
    const int64_t end = num_codes - begin < kRowChunk ? num_codes : begin + kRowChunk;
    const Float factor = exp2_of<float>(splat((chunk_max[begin / kRowChunk] - row_max) * scale)) *
                         static_cast<float>(1.0 / result.noisy_sum);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      narrow(sample + i, without_denormals(load(unscaled + i) * factor));
    }
    if (i < end) {
      const Float e = load_some(unscaled + i, end - i, 0.0f);
      store_some(sample + i, end - i, without_denormals(e * factor));
    }
  }
}

// The two terms of the gradient.
struct Gradient {
  Float inverse_tau{}, dot{};                            // of the sample
  Float grad_kl{}, logit_max{}, log2_sum{}, constant{};  // of the KL term

  inline Float of_sample(Float y, Float grad) const { return y * ((grad - dot) * inverse_tau); }

  // grad += the KL term.
  template <int kN>
  inline void add_kl(const Float (&logit)[kN], Float (&grad)[kN]) const {
    Float t[kN], p[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      t[j] = p[j] = maximum((logit[j] - logit_max) * kLog2EFloat - log2_sum, splat(-127.0f));
    }
    exp2_of<float>(p);
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) grad[j] += grad_kl * (p[j] * (t[j] * kLn2Float + constant));
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
    Float dot{};
    for (int64_t begin = 0; begin < num_codes; begin += kRowChunk) {
      const int64_t count = num_codes - begin < kRowChunk ? num_codes - begin : kRowChunk;
      const int64_t full = count / kLanes * kLanes, rest = count - full;
      uint32_t words[kRowChunk + 4 * kLanes];
      const uint32_t* word = row_words(keys, element_of(p, row), begin, count, words);
      const auto sample_of = [&](auto many, const auto& logit, const uint32_t* from, auto& y) {
        constexpr int kN = many.kCount;
        add_noise<kN>(logit, from, y);
#pragma GCC unroll 4
        for (int j = 0; j < kN; ++j) y[j] = (y[j] - noisy_max) * scale;
        exp2_of<float>(y);
#pragma GCC unroll 4
        for (int j = 0; j < kN; ++j) y[j] *= inverse_sum;
      };
      for_vectors(full, [&](auto many, int64_t i) {
        constexpr int kN = many.kCount;
        Float logit[kN], grad[kN], y[kN];
        load_many<kN>(logits + begin + i, logit);
        load_many<kN>(grads + begin + i, grad);
        sample_of(many, logit, word + i, y);
#pragma GCC unroll 4
        for (int j = 0; j < kN; ++j) {
          dot += y[j] * grad[j];
          store(scratch + begin + i + j * kLanes, y[j]);
        }
      });
      if (rest) {
        const int64_t k = begin + full;
        const Float logit[] = {load_some(logits + k, rest, 0.0f)};
        const Float grad = load_some(grads + k, rest, 0.0f);
        Float y[1];
        sample_of(Count<1>{}, logit, word + full, y);
        dot += select(lane_numbers() < static_cast<int32_t>(rest), y[0] * grad, Float{});
        store_some(scratch + k, rest, y[0]);
      }
    }
    gradient.dot = splat(sum_of<float>(dot));
    gradient.inverse_tau = splat(scale * kLn2Float);
  }
  if (args.grad_kl) {
    gradient.grad_kl = splat(args.grad_kl[row]);
    gradient.logit_max = splat(stats[kLogitMax * stride]);
    gradient.log2_sum = splat(stats[kLog2Sum * stride]);
    gradient.constant =
        splat(static_cast<float>(__builtin_log(static_cast<double>(num_codes))) - args.kl[row]);
  }
  const int64_t full = num_codes / kLanes * kLanes, rest = num_codes - full;
  for_vectors(full, [&](auto many, int64_t k) {
    constexpr int kN = many.kCount;
    Float grad[kN] = {};
    if (grads) {
      Float y[kN], grad_sample[kN];
      load_many<kN>(scratch + k, y);
      load_many<kN>(grads + k, grad_sample);
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) grad[j] = gradient.of_sample(y[j], grad_sample[j]);
    }
    if (args.grad_kl) {
      Float logit[kN];
      load_many<kN>(logits + k, logit);
      gradient.add_kl<kN>(logit, grad);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) narrow(out + k + j * kLanes, grad[j]);
  });
  if (rest) {
    Float grad[1] = {};
    if (grads) {
      const Float y = load_some(scratch + full, rest, 0.0f);
      grad[0] = gradient.of_sample(y, load_some(grads + full, rest, 0.0f));
    }
    if (args.grad_kl) gradient.add_kl<1>({load_some(logits + full, rest, 0.0f)}, grad);
    store_some(out + full, rest, grad[0]);
  }
}

}  // namespace
}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle
