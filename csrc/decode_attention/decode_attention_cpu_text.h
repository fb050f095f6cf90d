// The text, whose keys and values all samples of a caption share: two products a chunk of keys.
// Included by decode_attention_cpu.h only.
//
// With many samples a vector of scores holds one key of as many samples; with few it holds one
// sample's scores of as many keys. Each number comes out of the same operations in the same order
// both ways, so that a sample's bits do not depend on how many there are.
#pragma once

#include "decode_attention/decode_attention_cpu_space.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int kScorePart = 64;  // products of a score that are added up before they meet the rest

// Rows of text as operands: where they lie, or a copy.
template <typename operand_t>
struct OperandRows {
  const operand_t* data;
  int64_t stride;
};

template <typename storage_t, typename operand_t>
constexpr bool kSameWords = std::is_same_v<storage_t, operand_t>;

// to[rows][words] = `count` rows, then zeros.
template <typename storage_t, typename operand_t>
inline void gather_rows(const storage_t* from, int count, int rows, const HeadSize<operand_t>& size,
                        operand_t* to) {
  for (int t = 0; t < count; ++t) {
    gather_row(from + int64_t{t} * size.size, size.size, size.words, to + t * size.words);
  }
  std::memset(to + count * size.words, 0, sizeof(operand_t) * (rows - count) * size.words);
}

// Values as factors of a sum over keys: [keys / kElements][channels], whole vectors.
template <typename storage_t, typename operand_t>
inline OperandRows<operand_t> values_of(const storage_t* from, int count,
                                        const HeadSize<operand_t>& size,
                                        DecodeSpace<operand_t>& space) {
  if constexpr (kSameWords<storage_t, operand_t>) {
    if (size.padded == size.size) return {from, size.size};
  }
  if constexpr (kElements<operand_t> == 1) {
    gather_rows(from, count, count, size, space.values);
  } else {
    gather_rows(from, count, count + count % 2, size, space.keys);  // the keys are done with
    for (int t = 0; t < count; t += 2) {
      const operand_t* first = space.keys + t * size.words;
      pair_rows(first, first + size.words, size.padded, space.values + t / 2 * size.padded);
    }
  }
  return {space.values, size.padded};
}

// out = rescale * out + weights * values, for `rows` samples, kRows at a time.
template <typename operand_t, int kVectors, int kRows>
inline void weigh_block(DecodeSpace<operand_t>& space, const Sums<Sum<operand_t>>& text,
                        int64_t row_step, int64_t step, OperandRows<operand_t> values, int depth,
                        int rows, int padded, int d) {
  using acc_t = Sum<operand_t>;
  for (int r = 0; r < rows; r += kRows) {
    MicroTile<acc_t, kVectors, kRows> sum;
    acc_t* out = text.out + r * padded + d;
    load_tile<acc_t, kVectors, kRows>(out, padded, space.rescale + r, sum);
    micro_tile<operand_t, kVectors, kRows>(space.weights + r * row_step, row_step, step,
                                           values.data + d, values.stride, depth, sum);
    store_tile<acc_t, kVectors, kRows>(out, padded, sum);
  }
}
template <typename operand_t, int kVectors, int kRows>
inline void weigh_values(DecodeSpace<operand_t>& space, const Sums<Sum<operand_t>>& text,
                         int64_t row_step, int64_t step, OperandRows<operand_t> values, int depth,
                         int rows, int padded) {
  constexpr int kWidth = Lanes<Sum<operand_t>>::kWidth, kBlock = kVectors * kWidth;
  int d = 0;
  for (; d + kBlock <= padded; d += kBlock) {
    weigh_block<operand_t, kVectors, kRows>(space, text, row_step, step, values, depth, rows,
                                            padded, d);
  }
  for (; d < padded; d += kWidth) {
    weigh_block<operand_t, 1, kRows>(space, text, row_step, step, values, depth, rows, padded, d);
  }
}

// -- many samples: kVectors vectors of them -------------------------------------------------------

// Asks for rows of text from two places, as many bytes further at each step of a product.
struct TextAhead {
  const char *one, *two;
  int64_t step;

  void operator()() {
    __builtin_prefetch(one);
    __builtin_prefetch(two);
    one += step, two += step;
  }
};

template <typename operand_t, int kVectors>
inline void score_many(DecodeSpace<operand_t>& space, OperandRows<operand_t> keys, int count,
                       int depth, Sum<operand_t> factor, TextAhead ahead) {
  constexpr int kLead = kSamples<Sum<operand_t>>;
  int t = 0;
  for (; t + kMicroRows <= count; t += kMicroRows) {
    scaled_product<operand_t, kVectors, kMicroRows, kScorePart>(
        keys.data + t * keys.stride, keys.stride, 1, space.q_across, kLead, depth, factor,
        space.scores + t * kLead, kLead, ahead);
  }
  for (; t < count; ++t) {
    scaled_product<operand_t, kVectors, 1, kScorePart>(keys.data + t * keys.stride, 0, 1,
                                                       space.q_across, kLead, depth, factor,
                                                       space.scores + t * kLead, kLead);
  }
}

// Scores become weights. Those of a sample are added up as lanes of a vector of keys would be.
template <typename operand_t>
inline void softmax_many(DecodeSpace<operand_t>& space, const Sums<Sum<operand_t>>& text, int count,
                         int vectors) {
  using acc_t = Sum<operand_t>;
  constexpr int kLead = kSamples<acc_t>, kWidth = Lanes<acc_t>::kWidth, kStep = 4;
  static_assert(kStep % kElements<operand_t> == 0);
  for (int j = 0; j < vectors * kWidth; j += kWidth) {
    Vec<acc_t> most = splat<acc_t>(-INFINITY);
    for (int t = 0; t < count; ++t) {
      const Vec<acc_t> s = load(space.scores + t * kLead + j);
      most = s > most ? s : most;
    }
    store(space.most + j, most);
  }
  space.meet_maxima(text, vectors * kWidth);
  for (int j = 0; j < vectors * kWidth; j += kWidth) {
    const Vec<acc_t> shift = load(space.shift + j);
    Vec<acc_t> part[kWidth < kStep ? kStep : kWidth] = {};
    for (int t = 0; t < count; t += kStep) {
      const int left = count - t;
      Vec<acc_t> e[kStep];
#pragma GCC unroll 4
      for (int i = 0; i < kStep; ++i) {
        e[i] =
            i < left ? load(space.scores + (t + i) * kLead + j) - shift : splat<acc_t>(-INFINITY);
      }
      exp2_of<acc_t, kStep>(e);
#pragma GCC unroll 4
      for (int i = 0; i < kStep; ++i) part[(t + i) % kWidth] += e[i];
      if constexpr (kElements<operand_t> == 1) {
#pragma GCC unroll 4
        for (int i = 0; i < kStep; ++i) {
          if (i < left) store(space.weights + (t + i) * kLead + j, e[i]);
        }
      } else {
#pragma GCC unroll 2
        for (int i = 0; i < kStep; i += 2) {
          if (i < left)
            store(space.weights + (t + i) / 2 * kLead + j, pairs_across(e[i], e[i + 1]));
        }
      }
    }
    for (int step = kWidth / 2; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) part[i] += part[i + step];
    }
    store(space.sum + j, part[0]);
  }
  space.add_sums(text, vectors * kWidth);
}

// -- few samples: half a vector of them at most ---------------------------------------------------

template <typename operand_t, int kRows>
inline void chunk_of_few(DecodeSpace<operand_t>& space, const Sums<Sum<operand_t>>& text, int count,
                         const HeadSize<operand_t>& size, Sum<operand_t> factor) {
  using acc_t = Sum<operand_t>;
  constexpr int kWidth = Lanes<acc_t>::kWidth, kVectors = kRows <= 2 ? 4 : 2;
  constexpr int kBlock = kVectors * kWidth < kChunk ? kVectors * kWidth : kChunk;
  for (int c = 0; c < count; c += kBlock) {
    scaled_product<operand_t, kVectors, kRows, kScorePart>(
        space.q, size.words, 1, space.keys_across + c, kChunk, size.depth, factor, space.scores + c,
        kChunk);
  }
  for (int r = 0; r < kWidth; ++r) space.most[r] = -INFINITY;
  for (int r = 0; r < kRows; ++r) {
    acc_t* scores = space.scores + r * kChunk;
    for (int t = count; t < kChunk; ++t) scores[t] = -INFINITY;
    Vec<acc_t> most = load(scores);
    for (int c = kWidth; c < count; c += kWidth) {
      const Vec<acc_t> s = load(scores + c);
      most = s > most ? s : most;
    }
    space.most[r] = max_of<acc_t>(most);
  }
  space.meet_maxima(text, kWidth);
  for (int r = 0; r < kRows; ++r) {
    const acc_t* scores = space.scores + r * kChunk;
    operand_t* weights = space.weights + r * kChunk / kElements<operand_t>;
    Vec<acc_t> sum = {};
    for (int c = 0; c < count; c += 2 * kWidth) {
      Vec<acc_t> e[2] = {load(scores + c) - space.shift[r],
                         load(scores + c + kWidth) - space.shift[r]};
      exp2_of<acc_t, 2>(e);
      store_along(weights + c / kElements<operand_t>, e[0], e[1]);
      sum += e[0];
      sum += e[1];
    }
    space.sum[r] = sum_of<acc_t>(sum);
  }
  space.add_sums(text, kWidth);
}

// -- the text of a caption ------------------------------------------------------------------------

// `keys` and `values` are (T, D) of the head; the queries lie in space.q, zero beyond `samples`.
template <typename storage_t, typename operand_t>
inline void attend_text(const storage_t* keys, const storage_t* values, int text_len, int samples,
                        const HeadSize<operand_t>& size, Sum<operand_t> factor,
                        DecodeSpace<operand_t>& space, const Sums<Sum<operand_t>>& text) {
  using acc_t = Sum<operand_t>;
  constexpr int kWidth = Lanes<acc_t>::kWidth, kLead = kSamples<acc_t>;
  constexpr int kPer = kElements<operand_t>;
  for (int r = 0; r < kLead; ++r) text.m[r] = -INFINITY;
  std::memset(text.l, 0, sizeof(acc_t) * kLead);
  std::memset(text.out, 0, sizeof(acc_t) * kLead * size.padded);
  const bool few = samples <= kWidth / 2, whole = size.padded == size.size;
  if (!few) transpose_panel(space.q, kLead, size.words, space.q_across);
  for (int first = 0; first < text_len; first += kChunk) {
    const int count = text_len - first < kChunk ? text_len - first : kChunk;
    const storage_t* chunk = keys + int64_t{first} * size.size;
    OperandRows<operand_t> rows = {space.keys, size.words};
    bool there = false;
    if constexpr (kSameWords<storage_t, operand_t>) {
      there = !few || (whole && count == kChunk);
      if (there) rows = {chunk, size.size};
    }
    if (!there) gather_rows(chunk, count, few ? kChunk : count, size, space.keys);
    const storage_t* next = values + int64_t{first} * size.size;
    const int depth = (count + kPer - 1) / kPer;
    if (few) {
      transpose_panel(rows.data, kChunk, size.words, space.keys_across);
      const auto run = [&](auto rows_t) {
        constexpr int kRows = decltype(rows_t)::value, kVectors = kRows <= 2 ? 4 : 2;
        chunk_of_few<operand_t, kRows>(space, text, count, size, factor);
        weigh_values<operand_t, kVectors, kRows>(space, text, kChunk / kPer, 1,
                                                 values_of(next, count, size, space), depth, kRows,
                                                 size.padded);
      };
      if (samples == 1) {
        run(std::integral_constant<int, 1>{});
      } else if (samples == 2 || kWidth <= 4) {
        run(std::integral_constant<int, 2>{});
      } else if (samples <= 4 || kWidth <= 8) {
        run(std::integral_constant<int, 4>{});
      } else {
        run(std::integral_constant<int, 8>{});
      }
      continue;
    }
    const int vectors = samples <= kWidth ? 1 : kMicroVectors;
    // The values of this chunk and the keys of the next, which may be those of the next head.
    const int64_t row = size.size * static_cast<int64_t>(sizeof(storage_t));
    const TextAhead ahead = {reinterpret_cast<const char*>(next),
                             reinterpret_cast<const char*>(chunk) + kChunk * row,
                             ceil_div(kMicroRows * row, size.depth)};
    if (vectors == 1) {
      score_many<operand_t, 1>(space, rows, count, size.depth, factor, ahead);
    } else {
      score_many<operand_t, kMicroVectors>(space, rows, count, size.depth, factor, ahead);
    }
    softmax_many(space, text, count, vectors);
    weigh_values<operand_t, kMicroVectors, kMicroRows>(
        space, text, 1, kLead, values_of(next, count, size, space), depth, samples, size.padded);
  }
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
