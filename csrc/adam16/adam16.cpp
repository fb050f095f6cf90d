// Schema of adam16 and its CPU registration.
#include "adam16/adam16.hpp"

#include "adam16/adam16_cpu.h"
#include "common/isa.h"

namespace dalle {
namespace {

void adam_step_(Tensors params, Tensors grads, Tensors means, Tensors variances, Tensors steps,
                const Tensor& host, const Tensor& rows, const std::optional<Tensor>& scales,
                const std::optional<Tensor>& clip_factor, const std::optional<Tensor>& skip,
                const std::optional<Tensor>& lr_tensor, const Tensor& seed, bool stochastic,
                double lr, double beta1, double beta2, double eps, double weight_decay,
                double variance_clip) {
  const AdamArgs args =
      prepare_adam(params, grads, means, variances, steps, host, rows, scales, clip_factor, skip,
                   lr_tensor, seed, stochastic, lr, beta1, beta2, eps, weight_decay, variance_clip);
  if (skipped(args)) return;
  const Adam16Cpu& cpu = DALLE_SELECT_ISA(adam16_cpu);
  torch::stable::parallel_for(0, args.table.num_chunks, 1,
                              [&](int64_t b, int64_t e) { cpu.chunks(args, b, e); });
  for (int64_t i = 0; i < args.table.num_rows; ++i) {
    *data_of<int64_t>(args.table.rows[i], kStep) += 1;
  }
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) {
  m.def(
      "_adam16_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] means,"
      " Tensor(c!)[] variances, Tensor(d!)[] steps, Tensor host, Tensor rows, Tensor? scales,"
      " Tensor? clip_factor, Tensor? skip, Tensor? lr_tensor, Tensor seed, bool stochastic,"
      " float lr, float beta1, float beta2, float eps, float weight_decay, float variance_clip)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CPU, m) {
  m.impl("_adam16_step_", TORCH_BOX(&dalle::adam_step_));
}
