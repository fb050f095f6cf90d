// The rules of sparse attention that host and device share: which key a query sees, in which order
// the CPU kernel walks the stream, how tensors are described. No torch here.
//
// Letters: B batch, H heads, T positions, D head size. A stream is text_len text positions, then
// rows * columns image positions in raster order (paper, section 2.2 and Figure 11).
//
// Every rule below asks for the kind by a switch without default, and the builds take -Wswitch for
// an error: a new kind compiles once each of them has an answer.
#pragma once

#include "common/element.h"
#include "common/host_device.h"

namespace dalle {

enum class AttentionKind : int32_t { kRow, kColumn, kOffsets, kCausal };

// What callers call them. The convolution is a list of offsets too, which Python has made.
struct AttentionKindName {
  const char* name;
  AttentionKind kind;
};
constexpr AttentionKindName kAttentionKinds[] = {{"row", AttentionKind::kRow},
                                                 {"column", AttentionKind::kColumn},
                                                 {"conv", AttentionKind::kOffsets},
                                                 {"causal", AttentionKind::kCausal},
                                                 {"offsets", AttentionKind::kOffsets}};

constexpr int kMaxRuns = 128;  // runs of a kOffsets rule; odd convolutions up to 253 fit
constexpr int kMaxHeadSize = 256;

// Which keys a query sees. A kOffsets rule is data: the image distances that it attends, as
// half-open runs.
struct AttentionRule {
  AttentionKind kind;
  int32_t text_len, rows, columns;
  int32_t num_runs;
  int32_t runs[2 * kMaxRuns];  // begin, end, begin, end, ...
};

// One (B, H, T, D) tensor with contiguous D; strides in elements.
struct AttentionRows {
  void* data;
  int64_t batch, head, row;
};

// Everything a kernel needs. The forward writes out and lse; the backward reads them and grad_out
// and writes grad_q, grad_k, grad_v. lse is (B, H, T) contiguous, natural log, double: its
// fraction decides the last bits of every probability that the backward makes again.
struct SparseAttentionParams {
  AttentionRule rule;
  ElementKind type;  // kFloat, kDouble, kHalf or kBFloat16
  int32_t batch, heads, length, head_size;
  double scale;
  AttentionRows q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  double* lse;
};

// Whether the rule reads its runs. The others are ranges of the walk, in closed form.
DALLE_HOST_DEVICE bool reads_runs(AttentionKind kind) {
  switch (kind) {
    case AttentionKind::kRow:
    case AttentionKind::kColumn:
    case AttentionKind::kCausal:
      return false;
    case AttentionKind::kOffsets:
      break;
  }
  return true;
}

// One more than the largest attended distance of a kOffsets rule.
DALLE_HOST_DEVICE int32_t end_of_runs(const AttentionRule& rule) {
  return rule.runs[2 * rule.num_runs - 1];
}

// Whether the image distance `offset` = query - key >= 0 is attended.
DALLE_HOST_DEVICE bool attends_offset(const AttentionRule& rule, int32_t offset) {
  switch (rule.kind) {
    case AttentionKind::kRow:
      return offset <= rule.columns;
    case AttentionKind::kColumn:
      return offset % rule.columns == 0;
    case AttentionKind::kCausal:
      return true;
    case AttentionKind::kOffsets:
      break;
  }
  for (int32_t i = 0; i < rule.num_runs; ++i) {
    if (offset < rule.runs[2 * i]) return false;
    if (offset < rule.runs[2 * i + 1]) return true;
  }
  return false;
}

// Whether the query at position q_idx of the stream sees the key at position k_idx.
DALLE_HOST_DEVICE bool attends(const AttentionRule& rule, int32_t q_idx, int32_t k_idx) {
  if (k_idx > q_idx) return false;
  return k_idx < rule.text_len || attends_offset(rule, q_idx - k_idx);
}

// The first image key at or after k_idx that the query at q_idx may see; q_idx + 1 or more if there
// is none. Text keys are k_idx < min(text_len, q_idx + 1).
DALLE_HOST_DEVICE int32_t next_image_key(const AttentionRule& rule, int32_t q_idx, int32_t k_idx) {
  switch (rule.kind) {
    case AttentionKind::kRow:
      return k_idx < q_idx - rule.columns ? q_idx - rule.columns : k_idx;
    case AttentionKind::kColumn: {
      const int32_t remainder = q_idx < k_idx ? 0 : (q_idx - k_idx) % rule.columns;
      return k_idx + remainder;
    }
    case AttentionKind::kCausal:
    case AttentionKind::kOffsets:
      break;
  }
  while (k_idx <= q_idx && !attends_offset(rule, q_idx - k_idx)) ++k_idx;
  return k_idx;
}

// The same for a key: the first image query at or after q_idx >= k_idx that may see the key at
// k_idx; `length` or more if there is none.
DALLE_HOST_DEVICE int32_t next_image_query(const AttentionRule& rule, int32_t length, int32_t k_idx,
                                           int32_t q_idx) {
  switch (rule.kind) {
    case AttentionKind::kRow:
      return q_idx <= k_idx + rule.columns ? q_idx : length;
    case AttentionKind::kColumn: {
      const int32_t remainder = (q_idx - k_idx) % rule.columns;
      return remainder == 0 ? q_idx : q_idx + rule.columns - remainder;
    }
    case AttentionKind::kCausal:
    case AttentionKind::kOffsets:
      break;
  }
  while (q_idx < length && !attends_offset(rule, q_idx - k_idx)) ++q_idx;
  return q_idx;
}

// The kernels walk the stream in an order of their own: kColumn takes the columns of the image one
// after another, so that the keys of a query are neighbours; the others keep the stream's order.
// Returns the position in the stream of index `index` of the walk.
DALLE_HOST_DEVICE int32_t walked_position(const AttentionRule& rule, int32_t index) {
  switch (rule.kind) {
    case AttentionKind::kRow:
    case AttentionKind::kCausal:
    case AttentionKind::kOffsets:
      return index;
    case AttentionKind::kColumn:
      break;
  }
  if (index < rule.text_len) return index;
  const int32_t slot = index - rule.text_len;
  return rule.text_len + slot % rule.rows * rule.columns + slot / rule.rows;
}

// The smallest index of the walk whose image key is visible to a query at `index` or later;
// text_len where every earlier image key is. Monotone in `index`.
DALLE_HOST_DEVICE int32_t earliest_image_index(const AttentionRule& rule, int32_t index) {
  int32_t earliest = rule.text_len;
  if (index <= rule.text_len) return earliest;
  switch (rule.kind) {
    case AttentionKind::kRow:
      earliest = index - rule.columns;
      break;
    case AttentionKind::kColumn:
      earliest = index - (index - rule.text_len) % rule.rows;
      break;
    case AttentionKind::kOffsets:
      earliest = index - end_of_runs(rule) + 1;
      break;
    case AttentionKind::kCausal:
      break;
  }
  return earliest < rule.text_len ? rule.text_len : earliest;
}

// The largest index of a walk of `length` whose query sees the key at `index` or an earlier image
// key; for a text key the end of the walk.
DALLE_HOST_DEVICE int32_t latest_index(const AttentionRule& rule, int32_t length, int32_t index) {
  int32_t latest = length - 1;
  if (index < rule.text_len) return latest;
  switch (rule.kind) {
    case AttentionKind::kRow:
      latest = index + rule.columns;
      break;
    case AttentionKind::kColumn:
      latest = index - (index - rule.text_len) % rule.rows + rule.rows - 1;
      break;
    case AttentionKind::kOffsets:
      latest = index + end_of_runs(rule) - 1;
      break;
    case AttentionKind::kCausal:
      break;
  }
  return latest < length ? latest : length - 1;
}

}  // namespace dalle
