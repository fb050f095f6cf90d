// CUDA registration of grad_scale: guard, allocate, launch, check.
#include "common/stream.hpp"
#include "grad_scale/grad_scale.hpp"
#include "grad_scale/grad_scale_cuda.cuh"

namespace dalle {
namespace {

std::tuple<Tensor, Tensor> scale_gradient(const Tensor& grad, const Tensor& scale,
                                          ScalarType type) {
  const DeviceScope on(grad);
  const auto [out, counts, args] = prepare_scale(grad, scale, type);
  check_launch("scale_gradient", launch_grad_scale_scale(args, on.stream()));
  return {out, counts};
}

Tensor unscale_gradient(const Tensor& stream, const Tensor& grad, const Tensor& scale) {
  const DeviceScope on(stream);
  const auto [out, args] = prepare_unscale(stream, grad, scale);
  check_launch("unscale_gradient", launch_grad_scale_unscale(args, on.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> unscale_gradients_(std::vector<Tensor> grads, const Tensor& host,
                                                      const Tensor& rows, const Tensor& scales,
                                                      bool check_only) {
  const DeviceScope on(scales);
  const GroupStats stats = prepare_group_stats(grads, host, rows, scales, check_only);
  check_launch("unscale_gradients_", launch_grad_scale_stats(stats.args, on.stream()));
  return {stats.counts, stats.squares, stats.max_abs};
}

void update_scales_(Tensor scales, Tensor since_drop, const Tensor& nonfinite, double growth,
                    double backoff, int64_t window, double low, double high, bool grow_on_skip) {
  const DeviceScope on(scales);
  const UpdateScalesArgs args = prepare_update_scales(scales, since_drop, nonfinite, growth,
                                                      backoff, window, low, high, grow_on_skip);
  check_launch("update_scales_", launch_grad_scale_update(args, on.stream()));
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, DALLE_CUDA_KEY, m) {
  m.impl("_grad_scale_scale", TORCH_BOX(&dalle::scale_gradient));
  m.impl("_grad_scale_unscale", TORCH_BOX(&dalle::unscale_gradient));
  m.impl("_grad_scale_unscale_", TORCH_BOX(&dalle::unscale_gradients_));
  m.impl("_grad_scale_update_", TORCH_BOX(&dalle::update_scales_));
}
