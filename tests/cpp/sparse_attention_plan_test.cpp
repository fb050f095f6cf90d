// The plan of a walk against list scheduling of every number of parts, with each number of blocks a
// multiprocessor: what it predicts is what happens, and nothing ends much earlier. Compiled and run
// by tests/ops/test_sparse_attention_plan.py.
#include "sparse_attention/sparse_attention_plan.h"

#include <cstdio>

using namespace dalle;

namespace {

constexpr DeviceLimits kA100 = {108, 163 << 10, 164 << 10, 1 << 10};
constexpr DeviceLimits kH100 = {132, 227 << 10, 228 << 10, 1 << 10};
constexpr int64_t kStatic = 1024;
int failures = 0;

void expect(bool holds, const char* what, const WalkShape& shape, const AttentionRule& rule,
            double got) {
  if (holds || ++failures > 20) return;
  std::printf("FAIL %s: kind %d, text %d, heads %ld, length %d, queries %d, pair %ld: got %g\n",
              what, static_cast<int>(rule.kind), rule.text_len, long(shape.heads), shape.length,
              shape.queries, long(shape.pair_bytes), got);
}

// The slow and plain way: each block goes to the one of `num_running` that is free first.
double schedule(const std::vector<double>& blocks, int64_t heads, int64_t num_running) {
  std::vector<double> free(static_cast<size_t>(num_running), 0.0);
  for (int64_t head = 0; head < heads; ++head) {
    for (const double time : blocks) *std::min_element(free.begin(), free.end()) += time;
  }
  return *std::max_element(free.begin(), free.end());
}

double schedule(const AttentionRule& rule, const WalkShape& shape, const DeviceLimits& device,
                int64_t parts, int64_t resident, int64_t side_by_side) {
  const std::vector<double> steps = step_times(rule, shape, side_by_side, resident);
  const double fixed = walk_costs(shape, side_by_side, resident).fixed;
  return schedule(block_times(steps, parts, fixed), shape.heads,
                  side_by_side * device.multiprocessors);
}

// Tiles that fit beside the slots; negative where the slots do not.
int64_t spare_tiles(const WalkShape& shape, const DeviceLimits& device, int64_t side_by_side) {
  int64_t tiles = -1 - kSlots;
  while ((tiles + 1 + kSlots) * shape.pair_bytes + kStatic <= device.shared_per_block &&
         side_by_side *
                 ((tiles + 1 + kSlots) * shape.pair_bytes + kStatic + device.shared_reserved) <=
             device.shared_per_multiprocessor) {
    ++tiles;
  }
  return tiles;
}

// Returns how much longer the former rule takes: ceil(264 / heads) parts.
double check(const AttentionRule& rule, const WalkShape& shape, const DeviceLimits& device) {
  const int64_t steps = ceil_div(shape.length, shape.queries), text = ceil_div(rule.text_len, 64);
  const WalkPlan plan = find_walk_plan(rule, shape, device);
  if (plan.parts < 1 || plan.parts > steps) {
    expect(false, "1 <= parts <= steps", shape, rule, double(plan.parts));
    return 1;
  }
  expect(plan.resident == std::min(text, spare_tiles(shape, device, plan.per_multiprocessor)),
         "as much text as fits", shape, rule, double(plan.resident));
  const double mine =
      schedule(rule, shape, device, plan.parts, plan.resident, plan.per_multiprocessor);
  expect(plan.makespan >= mine * (1 - 1e-9) && plan.makespan < 1.07 * mine,
         "the makespan of list scheduling", shape, rule, plan.makespan / mine);
  double least = mine;
  for (const int64_t side_by_side : {1, 2}) {
    const int64_t fits = spare_tiles(shape, device, side_by_side);
    for (int64_t parts = 1; parts <= steps && fits >= 0; ++parts) {
      least =
          std::min(least, schedule(rule, shape, device, parts, std::min(text, fits), side_by_side));
    }
  }
  expect(mine <= 1.05 * least, "nothing ends 5 % earlier", shape, rule, mine / least);
  const int64_t former = std::clamp<int64_t>(ceil_div(264, shape.heads), 1, steps);
  return schedule(rule, shape, device, former, plan.resident, plan.per_multiprocessor) / mine;
}

AttentionRule rule_of(AttentionKind kind, int32_t text, int32_t side) {
  AttentionRule rule = {kind, text, side, side, 1, {}};
  rule.runs[1] = 5 * side + 6;
  return rule;
}

}  // namespace

int main() {
  double worst = 0;
  for (const AttentionKind kind : {AttentionKind::kRow, AttentionKind::kColumn,
                                   AttentionKind::kOffsets, AttentionKind::kCausal}) {
    for (const auto& [text, side] : {std::pair{256, 32}, {0, 23}, {1030, 8}, {1, 1}}) {
      for (const int32_t head : {64, 128}) {
        for (const int64_t heads : {1, 31, 62, 128, 248, 300}) {
          const AttentionRule rule = rule_of(kind, text, side);
          const WalkShape shape = {heads, text + side * side, head <= 64 ? 128 : 64, 256 * head,
                                   kStatic};
          for (const DeviceLimits& device : {kA100, kH100}) {
            const double former = check(rule, shape, device);
            if (text == 256 && head == 64 && device.multiprocessors == 132) {
              worst = std::max(worst, former);
            }
          }
        }
      }
    }
  }
  // The size of the paper: two blocks a multiprocessor for every head size, on both.
  const AttentionRule paper = rule_of(AttentionKind::kRow, 256, 32);
  for (const auto& [head, old_text, new_text] :
       {std::tuple{32, 4, 4}, {64, 3, 4}, {80, 2, 3}, {96, 1, 2}, {128, 0, 1}}) {
    const WalkShape shape = {496, 1280, head <= 64 ? 128 : 64, 256 * head, kStatic};
    const WalkPlan a = find_walk_plan(paper, shape, kA100), b = find_walk_plan(paper, shape, kH100);
    expect(a.per_multiprocessor == 2 && a.resident == old_text, "two blocks", shape, paper,
           double(a.resident));
    expect(b.per_multiprocessor == 2 && b.resident == new_text, "two blocks", shape, paper,
           double(b.resident));
  }
  // 99 KiB of shared memory a block, 100 KiB a multiprocessor: two blocks only of small heads.
  constexpr DeviceLimits kSm120 = {170, 99 << 10, 100 << 10, 1 << 10};
  for (const auto& [head, text, side_by_side] : {std::tuple{32, 4, 2}, {64, 1, 2}, {128, 1, 1}}) {
    const WalkShape shape = {496, 1280, head <= 64 ? 128 : 64, 256 * head, kStatic};
    const WalkPlan plan = find_walk_plan(paper, shape, kSm120);
    expect(plan.per_multiprocessor == side_by_side && plan.resident == text, "sm_120", shape, paper,
           double(plan.resident));
  }
  const WalkShape few = {8, 1280, 128, 256 * 64, kStatic};
  const WalkPlan alone = find_walk_plan(paper, few, kH100);
  expect(alone.per_multiprocessor == 1 && alone.resident == 4, "few blocks: one a multiprocessor",
         few, paper, double(alone.per_multiprocessor));
  const DeviceLimits small = {1, 48 << 10, 48 << 10, 0};
  expect(find_walk_plan(paper, {1, 1280, 64, 32 << 10, kStatic}, small).parts == 0,
         "no room for the slots", {}, paper, 0);
  const WalkPlan many = find_walk_plan(paper, {1 << 20, 1280, 128, 16 << 10, kStatic}, kH100);
  expect(many.parts == 1, "many heads: one block each", {}, paper, double(many.parts));
  const WalkShape long_shape = {1, (1 << 25) - 1, 128, 16 << 10, kStatic};
  const WalkPlan longest = plan_walk(rule_of(AttentionKind::kRow, 0, 5792), long_shape, kH100);
  expect(longest.parts <= kMaxParts && longest.parts >= 132, "the longest walk", long_shape, paper,
         double(longest.parts));
  std::printf("ceil(264 / heads) takes up to %.2f times as long\n", worst);
  return failures ? 1 : 0;
}
