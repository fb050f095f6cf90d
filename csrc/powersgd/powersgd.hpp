// Torch-facing half of the contract: checks the inputs once.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "common/checks.hpp"
#include "common/element.hpp"
#include "powersgd/powersgd.h"

namespace dalle {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline void check_matrix(const char* op, const char* name, const Tensor& tensor, int64_t rows,
                         int64_t columns, ScalarType type, const Tensor& beside) {
  DALLE_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
                  tensor.scalar_type() == type && tensor.is_contiguous() &&
                  tensor.device() == beside.device(),
              op, name,
              "contiguous (" + std::to_string(rows) + ", " + std::to_string(columns) + ") " +
                  dtype_text(type) + " on the buffers' device",
              tensor_text(tensor));
}

inline const float* check_one(const char* op, const char* name, const std::optional<Tensor>& tensor,
                              const Tensor& beside) {
  if (!tensor) return nullptr;
  DALLE_CHECK(tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Float &&
                  tensor->device() == beside.device(),
              op, name, "one float32 on the buffers' device", tensor_text(*tensor));
  return static_cast<const float*>(tensor->const_data_ptr());
}

// The matrices of a call. `left`, `right` and `grads` are empty where the op has none.
inline std::vector<PowerMatrix> prepare_matrices(const char* op, const Tensors& errors,
                                                 const Tensors& grads, const Tensors& left,
                                                 const Tensors& right, const Tensors& outs) {
  DALLE_CHECK(!errors.empty() && outs.size() == errors.size(), op, "errors",
              "as many as results, and at least one", errors.size());
  std::vector<PowerMatrix> matrices;
  for (size_t i = 0; i < errors.size(); ++i) {
    const Tensor& error = errors[i];
    DALLE_CHECK(error.dim() == 2, op, "errors", "(m, n)", shape_text(error));
    const int64_t m = error.size(0), n = error.size(1);
    const Tensor& factor = left.empty() ? right.at(i) : left.at(i);
    DALLE_CHECK(factor.dim() == 2 && factor.size(1) >= 1, op, "factors", "(m or n, r) with r >= 1",
                shape_text(factor));
    const int64_t r = factor.size(1);
    DALLE_CHECK(m < kMaxLines && n < kMaxLines, op, "errors", "under 2^30 long", shape_text(error));
    check_matrix(op, "errors", error, m, n, ScalarType::Short, errors[0]);
    PowerMatrix matrix{};
    matrix.error = static_cast<uint16_t*>(error.mutable_data_ptr());
    if (!grads.empty()) {
      const Tensor& grad = grads.at(i);
      matrix.grad_kind = check_floating(op, "grads", grad.scalar_type());
      check_matrix(op, "grads", grad, m, n, grad.scalar_type(), error);
      matrix.grad = grad.const_data_ptr();
    }
    if (!left.empty()) {
      check_matrix(op, "ps", left.at(i), m, r, ScalarType::Float, error);
      matrix.left = static_cast<const float*>(left[i].const_data_ptr());
    }
    if (!right.empty()) {
      check_matrix(op, "qs", right.at(i), n, r, ScalarType::Float, error);
      matrix.right = static_cast<const float*>(right[i].const_data_ptr());
    }
    const bool both = !left.empty() && !right.empty();
    check_matrix(op, "results", outs[i], left.empty() || both ? m : n, both ? n : r,
                 ScalarType::Float, error);
    matrix.out = static_cast<float*>(outs[i].mutable_data_ptr());
    matrix.rows = m;
    matrix.columns = n;
    matrix.rank = r;
    if (m * n > 0) matrices.push_back(matrix);
  }
  return matrices;
}

inline PowerFactors prepare_factors(const char* op, const std::optional<Tensor>& scale,
                                    const std::optional<Tensor>& skip, double error_scale,
                                    double feedback, const Tensor& beside) {
  return {check_one(op, "scale", scale, beside), check_one(op, "skip", skip, beside),
          static_cast<float>(error_scale), static_cast<float>(feedback)};
}

// Numbers the tiles of all matrices, `tiles` of one; returns how many there are.
template <typename Tiles>
int64_t number_tiles(std::vector<PowerMatrix>& matrices, const Tiles& tiles) {
  int64_t count = 0;
  for (PowerMatrix& matrix : matrices) {
    matrix.tile_begin = count;
    count += tiles(matrix);
  }
  return count;
}

}  // namespace dalle
