// What a thread keeps: queries, the online softmax over the text and over the image slots, and how
// the two are merged. Included by decode_attention_cpu.h only.
#pragma once

#include <cmath>  // INFINITY

#include "common/micro_tile.h"
#include "common/operands.h"
#include "decode_attention/decode_attention.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int kChunk = 64;  // keys between two updates of the running maximum
template <typename acc_t>
constexpr int kSamples = kMicroVectors * Lanes<acc_t>::kWidth;  // of a task

// Heads, and tiles of kSamples, whose first softmax is kept until the second is there.
constexpr int kHeads = 16, kTiles = 2;

// A softmax over some keys, for each of some samples: the largest score m, the sum l of the weights
// 2^(score - m), and the sum `out` of weights * values, [padded].
template <typename acc_t>
struct Sums {
  acc_t *m, *l, *out;

  Sums row(int64_t r, int padded) const { return {m + r, l + r, out + r * padded}; }
};

template <typename acc_t>
inline Sums<acc_t> take_sums(Carver& carver, int rows, int padded) {
  acc_t* const m = carver.take<acc_t>(rows);
  acc_t* const l = carver.take<acc_t>(rows);
  return {m, l, carver.take<acc_t>(int64_t{rows} * padded)};
}

template <typename acc_t>
inline void keep(const Sums<acc_t>& from, int padded, const Sums<acc_t>& to) {
  *to.m = *from.m, *to.l = *from.l;
  std::memcpy(to.out, from.out, sizeof(acc_t) * padded);
}

template <typename T>
inline void prefetch(const T* from, int64_t count) {
  const char* const bytes = reinterpret_cast<const char*>(from);
  for (size_t i = 0; i < count * sizeof(T); i += 64) __builtin_prefetch(bytes + i);
}

// The softmax over both sets of keys, for one sample; the same bits whichever was computed first.
template <typename storage_t, typename acc_t>
inline void merge(const Sums<acc_t>& text, const Sums<acc_t>& image, int size, storage_t* out) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  // In vectors: a branch on m would be mispredicted.
  const Vec<acc_t> m_text = splat(*text.m), m_image = splat(*image.m);
  const Vec<acc_t> m = m_text > m_image ? m_text : m_image;
  const Vec<acc_t> shift = m == splat<acc_t>(-INFINITY) ? Vec<acc_t>{} : m;
  Vec<acc_t> share[2] = {m_text - shift, m_image - shift};
  exp2_of<acc_t>(share);
  const acc_t of_text = share[0][0], of_image = share[1][0];
  const acc_t inverse = 1 / (*text.l * of_text + *image.l * of_image);
  for (int d = 0; d < size; d += kWidth) {
    const int some = size - d < kWidth ? size - d : kWidth;
    const Vec<acc_t> sum = load(text.out + d) * of_text + load(image.out + d) * of_image;
    store_up_to(out + d, some, inverse * sum);
  }
}

template <typename operand_t>
struct DecodeSpace {
  using acc_t = Sum<operand_t>;
  operand_t *q, *q_across, *keys, *keys_across, *values, *weights;
  acc_t *scores, *q_image, *most, *shift, *rescale, *sum;
  Sums<acc_t> kept, now;  // of kTiles * kRows samples and kHeads, and of the kRows at work
  DecodeRange* pieces;    // that the slot reads, cut where a chunk is full
  int num_pieces = 0;

  DecodeSpace(Carver& carver, const HeadSize<operand_t>& size, const DecodeAttentionParams& p) {
    constexpr int kRows = kSamples<acc_t>;
    q = carver.take<operand_t>(kRows * size.words);             // [samples][words]
    q_across = carver.take<operand_t>(kRows * size.words);      // [words][samples]
    keys = carver.take<operand_t>(kChunk * size.words);         // [keys][words]
    keys_across = carver.take<operand_t>(kChunk * size.words);  // [words][keys]
    values = carver.take<operand_t>(kChunk / kElements<operand_t> * size.padded);
    scores = carver.take<acc_t>(kChunk * kRows);  // [keys][samples], or [samples][keys] of few
    // 2^(score - m) as operands: a word holds kElements neighbours along the keys.
    if constexpr (kElements<operand_t> == 1) weights = scores;
    if constexpr (kElements<operand_t> == 2) weights = carver.take<operand_t>(kChunk * kRows / 2);
    q_image = carver.take<acc_t>(size.padded);
    most = carver.take<acc_t>(kRows);     // of the chunk
    shift = carver.take<acc_t>(kRows);    // m, or 0 where m is -inf
    rescale = carver.take<acc_t>(kRows);  // 2^(old m - new m)
    sum = carver.take<acc_t>(kRows);      // weights of the chunk
    pieces =
        carver.take<DecodeRange>(decode_num_ranges(p.rule) + decode_most_keys(p.rule) / kChunk);
    const int rows = p.samples < kTiles * kRows ? p.samples : kTiles * kRows;
    kept = take_sums<acc_t>(carver, kHeads * rows, size.padded);
    now = take_sums<acc_t>(carver, kRows, size.padded);
  }

  void find_pieces(const AttentionRule& rule, int32_t slot) {
    int32_t room = kChunk;
    for (int i = 0; i < decode_num_ranges(rule); ++i) {
      const DecodeRange range = decode_range(rule, slot, i);
      for (int32_t begin = range.begin, end; begin < range.end; begin = end) {
        end = range.end - begin < room ? range.end : begin + room;
        pieces[num_pieces++] = {begin, end};
        room = room == end - begin ? kChunk : room - (end - begin);
      }
    }
  }

  // The new maxima, for `lanes` samples.
  void meet_maxima(const Sums<acc_t>& text, int lanes) {
    const Vec<acc_t> minus_infinity = splat<acc_t>(-INFINITY);
    for (int r = 0; r < lanes; r += Lanes<acc_t>::kWidth) {
      const Vec<acc_t> m_old = load(text.m + r), chunk = load(most + r);
      const Vec<acc_t> m_new = chunk > m_old ? chunk : m_old;
      // Where there was no key yet there is no maximum; 0 keeps -inf - (-inf) away.
      const Vec<acc_t> safe = m_new == minus_infinity ? Vec<acc_t>{} : m_new;
      store(rescale + r, exp2_of<acc_t>(m_old - safe));
      store(text.m + r, m_new);
      store(shift + r, safe);
    }
  }
  void add_sums(const Sums<acc_t>& text, int lanes) {
    for (int r = 0; r < lanes; r += Lanes<acc_t>::kWidth) {
      store(text.l + r, load(text.l + r) * load(rescale + r) + load(sum + r));
    }
  }
};

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
