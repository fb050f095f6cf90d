// Torch-facing half of the contract: checks the inputs once, allocates outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/checks.hpp"
#include "common/element.hpp"
#include "common/scales.hpp"
#include "common/tensor_table.hpp"
#include "grad_scale/grad_scale.h"

namespace dalle {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

inline std::tuple<Tensor, Tensor, ScaleArgs> prepare_scale(const Tensor& grad, const Tensor& scale,
                                                           ScalarType type) {
  const char* const op = "scale_gradient";
  const ElementKind from = check_floating(op, "grad", grad.scalar_type());
  const ElementKind to = check_floating(op, "dtype", type);
  DALLE_CHECK(grad.is_contiguous(), op, "grad", "contiguous", "strides of another layout");
  const float* const factor = check_scales(op, "scale", scale, 1, grad);
  Tensor out = torch::stable::new_empty(grad, sizes_of(grad), type);
  Tensor counts = torch::stable::new_zeros(grad, {int64_t{kNumScaleCounts}}, ScalarType::Long);
  const ScaleArgs args{grad.const_data_ptr(),
                       factor,
                       out.mutable_data_ptr(),
                       static_cast<int64_t*>(counts.mutable_data_ptr()),
                       grad.numel(),
                       from,
                       to};
  return {out, counts, args};
}

inline std::tuple<Tensor, UnscaleArgs> prepare_unscale(const Tensor& stream, const Tensor& grad,
                                                       const Tensor& scale) {
  const char* const op = "unscale_gradient";
  DALLE_CHECK(stream.scalar_type() == ScalarType::Float && stream.is_contiguous(), op, "stream",
              "contiguous float32", tensor_text(stream));
  const ElementKind kind = check_floating(op, "grad", grad.scalar_type());
  DALLE_CHECK(grad.is_contiguous() && sizes_of(grad) == sizes_of(stream) &&
                  grad.device() == stream.device(),
              op, "grad", "contiguous, of the stream's shape and device", tensor_text(grad));
  const float* const divisor = check_scales(op, "scale", scale, 1, stream);
  Tensor out = torch::stable::new_empty(stream, sizes_of(stream));
  const UnscaleArgs args{
      static_cast<const float*>(stream.const_data_ptr()), grad.const_data_ptr(), divisor,
      static_cast<float*>(out.mutable_data_ptr()),        stream.numel(),        kind};
  return {out, args};
}

struct GroupStats {
  Tensor counts, squares, max_abs, chunks;
  GroupStatsArgs args;
};

inline GroupStats prepare_group_stats(const std::vector<Tensor>& grads, const Tensor& host,
                                      const Tensor& rows, const Tensor& scales, bool check_only) {
  const char* const op = "unscale_gradients_";
  const TensorTable table = check_table(op, host, rows, {&grads});
  const int64_t groups = scales.numel();
  const auto* expected = static_cast<const TableRow*>(host.const_data_ptr());
  for (int64_t i = 0; i < table.num_rows; ++i) {
    check_floating(op, "grads", grads[i].scalar_type());
    DALLE_CHECK(expected[i].group >= 0 && expected[i].group < groups, op, "groups",
                "0 to one less than the number of scales", expected[i].group);
  }
  const float* const divisors = check_scales(op, "scales", scales, groups, rows);
  Tensor counts = torch::stable::new_empty(scales, {groups, kNumGroupCounts}, ScalarType::Long);
  Tensor squares = torch::stable::new_empty(scales, {groups}, ScalarType::Double);
  Tensor max_abs = torch::stable::new_empty(scales, {groups});
  Tensor chunks =
      torch::stable::new_empty(scales, {table.num_chunks, int64_t{4}}, ScalarType::Long);
  const GroupStatsArgs args{table,
                            divisors,
                            static_cast<ChunkStats*>(chunks.mutable_data_ptr()),
                            static_cast<int64_t*>(counts.mutable_data_ptr()),
                            static_cast<double*>(squares.mutable_data_ptr()),
                            static_cast<float*>(max_abs.mutable_data_ptr()),
                            groups,
                            check_only};
  return {counts, squares, max_abs, chunks, args};
}

inline UpdateScalesArgs prepare_update_scales(Tensor& scales, Tensor& since_drop,
                                              const Tensor& nonfinite, double growth,
                                              double backoff, int64_t window, double low,
                                              double high, bool grow_on_skip) {
  const char* const op = "update_scales_";
  const int64_t groups = scales.numel();
  check_scales(op, "scales", scales, groups, scales);
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"since_drop", since_drop},
        {"nonfinite", nonfinite}}) {
    DALLE_CHECK(tensor.numel() == groups && tensor.scalar_type() == ScalarType::Long &&
                    tensor.is_contiguous() && tensor.device() == scales.device(),
                op, name, "contiguous int64 beside the scales, one a group", tensor_text(tensor));
  }
  DALLE_CHECK(growth >= 1, op, "growth", "1 or more", growth);
  DALLE_CHECK(backoff > 0 && backoff <= 1, op, "backoff", "above 0 and at most 1", backoff);
  DALLE_CHECK(window >= 1, op, "window", "1 or more", window);
  DALLE_CHECK(low > 0 && low <= high, op, "low", "above 0 and at most high", low);
  return {static_cast<float*>(scales.mutable_data_ptr()),
          static_cast<int64_t*>(since_drop.mutable_data_ptr()),
          static_cast<const int64_t*>(nonfinite.const_data_ptr()),
          groups,
          window,
          static_cast<float>(growth),
          static_cast<float>(backoff),
          static_cast<float>(low),
          static_cast<float>(high),
          grow_on_skip};
}

}  // namespace dalle
