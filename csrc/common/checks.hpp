// One form for every message of a torch-facing check: "<op>: <argument> must be <requirement>, got <value>".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

// DALLE_CHECK(cond, "sparse_attention", "tau", "positive", tau)
#define DALLE_CHECK(condition, op, argument, requirement, ...) \
  STD_TORCH_CHECK(condition, op, ": ", argument, " must be ", requirement, ", got ", __VA_ARGS__)

namespace dalle {

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + ")";
}

}  // namespace dalle
