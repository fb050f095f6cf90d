// Checks the arguments of sparse attention once, for every device, and makes plain data of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>
#include <utility>
#include <vector>

#include "common/checks.hpp"
#include "common/element.hpp"
#include "sparse_attention/sparse_attention.h"

namespace dalle {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define DALLE_ATTENTION_CHECK(condition, argument, requirement, ...) \
  DALLE_CHECK(condition, "sparse_attention", argument, requirement, __VA_ARGS__)

inline AttentionRule check_rule(const std::string& kind, int64_t text_len, int64_t rows,
                                int64_t columns, const std::vector<int64_t>& runs,
                                const char* op = "sparse_attention") {
  constexpr int64_t kMax = int64_t{1} << 24;  // positions, so that 32-bit indices are safe
  AttentionRule rule = {};
  const AttentionKindName* match = nullptr;
  std::string names;
  for (const AttentionKindName& known : kAttentionKinds) {
    if (kind == known.name) match = &known;
    names += (names.empty() ? "" : ", ") + std::string(known.name);
  }
  DALLE_CHECK(match != nullptr, op, "kind", "one of " + names, kind);
  rule.kind = match->kind;
  DALLE_CHECK(text_len >= 0 && text_len < kMax, op, "text_len", "from 0 to 2^24", text_len);
  DALLE_CHECK(rows >= 1 && columns >= 1 && rows < kMax && columns < kMax && rows * columns < kMax,
              op, "grid", "at least 1 x 1 and at most 2^24 positions", rows, " x ", columns);
  rule.text_len = static_cast<int32_t>(text_len);
  rule.rows = static_cast<int32_t>(rows);
  rule.columns = static_cast<int32_t>(columns);
  const size_t bounds = reads_runs(rule.kind) ? runs.size() : 0;
  DALLE_CHECK(bounds <= 2 * kMaxRuns, op, "offsets", "at most 128 runs", bounds / 2, " runs");
  bool valid = bounds % 2 == 0 && (!reads_runs(rule.kind) || bounds > 0);
  for (size_t i = 0; i < bounds; ++i) {
    valid = valid && (i == 0 ? runs[i] == 0 : runs[i] > runs[i - 1]) && runs[i] <= rows * columns;
    if (valid) rule.runs[i] = static_cast<int32_t>(runs[i]);
  }
  DALLE_CHECK(valid, op, "runs", "ascending half-open runs from 0 on", bounds, " bounds");
  rule.num_runs = static_cast<int32_t>(bounds / 2);
  return rule;
}

inline AttentionRows rows_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline void check_device(const Tensor& x, const char* name, const Tensor& q) {
  DALLE_ATTENTION_CHECK(x.is_cuda() == q.is_cuda() && x.get_device_index() == q.get_device_index(),
                        name, "on q's device", x.is_cuda() ? "cuda:" : "cpu, index ",
                        x.get_device_index());
}

inline void check_like(const Tensor& x, const char* name, const Tensor& q) {
  bool same = x.dim() == 4;
  for (int64_t d = 0; same && d < 4; ++d) same = x.size(d) == q.size(d);
  DALLE_ATTENTION_CHECK(same, name, "of q's shape " + shape_text(q), shape_text(x));
  DALLE_ATTENTION_CHECK(x.scalar_type() == q.scalar_type(), name,
                        "of q's dtype " + dtype_text(q.scalar_type()), dtype_text(x.scalar_type()));
  check_device(x, name, q);
  DALLE_ATTENTION_CHECK(x.numel() == 0 || x.size(3) == 1 || x.stride(3) == 1, name,
                        "contiguous along D", tensor_text(x));
}

inline ElementKind check_type(const Tensor& q) {
  const ElementKind kind = element_kind(q.scalar_type());
  const bool valid = kind == ElementKind::kFloat || kind == ElementKind::kDouble ||
                     kind == ElementKind::kHalf || kind == ElementKind::kBFloat16;
  DALLE_ATTENTION_CHECK(valid, "q", "float32, float64, float16 or bfloat16",
                        dtype_text(q.scalar_type()));
  return kind;
}

inline SparseAttentionParams check_sparse_attention(const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const AttentionRule& rule,
                                                    double scale) {
  DALLE_ATTENTION_CHECK(q.dim() == 4, "q", "(B, H, T, D)", shape_text(q));
  const int64_t length = rule.text_len + int64_t{rule.rows} * rule.columns;
  DALLE_ATTENTION_CHECK(q.size(2) == length, "T",
                        "text_len + rows * columns = " + std::to_string(length), q.size(2));
  DALLE_ATTENTION_CHECK(q.size(3) >= 1 && q.size(3) <= kMaxHeadSize, "D", "from 1 to 256",
                        q.size(3));
  constexpr int64_t kMax = int64_t{1} << 31;
  DALLE_ATTENTION_CHECK(q.size(0) < kMax && q.size(1) < kMax, "B and H", "less than 2^31",
                        shape_text(q));
  SparseAttentionParams params = {};
  params.type = check_type(q);
  check_like(q, "q", q);
  check_like(k, "k", q);
  check_like(v, "v", q);
  params.rule = rule;
  params.batch = static_cast<int32_t>(q.size(0));
  params.heads = static_cast<int32_t>(q.size(1));
  params.length = static_cast<int32_t>(length);
  params.head_size = static_cast<int32_t>(q.size(3));
  params.scale = scale;
  params.q = rows_of(q);
  params.k = rows_of(k);
  params.v = rows_of(v);
  return params;
}

// An empty tensor of x's shape, in memory (B, T, H, D) where x has heads inside positions.
inline Tensor empty_rows(const Tensor& x) {
  const bool inside = x.stride(1) < x.stride(2);
  const int64_t b = x.size(0), h = x.size(1), t = x.size(2), d = x.size(3);
  if (!inside) return torch::stable::new_empty(x, {b, h, t, d});
  return torch::stable::transpose(torch::stable::new_empty(x, {b, t, h, d}), 1, 2);
}

inline Tensor empty_lse(const Tensor& q) {
  return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Double);
}

// Adds what the backward reads to the params of the forward.
inline void check_backward(const Tensor& q, const Tensor& grad_out, const Tensor& out,
                           const Tensor& lse, SparseAttentionParams* params) {
  check_like(grad_out, "grad_out", q);
  check_like(out, "out", q);
  bool same = lse.dim() == 3 && lse.is_contiguous() && lse.scalar_type() == ScalarType::Double;
  for (int64_t d = 0; same && d < 3; ++d) same = lse.size(d) == q.size(d);
  DALLE_ATTENTION_CHECK(same, "lse", "as the forward returned it", tensor_text(lse));
  check_device(lse, "lse", q);
  params->grad_out = rows_of(grad_out);
  params->out = rows_of(out);
  params->lse = static_cast<double*>(lse.data_ptr());
}

inline void set_gradients(const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                          SparseAttentionParams* params) {
  params->grad_q = rows_of(grad_q);
  params->grad_k = rows_of(grad_k);
  params->grad_v = rows_of(grad_v);
}

// The three parts of a packed (B, T, 3, H, D), each (B, H, T, D) and a view of it.
struct PackedTensors {
  Tensor q, k, v;

  explicit PackedTensors(const Tensor& qkv) : q(part(qkv, 0)), k(part(qkv, 1)), v(part(qkv, 2)) {}

  static Tensor part(const Tensor& qkv, int64_t index) {
    DALLE_ATTENTION_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "qkv", "(B, T, 3, H, D)",
                          shape_text(qkv));
    return torch::stable::transpose(torch::stable::select(qkv, 2, index), 1, 2);
  }
};

inline Tensor empty_packed(const Tensor& qkv) {
  return torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), 3, qkv.size(3), qkv.size(4)});
}

}  // namespace dalle
