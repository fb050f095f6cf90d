// The rules of sparse attention that host and device share: which key a query sees, in which order
// the CPU kernel walks the stream, how tensors are described. No torch here.
//
// Letters: B batch, H heads, T positions, D head size. A stream is text_len text positions, then
// rows * columns image positions in raster order (paper, section 2.2 and Figure 11).
#pragma once

#include "common/host_device.h"

namespace dalle {

enum class AttentionKind : int32_t { kRow, kColumn, kConv, kCausal };
enum class AttentionType : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

constexpr int kMaxRuns = 128;  // runs of offsets of a kConv rule; odd kernels up to 253 fit
constexpr int kMaxHeadSize = 256;

// Which keys a query sees. A kConv rule is data: the image distances it attends, as half-open runs.
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
  AttentionType type;
  int32_t batch, heads, length, head_size;
  double scale;
  AttentionRows q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  double* lse;
};

// Whether the image distance `offset` = query - key >= 0 is attended.
DALLE_HOST_DEVICE bool attends_offset(const AttentionRule& rule, int32_t offset) {
  if (rule.kind == AttentionKind::kRow) return offset <= rule.columns;
  if (rule.kind == AttentionKind::kColumn) return offset % rule.columns == 0;
  if (rule.kind == AttentionKind::kCausal) return true;
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

// The walk of one row of the dense kernel: the first image key at or after k_idx that the query at
// q_idx may see, q_idx + 1 or more if there is none. Text keys are k_idx < min(text_len, q_idx +
// 1).
DALLE_HOST_DEVICE int32_t next_image_key(const AttentionRule& rule, int32_t q_idx, int32_t k_idx) {
  if (rule.kind == AttentionKind::kRow) {
    return k_idx < q_idx - rule.columns ? q_idx - rule.columns : k_idx;
  }
  if (rule.kind == AttentionKind::kColumn) {
    const int32_t late = q_idx < k_idx ? 0 : (q_idx - k_idx) % rule.columns;
    return k_idx + late;
  }
  while (k_idx <= q_idx && !attends_offset(rule, q_idx - k_idx)) ++k_idx;
  return k_idx;
}

// The same for a key: the first image query at or after q_idx >= k_idx that may see the key at
// k_idx; `length` or more if there is none.
DALLE_HOST_DEVICE int32_t next_image_query(const AttentionRule& rule, int32_t length, int32_t k_idx,
                                           int32_t q_idx) {
  if (rule.kind == AttentionKind::kRow) return q_idx <= k_idx + rule.columns ? q_idx : length;
  if (rule.kind == AttentionKind::kColumn) {
    const int32_t past = (q_idx - k_idx) % rule.columns;
    return past == 0 ? q_idx : q_idx + rule.columns - past;
  }
  while (q_idx < length && !attends_offset(rule, q_idx - k_idx)) ++q_idx;
  return q_idx;
}

// Stream position of place `p` of the walk: columns are walked one after another by kColumn, so
// that the keys of a query are neighbours; everything else is walked as it lies.
DALLE_HOST_DEVICE int32_t walked_position(const AttentionRule& rule, int32_t p) {
  if (rule.kind != AttentionKind::kColumn || p < rule.text_len) return p;
  const int32_t slot = p - rule.text_len;
  return rule.text_len + slot % rule.rows * rule.columns + slot / rule.rows;
}

// The first place of the walk whose image key a query at `place` or later sees; text_len where that
// is every image key before it. Never falls as `place` rises.
DALLE_HOST_DEVICE int32_t earliest_image_place(const AttentionRule& rule, int32_t place) {
  int32_t earliest = rule.text_len;
  if (place <= rule.text_len) return earliest;
  if (rule.kind == AttentionKind::kRow) earliest = place - rule.columns;
  if (rule.kind == AttentionKind::kConv) earliest = place - rule.runs[2 * rule.num_runs - 1] + 1;
  if (rule.kind == AttentionKind::kColumn) earliest = place - (place - rule.text_len) % rule.rows;
  return earliest < rule.text_len ? rule.text_len : earliest;
}

// The last place of a walk of `length` whose query sees the key at `place` or an earlier image key;
// for a text key the end of the walk.
DALLE_HOST_DEVICE int32_t latest_place(const AttentionRule& rule, int32_t length, int32_t place) {
  int32_t latest = length - 1;
  if (place < rule.text_len) return latest;
  if (rule.kind == AttentionKind::kRow) latest = place + rule.columns;
  if (rule.kind == AttentionKind::kConv) latest = place + rule.runs[2 * rule.num_runs - 1] - 1;
  if (rule.kind == AttentionKind::kColumn) {
    latest = place - (place - rule.text_len) % rule.rows + rule.rows - 1;
  }
  return latest < length ? latest : length - 1;
}

}  // namespace dalle
