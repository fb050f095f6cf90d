// Torch-facing half of the contract: checks the inputs once.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "adam16/adam16.h"
#include "common/checks.hpp"
#include "common/element.hpp"
#include "common/scales.hpp"
#include "common/tensor_table.hpp"

namespace dalle {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline const float* check_one_float(const char* name, const std::optional<Tensor>& tensor,
                                    const Tensor& rows) {
  if (!tensor) return nullptr;
  DALLE_CHECK(tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Float &&
                  tensor->device() == rows.device(),
              "AdamW16", name, "one float32 on the parameters' device", tensor_text(*tensor));
  return static_cast<const float*>(tensor->const_data_ptr());
}

inline AdamArgs prepare_adam(const Tensors& params, const Tensors& grads, const Tensors& means,
                             const Tensors& variances, const Tensors& steps, const Tensor& host,
                             const Tensor& rows, const std::optional<Tensor>& scales,
                             const std::optional<Tensor>& clip_factor,
                             const std::optional<Tensor>& skip,
                             const std::optional<Tensor>& lr_tensor, const Tensor& seed,
                             bool stochastic, double lr, double beta1, double beta2, double eps,
                             double weight_decay, double variance_clip) {
  const char* const op = "AdamW16";
  const TensorTable table =
      check_table(op, host, rows, {&params, &grads, &means, &variances, &steps}, 1);
  const auto* expected = static_cast<const TableRow*>(host.const_data_ptr());
  for (int64_t i = 0; i < table.num_rows; ++i) {
    check_floating(op, "params", params[i].scalar_type());
    check_floating(op, "grads", grads[i].scalar_type());
    const ElementKind kind = kind_of(expected[i], kMean);
    DALLE_CHECK((kind == ElementKind::kShort || kind == ElementKind::kFloat) &&
                    kind_of(expected[i], kVariance) == kind,
                op, "moments", "both int16 codes or both float32",
                dtype_text(means[i].scalar_type()));
    DALLE_CHECK(kind_of(expected[i], kStep) == ElementKind::kLong, op, "steps", "int64",
                dtype_text(steps[i].scalar_type()));
    DALLE_CHECK(!scales || (expected[i].group >= 0 && expected[i].group < scales->numel()), op,
                "groups", "0 or more and below the number of scales", expected[i].group);
  }
  AdamArgs args{};
  args.table = table;
  if (scales) args.scales = check_scales(op, "scales", *scales, scales->numel(), rows);
  args.clip_factor = check_one_float("clip_factor", clip_factor, rows);
  args.skip = check_one_float("found_nonfinite", skip, rows);
  args.lr_pointer = check_one_float("lr", lr_tensor, rows);
  DALLE_CHECK(
      seed.numel() == 1 && seed.scalar_type() == ScalarType::Long && seed.device() == rows.device(),
      op, "seed", "one int64 on the parameters' device", tensor_text(seed));
  args.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  args.stochastic = stochastic;
  args.lr = lr;
  args.beta1 = beta1;
  args.beta2 = beta2;
  args.eps = eps;
  args.weight_decay = weight_decay;
  args.variance_clip = variance_clip;
  return args;
}

}  // namespace dalle
