// Schema and CPU registration of decode attention.
#include "decode_attention/decode_attention.hpp"

#include <torch/csrc/stable/library.h>

#include "common/isa.h"
#include "common/tasks.hpp"
#include "decode_attention/decode_attention_cpu.h"

namespace dalle {
namespace {

// Tasks worth a thread: about 20 us of a core.
int64_t grain_of(const DecodeAttentionParams& params, int64_t samples) {
  const double keys = params.rule.text_len + decode_most_keys(params.rule);
  const double task = keys * params.head_size * static_cast<double>(samples);
  return static_cast<int64_t>(1 + 3e5 / task);
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
  const int32_t at = checked_slot(kDecodeAttention, params);
  Tensor out = empty_decoded(q);
  params.out = decode_rows_of(out);
  if (out.numel() == 0) return out;
  const DecodeAttentionCpu& cpu = params.type == ElementKind::kBFloat16
                                      ? DALLE_SELECT_ISA_BFLOAT16(decode_attention_cpu)
                                      : DALLE_SELECT_ISA(decode_attention_cpu);
  const int64_t samples = std::min<int64_t>(cpu.task_samples(params.type), q.size(1));
  const int64_t tasks = q.size(0) * q.size(2) * ceil_div(q.size(1), cpu.task_samples(params.type));
  run_tasks(
      q, tasks, grain_of(params, samples), cpu.workspace_bytes(params),
      [&](void* space, int64_t begin, int64_t end) { cpu.run(params, at, space, begin, end); });
  return out;
}

// For tests: row p of the result is how often the query at slot p reads each place of the cache,
// then the place of slot p.
Tensor places(std::string kind, int64_t rows, int64_t columns, std::vector<int64_t> runs) {
  const AttentionRule rule = check_rule(kind, 0, rows, columns, runs, "decode_attention");
  const int64_t slots = rows * columns, capacity = decode_capacity(rule);
  Tensor result = torch::stable::full({slots, capacity + 1}, 0.0, ScalarType::Long);
  int64_t* row = static_cast<int64_t*>(result.mutable_data_ptr());
  for (int32_t slot = 0; slot < slots; ++slot, row += capacity + 1) {
    for (int32_t i = 0; i < decode_num_ranges(rule); ++i) {
      const DecodeRange range = decode_range(rule, slot, i);
      for (int32_t c = range.begin; c < range.end; ++c) ++row[c];
    }
    row[capacity] = decode_place(rule, slot);
  }
  return result;
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) {
  m.def(
      "_decode_attention(Tensor q, Tensor k, Tensor v, Tensor text_keys, Tensor text_values,"
      " Tensor(a!) image_keys, Tensor(b!) image_values, Tensor(c!)? key_scales,"
      " Tensor(d!)? value_scales, Tensor slot, str kind, int rows, int columns, int[] runs,"
      " float scale) -> Tensor");
  m.def("_decode_attention_places(str kind, int rows, int columns, int[] runs) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CPU, m) {
  m.impl("_decode_attention", TORCH_BOX(&dalle::decode));
}
STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CompositeExplicitAutograd, m) {
  m.impl("_decode_attention_places", TORCH_BOX(&dalle::places));
}
