// Schema and CPU registration of the products of a decoding step.
#include "packed_linear/packed_linear.hpp"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/isa.h"
#include "packed_linear/packed_linear_cpu.h"

namespace dalle {
namespace {

constexpr int64_t kRowsInParallel = 16;  // fewer are prepared by one thread
constexpr int64_t kGrain = 1 << 16;      // products worth a thread

Tensor packed_linear(const Tensor& x, const Tensor& weight, int64_t outputs,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& gain,
                     const std::optional<Tensor>& shift, double eps, double slope,
                     const std::optional<Tensor>& add) {
  PackedLinearArgs args =
      check_packed_linear(x, weight, outputs, bias, gain, shift, eps, slope, add);
  const int64_t steps = args.pairs ? ceil_div(args.inputs, 2) : args.inputs;
  const int64_t panels = ceil_div(outputs, kLinearColumns);
  Tensor out = torch::stable::new_empty(x, {args.rows, outputs});
  args.out = static_cast<float*>(out.mutable_data_ptr());
  if (out.numel() == 0) return out;
  const PackedLinearCpu& cpu = args.pairs ? DALLE_SELECT_ISA_BFLOAT16(packed_linear_cpu)
                                          : DALLE_SELECT_ISA(packed_linear_cpu);
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
      "_packed_linear(Tensor x, Tensor weight, int outputs, Tensor? bias, Tensor? gain,"
      " Tensor? shift, float eps, float slope, Tensor? add) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CPU, m) {
  m.impl("_packed_linear", TORCH_BOX(&dalle::packed_linear));
}
