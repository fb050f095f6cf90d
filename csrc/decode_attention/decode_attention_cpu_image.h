// The image slots of one sample, which are its own: keys and values stream through once. Included
// by decode_attention_cpu.h only.
#pragma once

#include "decode_attention/decode_attention_cpu_space.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

// As many int8 as a vector of acc_t has lanes.
template <typename acc_t>
struct CodesOf;
template <>
struct CodesOf<float> {
  typedef int8_t vec __attribute__((vector_size(kBytes / 4)));
};
template <>
struct CodesOf<double> {
  typedef int8_t vec __attribute__((vector_size(kBytes / 8)));
};
template <typename acc_t>
using Codes = typename CodesOf<acc_t>::vec;

// A vector of a stored row at channel d, zero beyond its `left` channels; with kWhole all are
// there.
template <typename acc_t, bool kWhole, typename stored_t>
inline Vec<acc_t> row_at(const stored_t* p, int left) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  if constexpr (std::is_same_v<stored_t, int8_t>) {
    int8_t some[kWidth] = {};
    if (!kWhole && left < kWidth) {
      std::memcpy(some, p, left);
      p = some;
    }
    if constexpr (std::is_same_v<acc_t, float>) {
      return __builtin_convertvector(widened_bytes(p), Float);
    } else {
      return __builtin_convertvector(load_as<Codes<acc_t>>(p), Vec<acc_t>);
    }
  } else {
    if constexpr (kWhole) return widen(p);
    return load_up_to(p, left < kWidth ? left : kWidth, 0);
  }
}

// Asks for a row that will be read soon, which may also lie beyond the last one.
template <typename stored_t>
inline void fetch_row(const stored_t* row, int size) {
  const char* const bytes = reinterpret_cast<const char*>(row);
  for (size_t i = 0; i < size * sizeof(stored_t); i += 64) __builtin_prefetch(bytes + i);
}

// sum[i] += lane by lane row i times q, over the channels; with kWhole they are whole vectors.
template <bool kWhole, int kRows, typename acc_t, typename stored_t>
inline void add_products(const stored_t* const (&rows)[kRows], const acc_t* q, int size,
                         Vec<acc_t>* sum) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  for (int d = 0; d < size; d += kWidth) {
    const Vec<acc_t> factor = load(q + d);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      sum[i] += row_at<acc_t, kWhole>(rows[i] + d, size - d) * factor;
    }
  }
}

// scores[count] = the products of q with the keys at `places`.
template <bool kWhole, typename acc_t, typename stored_t>
inline void score_places(const stored_t* keys, const int32_t* places, int count, const acc_t* q,
                         int size, int64_t ahead, acc_t* scores) {
  constexpr int kWidth = Lanes<acc_t>::kWidth, kRows = kWidth < 8 ? kWidth : 8;
  int t = 0;
  for (; t + kWidth <= count; t += kWidth) {
    Vec<acc_t> sum[kWidth] = {};
#pragma GCC unroll 2
    for (int half = 0; half < kWidth; half += kRows) {
      const stored_t* rows[kRows];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) rows[i] = keys + int64_t{places[t + half + i]} * size;
      for (int i = 0; i < kRows; ++i) fetch_row(rows[i] + ahead, size);
      add_products<kWhole, kRows>(rows, q, size, sum + half);
    }
    store(scores + t, sums_of<acc_t>(sum));
  }
  for (; t < count; ++t) {
    const stored_t* const row[1] = {keys + int64_t{places[t]} * size};
    fetch_row(row[0] + ahead, size);
    Vec<acc_t> sum[1] = {};
    add_products<kWhole, 1>(row, q, size, sum);
    scores[t] = sum_of<acc_t>(sum[0]);
  }
}

// kVectors vectors of out, at channel d: rescaled, plus the sum of weights * values. Two sums, of
// every other key, so that the products need not wait for one another.
template <bool kWhole, int kVectors, typename acc_t, typename stored_t>
inline void weigh_places(const stored_t* values, const int32_t* places, int count,
                         const acc_t* weights, int size, int64_t ahead, acc_t rescale, int d,
                         acc_t* out) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  Vec<acc_t> sum[2][kVectors] = {};
  const auto add = [&](int t, Vec<acc_t>(&to)[kVectors]) DALLE_INLINE {
    const stored_t* row = values + int64_t{places[t]} * size + d;
    const Vec<acc_t> weight = splat(weights[t]);
    if (d == 0) fetch_row(row + ahead, size);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      to[j] += weight * row_at<acc_t, kWhole>(row + j * kWidth, size - d - j * kWidth);
    }
  };
  int t = 0;
  for (; t + 2 <= count; t += 2) {
    add(t, sum[0]);
    add(t + 1, sum[1]);
  }
  if (t < count) add(t, sum[0]);
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    acc_t* to = out + d + j * kWidth;
    store(to, load(to) * rescale + (sum[0][j] + sum[1][j]));
  }
}

// Keys and values of one sample and head, and their scales where they are codes.
template <typename stored_t>
struct SampleSlots {
  const stored_t *keys, *values;
  const float *key_scales, *value_scales;
  int64_t ahead;  // from a row to that of the next sample
};

// Adds the slots at space.places to what sample r has; its query lies in space.q_image.
template <bool kWhole, typename stored_t, typename operand_t>
inline void attend_image(const SampleSlots<stored_t>& slots, int num_places, int r,
                         const HeadSize<operand_t>& size, Sum<operand_t> factor,
                         DecodeSpace<operand_t>& space) {
  using acc_t = Sum<operand_t>;
  constexpr int kWidth = Lanes<acc_t>::kWidth, kVectors = 4;
  constexpr bool kCoded = std::is_same_v<stored_t, int8_t>;
  acc_t scores[kChunk], *out = space.out + r * size.padded;
  for (int first = 0; first < num_places; first += kChunk) {
    const int count = num_places - first < kChunk ? num_places - first : kChunk;
    const int32_t* places = space.places + first;
    score_places<kWhole>(slots.keys, places, count, space.q_image, size.size, slots.ahead, scores);
    if constexpr (kCoded) {
      for (int t = 0; t < count; ++t) scores[t] *= slots.key_scales[places[t]];
    }
    for (int t = 0; t < count; ++t) scores[t] *= factor;
    for (int t = count; t % kWidth != 0; ++t) scores[t] = -INFINITY;  // whatever the factor's sign
    Vec<acc_t> most = splat<acc_t>(-INFINITY);
    for (int t = 0; t < count; t += kWidth) {
      const Vec<acc_t> s = load(scores + t);
      most = s > most ? s : most;
    }
    const acc_t m_old = space.m[r], chunk = max_of<acc_t>(most);
    const acc_t m = chunk > m_old ? chunk : m_old, shift = m == -INFINITY ? 0 : m;
    const acc_t rescale = exp2_of<acc_t>(splat<acc_t>(m_old - shift))[0];
    Vec<acc_t> sum = {};
    for (int t = 0; t < count; t += kWidth) {
      const Vec<acc_t> e = exp2_of<acc_t>(load(scores + t) - shift);
      store(scores + t, e);
      sum += e;
    }
    space.m[r] = m;
    space.l[r] = space.l[r] * rescale + sum_of<acc_t>(sum);
    if constexpr (kCoded) {
      for (int t = 0; t < count; ++t) scores[t] *= slots.value_scales[places[t]];
    }
    int d = 0;
    for (; d + kVectors * kWidth <= size.padded; d += kVectors * kWidth) {
      weigh_places<kWhole, kVectors>(slots.values, places, count, scores, size.size, slots.ahead,
                                     rescale, d, out);
    }
    for (; d < size.padded; d += kWidth) {
      weigh_places<kWhole, 1>(slots.values, places, count, scores, size.size, slots.ahead, rescale,
                              d, out);
    }
  }
}

// The 8-bit form of a row: codes and their scale, max |x| / 127; a row that is not finite gets a
// scale of NaN, one of zeros 0.
template <typename storage_t>
inline void store_coded(const storage_t* row, int size, int8_t* codes, float* scale) {
  using acc_t = Computed<storage_t>;
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  Vec<acc_t> largest = {};
  IVec<acc_t> number = largest == largest;
  for (int d = 0; d < size; d += kWidth) {
    const Vec<acc_t> x = row_at<acc_t, false>(row + d, size - d), magnitude = x < 0 ? -x : x;
    number &= x == x;
    largest = magnitude > largest ? magnitude : largest;
  }
  float found = static_cast<float>(max_of<acc_t>(largest)) / kMaxCode;
  for (int i = 0; i < kWidth; ++i) found = number[i] && found < INFINITY ? found : NAN;
  *scale = found;
  const bool coded = found > 0;
  for (int d = 0; d < size; d += kWidth) {
    const Vec<acc_t> x = row_at<acc_t, false>(row + d, size - d) / acc_t{coded ? found : 1};
    const Vec<acc_t> near = x + Exp2<acc_t>::kRound - Exp2<acc_t>::kRound;  // to nearest, even
    const IVec<acc_t> words = __builtin_convertvector(near, IVec<acc_t>);
    typename Lanes<acc_t>::word_t word[kWidth];
    int8_t some[kWidth];
    store(word, words);
    for (int i = 0; i < kWidth; ++i) some[i] = static_cast<int8_t>(coded ? word[i] : 0);
    std::memcpy(codes + d, some, size - d < kWidth ? size - d : kWidth);
  }
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
