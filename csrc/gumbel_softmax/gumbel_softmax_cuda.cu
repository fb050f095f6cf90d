// CUDA registration of gumbel_softmax: guard, allocate, launch, check.
#include "common/stream.hpp"
#include "gumbel_softmax/gumbel_softmax.hpp"
#include "gumbel_softmax/gumbel_softmax_cuda.cuh"

namespace dalle {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& tau,
                                                   const Tensor& seed, int64_t dim, bool hard,
                                                   int64_t first_row) {
  const GumbelSoftmaxParams p = check_gumbel_softmax(logits, tau, seed, dim, first_row);
  const DeviceScope on(logits);
  auto outputs = gumbel_softmax_outputs(logits, dim);
  const auto args = gumbel_softmax_forward_args(logits, tau, seed, hard, outputs);
  check_launch("gumbel_softmax", launch_gumbel_softmax_forward(p, args, on.stream()));
  return outputs;
}

Tensor backward(const std::optional<Tensor>& grad_sample, const std::optional<Tensor>& grad_kl,
                const Tensor& logits, const Tensor& tau, const Tensor& seed, const Tensor& kl,
                const Tensor& stats, int64_t dim, int64_t first_row) {
  const GumbelSoftmaxParams p = check_gumbel_softmax(logits, tau, seed, dim, first_row);
  const DeviceScope on(logits);
  Tensor grad_logits = torch::stable::empty_like(logits);
  const auto args = gumbel_softmax_backward_args(p, grad_sample, grad_kl, logits, tau, seed, kl,
                                                 stats, grad_logits);
  check_launch("gumbel_softmax", launch_gumbel_softmax_backward(p, args, on.stream()));
  return grad_logits;
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, DALLE_CUDA_KEY, m) {
  m.impl("_gumbel_softmax_forward", TORCH_BOX(&dalle::forward));
  m.impl("_gumbel_softmax_backward", TORCH_BOX(&dalle::backward));
}
