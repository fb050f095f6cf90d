// CUDA registration of adam16: guard, launch, check.
#include "adam16/adam16.hpp"
#include "adam16/adam16_cuda.cuh"
#include "common/stream.hpp"

namespace dalle {
namespace {

void adam_step_(Tensors params, Tensors grads, Tensors means, Tensors variances, Tensors steps,
                const Tensor& host, const Tensor& rows, const std::optional<Tensor>& scales,
                const std::optional<Tensor>& clip_factor, const std::optional<Tensor>& skip,
                const std::optional<Tensor>& lr_tensor, const Tensor& seed, bool stochastic,
                double lr, double beta1, double beta2, double eps, double weight_decay,
                double variance_clip) {
  const DeviceScope on(rows);
  const AdamArgs args =
      prepare_adam(params, grads, means, variances, steps, host, rows, scales, clip_factor, skip,
                   lr_tensor, seed, stochastic, lr, beta1, beta2, eps, weight_decay, variance_clip);
  check_launch("AdamW16", launch_adam16_step(args, on.stream()));
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, DALLE_CUDA_KEY, m) {
  m.impl("_adam16_step_", TORCH_BOX(&dalle::adam_step_));
}
