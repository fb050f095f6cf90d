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
// 0, 1, 2 ...
template <typename acc_t, size_t... kLane>
inline IVec<acc_t> lane_numbers(std::index_sequence<kLane...>) {
  return IVec<acc_t>{kLane...};
}

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

// The channels of a row: kFixed of them, or a number known at run time, of whole vectors with
// kWhole. What a core has in flight is bounded by its reorder buffer, so every instruction between
// two loads of a stream costs bandwidth: no loop over channels where their number is known.
template <int kFixed, bool kWhole>
struct Channels {
  int count;
  static constexpr bool kAll = kWhole;
  int operator()() const { return kFixed > 0 ? kFixed : count; }
};

constexpr int64_t kAheadBytes = 6144;  // prefetch distance in a stream

// sums[rows][lanes] = the products of q with so many rows of keys, lane by lane. One row a turn and
// no table of addresses: the hardware prefetcher sees one stride.
template <typename acc_t, typename stored_t, typename channels_t>
inline void score_rows(const stored_t* row, int rows, const acc_t* q, channels_t channels,
                       int64_t ahead, acc_t* sums) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  const int size = channels();
#pragma GCC unroll 1
  for (int t = 0; t < rows; ++t, row += size, sums += kWidth) {
    prefetch(row + ahead, size);
    Vec<acc_t> sum = {};
#pragma GCC unroll 16
    for (int d = 0; d < size; d += kWidth) {
      sum += row_at<acc_t, channels_t::kAll>(row + d, size - d) * load(q + d);
    }
    store(sums, sum);
  }
}

// Scores of `count` keys from their sums, as whole vectors with -inf behind, an even number of
// them, whose lanes are returned.
template <typename acc_t>
inline int add_lanes(const acc_t* sums, int count, acc_t factor, acc_t* scores) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  const IVec<acc_t> lane = lane_numbers<acc_t>(std::make_index_sequence<kWidth>{});
  int t = 0;
  for (; t < count; t += kWidth) {
    Vec<acc_t> sum[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) sum[i] = load(sums + (t + i) * kWidth);
    const Vec<acc_t> found = sums_of<acc_t>(sum) * factor;
    store(scores + t, lane < count - t ? found : splat<acc_t>(-INFINITY));
  }
  if (t / kWidth % 2 == 1) {
    store(scores + t, splat<acc_t>(-INFINITY));
    t += kWidth;
  }
  return t;
}

// sum += weights * rows, kVectors vectors wide. With registers enough there are two sums, of every
// other row, so that products need not wait for one another.
template <int kVectors>
constexpr int kSets = kVectors == 4 ? 2 : 1;
template <int kVectors, typename acc_t, typename stored_t, typename channels_t>
inline void weigh_rows(const stored_t* row, int rows, const acc_t* weights, channels_t channels,
                       int left, int64_t ahead, Vec<acc_t> (&sum)[kSets<kVectors>][kVectors]) {
  constexpr int kWidth = Lanes<acc_t>::kWidth, kTurn = kSets<kVectors>;
  const int size = channels();
  const auto add = [&](Vec<acc_t>(&to)[kVectors]) DALLE_INLINE {
    const Vec<acc_t> weight = splat(*weights++);
    prefetch(row + ahead, kVectors * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      to[j] += weight * row_at<acc_t, channels_t::kAll>(row + j * kWidth, left - j * kWidth);
    }
    row += size;
  };
#pragma GCC unroll 1
  for (int t = 0; t + kTurn <= rows; t += kTurn) {
#pragma GCC unroll 2
    for (int i = 0; i < kTurn; ++i) add(sum[i]);
  }
  if (rows % kTurn != 0) add(sum[0]);
}

// Keys and values of one sample and head, and their scales where they are codes.
template <typename stored_t>
struct SampleSlots {
  const stored_t *keys, *values;
  const float *key_scales, *value_scales;
  int64_t ahead;  // elements from a row to the one that is prefetched meanwhile
};

// The softmax over the slots of space.pieces, of the query in space.q_image.
template <typename channels_t, typename stored_t, typename operand_t>
inline void attend_image(const SampleSlots<stored_t>& slots, channels_t channels,
                         const HeadSize<operand_t>& size, Sum<operand_t> factor,
                         const DecodeSpace<operand_t>& space, const Sums<Sum<operand_t>>& image) {
  using acc_t = Sum<operand_t>;
  constexpr int kWidth = Lanes<acc_t>::kWidth, kVectors = kBytes == 64 ? 4 : 8;
  constexpr bool kCoded = std::is_same_v<stored_t, int8_t>;
  alignas(64) acc_t sums[kChunk * kWidth], scores[kChunk];
  acc_t m = -INFINITY, l = 0;
  const DecodeRange* const end = space.pieces + space.num_pieces;
  for (const DecodeRange *first = space.pieces, *last = first; first != end; first = last) {
    int count = 0;
    for (; last != end && count < kChunk; ++last) {  // a chunk is full, or the last
      const int rows = last->end - last->begin;
      score_rows(slots.keys + int64_t{last->begin} * channels(), rows, space.q_image, channels,
                 slots.ahead, sums + count * kWidth);
      count += rows;
    }
    const auto scale_by = [&](const float* scales) DALLE_INLINE {
      if constexpr (std::is_same_v<acc_t, float>) {
        if (last - first == 1) {  // of the kinds that keep codes always
          for (int t = 0; t < count; t += kWidth) {
            const int some = count - t < kWidth ? count - t : kWidth;
            store(scores + t, load(scores + t) * load_up_to(scales + first->begin + t, some, 1));
          }
          return;
        }
      }
      acc_t* score = scores;
      for (const DecodeRange* piece = first; piece != last; ++piece) {
        for (int32_t c = piece->begin; c < piece->end; ++c) *score++ *= scales[c];
      }
    };
    const int padded = add_lanes(sums, count, factor, scores);
    if constexpr (kCoded) scale_by(slots.key_scales);
    Vec<acc_t> most = splat<acc_t>(-INFINITY);
    for (int t = 0; t < padded; t += kWidth) {
      const Vec<acc_t> s = load(scores + t);
      most = s > most ? s : most;
    }
    const bool again = first != space.pieces;
    const acc_t m_old = m, chunk = max_of<acc_t>(most);
    m = chunk > m_old ? chunk : m_old;
    const acc_t shift = m == -INFINITY ? 0 : m;
    const acc_t rescale = again ? exp2_of<acc_t>(splat<acc_t>(m_old - shift))[0] : 0;
    Vec<acc_t> sum = {};
    for (int t = 0; t < padded; t += 2 * kWidth) {
      Vec<acc_t> e[2] = {load(scores + t) - shift, load(scores + t + kWidth) - shift};
      exp2_of<acc_t>(e);
      sum += e[0], sum += e[1];
      store(scores + t, e[0]), store(scores + t + kWidth, e[1]);
    }
    l = l * rescale + sum_of<acc_t>(sum);
    if constexpr (kCoded) scale_by(slots.value_scales);
    const auto weigh = [&](auto vectors, int d) DALLE_INLINE {
      constexpr int kSome = decltype(vectors)::value, kTurn = kSets<kSome>;
      Vec<acc_t> sum[kTurn][kSome] = {};
      const acc_t* weights = scores;
      for (const DecodeRange* piece = first; piece != last; ++piece) {
        const int rows = piece->end - piece->begin;
        weigh_rows<kSome>(slots.values + int64_t{piece->begin} * channels() + d, rows, weights,
                          channels, channels() - d, slots.ahead, sum);
        weights += rows;
      }
#pragma GCC unroll 8
      for (int j = 0; j < kSome; ++j) {
        acc_t* to = image.out + d + j * kWidth;
        const Vec<acc_t> all = kTurn == 2 ? sum[0][j] + sum[kTurn - 1][j] : sum[0][j];
        store(to, again ? load(to) * rescale + all : all);
      }
    };
    int d = 0;
    for (; d + kVectors * kWidth <= size.padded; d += kVectors * kWidth) {
      weigh(std::integral_constant<int, kVectors>{}, d);
    }
    for (; d < size.padded; d += kWidth) weigh(std::integral_constant<int, 1>{}, d);
  }
  *image.m = m, *image.l = l;
}

// to[size] = from, in vectors as wide as those that will load it: a load that takes from several
// stores waits until they have left the store buffer.
template <typename storage_t>
inline void copy_row(const storage_t* from, int size, storage_t* to) {
  typedef char Bytes __attribute__((vector_size(kBytes)));
  constexpr int kElementsOf = kBytes / sizeof(storage_t);
  int d = 0;
  for (; d + kElementsOf <= size; d += kElementsOf) {
    store(to + d, load_as<Bytes>(from + d));
  }
  if (d < size) std::memcpy(to + d, from + d, sizeof(storage_t) * (size - d));
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
