// The tile walk of the CPU kernel, made once per rule: strips of 32 queries, and for each strip the
// tiles of 32 keys with anything in them. A tile is full (no mask) or carries one word of bits per
// query. Two-level like the layouts of the paper's kernels, so any rule is possible. No torch here.
#pragma once

#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "sparse_attention/sparse_attention_cpu.h"

namespace dalle {

struct AttentionTiles {
  AttentionRule rule;
  std::vector<int32_t> position;     // index in the walk -> position in the stream
  std::vector<int32_t> strip_begin;  // num_strips + 1 indices into tiles
  std::vector<AttentionTile> tiles;  // keys ascending within a strip
  std::vector<AttentionTileMask> masks;

  explicit AttentionTiles(const AttentionRule& r) : rule(r) {
    const int32_t length = r.text_len + r.rows * r.columns;
    for (int32_t i = 0; i < length; ++i) position.push_back(walked_position(r, i));
    const int32_t num_strips = static_cast<int32_t>(ceil_div(length, kTile));
    strip_begin.push_back(0);
    for (int32_t strip = 0; strip < num_strips; ++strip) {
      // Image panels between the text and the earliest visible image key are empty.
      const int32_t earliest = earliest_image_index(r, strip * kTile);
      for (int32_t panel = 0; panel <= strip; ++panel) {
        const int32_t first = panel * kTile, last = first + kTile - 1;
        if (first < r.text_len || last >= earliest) add_tile(strip, panel, length);
      }
      strip_begin.push_back(static_cast<int32_t>(tiles.size()));
    }
  }

  int32_t num_strips() const { return static_cast<int32_t>(strip_begin.size()) - 1; }

  AttentionTileView view() const {
    return {position.data(), strip_begin.data(), tiles.data(), masks.data(), num_strips()};
  }

  // For tests: counts[q][k] += 1 for every pair of stream positions the walk visits.
  void count_visits(uint8_t* counts) const {
    const int64_t length = static_cast<int64_t>(position.size());
    for (int32_t strip = 0; strip < num_strips(); ++strip) {
      for (int32_t t = strip_begin[strip]; t < strip_begin[strip + 1]; ++t) {
        for (int32_t i = 0; i < kTile * kTile; ++i) {
          const int32_t r = i / kTile, c = i % kTile;
          const int32_t q = strip * kTile + r, k = tiles[t].panel * kTile + c;
          const bool bit = tiles[t].mask < 0 || (masks[tiles[t].mask].rows[r] >> c & 1u);
          if (q < length && bit) ++counts[position[q] * length + position[k]];
        }
      }
    }
  }

 private:
  void add_tile(int32_t strip, int32_t panel, int32_t length) {
    if (strip * kTile >= rule.text_len && (panel + 1) * kTile <= rule.text_len) {
      tiles.push_back({panel, -1});
      return;
    }
    AttentionTileMask mask = {};
    bool any = false, full = true;
    for (int32_t r = 0; r < kTile && strip * kTile + r < length; ++r) {
      for (int32_t c = 0; c < kTile; ++c) {
        const int32_t q = strip * kTile + r, k = panel * kTile + c;
        const bool visible = k < length && attends(rule, position[q], position[k]);
        mask.rows[r] |= static_cast<uint32_t>(visible) << c;
        any |= visible;
        full &= visible;
      }
    }
    if (!any) return;
    tiles.push_back({panel, full ? -1 : static_cast<int32_t>(masks.size())});
    if (!full) masks.push_back(mask);
  }
};

inline bool same_rule(const AttentionRule& a, const AttentionRule& b) {
  return a.kind == b.kind && a.text_len == b.text_len && a.rows == b.rows &&
         a.columns == b.columns && a.num_runs == b.num_runs &&
         std::memcmp(a.runs, b.runs, 2 * sizeof(int32_t) * a.num_runs) == 0;
}

// The walk of `rule`, from a small cache: a model has a few rules and calls each in every layer.
inline std::shared_ptr<const AttentionTiles> attention_tiles(const AttentionRule& rule) {
  static std::mutex mutex;
  static std::list<std::shared_ptr<const AttentionTiles>> recent;
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = recent.begin(); it != recent.end(); ++it) {
    if (!same_rule((*it)->rule, rule)) continue;
    recent.splice(recent.begin(), recent, it);
    return recent.front();
  }
  recent.push_front(std::make_shared<const AttentionTiles>(rule));
  if (recent.size() > 32) recent.pop_back();
  return recent.front();
}

}  // namespace dalle
