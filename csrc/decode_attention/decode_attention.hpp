// Checks the arguments of decode attention once, for every device, and makes plain data of them.
#pragma once

#include <optional>

#include "decode_attention/decode_attention.h"
#include "sparse_attention/sparse_attention.hpp"

namespace dalle {

constexpr const char* kDecodeAttention = "decode_attention";

inline DecodeRows decode_rows_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline void check_decode_device(const char* op, const Tensor& x, const char* name,
                                const Tensor& q) {
  DALLE_CHECK(x.is_cuda() == q.is_cuda() && x.get_device_index() == q.get_device_index(), op, name,
              "on q's device", x.is_cuda() ? "cuda:" : "cpu, index ", x.get_device_index());
}

// A contiguous tensor of these sizes and this type.
inline void check_decode_store(const char* op, const Tensor& x, const char* name, const Tensor& q,
                               ScalarType type, const std::vector<int64_t>& sizes) {
  const auto dims = static_cast<int64_t>(sizes.size());
  const auto wanted = [&](int64_t d) { return sizes[static_cast<size_t>(d)]; };
  bool holds = x.dim() == dims && x.scalar_type() == type && x.is_contiguous();
  for (int64_t d = 0; holds && d < dims; ++d) holds = x.size(d) == wanted(d);
  DALLE_CHECK(holds, op, name,
              "contiguous " + dtype_text(type) + " of shape " + tuple_text(dims, wanted),
              tensor_text(x));
  check_decode_device(op, x, name, q);
}

inline void check_decode_row(const Tensor& x, const char* name, const Tensor& q) {
  constexpr const char* op = kDecodeAttention;
  bool same = x.dim() == 4;
  for (int64_t d = 0; same && d < 4; ++d) same = x.size(d) == q.size(d);
  DALLE_CHECK(same, op, name, "of q's shape " + shape_text(q), shape_text(x));
  DALLE_CHECK(x.scalar_type() == q.scalar_type(), op, name,
              "of q's dtype " + dtype_text(q.scalar_type()), dtype_text(x.scalar_type()));
  check_decode_device(op, x, name, q);
  DALLE_CHECK(x.numel() == 0 || x.size(3) == 1 || x.stride(3) == 1, op, name, "contiguous along D",
              tensor_text(x));
}

// The caches of a call, as the schema has them.
struct DecodeTensors {
  const Tensor &text_keys, &text_values, &image_keys, &image_values;
  const std::optional<Tensor>&key_scales, &value_scales;
};

struct DecodeSizes {
  int64_t b, s, h, d;
  ScalarType type;
};

// All but q, k, v and out, which the caller adds. `like` has the device of all tensors.
inline DecodeAttentionParams check_decode_cache(const char* op, const Tensor& like,
                                                const DecodeSizes& shape,
                                                const DecodeTensors& cache, const Tensor& slot,
                                                const std::string& kind, int64_t rows,
                                                int64_t columns, const std::vector<int64_t>& runs,
                                                double scale) {
  const auto [b, s, h, d, type] = shape;
  DALLE_CHECK(d >= 1 && d <= kMaxHeadSize, op, "D", "from 1 to 256", d);
  constexpr int64_t kMax = int64_t{1} << 31;
  DALLE_CHECK(b < kMax && s < kMax && h < kMax, op, "B, S and H", "less than 2^31", b, ", ", s,
              " and ", h);
  DecodeAttentionParams params = {};
  params.type = element_kind(type);
  const bool floating = params.type == ElementKind::kFloat || params.type == ElementKind::kDouble ||
                        params.type == ElementKind::kHalf || params.type == ElementKind::kBFloat16;
  DALLE_CHECK(floating, op, "q", "float32, float64, float16 or bfloat16", dtype_text(type));

  const Tensor& text = cache.text_keys;
  DALLE_CHECK(text.dim() == 4, op, "text_keys", "(B, H, T, D)", shape_text(text));
  params.rule = check_rule(kind, text.size(2), rows, columns, runs, op);
  params.capacity = decode_capacity(params.rule);
  for (const Tensor* x : {&cache.text_keys, &cache.text_values}) {
    const char* name = x == &cache.text_keys ? "text_keys" : "text_values";
    check_decode_store(op, *x, name, like, type, {b, h, text.size(2), d});
  }
  params.coded = cache.key_scales.has_value();
  DALLE_CHECK(params.coded == cache.value_scales.has_value(), op, "scales",
              "of keys and values, or of neither", "one of them");
  const ScalarType stored = params.coded ? ScalarType::Char : type;
  check_decode_store(op, cache.image_keys, "image_keys", like, stored,
                     {b, s, h, params.capacity, d});
  check_decode_store(op, cache.image_values, "image_values", like, stored,
                     {b, s, h, params.capacity, d});
  if (params.coded) {
    for (const auto* x : {&cache.key_scales, &cache.value_scales}) {
      check_decode_store(op, **x, "scales", like, ScalarType::Float, {b, s, h, params.capacity});
    }
    params.key_scales = static_cast<float*>((*cache.key_scales).data_ptr());
    params.value_scales = static_cast<float*>((*cache.value_scales).data_ptr());
  }
  DALLE_CHECK(slot.dim() == 0 && slot.scalar_type() == ScalarType::Long, op, "slot",
              "one int64, 0-d", tensor_text(slot));
  check_decode_device(op, slot, "slot", like);

  params.batch = static_cast<int32_t>(b);
  params.samples = static_cast<int32_t>(s);
  params.heads = static_cast<int32_t>(h);
  params.head_size = static_cast<int32_t>(d);
  params.scale = scale;
  params.slot = static_cast<const int64_t*>(slot.data_ptr());
  params.text_keys = cache.text_keys.data_ptr();
  params.text_values = cache.text_values.data_ptr();
  params.image_keys = cache.image_keys.data_ptr();
  params.image_values = cache.image_values.data_ptr();
  return params;
}

// All but `out`, which the caller adds.
inline DecodeAttentionParams check_decode_attention(const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const DecodeTensors& cache,
                                                    const Tensor& slot, const std::string& kind,
                                                    int64_t rows, int64_t columns,
                                                    const std::vector<int64_t>& runs,
                                                    double scale) {
  DALLE_CHECK(q.dim() == 4, kDecodeAttention, "q", "(B, S, H, D)", shape_text(q));
  check_decode_row(q, "q", q);
  check_decode_row(k, "k", q);
  check_decode_row(v, "v", q);
  const DecodeSizes shape = {q.size(0), q.size(1), q.size(2), q.size(3), q.scalar_type()};
  DecodeAttentionParams params =
      check_decode_cache(kDecodeAttention, q, shape, cache, slot, kind, rows, columns, runs, scale);
  params.q = decode_rows_of(q);
  params.k = decode_rows_of(k);
  params.v = decode_rows_of(v);
  return params;
}

// The slot of a step, read on the host.
inline int32_t checked_slot(const char* op, const DecodeAttentionParams& params) {
  const int64_t at = *params.slot, slots = int64_t{params.rule.rows} * params.rule.columns;
  DALLE_CHECK(at >= 0 && at < slots, op, "slot", "from 0 to " + std::to_string(slots - 1), at);
  return static_cast<int32_t>(at);
}

inline Tensor empty_decoded(const Tensor& q) {
  return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
}

}  // namespace dalle
