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
  params.grad_q = rows_of(grad_q);
  params.grad_k = rows_of(grad_k);
  params.grad_v = rows_of(grad_v);
  Tensor scratch = empty_lse(q);  // 8 bytes a query
  check_launch("sparse_attention",
               launch_sparse_attention_backward(params, scratch.mutable_data_ptr(), on.stream()));
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, DALLE_CUDA_KEY, m) {
  m.impl("_sparse_attention_forward", TORCH_BOX(&dalle::forward));
  m.impl("_sparse_attention_backward", TORCH_BOX(&dalle::backward));
}
