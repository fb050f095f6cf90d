// Schemas of formats and its CPU registration.
#include "formats/formats.hpp"

#include "common/isa.h"
#include "formats/formats_cpu.h"

namespace dalle {
namespace {

constexpr int64_t kGrain = 4;  // units a task: 16,384 elements, some microseconds

std::tuple<Tensor, Tensor> pack(const Tensor& x, int64_t format, const std::optional<Tensor>& seed,
                                bool count) {
  auto [codes, counts, args] = prepare_pack(x, format, seed, count);
  const FormatsCpu& cpu = DALLE_SELECT_ISA(formats_cpu);
  torch::stable::parallel_for(0, ceil_div(args.numel, kFormatsUnit), kGrain,
                              [&, &args = args](int64_t b, int64_t e) { cpu.pack(args, b, e); });
  return {codes, counts};
}

Tensor unpack(const Tensor& codes, int64_t format, ScalarType type) {
  auto [x, args] = prepare_unpack(codes, format, type);
  const FormatsCpu& cpu = DALLE_SELECT_ISA(formats_cpu);
  torch::stable::parallel_for(0, ceil_div(args.numel, kFormatsUnit), kGrain,
                              [&, &args = args](int64_t b, int64_t e) { cpu.unpack(args, b, e); });
  return x;
}

std::tuple<Tensor, Tensor> sum_codes(const Tensor& codes, int64_t format,
                                     const std::optional<Tensor>& seed, bool count) {
  auto [sum, counts, args] = prepare_reduce(codes, format, seed, count);
  const FormatsCpu& cpu = DALLE_SELECT_ISA(formats_cpu);
  torch::stable::parallel_for(0, ceil_div(args.numel, kFormatsUnit), kGrain,
                              [&, &args = args](int64_t b, int64_t e) { cpu.reduce(args, b, e); });
  return {sum, counts};
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) {
  m.def(
      "_formats_pack(Tensor x, int format, Tensor? seed, bool count)"
      " -> (Tensor codes, Tensor counts)");
  m.def("_formats_unpack(Tensor codes, int format, ScalarType dtype) -> Tensor");
  m.def(
      "_formats_sum(Tensor codes, int format, Tensor? seed, bool count)"
      " -> (Tensor sum, Tensor counts)");
}

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CPU, m) {
  m.impl("_formats_pack", TORCH_BOX(&dalle::pack));
  m.impl("_formats_unpack", TORCH_BOX(&dalle::unpack));
  m.impl("_formats_sum", TORCH_BOX(&dalle::sum_codes));
}
