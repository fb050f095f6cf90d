// gumbel_softmax_cpu.h where the codebook axis is strided (dim = 1 of NCHW): lanes are neighbouring
// rows, so every load takes kLanes numbers that lie side by side, and no sum crosses lanes.
#pragma once

#include "gumbel_softmax/gumbel_softmax_cpu_rows.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

constexpr int64_t kColumnChunk = 64;  // a multiple of 4
constexpr int64_t kColumnGroup = 8;
constexpr int64_t kMaxBlocks = 128 / kLanes;  // measured; more gains little and costs scratch

// One vector of rows.
struct Columns {
  int64_t row, count;  // first row, rows (at most kLanes)
  int64_t offset;      // of (row, code 0) in memory
};

// Vectors of one unit. Where codes lie far apart, one vector at a time would touch a page for each
// cache line; then a unit takes several neighbours and walks them chunk by chunk.
inline int64_t blocks_per_unit(const GumbelSoftmaxParams& p) {
  return p.inner >= 512 ? kMaxBlocks : 1;
}

inline int64_t units_per_outer(const GumbelSoftmaxParams& p) {
  return ceil_div(p.inner, kLanes * blocks_per_unit(p));
}

// Fills `columns` with the vectors of `unit` and returns how many there are.
inline int64_t columns_of(const GumbelSoftmaxParams& p, int64_t unit, Columns* columns) {
  const int64_t per_outer = units_per_outer(p), outer_idx = unit / per_outer;
  int64_t inner_idx = (unit - outer_idx * per_outer) * blocks_per_unit(p) * kLanes, blocks = 0;
  for (; blocks < blocks_per_unit(p) && inner_idx < p.inner; ++blocks, inner_idx += kLanes) {
    const int64_t left = p.inner - inner_idx;
    columns[blocks] = {outer_idx * p.inner + inner_idx, left < kLanes ? left : kLanes,
                       outer_idx * p.num_codes * p.inner + inner_idx};
  }
  return blocks;
}

inline int64_t column_scratch(const GumbelSoftmaxParams& p) {  // floats of one vector
  return (p.num_codes + ceil_div(p.num_codes, kColumnChunk)) * kLanes;
}

// kFull: every lane is a row. Not so at the end of an axis that is no multiple of kLanes.
template <bool kFull, typename scalar_t>
inline Float load_columns(const scalar_t* p, int64_t count) {
  return kFull ? widen(p) : load_some(p, count, 0.0f);
}
template <bool kFull, typename scalar_t>
inline void store_columns(scalar_t* p, int64_t count, Float v) {
  kFull ? narrow(p, v) : store_some(p, count, v);
}
inline Float load_stat(const float* stats, const Columns& c) {
  return load_some(stats + c.row, c.count, 0.0f);
}

// Words of four codes at a time, for each of kLanes rows. Where K is no multiple of 4 the rows
// begin at different words of their first call: then each lane picks from two calls.
class ColumnWords {
 public:
  void start(const GumbelSoftmaxParams& p, const PhiloxKeys& keys, int64_t row) {
    keys_ = &keys;
    aligned_ = p.num_codes % 4 == 0;
    for (int i = 0; i < kLanes / 2; ++i) {
      const uint64_t even = element_of(p, row + 2 * i);
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
    const Wide subsequence[] = {even_, odd_};
    const PhiloxLanes<2> lanes(subsequence, *keys_);
    words[0] = (Word)interleave(lanes.c0[0], lanes.c0[1]);
    words[1] = (Word)interleave(lanes.c1[0], lanes.c1[1]);
    words[2] = (Word)interleave(lanes.c2[0], lanes.c2[1]);
    words[3] = (Word)interleave(lanes.c3[0], lanes.c3[1]);
    even_ += 1;
    odd_ += 1;
  }

  const PhiloxKeys* keys_ = nullptr;
  bool aligned_ = true;
  Wide even_{}, odd_{};
  Int shift_{};
  Word next_[4]{};
};

struct ColumnState {
  Columns c;
  float *unscaled, *chunk_max;  // in scratch
  ColumnWords random;
  Sums sums;
  Float nonfinite{}, inverse_sum{}, dot{};
  Int index{};

  void start(const GumbelSoftmaxParams& p, const PhiloxKeys& keys, const Columns& columns,
             float* scratch) {
    c = columns;
    unscaled = scratch;
    chunk_max = scratch + p.num_codes * kLanes;
    random.start(p, keys, c.row);
  }
};

template <typename scalar_t, bool kFull>
void forward_chunk(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args, float scale,
                   ColumnState& state, int64_t begin, int64_t end) {
  const int64_t inner = p.inner, count = state.c.count;
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits) + state.c.offset;
  float* unscaled = state.unscaled;
  const bool soft = !args.hard;
  Float noisy_of_code[kColumnChunk], logit_of_code[kColumnChunk];
  Word words[kColumnChunk];
  state.random.next(end - begin, words);
  Float noisy_max = state.sums.noisy_max, logit_max = state.sums.logit_max;
  Float nonfinite = state.nonfinite;
  Int index = state.index;
  for (int64_t k = begin; k < end; ++k) {
    const Float logit = load_columns<kFull>(logits + k * inner, count);
    const Float noisy = add_gumbel(logit, words[k - begin]);
    nonfinite += logit * 0.0f;
    index = noisy > noisy_max ? splat(static_cast<int32_t>(k)) : index;
    noisy_max = maximum(noisy_max, noisy);
    logit_max = maximum(logit_max, logit);
    noisy_of_code[k - begin] = noisy;
    logit_of_code[k - begin] = logit;
  }
  state.nonfinite = nonfinite;
  state.index = index;
  state.sums.rescale(noisy_max, logit_max, scale);
  store(state.chunk_max + begin / kColumnChunk * kLanes, noisy_max);
  // Each lane sums a row of its own: sums go by groups and chunks, so that they round less.
  Sums chunk{noisy_max, logit_max}, part{noisy_max, logit_max};
  for (int64_t k = begin; k < end; ++k) {
    Float e[] = {noisy_of_code[k - begin]};
    part.add<true, 1>(e, {logit_of_code[k - begin]}, scale, Int{});
    if (soft) store(unscaled + k * kLanes, e[0]);
    if (k % kColumnGroup == kColumnGroup - 1) chunk.merge(part);
  }
  chunk.merge(part);
  state.sums.merge(chunk);
}

inline void write_results(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args,
                          float scale, ColumnState& state) {
  const Sums& sums = state.sums;
  state.inverse_sum = splat(__builtin_nanf(""));
  for (int64_t i = 0; i < state.c.count; ++i) {
    const RowResult result{sums.noisy_max[i], sums.logit_max[i], sums.noisy_sum[i],
                           sums.logit_sum[i], sums.entropy[i],   state.nonfinite[i] == 0.0f};
    result.write(p, args, state.c.row + i, state.index[i], scale);
    state.inverse_sum[i] = args.stats[kInverseSum * num_rows(p) + state.c.row + i];
  }
}

template <typename scalar_t, bool kFull>
void finish_chunk(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args, float scale,
                  const ColumnState& state, int64_t begin, int64_t end) {
  scalar_t* sample = static_cast<scalar_t*>(args.sample) + state.c.offset;
  const float* unscaled = state.unscaled;
  const Float chunk_max = load(state.chunk_max + begin / kColumnChunk * kLanes);
  const Float factor =
      exp2_of<float>((chunk_max - state.sums.noisy_max) * scale) * state.inverse_sum;
  const Float zero_or_nan = state.inverse_sum * 0.0f;  // NaN in a row with a nonfinite logit
  const Int index = state.index;
  for (int64_t k = begin; k < end; ++k) {
    Float y;
    if (args.hard) {
      y = select(index == static_cast<int32_t>(k), splat(1.0f), Float{});
    } else {
      y = without_denormals(load(unscaled + k * kLanes) * factor);
    }
    store_columns<kFull>(sample + k * p.inner, state.c.count, y + zero_or_nan);
  }
}

// Calls visit(state, begin, end) for every chunk of codes and, within it, for every vector.
template <typename visit_t>
inline void for_chunks(const GumbelSoftmaxParams& p, ColumnState* states, int64_t blocks,
                       visit_t visit) {
  for (int64_t begin = 0; begin < p.num_codes; begin += kColumnChunk) {
    const int64_t left = p.num_codes - begin;
    const int64_t end = left < kColumnChunk ? p.num_codes : begin + kColumnChunk;
    for (int64_t b = 0; b < blocks; ++b) visit(states[b], begin, end);
  }
}

template <typename scalar_t>
void forward_columns(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args,
                     const PhiloxKeys& keys, float scale, int64_t unit, float* scratch) {
  Columns columns[kMaxBlocks];
  ColumnState states[kMaxBlocks];
  const int64_t blocks = columns_of(p, unit, columns);
  for (int64_t b = 0; b < blocks; ++b) {
    states[b].start(p, keys, columns[b], scratch + b * column_scratch(p));
  }
  for_chunks(p, states, blocks, [&](ColumnState& state, int64_t begin, int64_t end) {
    state.c.count == kLanes ? forward_chunk<scalar_t, true>(p, args, scale, state, begin, end)
                            : forward_chunk<scalar_t, false>(p, args, scale, state, begin, end);
  });
  for (int64_t b = 0; b < blocks; ++b) write_results(p, args, scale, states[b]);
  for_chunks(p, states, blocks, [&](ColumnState& state, int64_t begin, int64_t end) {
    state.c.count == kLanes ? finish_chunk<scalar_t, true>(p, args, scale, state, begin, end)
                            : finish_chunk<scalar_t, false>(p, args, scale, state, begin, end);
  });
}

template <typename scalar_t, bool kFull>
void sample_chunk(const GumbelSoftmaxParams& p, const GumbelSoftmaxBackward& args, float scale,
                  ColumnState& state, int64_t begin, int64_t end) {
  const int64_t inner = p.inner, count = state.c.count;
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits) + state.c.offset;
  const scalar_t* grads = static_cast<const scalar_t*>(args.grad_sample) + state.c.offset;
  const Float noisy_max = state.sums.noisy_max, inverse_sum = state.inverse_sum;
  float* samples = state.unscaled;
  Word words[kColumnChunk];
  state.random.next(end - begin, words);
  Float chunk{}, part{};
  for (int64_t k = begin; k < end; ++k) {
    const Float logit = load_columns<kFull>(logits + k * inner, count);
    const Float noisy = add_gumbel(logit, words[k - begin]);
    const Float y = exp2_of<float>((noisy - noisy_max) * scale) * inverse_sum;
    part += y * load_columns<kFull>(grads + k * inner, count);
    store(samples + k * kLanes, y);
    if (k % kColumnGroup == kColumnGroup - 1) {
      chunk += part;
      part = Float{};
    }
  }
  state.dot += chunk + part;
}

template <typename scalar_t, bool kFull>
void gradient_chunk(const GumbelSoftmaxParams& p, const GumbelSoftmaxBackward& args,
                    const ColumnState& state, Gradient gradient, int64_t begin, int64_t end) {
  const int64_t inner = p.inner, count = state.c.count;
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits) + state.c.offset;
  const scalar_t* grads = static_cast<const scalar_t*>(args.grad_sample);
  scalar_t* out = static_cast<scalar_t*>(args.grad_logits) + state.c.offset;
  const float* samples = state.unscaled;
  if (grads) grads += state.c.offset;
  gradient.dot = state.dot;
  if (args.grad_kl) {
    const int64_t stride = num_rows(p);
    gradient.grad_kl = load_stat(args.grad_kl, state.c);
    gradient.logit_max = load_stat(args.stats + kLogitMax * stride, state.c);
    gradient.log2_sum = load_stat(args.stats + kLog2Sum * stride, state.c);
    gradient.constant -= load_stat(args.kl, state.c);
  }
  for (int64_t k = begin; k < end; ++k) {
    Float grad[1] = {};
    if (grads) {
      grad[0] = gradient.of_sample(load(samples + k * kLanes),
                                   load_columns<kFull>(grads + k * inner, count));
    }
    if (args.grad_kl) gradient.add_kl<1>({load_columns<kFull>(logits + k * inner, count)}, grad);
    store_columns<kFull>(out + k * inner, count, grad[0]);
  }
}

template <typename scalar_t>
void backward_columns(const GumbelSoftmaxParams& p, const GumbelSoftmaxBackward& args,
                      const PhiloxKeys& keys, float scale, int64_t unit, float* scratch) {
  Columns columns[kMaxBlocks];
  ColumnState states[kMaxBlocks];
  const int64_t blocks = columns_of(p, unit, columns), stride = num_rows(p);
  for (int64_t b = 0; b < blocks; ++b) {
    states[b].start(p, keys, columns[b], scratch + b * column_scratch(p));
    states[b].sums.noisy_max = load_stat(args.stats + kNoisyMax * stride, columns[b]);
    states[b].inverse_sum = load_stat(args.stats + kInverseSum * stride, columns[b]);
  }
  if (args.grad_sample) {
    for_chunks(p, states, blocks, [&](ColumnState& state, int64_t begin, int64_t end) {
      state.c.count == kLanes ? sample_chunk<scalar_t, true>(p, args, scale, state, begin, end)
                              : sample_chunk<scalar_t, false>(p, args, scale, state, begin, end);
    });
  }
  Gradient gradient;
  gradient.inverse_tau = splat(scale * kLn2Float);
  gradient.constant = splat(static_cast<float>(__builtin_log(static_cast<double>(p.num_codes))));
  for_chunks(p, states, blocks, [&](ColumnState& state, int64_t begin, int64_t end) {
    state.c.count == kLanes ? gradient_chunk<scalar_t, true>(p, args, state, gradient, begin, end)
                            : gradient_chunk<scalar_t, false>(p, args, state, gradient, begin, end);
  });
}

}  // namespace
}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle
