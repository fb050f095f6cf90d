// gumbel_softmax_cpu.h where the codebook axis is strided (dim = 1 of NCHW): lanes are neighbouring
// rows, so every load takes kLanes numbers that lie side by side, and no sum crosses lanes.
#pragma once

#include "gumbel_softmax/gumbel_softmax_cpu_rows.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t kColumnChunk = 64;  // a multiple of 4
constexpr int64_t kColumnGroup = 8;

struct Columns {
  int64_t row, count;  // first row, rows (at most kLanes)
  int64_t offset;      // place of (row, code 0) in memory
};

inline Columns columns_of(const GumbelSoftmaxParams& p, int64_t unit) {
  const int64_t blocks = ceil_div(p.inner, kLanes), outer_idx = unit / blocks;
  const int64_t inner_idx = (unit - outer_idx * blocks) * kLanes;
  const int64_t left = p.inner - inner_idx;
  return {outer_idx * p.inner + inner_idx, left < kLanes ? left : kLanes,
          outer_idx * p.num_codes * p.inner + inner_idx};
}

// kWhole: all lanes are rows. At the end of an axis that is no multiple of kLanes they are not.
template <bool kWhole, typename scalar_t>
inline Float load_columns(const scalar_t* p, int64_t count) {
  return kWhole ? load_float(p) : load_some(p, count, 0.0f);
}
template <bool kWhole, typename scalar_t>
inline void store_columns(scalar_t* p, int64_t count, Float v) {
  kWhole ? store_float(p, v) : store_some(p, count, v);
}
inline Float load_stat(const float* stats, const Columns& c) {
  return load_some(stats + c.row, c.count, 0.0f);
}

// Words of four codes at a time, for each of kLanes rows. Where K is no multiple of 4 the rows
// begin at different words of their first call: then each lane picks from two calls.
class ColumnWords {
 public:
  ColumnWords(const GumbelSoftmaxParams& p, const PhiloxKeys& keys, int64_t row)
      : keys_(keys), aligned_(p.num_codes % 4 == 0) {
    for (int i = 0; i < kLanes / 2; ++i) {
      const uint64_t even = static_cast<uint64_t>((row + 2 * i) * p.num_codes);
      const uint64_t odd = even + static_cast<uint64_t>(p.num_codes);
      even_[i] = even / 4;
      odd_[i] = odd / 4;
      shift_[2 * i] = static_cast<int32_t>(even % 4);
      shift_[2 * i + 1] = static_cast<int32_t>(odd % 4);
    }
    if (!aligned_) draw(next_);
  }

  // The next `count` codes (rounded up to 4) of a row; all calls but the last take a multiple of 4.
  inline void next(int64_t count, Word* words) {
    if (aligned_) {
      for (int64_t k = 0; k < count; k += 4) draw(words + k);
    } else {
      for (int64_t k = 0; k < count; k += 4) pick(words + k);
    }
  }

 private:
  inline void pick(Word* words) {
    Word drawn[8];
    for (int j = 0; j < 4; ++j) drawn[j] = next_[j];
    draw(next_);
    for (int j = 0; j < 4; ++j) drawn[4 + j] = next_[j];
    for (int j = 0; j < 4; ++j) {
      const Word low = (Word)(shift_ == 0) ? drawn[j] : drawn[j + 1];
      const Word high = (Word)(shift_ == 2) ? drawn[j + 2] : drawn[j + 3];
      words[j] = (Word)(shift_ < 2) ? low : high;
    }
  }

  inline void draw(Word* words) {
    const PhiloxLanes even(even_, keys_), odd(odd_, keys_);
    words[0] = (Word)interleave(even.c0, odd.c0);
    words[1] = (Word)interleave(even.c1, odd.c1);
    words[2] = (Word)interleave(even.c2, odd.c2);
    words[3] = (Word)interleave(even.c3, odd.c3);
    even_ += 1;
    odd_ += 1;
  }

  const PhiloxKeys& keys_;
  const bool aligned_;
  Wide even_{}, odd_{};
  Int shift_{};
  Word next_[4]{};
};

template <typename scalar_t, bool kWhole>
void forward_columns(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args,
                     const PhiloxKeys& keys, float scale, const Columns& c, float* scratch) {
  const int64_t num_codes = p.num_codes, inner = p.inner, count = c.count;
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits) + c.offset;
  scalar_t* sample = static_cast<scalar_t*>(args.sample) + c.offset;
  float* chunk_max = scratch + num_codes * kLanes;
  const bool keep = !args.hard;

  ColumnWords random(p, keys, c.row);
  Sums sums;
  Float bad{};
  Int index{};
  for (int64_t begin = 0; begin < num_codes; begin += kColumnChunk) {
    const int64_t end = num_codes - begin < kColumnChunk ? num_codes : begin + kColumnChunk;
    Float noisy[kColumnChunk], plain[kColumnChunk];
    Float best = sums.noisy_max, logit_max = sums.logit_max;
    Word words[kColumnChunk];
    random.next(end - begin, words);
    for (int64_t k = begin; k < end; ++k) {
      const Float logit = load_columns<kWhole>(logits + k * inner, count);
      const Float n = add_gumbel(logit, words[k - begin]);
      bad += logit * 0.0f;
      index = n > best ? splat(static_cast<int32_t>(k)) : index;
      best = maximum(best, n);
      logit_max = maximum(logit_max, logit);
      noisy[k - begin] = n;
      plain[k - begin] = logit;
    }
    sums.raise(best, logit_max, scale);
    store(chunk_max + begin / kColumnChunk * kLanes, best);
    Sums chunk{best, logit_max};
    // Each lane holds a whole row, so sums go by groups and chunks for the sake of their rounding
    // errors.
    Sums part = chunk;
    for (int64_t k = begin; k < end; ++k) {
      const Float e = part.add<true>(noisy[k - begin], plain[k - begin], scale, Int{});
      if (keep) store(scratch + k * kLanes, e);
      if (k % kColumnGroup == kColumnGroup - 1) chunk.take(part);
    }
    chunk.take(part);
    sums.take(chunk);
  }

  Float inverse = splat(__builtin_nanf("")), marks = inverse;  // marks: 0, or NaN in a bad row
  for (int64_t i = 0; i < count; ++i) {
    const RowResult result{sums.noisy_max[i], sums.logit_max[i], sums.sample[i],
                           sums.plain[i],     sums.entropy[i],   bad[i] == 0.0f};
    result.write(p, args, c.row + i, index[i], scale);
    inverse[i] = args.stats[kInverseSum * num_rows(p) + c.row + i];
    marks[i] = inverse[i] * 0.0f;
  }
  for (int64_t begin = 0; begin < num_codes; begin += kColumnChunk) {
    const int64_t end = num_codes - begin < kColumnChunk ? num_codes : begin + kColumnChunk;
    const Float chunk = load<Float>(chunk_max + begin / kColumnChunk * kLanes);
    const Float factor = exp2_of((chunk - sums.noisy_max) * scale) * inverse;
    for (int64_t k = begin; k < end; ++k) {
      Float y;
      if (args.hard) {
        y = select(index == static_cast<int32_t>(k), splat(1.0f), Float{});
      } else {
        y = without_denormals(load<Float>(scratch + k * kLanes) * factor);
      }
      store_columns<kWhole>(sample + k * inner, count, y + marks);
    }
  }
}

template <typename scalar_t, bool kWhole>
void backward_columns(const GumbelSoftmaxParams& p, const GumbelSoftmaxBackward& args,
                      const PhiloxKeys& keys, float scale, const Columns& c, float* scratch) {
  const int64_t num_codes = p.num_codes, inner = p.inner, count = c.count, stride = num_rows(p);
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits) + c.offset;
  const scalar_t* grads = static_cast<const scalar_t*>(args.grad_sample);
  scalar_t* out = static_cast<scalar_t*>(args.grad_logits) + c.offset;
  Gradient gradient;
  if (grads) {
    grads += c.offset;
    const Float noisy_max = load_stat(args.stats + kNoisyMax * stride, c);
    const Float inverse_sum = load_stat(args.stats + kInverseSum * stride, c);
    ColumnWords random(p, keys, c.row);
    for (int64_t begin = 0; begin < num_codes; begin += kColumnChunk) {
      const int64_t end = num_codes - begin < kColumnChunk ? num_codes : begin + kColumnChunk;
      Word words[kColumnChunk];
      random.next(end - begin, words);
      Float chunk{};
      Float part{};
      for (int64_t k = begin; k < end; ++k) {
        const Float logit = load_columns<kWhole>(logits + k * inner, count);
        const Float noisy = add_gumbel(logit, words[k - begin]);
        const Float y = exp2_of((noisy - noisy_max) * scale) * inverse_sum;
        part += y * load_columns<kWhole>(grads + k * inner, count);
        store(scratch + k * kLanes, y);
        if (k % kColumnGroup == kColumnGroup - 1) {
          chunk += part;
          part = Float{};
        }
      }
      chunk += part;
      gradient.dot += chunk;
    }
    gradient.inverse_tau = splat(scale * kLn2);
  }
  if (args.grad_kl) {
    gradient.grad_kl = load_stat(args.grad_kl, c);
    gradient.logit_max = load_stat(args.stats + kLogitMax * stride, c);
    gradient.log2_sum = load_stat(args.stats + kLog2Sum * stride, c);
    gradient.constant =
        static_cast<float>(__builtin_log(static_cast<double>(num_codes))) - load_stat(args.kl, c);
  }
  for (int64_t k = 0; k < num_codes; ++k) {
    Float grad{};
    if (grads) {
      grad = gradient.of_sample(load<Float>(scratch + k * kLanes),
                                load_columns<kWhole>(grads + k * inner, count));
    }
    if (args.grad_kl) grad += gradient.of_kl(load_columns<kWhole>(logits + k * inner, count));
    store_columns<kWhole>(out + k * inner, count, grad);
  }
}

}  // namespace
}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle
