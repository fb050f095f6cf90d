// What a task keeps of its samples between chunks of keys: queries, the online softmax and its sum
// of values. Included by decode_attention_cpu.h only.
#pragma once

#include <cmath>  // INFINITY

#include "common/micro_tile.h"
#include "common/operands.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int kChunk = 64;  // keys between two updates of the running maximum
template <typename acc_t>
constexpr int kSamples = kMicroVectors * Lanes<acc_t>::kWidth;  // of a task

template <typename operand_t>
struct DecodeSpace {
  using acc_t = Sum<operand_t>;
  operand_t *q, *q_across, *keys, *keys_across, *values, *weights;
  acc_t *scores, *q_image, *out, *m, *l, *most, *shift, *rescale, *sum;
  int32_t* places;

  DecodeSpace(Carver& carver, const HeadSize<operand_t>& size, int64_t most_places) {
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
    out = carver.take<acc_t>(kRows * size.padded);  // [samples][padded], sum of weights * values
    m = carver.take<acc_t>(kRows);                  // running maximum of the scores
    l = carver.take<acc_t>(kRows);                  // running sum of the weights
    most = carver.take<acc_t>(kRows);               // of the chunk
    shift = carver.take<acc_t>(kRows);              // m, or 0 where m is -inf
    rescale = carver.take<acc_t>(kRows);            // 2^(old m - new m)
    sum = carver.take<acc_t>(kRows);                // weights of the chunk
    places = carver.take<int32_t>(most_places);     // that the slot reads
  }

  void start(int padded) {
    for (int r = 0; r < kSamples<acc_t>; ++r) m[r] = -INFINITY;
    std::memset(l, 0, sizeof(acc_t) * kSamples<acc_t>);
    std::memset(out, 0, sizeof(acc_t) * kSamples<acc_t> * padded);
  }

  // The new maxima, for `lanes` samples.
  void meet_maxima(int lanes) {
    const Vec<acc_t> minus_infinity = splat<acc_t>(-INFINITY);
    for (int r = 0; r < lanes; r += Lanes<acc_t>::kWidth) {
      const Vec<acc_t> m_old = load(m + r), chunk = load(most + r);
      const Vec<acc_t> m_new = chunk > m_old ? chunk : m_old;
      // Where there was no key yet there is no maximum; 0 keeps -inf - (-inf) away.
      const Vec<acc_t> safe = m_new == minus_infinity ? Vec<acc_t>{} : m_new;
      store(rescale + r, exp2_of<acc_t>(m_old - safe));
      store(m + r, m_new);
      store(shift + r, safe);
    }
  }
  void add_sums(int lanes) {
    for (int r = 0; r < lanes; r += Lanes<acc_t>::kWidth) {
      store(l + r, load(l + r) * load(rescale + r) + load(sum + r));
    }
  }
};

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
