// Checks the arguments of packed_linear once and makes plain data of them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "common/checks.hpp"
#include "packed_linear/packed_linear.h"

namespace dalle {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `sizes` is the whole shape: as many numbers in another shape are not what is asked for.
inline const float* check_floats(const char* op, const char* name, const std::optional<Tensor>& x,
                                 std::initializer_list<int64_t> sizes) {
  if (!x) return nullptr;
  const auto dims = static_cast<int64_t>(sizes.size());
  const auto wanted = [&](int64_t d) { return sizes.begin()[d]; };
  bool holds = x->dim() == dims && x->scalar_type() == ScalarType::Float && x->is_contiguous();
  for (int64_t d = 0; holds && d < dims; ++d) holds = x->size(d) == wanted(d);
  DALLE_CHECK(holds, op, name, "contiguous float32 of shape " + tuple_text(dims, wanted),
              tensor_text(*x));
  return static_cast<const float*>(x->const_data_ptr());
}

// What a packed weight says of a product; one of bfloat16 does not say whether `inputs` is odd.
inline PackedLinearArgs check_packed_weight(const char* op, const Tensor& weight, int64_t inputs,
                                            int64_t outputs, const std::string& requirement) {
  PackedLinearArgs args{};
  args.inputs = inputs, args.outputs = outputs;
  args.pairs = weight.scalar_type() == ScalarType::BFloat16;
  const int64_t steps = args.pairs ? ceil_div(inputs, 2) : inputs;
  const int64_t panels = ceil_div(outputs, kLinearColumns);
  const bool fits = weight.is_contiguous() &&
                    (args.pairs || weight.scalar_type() == ScalarType::Float) &&
                    weight.numel() == panels * steps * kLinearColumns * (1 + args.pairs);
  DALLE_CHECK(fits, op, "weight", requirement, tensor_text(weight));
  args.weight = weight.const_data_ptr();
  return args;
}

// All but `normed` and `out`, which the caller adds.
inline PackedLinearArgs check_packed_linear(const Tensor& x, const Tensor& weight, int64_t outputs,
                                            const std::optional<Tensor>& bias,
                                            const std::optional<Tensor>& gain,
                                            const std::optional<Tensor>& shift, double eps,
                                            double slope, const std::optional<Tensor>& add) {
  constexpr const char* op = "packed_linear";
  DALLE_CHECK(x.dim() == 2, op, "x", "(M, K)", shape_text(x));
  PackedLinearArgs args = check_packed_weight(op, weight, x.size(1), outputs, "packed for this x");
  args.rows = x.size(0);
  args.x = check_floats(op, "x", x, {args.rows, args.inputs});
  args.bias = check_floats(op, "bias", bias, {outputs});
  args.gain = check_floats(op, "gain", gain, {args.inputs});
  args.shift = check_floats(op, "shift", shift, {args.inputs});
  DALLE_CHECK(gain.has_value() == shift.has_value(), op, "shift", "given where gain is",
              gain ? "gain alone" : "shift alone");
  args.residual = check_floats(op, "add", add, {args.rows, outputs});
  args.eps = static_cast<float>(eps), args.slope = static_cast<float>(slope);
  return args;
}

}  // namespace dalle
