// CUDA registration of formats: guard, allocate, launch, check.
#include "common/stream.hpp"
#include "formats/formats.hpp"
#include "formats/formats_cuda.cuh"

namespace dalle {
namespace {

std::tuple<Tensor, Tensor> pack(const Tensor& x, int64_t format, const std::optional<Tensor>& seed,
                                bool count) {
  const DeviceScope on(x);
  const auto [codes, counts, args] = prepare_pack(x, format, seed, count);
  check_launch("pack", launch_formats_pack(args, on.stream()));
  return {codes, counts};
}

Tensor unpack(const Tensor& codes, int64_t format, ScalarType type) {
  const DeviceScope on(codes);
  const auto [x, args] = prepare_unpack(codes, format, type);
  check_launch("unpack", launch_formats_unpack(args, on.stream()));
  return x;
}

std::tuple<Tensor, Tensor> sum_codes(const Tensor& codes, int64_t format,
                                     const std::optional<Tensor>& seed, bool count) {
  const DeviceScope on(codes);
  const auto [sum, counts, args] = prepare_reduce(codes, format, seed, count);
  check_launch("sum_codes", launch_formats_sum(args, on.stream()));
  return {sum, counts};
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, DALLE_CUDA_KEY, m) {
  m.impl("_formats_pack", TORCH_BOX(&dalle::pack));
  m.impl("_formats_unpack", TORCH_BOX(&dalle::unpack));
  m.impl("_formats_sum", TORCH_BOX(&dalle::sum_codes));
}
