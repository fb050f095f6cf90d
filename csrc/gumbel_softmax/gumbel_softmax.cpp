// Schemas of gumbel_softmax and its CPU registration.
#include "gumbel_softmax/gumbel_softmax.hpp"

#include <memory>
#include <new>

#include "common/isa.h"
#include "gumbel_softmax/gumbel_softmax_cpu.h"

namespace dalle {
namespace {

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
};

// Runs `kernel` over all units in parallel, each thread with its own scratch.
template <typename kernel_t, typename args_t>
void run_units(const GumbelSoftmaxCpu& cpu, kernel_t kernel, const GumbelSoftmaxParams& p,
               const args_t& args) {
  const int64_t units = cpu.num_units(p);
  if (units == 0) return;
  const int64_t codes_per_unit = num_rows(p) * p.num_codes / units;
  const int64_t grain = ceil_div(16384, codes_per_unit + 1);  // about 20 us a task at least
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const size_t bytes = static_cast<size_t>(cpu.scratch_floats(p)) * sizeof(float);
    const std::unique_ptr<float, AlignedDelete> scratch(
        static_cast<float*>(::operator new(bytes, std::align_val_t{64})));
    kernel(p, args, begin, end, scratch.get());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& tau,
                                                   const Tensor& seed, int64_t dim, bool hard,
                                                   int64_t first_row) {
  const GumbelSoftmaxParams p = check_gumbel_softmax(logits, tau, seed, dim, first_row);
  auto outputs = gumbel_softmax_outputs(logits, dim);
  const auto args = gumbel_softmax_forward_args(logits, tau, seed, hard, outputs);
  const GumbelSoftmaxCpu& cpu = DALLE_SELECT_ISA(gumbel_softmax_cpu);
  run_units(cpu, cpu.forward, p, args);
  return outputs;
}

Tensor backward(const std::optional<Tensor>& grad_sample, const std::optional<Tensor>& grad_kl,
                const Tensor& logits, const Tensor& tau, const Tensor& seed, const Tensor& kl,
                const Tensor& stats, int64_t dim, int64_t first_row) {
  const GumbelSoftmaxParams p = check_gumbel_softmax(logits, tau, seed, dim, first_row);
  Tensor grad_logits = torch::stable::empty_like(logits);
  const auto args = gumbel_softmax_backward_args(p, grad_sample, grad_kl, logits, tau, seed, kl,
                                                 stats, grad_logits);
  const GumbelSoftmaxCpu& cpu = DALLE_SELECT_ISA(gumbel_softmax_cpu);
  run_units(cpu, cpu.backward, p, args);
  return grad_logits;
}

// int32 words of elements 0 to count - 1, as the kernels of this build draw them.
Tensor words(const Tensor& seed, int64_t count) {
  DALLE_CHECK(count >= 0 && count % 32 == 0, "gumbel_softmax", "count", "a multiple of 32", count);
  DALLE_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "gumbel_softmax", "seed",
              "an int64 scalar", shape_text(seed));
  const int64_t size[] = {count};
  Tensor out = torch::stable::new_empty(seed, size, ScalarType::Int);
  DALLE_SELECT_ISA(gumbel_softmax_cpu)
      .words(static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())), count,
             static_cast<uint32_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) {
  m.def(
      "_gumbel_softmax_forward(Tensor logits, Tensor tau, Tensor seed, int dim, bool hard,"
      " int first_row=0)"
      " -> (Tensor sample, Tensor index, Tensor kl, Tensor stats)");
  m.def(
      "_gumbel_softmax_backward(Tensor? grad_sample, Tensor? grad_kl, Tensor logits, Tensor tau,"
      " Tensor seed, Tensor kl, Tensor stats, int dim, int first_row=0) -> Tensor");
  m.def("_gumbel_softmax_words(Tensor seed, int count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CPU, m) {
  m.impl("_gumbel_softmax_forward", TORCH_BOX(&dalle::forward));
  m.impl("_gumbel_softmax_backward", TORCH_BOX(&dalle::backward));
  m.impl("_gumbel_softmax_words", TORCH_BOX(&dalle::words));
}
