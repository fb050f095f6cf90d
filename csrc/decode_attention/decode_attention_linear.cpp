// Schema and CPU registration of the products of a decoding step.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/checks.hpp"
#include "common/isa.h"
#include "decode_attention/decode_attention_cpu_linear.h"

namespace dalle {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowsInParallel = 16;  // fewer are prepared by one thread
constexpr int64_t kGrain = 1 << 16;      // products worth a thread

const float* floats(const char* name, const std::optional<Tensor>& x, int64_t rows, int64_t size) {
  if (!x) return nullptr;
  const bool holds = x->scalar_type() == ScalarType::Float && x->is_contiguous() &&
                     x->numel() == rows * size && x->size(x->dim() - 1) == size;
  DALLE_CHECK(holds, "decode_linear", name, "contiguous float32, " + std::to_string(size) + " wide",
              shape_text(*x));
  return static_cast<const float*>(x->const_data_ptr());
}

Tensor linear(const Tensor& x, const Tensor& weight, int64_t outputs,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& gain,
              const std::optional<Tensor>& shift, double eps, double slope,
              const std::optional<Tensor>& residual) {
  LinearArgs args{};
  DALLE_CHECK(x.dim() == 2, "decode_linear", "x", "(M, K)", shape_text(x));
  args.rows = x.size(0), args.inputs = x.size(1), args.outputs = outputs;
  args.pairs = weight.scalar_type() == ScalarType::BFloat16;
  const int64_t steps = args.pairs ? ceil_div(args.inputs, 2) : args.inputs;
  const int64_t panels = ceil_div(outputs, kLinearColumns);
  const bool fits = weight.is_contiguous() &&
                    (args.pairs || weight.scalar_type() == ScalarType::Float) &&
                    weight.numel() == panels * steps * kLinearColumns * (1 + args.pairs);
  DALLE_CHECK(fits, "decode_linear", "weight", "packed for this x", shape_text(weight));
  args.x = floats("x", x, args.rows, args.inputs);
  args.weight = weight.const_data_ptr();
  args.bias = floats("bias", bias, 1, outputs);
  args.gain = floats("gain", gain, 1, args.inputs);
  args.shift = floats("shift", shift, 1, args.inputs);
  args.residual = floats("residual", residual, args.rows, outputs);
  args.eps = static_cast<float>(eps), args.slope = static_cast<float>(slope);
  Tensor out = torch::stable::new_empty(x, {args.rows, outputs});
  args.out = static_cast<float*>(out.mutable_data_ptr());
  if (out.numel() == 0) return out;
  const DecodeLinearCpu& cpu = args.pairs ? DALLE_SELECT_ISA_BFLOAT16(decode_linear_cpu)
                                          : DALLE_SELECT_ISA(decode_linear_cpu);
  Tensor normed = x;
  args.normed = const_cast<float*>(args.x);  // read only, where nothing is to be prepared
  if (args.gain || args.pairs) {
    normed = torch::stable::new_empty(x, {args.rows, args.pairs ? steps : args.inputs});
    args.normed = static_cast<float*>(normed.mutable_data_ptr());
    if (args.rows < kRowsInParallel) {
      cpu.prepare(args, 0, args.rows);
    } else {
      torch::stable::parallel_for(0, args.rows, kRowsInParallel, [&](int64_t begin, int64_t end) {
        cpu.prepare(args, begin, end);
      });
    }
  }
  const int64_t grain = 1 + kGrain / (args.rows * steps * kLinearColumns);
  torch::stable::parallel_for(0, panels, grain,
                              [&](int64_t begin, int64_t end) { cpu.run(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) {
  m.def(
      "_decode_linear(Tensor x, Tensor weight, int outputs, Tensor? bias, Tensor? gain,"
      " Tensor? shift, float eps, float slope, Tensor? residual) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CPU, m) {
  m.impl("_decode_linear", TORCH_BOX(&dalle::linear));
}
