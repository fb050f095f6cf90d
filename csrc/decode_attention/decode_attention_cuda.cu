// CUDA registration of decode attention: guard, allocate, launch, check. Nothing here waits for the
// device, and `slot` is read there: a captured call can be replayed at other slots.
#include <torch/csrc/stable/library.h>

#include "common/stream.hpp"
#include "decode_attention/decode_attention.hpp"
#include "decode_attention/decode_attention_cuda.cuh"

namespace dalle {
namespace {

// Rows of x that 16-byte accesses take: those of x itself, or of a copy that `copy` then holds. So
// the kernel, and with it every bit of a result, does not hang on where x lies.
DecodeRows aligned_rows(const Tensor& x, Tensor* copy) {
  DecodeRows rows = decode_rows_of(x);
  int64_t* const strides[] = {&rows.batch, &rows.sample, &rows.head};
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  uint64_t bits = reinterpret_cast<uint64_t>(rows.data);
  for (int64_t d = 0; d < 3; ++d) {
    if (x.size(d) == 1) *strides[d] = 0;
    bits |= static_cast<uint64_t>(*strides[d] * bytes);
  }
  if (bits % 16 == 0) return rows;
  *copy = empty_decoded(x);
  torch::stable::copy_(*copy, x);
  return decode_rows_of(*copy);
}

Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& text_keys,
              const Tensor& text_values, const Tensor& image_keys, const Tensor& image_values,
              const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales,
              const Tensor& slot, std::string kind, int64_t rows, int64_t columns,
              std::vector<int64_t> runs, double scale) {
  const DecodeTensors cache = {text_keys,    text_values, image_keys,
                               image_values, key_scales,  value_scales};
  DecodeAttentionParams params =
      check_decode_attention(q, k, v, cache, slot, kind, rows, columns, runs, scale);
  const DeviceScope on(q);
  Tensor out = empty_decoded(q);
  if (out.numel() == 0) return out;
  Tensor copies[3];
  if (fits_chunks(params)) {
    params.q = aligned_rows(q, &copies[0]);
    params.k = aligned_rows(k, &copies[1]);
    params.v = aligned_rows(v, &copies[2]);
  }
  params.out = decode_rows_of(out);
  const DecodePlan plan = decode_plan(params);
  const int64_t floats = decode_scratch_floats(params, plan);
  Tensor scratch = torch::stable::new_empty(q, {floats}, ScalarType::Float);
  check_launch("decode_attention",
               launch_decode_attention(
                   params, plan, static_cast<float*>(scratch.mutable_data_ptr()), on.stream()));
  return out;
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, DALLE_CUDA_KEY, m) {
  m.impl("_decode_attention", TORCH_BOX(&dalle::decode));
}
