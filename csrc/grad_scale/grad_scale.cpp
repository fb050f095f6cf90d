// Schemas of grad_scale and its CPU registration.
#include "grad_scale/grad_scale.hpp"

#include <cstring>

#include "common/isa.h"
#include "grad_scale/grad_scale_cpu.h"

namespace dalle {
namespace {

constexpr int64_t kGrain = 4;  // units or chunks a task at least

std::tuple<Tensor, Tensor> scale_gradient(const Tensor& grad, const Tensor& scale,
                                          ScalarType type) {
  auto [out, counts, args] = prepare_scale(grad, scale, type);
  const GradScaleCpu& cpu = DALLE_SELECT_ISA(grad_scale_cpu);
  torch::stable::parallel_for(0, ceil_div(args.numel, kGradScaleUnit), kGrain,
                              [&, &args = args](int64_t b, int64_t e) { cpu.scale(args, b, e); });
  return {out, counts};
}

Tensor unscale_gradient(const Tensor& stream, const Tensor& grad, const Tensor& scale) {
  auto [out, args] = prepare_unscale(stream, grad, scale);
  const GradScaleCpu& cpu = DALLE_SELECT_ISA(grad_scale_cpu);
  torch::stable::parallel_for(0, ceil_div(args.numel, kGradScaleUnit), kGrain,
                              [&, &args = args](int64_t b, int64_t e) { cpu.unscale(args, b, e); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> unscale_gradients_(std::vector<Tensor> grads, const Tensor& host,
                                                      const Tensor& rows, const Tensor& scales,
                                                      bool check_only) {
  const GroupStats stats = prepare_group_stats(grads, host, rows, scales, check_only);
  const GroupStatsArgs& args = stats.args;
  const GradScaleCpu& cpu = DALLE_SELECT_ISA(grad_scale_cpu);
  torch::stable::parallel_for(0, args.table.num_chunks, 1,
                              [&](int64_t b, int64_t e) { cpu.chunks(args, b, e); });
  for (int64_t g = 0; g < args.num_groups; ++g) {
    const double scale = args.scales[g];
    double squares = 0;
    uint32_t max_abs = 0;
    int64_t counts[kNumGroupCounts] = {};
    const int64_t end = first_chunk_of_group(args.table, g + 1);
    for (int64_t c = first_chunk_of_group(args.table, g); c < end; ++c) {
      const ChunkStats& chunk = args.chunks[c];
      squares += chunk.squares;
      max_abs = chunk.max_abs > max_abs ? chunk.max_abs : max_abs;
      for (int k = 0; k < kNumGroupCounts; ++k) counts[k] += chunk.counts[k];
    }
    args.squares[g] = squares / scale / scale;
    args.max_abs[g] = float_of(max_abs) / args.scales[g];
    std::memcpy(args.counts + g * kNumGroupCounts, counts, sizeof counts);
  }
  return {stats.counts, stats.squares, stats.max_abs};
}

void update_scales_(Tensor scales, Tensor since_drop, const Tensor& nonfinite, double growth,
                    double backoff, int64_t window, double low, double high, bool grow_on_skip) {
  const UpdateScalesArgs args = prepare_update_scales(scales, since_drop, nonfinite, growth,
                                                      backoff, window, low, high, grow_on_skip);
  bool skipped = false;
  for (int64_t g = 0; g < args.num_groups; ++g) skipped |= args.nonfinite[g] != 0;
  for (int64_t g = 0; g < args.num_groups; ++g) update_scale(args, g, skipped);
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) {
  m.def(
      "_grad_scale_scale(Tensor grad, Tensor scale, ScalarType dtype)"
      " -> (Tensor out, Tensor counts)");
  m.def("_grad_scale_unscale(Tensor stream, Tensor grad, Tensor scale) -> Tensor");
  m.def(
      "_grad_scale_unscale_(Tensor(a!)[] grads, Tensor host, Tensor rows, Tensor scales,"
      " bool check_only) -> (Tensor counts, Tensor squares, Tensor max_abs)");
  m.def(
      "_grad_scale_update_(Tensor(a!) scales, Tensor(b!) since_drop, Tensor nonfinite,"
      " float growth, float backoff, int window, float low, float high, bool grow_on_skip) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CPU, m) {
  m.impl("_grad_scale_scale", TORCH_BOX(&dalle::scale_gradient));
  m.impl("_grad_scale_unscale", TORCH_BOX(&dalle::unscale_gradient));
  m.impl("_grad_scale_unscale_", TORCH_BOX(&dalle::unscale_gradients_));
  m.impl("_grad_scale_update_", TORCH_BOX(&dalle::update_scales_));
}
