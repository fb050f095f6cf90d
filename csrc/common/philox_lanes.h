// Philox of common/philox.h in parallel lanes, for the CPU kernels. No torch here.
#pragma once

#include "common/philox.h"
#include "common/vector.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

struct PhiloxKeys {
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];
};

inline PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
    keys.key0[r] = static_cast<uint32_t>(seed) + r * kPhiloxWeyl0;
    keys.key1[r] = static_cast<uint32_t>(seed >> 32) + r * kPhiloxWeyl1;
  }
  return keys;
}

// Words of kN times kLanes / 2 subsequences, one in each 64-bit lane. Only the low half of a lane
// counts; what stands in the high half falls out of the next product, so nothing is masked.
template <int kN>
struct PhiloxLanes {
  Wide c0[kN], c1[kN], c2[kN], c3[kN];

  PhiloxLanes(const Wide (&subsequence)[kN], const PhiloxKeys& keys) {
    // The first round knows that c0 = c1 = 0.
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      const Wide first = multiply_low(subsequence[j], Wide{} + kPhiloxMultiply1);
      c0[j] = (first >> 32) ^ (uint64_t)keys.key0[0];
      c1[j] = first;
      c2[j] = (subsequence[j] >> 32) ^ (uint64_t)keys.key1[0];
      c3[j] = Wide{};
    }
#pragma GCC unroll 9
    for (int r = 1; r < kPhiloxRounds; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) {
        const Wide product0 = multiply_low(c0[j], Wide{} + kPhiloxMultiply0);
        const Wide product1 = multiply_low(c2[j], Wide{} + kPhiloxMultiply1);
        c0[j] = (product1 >> 32) ^ c1[j] ^ (uint64_t)keys.key0[r];
        c1[j] = product1;
        c2[j] = (product0 >> 32) ^ c3[j] ^ (uint64_t)keys.key1[r];
        c3[j] = product0;
      }
    }
  }
};

// Low halves of `even` into the even 32-bit lanes, of `odd` into the odd ones.
inline Wide interleave(Wide even, Wide odd) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return (even & kLowHalf) | (odd << 32);
#else
  return (even << 32) | (odd & kLowHalf);
#endif
}

// Words of the 2 * kLanes * kN consecutive elements from 4 * call on.
template <int kN = 1>
inline void random_words(const PhiloxKeys& keys, uint64_t call, uint32_t* out) {
  constexpr int kCalls = kLanes / 2;
  // Calls of the lanes, in the order in which unpacking pairs of lanes gives consecutive elements.
  Wide lane_calls;
  for (int i = 0; i < kCalls; ++i) lane_calls[i] = (i % 2) * (kCalls / 2) + i / 2;
  Wide subsequence[kN];
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) subsequence[j] = lane_calls + (call + j * kCalls);
  const PhiloxLanes<kN> lanes(subsequence, keys);
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j, out += 2 * kLanes) {
    const Wide a = interleave(lanes.c0[j], lanes.c1[j]), b = interleave(lanes.c2[j], lanes.c3[j]);
#if DALLE_X86_BYTES == 64
    store(out, _mm512_unpacklo_epi64((__m512i)a, (__m512i)b));
    store(out + kLanes, _mm512_unpackhi_epi64((__m512i)a, (__m512i)b));
#elif DALLE_X86_BYTES == 32
    store(out, _mm256_unpacklo_epi64((__m256i)a, (__m256i)b));
    store(out + kLanes, _mm256_unpackhi_epi64((__m256i)a, (__m256i)b));
#elif DALLE_X86_BYTES == 16
    store(out, _mm_unpacklo_epi64((__m128i)a, (__m128i)b));
    store(out + kLanes, _mm_unpackhi_epi64((__m128i)a, (__m128i)b));
#else
    static_assert(kCalls == 2);
    const Wide first = {a[0], b[0]}, second = {a[1], b[1]};
    store(out, first);
    store(out + kLanes, second);
#endif
  }
}

// Random words of two vectors of neighbouring elements, from 4 * call on.
struct TwoWords {
  Word word[2];
};

inline TwoWords two_words(const PhiloxKeys& keys, uint64_t call) {
  uint32_t words[2 * kLanes];
  random_words(keys, call, words);
  return {{load(words), load(words + kLanes)}};
}

}  // namespace
}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle
