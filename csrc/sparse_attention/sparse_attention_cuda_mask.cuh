// The mask of a tile, in indices of the walk (walked_position of sparse_attention.h): one word of
// bits for 32 neighbours, from which a warp decides whether a tile is skipped, masked or full. Row,
// column and causal patterns are closed forms; other patterns read a table of their offsets, which
// each block keeps in shared memory. No torch here.
#pragma once

#include "common/simt.h"
#include "sparse_attention/sparse_attention.h"

namespace dalle {

constexpr int kOffsetWords = 256;                   // of the table
constexpr int kMaxReach = (kOffsetWords - 3) * 32;  // of offsets that fit

// The n lowest bits; n may lie outside of 0 .. 32.
__device__ __forceinline__ uint32_t low_bits(int32_t n) {
  return n <= 0 ? 0u : n >= 32 ? 0xffffffffu : (1u << n) - 1u;
}

// Bit i: whether begin <= first + i < end.
__device__ __forceinline__ uint32_t range_bits(int32_t first, int32_t begin, int32_t end) {
  return low_bits(end - first) & ~low_bits(begin - first);
}

struct AttentionMask {
  const AttentionRule& rule;
  int32_t length;
  const uint32_t* table;  // 32 zeros, then bit o: offset o is attended

  // Fills `words`, kOffsetWords of them in shared memory; a barrier has to follow.
  __device__ AttentionMask(const SparseAttentionParams& p, uint32_t* words)
      : rule(p.rule), length(p.length), table(words) {
    if (!by_table()) return;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kOffsetWords;
         i += static_cast<int32_t>(blockDim.x)) {
      uint32_t bits = 0;
      for (int32_t j = 0; j < rule.num_runs; ++j) {
        bits |= range_bits((i - 1) * 32, rule.runs[2 * j], rule.runs[2 * j + 1]);
      }
      words[i] = bits;
    }
  }

  __device__ __forceinline__ bool by_table() const { return reads_runs(rule.kind); }

  // Bit i: whether offset start + i is attended.
  __device__ __forceinline__ uint32_t offsets(int32_t start) const {
    const int32_t at = start < -32 ? 0 : start > kMaxReach ? kMaxReach + 32 : start + 32;
    return __funnelshift_r(table[at / 32], table[at / 32 + 1], static_cast<uint32_t>(at % 32));
  }

  // Bit i: whether the key at index first + i is visible to the query at index `query`; `earliest`
  // is the query's earliest_image_index.
  template <bool kTable>
  __device__ __forceinline__ uint32_t visible_keys(int32_t query, int32_t earliest,
                                                   int32_t first) const {
    const int32_t text = query < rule.text_len ? query + 1 : rule.text_len;
    uint32_t image = range_bits(first, earliest, query + 1);
    if (kTable) image &= __brev(offsets(query - first - 31));  // offsets fall as keys rise
    return image | low_bits(text - first);
  }

  // Bit i: whether the key at index `key` is visible to the query at index first + i; `latest` is
  // the key's latest_index.
  __device__ __forceinline__ uint32_t visible_queries(int32_t key, int32_t latest,
                                                      int32_t first) const {
    const uint32_t later = range_bits(first, key, latest + 1);
    if (key < rule.text_len || !by_table()) return later;
    return later & offsets(first - key);
  }

  // Whether every query of [query, last_query] sees every key of [key, last_key].
  __device__ __forceinline__ bool all_visible(int32_t query, int32_t last_query, int32_t key,
                                              int32_t last_key) const {
    if (last_key > query) return false;
    if (last_key < rule.text_len) return true;
    if (by_table()) return false;
    const int32_t earliest = earliest_image_index(rule, last_query);
    return key >= earliest || earliest <= rule.text_len;
  }
};

}  // namespace dalle
