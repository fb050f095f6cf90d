// The torch-facing check of gradient scales.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>

#include "common/checks.hpp"

namespace dalle {

// Their values are looked at on the CPU alone: elsewhere that would wait for the device.
inline const float* check_scales(const char* op, const char* name,
                                 const torch::stable::Tensor& scales, int64_t count,
                                 const torch::stable::Tensor& beside) {
  using torch::headeronly::ScalarType;
  DALLE_CHECK(scales.numel() == count && scales.scalar_type() == ScalarType::Float &&
                  scales.is_contiguous() && scales.device() == beside.device(),
              op, name, "contiguous float32 on the gradients' device, one a group",
              tensor_text(scales));
  const auto* values = static_cast<const float*>(scales.const_data_ptr());
  if (scales.is_cpu()) {
    for (int64_t i = 0; i < count; ++i) {
      DALLE_CHECK(values[i] > 0 && std::isfinite(values[i]), op, name, "positive and finite",
                  values[i]);
    }
  }
  return values;
}

}  // namespace dalle
