// Schema and CPU registration of sparse attention.
#include "sparse_attention/sparse_attention.hpp"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "common/tasks.hpp"
#include "sparse_attention/sparse_attention_cpu.h"
#include "sparse_attention/sparse_attention_tiles.h"

namespace dalle {
namespace {

// Tasks worth a thread: about 50 us of a core at 20 attended-pair elements a nanosecond.
int64_t grain_of(const AttentionTiles& walk, const SparseAttentionParams& params, int64_t tasks) {
  const double pairs = 1024.0 * static_cast<double>(walk.tiles.size());
  const double task =
      pairs * params.head_size * params.batch * params.heads / static_cast<double>(tasks);
  return static_cast<int64_t>(1 + 1e6 / task);
}

const SparseAttentionCpu& kernels_for(ElementKind type) {
  if (type == ElementKind::kBFloat16) return DALLE_SELECT_ISA_BFLOAT16(sparse_attention_cpu);
  return DALLE_SELECT_ISA(sparse_attention_cpu);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   std::string kind, int64_t text_len, int64_t rows,
                                   int64_t columns, std::vector<int64_t> runs, double scale) {
  const AttentionRule rule = check_rule(kind, text_len, rows, columns, runs);
  SparseAttentionParams params = check_sparse_attention(q, k, v, rule, scale);
  Tensor out = empty_rows(q), lse = empty_lse(q);
  params.out = rows_of(out);
  params.lse = static_cast<double*>(lse.mutable_data_ptr());
  const auto walk = attention_tiles(rule);
  const AttentionTileView view = walk->view();
  const SparseAttentionCpu& cpu = kernels_for(params.type);
  const int64_t tasks = q.size(0) * q.size(1) * view.num_strips;
  run_tasks(q, tasks, grain_of(*walk, params, tasks), cpu.forward_bytes(params, view),
            [&](void* space, int64_t begin, int64_t end) {
              cpu.forward(params, view, space, begin, end);
            });
  return {out, lse};
}

// Few heads are split so that 16 threads have work; the split depends on the shape alone, so the
// bits of the result do not depend on the number of threads.
std::vector<uint8_t> touched_panels(const AttentionTiles& walk, int64_t segments) {
  const int64_t strips = walk.num_strips();
  std::vector<uint8_t> touched(segments * strips, 0);
  for (int64_t g = 0; g < segments; ++g) {
    const int32_t first = walk.strip_begin[g * strips / segments];
    const int32_t last = walk.strip_begin[(g + 1) * strips / segments];
    for (int32_t t = first; t < last; ++t) touched[g * strips + walk.tiles[t].panel] = 1;
  }
  return touched;
}

// Writes the three gradients of `params`, whose tensors have q's device.
void run_backward(const Tensor& q, const SparseAttentionParams& params) {
  const int64_t heads = q.size(0) * q.size(1);
  if (heads == 0) return;
  const auto walk = attention_tiles(params.rule);
  const AttentionTileView view = walk->view();
  const SparseAttentionCpu& cpu = kernels_for(params.type);

  const int64_t segments = std::clamp<int64_t>(ceil_div(16, heads), 1, view.num_strips);
  const std::vector<uint8_t> touched = touched_panels(*walk, segments);
  const int64_t partial_bytes =
      segments == 1 ? 0 : heads * segments * static_cast<int64_t>(cpu.partial_bytes(params, view));
  Tensor partial = torch::stable::new_empty(q, {partial_bytes}, ScalarType::Byte);
  const AttentionSegments split = {static_cast<int32_t>(segments), touched.data(),
                                   partial.mutable_data_ptr()};
  const int64_t tasks = heads * segments, panels = heads * view.num_strips;
  run_tasks(q, tasks, grain_of(*walk, params, tasks), cpu.backward_bytes(params, view),
            [&](void* space, int64_t begin, int64_t end) {
              cpu.backward(params, view, split, space, begin, end);
            });
  if (segments > 1) {
    run_tasks(q, panels, 16, 0, [&](void*, int64_t begin, int64_t end) {
      cpu.backward_reduce(params, view, split, begin, end);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out,
                                            const Tensor& lse, std::string kind, int64_t text_len,
                                            int64_t rows, int64_t columns,
                                            std::vector<int64_t> runs, double scale) {
  const AttentionRule rule = check_rule(kind, text_len, rows, columns, runs);
  SparseAttentionParams params = check_sparse_attention(q, k, v, rule, scale);
  check_backward(q, grad_out, out, lse, &params);
  Tensor grad_q = empty_rows(q), grad_k = empty_rows(k), grad_v = empty_rows(v);
  set_gradients(grad_q, grad_k, grad_v, &params);
  run_backward(q, params);
  return {grad_q, grad_k, grad_v};
}

Tensor backward_qkvpacked(const Tensor& grad_out, const Tensor& qkv, const Tensor& out,
                          const Tensor& lse, std::string kind, int64_t text_len, int64_t rows,
                          int64_t columns, std::vector<int64_t> runs, double scale) {
  const AttentionRule rule = check_rule(kind, text_len, rows, columns, runs);
  const PackedTensors packed(qkv);
  SparseAttentionParams params = check_sparse_attention(packed.q, packed.k, packed.v, rule, scale);
  check_backward(packed.q, grad_out, out, lse, &params);
  Tensor grad_qkv = empty_packed(qkv);
  const PackedTensors grads(grad_qkv);
  set_gradients(grads.q, grads.k, grads.v, &params);
  run_backward(packed.q, params);
  return grad_qkv;
}

// For tests: the (T, T) mask that `attends` gives, or how often the CPU kernel's walk visits each
// pair.
Tensor mask(std::string kind, int64_t text_len, int64_t rows, int64_t columns,
            std::vector<int64_t> runs, bool walked) {
  const AttentionRule rule = check_rule(kind, text_len, rows, columns, runs);
  const int32_t length = static_cast<int32_t>(text_len + rows * columns);
  Tensor result = torch::stable::full({length, length}, 0.0, ScalarType::Byte);
  uint8_t* visible = static_cast<uint8_t*>(result.mutable_data_ptr());
  if (walked) AttentionTiles(rule).count_visits(visible);
  for (int32_t q = 0; !walked && q < length; ++q) {
    for (int32_t k = 0; k < length; ++k) visible[int64_t{q} * length + k] = attends(rule, q, k);
  }
  return result;
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) {
  m.def(
      "_sparse_attention_forward(Tensor q, Tensor k, Tensor v, str kind, int text_len, int rows, "
      "int columns, int[] runs, float scale) -> (Tensor, Tensor)");
  m.def(
      "_sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, str kind, int text_len, int rows, int columns, int[] runs, float scale) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "_sparse_attention_backward_qkvpacked(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, "
      "str kind, int text_len, int rows, int columns, int[] runs, float scale) -> Tensor");
  m.def(
      "_sparse_attention_mask(str kind, int text_len, int rows, int columns, int[] runs, "
      "bool walked) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CPU, m) {
  m.impl("_sparse_attention_forward", TORCH_BOX(&dalle::forward));
  m.impl("_sparse_attention_backward", TORCH_BOX(&dalle::backward));
  m.impl("_sparse_attention_backward_qkvpacked", TORCH_BOX(&dalle::backward_qkvpacked));
}
STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CompositeExplicitAutograd, m) {
  m.impl("_sparse_attention_mask", TORCH_BOX(&dalle::mask));
}
