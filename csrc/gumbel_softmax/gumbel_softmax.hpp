// Torch-facing half of the contract: checks the inputs once, allocates outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.hpp"
#include "common/element.hpp"
#include "gumbel_softmax/gumbel_softmax.h"

namespace dalle {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// logits contiguous; tau a float64 scalar and seed an int64 scalar on its device.
inline GumbelSoftmaxParams check_gumbel_softmax(const Tensor& logits, const Tensor& tau,
                                                const Tensor& seed, int64_t dim,
                                                int64_t first_row) {
  constexpr const char* kOp = "gumbel_softmax";
  GumbelSoftmaxParams p{1, 1, 1, check_floating(kOp, "logits", logits.scalar_type()), first_row};
  DALLE_CHECK(dim >= 0 && dim < logits.dim(), kOp, "dim", "an axis of logits", dim, " for shape ",
              shape_text(logits));
  DALLE_CHECK(logits.is_contiguous(), kOp, "logits", "contiguous", "strides of another layout");
  for (int64_t d = 0; d < logits.dim(); ++d) {
    (d < dim ? p.outer : d == dim ? p.num_codes : p.inner) *= logits.size(d);
  }
  DALLE_CHECK(p.num_codes >= 1 && p.num_codes < (int64_t{1} << 31), kOp, "K",
              "from 1 to 2147483647", p.num_codes);
  DALLE_CHECK(first_row >= 0, kOp, "first_row", "0 or more", first_row);
  const auto scalar = [&](const Tensor& t, const char* name, ScalarType type, const char* what) {
    DALLE_CHECK(t.numel() == 1 && t.scalar_type() == type && t.device() == logits.device(), kOp,
                name, what, tensor_text(t));
  };
  scalar(tau, "tau", ScalarType::Double, "a float64 scalar on the logits' device");
  scalar(seed, "seed", ScalarType::Long, "an int64 scalar on the logits' device");
  return p;
}

// Checks a tensor that belongs to `logits`: its device, contiguous, of this size and type.
inline void check_beside(const Tensor& t, const Tensor& logits, int64_t numel, ScalarType type,
                         const char* name) {
  DALLE_CHECK(t.device() == logits.device() && t.is_contiguous() && t.numel() == numel &&
                  t.scalar_type() == type,
              "gumbel_softmax", name, "contiguous, of the forward's shape, dtype and device",
              tensor_text(t));
}

// sample, index, kl, stats
inline std::tuple<Tensor, Tensor, Tensor, Tensor> gumbel_softmax_outputs(const Tensor& logits,
                                                                         int64_t dim) {
  std::vector<int64_t> rows, stats{kNumStats};
  for (int64_t d = 0; d < logits.dim(); ++d) {
    if (d != dim) rows.push_back(logits.size(d));
  }
  stats.insert(stats.end(), rows.begin(), rows.end());
  return {torch::stable::empty_like(logits),
          torch::stable::new_empty(logits, rows, ScalarType::Long),
          torch::stable::new_empty(logits, rows, ScalarType::Float),
          torch::stable::new_empty(logits, stats, ScalarType::Float)};
}

inline GumbelSoftmaxForward gumbel_softmax_forward_args(
    const Tensor& logits, const Tensor& tau, const Tensor& seed, bool hard,
    const std::tuple<Tensor, Tensor, Tensor, Tensor>& outputs) {
  const auto& [sample, index, kl, stats] = outputs;
  return {logits.const_data_ptr(),
          static_cast<const double*>(tau.const_data_ptr()),
          static_cast<const int64_t*>(seed.const_data_ptr()),
          sample.mutable_data_ptr(),
          static_cast<int64_t*>(index.mutable_data_ptr()),
          static_cast<float*>(kl.mutable_data_ptr()),
          static_cast<float*>(stats.mutable_data_ptr()),
          hard};
}

// Also checks what only backward takes.
inline GumbelSoftmaxBackward gumbel_softmax_backward_args(
    const GumbelSoftmaxParams& p, const std::optional<Tensor>& grad_sample,
    const std::optional<Tensor>& grad_kl, const Tensor& logits, const Tensor& tau,
    const Tensor& seed, const Tensor& kl, const Tensor& stats, const Tensor& grad_logits) {
  const int64_t rows = num_rows(p);
  check_beside(kl, logits, rows, ScalarType::Float, "kl");
  check_beside(stats, logits, kNumStats * rows, ScalarType::Float, "stats");
  const auto type = logits.scalar_type();
  if (grad_sample) check_beside(*grad_sample, logits, logits.numel(), type, "grad_sample");
  if (grad_kl) check_beside(*grad_kl, logits, rows, ScalarType::Float, "grad_kl");
  return {grad_sample ? grad_sample->const_data_ptr() : nullptr,
          grad_kl ? static_cast<const float*>(grad_kl->const_data_ptr()) : nullptr,
          logits.const_data_ptr(),
          static_cast<const double*>(tau.const_data_ptr()),
          static_cast<const int64_t*>(seed.const_data_ptr()),
          static_cast<const float*>(kl.const_data_ptr()),
          static_cast<const float*>(stats.const_data_ptr()),
          grad_logits.mutable_data_ptr()};
}

}  // namespace dalle
