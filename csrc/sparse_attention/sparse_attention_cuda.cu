// CUDA registration of sparse attention: guard, allocate, launch, check.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/stream.hpp"
#include "sparse_attention/sparse_attention.hpp"
#include "sparse_attention/sparse_attention_cuda.cuh"

namespace dalle {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   std::string kind, int64_t text_len, int64_t rows,
                                   int64_t columns, std::vector<int64_t> runs, double scale) {
  const AttentionRule rule = check_rule(kind, text_len, rows, columns, runs);
  SparseAttentionParams params = check_sparse_attention(q, k, v, rule, scale);
  const DeviceScope on(q);
  Tensor out = empty_rows(q), lse = empty_lse(q);
  if (lse.numel() == 0) return {out, lse};
  params.out = rows_of(out);
  params.lse = static_cast<double*>(lse.mutable_data_ptr());
  check_launch("sparse_attention", launch_sparse_attention_forward(params, on.stream()));
  return {out, lse};
}

// Writes the three gradients of `params`, whose tensors are on q's device.
void run_backward(const Tensor& q, const SparseAttentionParams& params, void* stream) {
  Tensor scratch = empty_lse(q);  // 8 bytes a query
  check_launch("sparse_attention",
               launch_sparse_attention_backward(params, scratch.mutable_data_ptr(), stream));
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out,
                                            const Tensor& lse, std::string kind, int64_t text_len,
                                            int64_t rows, int64_t columns,
                                            std::vector<int64_t> runs, double scale) {
  const AttentionRule rule = check_rule(kind, text_len, rows, columns, runs);
  SparseAttentionParams params = check_sparse_attention(q, k, v, rule, scale);
  check_backward(q, grad_out, out, lse, &params);
  const DeviceScope on(q);
  Tensor grad_q = empty_rows(q), grad_k = empty_rows(k), grad_v = empty_rows(v);
  if (lse.numel() == 0) return {grad_q, grad_k, grad_v};
  set_gradients(grad_q, grad_k, grad_v, &params);
  run_backward(q, params, on.stream());
  return {grad_q, grad_k, grad_v};
}

Tensor backward_qkvpacked(const Tensor& grad_out, const Tensor& qkv, const Tensor& out,
                          const Tensor& lse, std::string kind, int64_t text_len, int64_t rows,
                          int64_t columns, std::vector<int64_t> runs, double scale) {
  const AttentionRule rule = check_rule(kind, text_len, rows, columns, runs);
  const PackedTensors packed(qkv);
  SparseAttentionParams params = check_sparse_attention(packed.q, packed.k, packed.v, rule, scale);
  check_backward(packed.q, grad_out, out, lse, &params);
  const DeviceScope on(qkv);
  Tensor grad_qkv = empty_packed(qkv);
  if (lse.numel() == 0) return grad_qkv;
  const PackedTensors grads(grad_qkv);
  set_gradients(grads.q, grads.k, grads.v, &params);
  run_backward(packed.q, params, on.stream());
  return grad_qkv;
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, DALLE_CUDA_KEY, m) {
  m.impl("_sparse_attention_forward", TORCH_BOX(&dalle::forward));
  m.impl("_sparse_attention_backward", TORCH_BOX(&dalle::backward));
  m.impl("_sparse_attention_backward_qkvpacked", TORCH_BOX(&dalle::backward_qkvpacked));
}
