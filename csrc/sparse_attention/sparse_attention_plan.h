// How the queries of B * H heads are dealt out to blocks, and how many text tiles a block keeps in
// shared memory: what ends first by list scheduling. No CUDA and no torch here. The times of its
// cost model are predicted from instruction and byte counts; none is measured on a GPU.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <queue>
#include <vector>

#include "common/device_limits.h"
#include "sparse_attention/sparse_attention.h"

namespace dalle {

constexpr int kTileSize = 64;  // keys or queries of a tile
constexpr int kSlots = 2;      // tiles of keys and values that pass through shared memory
constexpr int kMaxParts = 4096;
constexpr int kMaxScheduled = 16;  // blocks for each that can run at once; more are estimated

// The tiles of keys that a block visits for some of its queries, ascending.
struct TileRange {
  int32_t text_tiles;   // tiles with a text key
  int32_t first_image;  // the first one to visit of the others
  int32_t last;         // the one on the diagonal
};

DALLE_HOST_DEVICE TileRange tile_range(const AttentionRule& rule, int32_t length,
                                       int32_t first_query, int32_t num_queries) {
  const int32_t end = first_query + num_queries;
  const int32_t text_tiles = (rule.text_len + kTileSize - 1) / kTileSize;
  const int32_t earliest = earliest_image_index(rule, first_query) / kTileSize;
  return {text_tiles, earliest < text_tiles ? text_tiles : earliest,
          ((end < length ? end : length) - 1) / kTileSize};
}

struct WalkShape {
  int64_t heads;         // B * H
  int32_t length;        // queries of a head
  int32_t queries;       // of a step: what a block takes at a time
  int64_t pair_bytes;    // of a tile of keys and one of values
  int64_t static_bytes;  // of shared memory
};

struct WalkPlan {
  int64_t parts = 0;               // blocks of a head; 0 where the device has no room for the slots
  int64_t resident = 0;            // text tiles that a block keeps
  int64_t per_multiprocessor = 0;  // blocks that run side by side on one
  double makespan = 0;             // predicted, in visits
};

// The unit of time is one visit: a step's queries and a tile, two blocks side by side on the
// multiprocessor. It takes about 2,048 clocks of it, by shared memory (steps of 64 queries, heads
// of 128) or by tensor cores and exponentials (steps of 128, heads of 64).
struct WalkCosts {
  double visit, copy, step, fixed;
};

// A block alone on its multiprocessor is not twice as fast: nothing hides its softmax. Copies come
// from L2 at about 24 bytes a clock and multiprocessor: 32 KiB (64 queries) and 16 KiB (128
// queries) are 4/3 and 2/3 of a visit where two blocks copy.
inline WalkCosts walk_costs(const WalkShape& shape, int64_t per_multiprocessor, int64_t resident) {
  const double visit = per_multiprocessor == 1 ? 0.75 : 1.0;
  const double copy =
      (shape.queries >= 128 ? 2.0 / 3 : 4.0 / 3) * (per_multiprocessor == 1 ? 0.5 : 1.0);
  // A step loads its queries and stores their results; a block begins with its text.
  return {visit, copy, visit, visit + copy * static_cast<double>(resident)};
}

// The time of each step of a head. Copies run beside visits; what takes longer counts.
inline std::vector<double> step_times(const AttentionRule& rule, const WalkShape& shape,
                                      int64_t per_multiprocessor, int64_t resident) {
  const WalkCosts costs = walk_costs(shape, per_multiprocessor, resident);
  std::vector<double> times;
  for (int64_t query = 0; query < shape.length; query += shape.queries) {
    const TileRange range =
        tile_range(rule, shape.length, static_cast<int32_t>(query), shape.queries);
    const int64_t tiles = int64_t{range.last} + 1;
    const int64_t text = std::min<int64_t>(range.text_tiles, tiles);
    const int64_t image = std::max<int64_t>(tiles - range.first_image, 0);
    const int64_t copies = image + std::max<int64_t>(text - resident, 0);
    times.push_back(costs.step + std::max(costs.visit * static_cast<double>(text + image),
                                          costs.copy * static_cast<double>(copies)));
  }
  return times;
}

// The time of each of `parts` blocks of a head: block i takes steps i * n / parts up to
// (i + 1) * n / parts of n, as walk_queries does.
inline std::vector<double> block_times(const std::vector<double>& steps, int64_t parts,
                                       double fixed) {
  const int64_t n = static_cast<int64_t>(steps.size());
  std::vector<double> times(static_cast<size_t>(parts), fixed);
  for (int64_t i = 0; i < parts; ++i) {
    for (int64_t j = i * n / parts; j < (i + 1) * n / parts; ++j) times[i] += steps[j];
  }
  return times;
}

// When the last of heads * blocks.size() blocks ends, of which `num_running` run at once and the
// others follow in order. Gives up with infinity once it cannot end before `limit`.
inline double makespan(const std::vector<double>& blocks, int64_t heads, int64_t num_running,
                       double limit) {
  std::priority_queue<double, std::vector<double>, std::greater<double>> ends;
  double last = 0;
  for (int64_t head = 0; head < heads; ++head) {
    for (const double time : blocks) {
      double end = time;
      if (static_cast<int64_t>(ends.size()) == num_running) {
        end += ends.top();
        ends.pop();
      }
      if (end >= limit) return HUGE_VAL;
      ends.push(end);
      last = std::max(last, end);
    }
  }
  return last;
}

// The plan that ends first, of those with one block a multiprocessor and with two (which is what
// the registers allow), with as many text tiles as fit; the fewest parts among equals to 1 %.
inline WalkPlan find_walk_plan(const AttentionRule& rule, const WalkShape& shape,
                               const DeviceLimits& device) {
  WalkPlan best;
  for (const int64_t side_by_side : {2, 1}) {
    const int64_t shared_bytes =
        std::min(device.shared_per_block,
                 device.shared_per_multiprocessor / side_by_side - device.shared_reserved);
    const int64_t pairs = (shared_bytes - shape.static_bytes) / shape.pair_bytes;
    if (shared_bytes < shape.static_bytes || pairs < kSlots) continue;
    const int64_t resident = std::min(ceil_div(rule.text_len, kTileSize), pairs - kSlots);
    const std::vector<double> steps = step_times(rule, shape, side_by_side, resident);
    const double fixed = walk_costs(shape, side_by_side, resident).fixed;
    const double work = std::accumulate(steps.begin(), steps.end(), 0.0);  // of one head
    const int64_t num_running = side_by_side * device.multiprocessors;
    const double heads_per_block =
        static_cast<double>(shape.heads) / static_cast<double>(num_running);
    const int64_t max_parts = std::min<int64_t>(  // more only repeat the fixed part
        {static_cast<int64_t>(steps.size()), std::max<int64_t>(8 * num_running / shape.heads, 32),
         kMaxParts});
    for (int64_t parts = 1; parts <= max_parts; parts += 1 + parts / 32) {
      const double mean = heads_per_block * (work + fixed * static_cast<double>(parts));
      const double limit = best.parts ? 0.99 * best.makespan : HUGE_VAL;
      if (mean >= limit) break;  // it grows with parts
      const std::vector<double> blocks = block_times(steps, parts, fixed);
      // Of very many blocks, no schedule in order ends later than this.
      const double latest = mean + *std::max_element(blocks.begin(), blocks.end());
      const double ends = shape.heads * parts > kMaxScheduled * num_running
                              ? latest
                              : makespan(blocks, shape.heads, num_running, limit);
      if (ends < limit) best = {parts, resident, side_by_side, ends};
    }
  }
  return best;
}

// find_walk_plan, which takes up to a millisecond, once for every shape.
inline WalkPlan plan_walk(const AttentionRule& rule, const WalkShape& shape,
                          const DeviceLimits& device) {
  using Key = std::array<int64_t, 14>;
  const Key key = {static_cast<int64_t>(rule.kind),
                   rule.text_len,
                   rule.rows,
                   rule.columns,
                   reads_runs(rule.kind) ? end_of_runs(rule) : 0,
                   shape.heads,
                   shape.length,
                   shape.queries,
                   shape.pair_bytes,
                   shape.static_bytes,
                   device.multiprocessors,
                   device.shared_per_block,
                   device.shared_per_multiprocessor,
                   device.shared_reserved};
  static std::mutex one_thread;
  static std::map<Key, WalkPlan> plans;
  const std::lock_guard<std::mutex> lock(one_thread);
  const auto known = plans.find(key);
  if (known != plans.end()) return known->second;
  if (plans.size() >= 256) plans.clear();
  return plans[key] = find_walk_plan(rule, shape, device);
}

}  // namespace dalle
