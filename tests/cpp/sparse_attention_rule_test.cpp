// The rules of sparse_attention.h against `attends`, at every position of small streams: what the
// CUDA kernels skip and walk by them is right for every kind of pattern, a new one included.
// Compiled and run by tests/ops/test_sparse_attention_cpu.py.
#include <cstdio>
#include <vector>

#include "sparse_attention/sparse_attention.h"

using namespace dalle;

namespace {

int failures = 0;

void expect(bool holds, const char* kind, const char* rule, int32_t first, int32_t second) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAIL %s: %s at %d, %d\n", kind, rule, first, second);
}

void check(const char* kind, const AttentionRule& rule) {
  const int32_t text = rule.text_len, length = text + rule.rows * rule.columns;
  std::vector<int32_t> position, times(length, 0);
  for (int32_t p = 0; p < length; ++p) {
    position.push_back(walked_position(rule, p));
    const bool inside = position[p] >= 0 && position[p] < length;
    expect(inside && ++times[position[p]] == 1, kind, "walked_position: each once", p, position[p]);
    expect(p >= text || position[p] == p, kind, "walked_position: text as it lies", p, position[p]);
    if (!inside) return;
  }
  // By index in the walk. Without runs the visible keys of a query are a range, from the earliest
  // to its own index, and the queries of a key too, from its own index to the latest.
  const bool range = !reads_runs(rule.kind);
  for (int32_t q = text; q < length; ++q) {
    const int32_t earliest = earliest_image_index(rule, q);
    expect(q == text || earliest >= earliest_image_index(rule, q - 1), kind,
           "earliest_image_index: never falls", q, earliest);
    for (int32_t k = text; k < length; ++k) {
      const bool visible = attends(rule, position[q], position[k]);
      const int32_t latest = latest_index(rule, length, k);
      const bool by_query = k >= earliest && k <= q, by_key = q >= k && q <= latest;
      expect(range ? visible == by_query : !visible || by_query, kind, "earliest_image_index", q,
             k);
      expect(range ? visible == by_key : !visible || by_key, kind, "latest_index", q, k);
    }
  }
  for (int32_t k = 1; k < length; ++k) {
    expect(k == text || latest_index(rule, length, k) >= latest_index(rule, length, k - 1) ||
               k - 1 < text,
           kind, "latest_index: never falls", k, latest_index(rule, length, k));
  }
  // By position.
  for (int32_t q = text; q < length; ++q) {
    int32_t next = q + 1;
    for (int32_t k = q; k >= text; --k) {
      if (attends(rule, q, k)) next = k;
      const int32_t got = next_image_key(rule, q, k);
      expect(got == next || (next > q && got > q), kind, "next_image_key", q, k);
    }
  }
  for (int32_t k = text; k < length; ++k) {
    int32_t next = length;
    for (int32_t q = length - 1; q >= k; --q) {
      if (attends(rule, q, k)) next = q;
      const int32_t got = next_image_query(rule, length, k, q);
      expect(got == next || (next >= length && got >= length), kind, "next_image_query", q, k);
    }
  }
}

}  // namespace

int main() {
  constexpr int32_t kGrids[][2] = {{1, 1}, {1, 9}, {7, 1}, {4, 3}, {3, 4}, {5, 8}};
  for (const AttentionKindName& known : kAttentionKinds) {
    for (const auto& grid : kGrids) {
      for (const int32_t text_len : {0, 1, 6}) {
        AttentionRule rule = {known.kind, text_len, grid[0], grid[1], 2, {0, 1, 2, 6}};
        check(known.name, rule);
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
