// CUDA kernels of gumbel_softmax and their launch: the layout that fits K and the axis. No torch
// here. Not yet measured on a GPU. Letters: see gumbel_softmax.h.
#pragma once

#include "common/vec.cuh"
#include "gumbel_softmax/gumbel_softmax_cuda_backward.cuh"
#include "gumbel_softmax/gumbel_softmax_cuda_forward.cuh"

namespace dalle {

// Calls `launch` with the first of the layouts whose registers hold a row, or with the last.
template <typename scalar_t, typename layout_t, typename... more_t, typename launch_t>
cudaError_t choose_layout(const GumbelSoftmaxParams& p, const launch_t& launch) {
  if constexpr (sizeof...(more_t) == 0) {
    static_assert(layout_t::kTail, "the last layout must take every K");
    return launch(layout_t());
  } else {
    // The first and the last unit of a row may hold fewer codes.
    constexpr int64_t kWidth = Row<scalar_t, layout_t>::kWidth;
    const int64_t wasted = p.num_codes % kWidth == 0 ? 0 : kWidth - 1;
    if (p.num_codes + wasted <= layout_t::kLanes * layout_t::kElements) return launch(layout_t());
    return choose_layout<scalar_t, more_t...>(p, launch);
  }
}

// Moves a tensor's address to where element 0 of the larger batch would be: see Row.
template <typename scalar_t, typename pointer_t>
void count_from_first_row(const GumbelSoftmaxParams& p, pointer_t& data) {
  if (data == nullptr || p.inner > 1) return;
  const uint64_t before = element_of(p, 0) * sizeof(scalar_t);
  data = reinterpret_cast<pointer_t>(reinterpret_cast<uintptr_t>(data) - before);
}

template <typename kernel_t, typename args_t, typename layout_t>
cudaError_t launch_rows(kernel_t kernel, layout_t, const GumbelSoftmaxParams& p, const args_t& args,
                        void* stream) {
  const int64_t blocks = ceil_div(num_rows(p), layout_t::kRows);
  if (blocks == 0) return cudaSuccess;
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidConfiguration;
  return launch(kernel, static_cast<unsigned>(blocks), layout_t::kThreads, 0, stream, p, args);
}

template <typename scalar_t>
cudaError_t launch_forward(const GumbelSoftmaxParams& p, GumbelSoftmaxForward args, void* stream) {
  count_from_first_row<scalar_t>(p, args.logits);
  count_from_first_row<scalar_t>(p, args.sample);
  const auto launch = [&](auto layout) {
    return launch_rows(gumbel_softmax_forward_kernel<scalar_t, decltype(layout)>, layout, p, args,
                       stream);
  };
  if (p.inner > 1) {
    return choose_layout<scalar_t, RowLayout<true, 32, 8, 16, false, 16, 4>,
                         RowLayout<true, 8, 64, 16, true, 8>>(p, launch);
  }
  return choose_layout<scalar_t, RowLayout<false, 32, 4, 8>, RowLayout<false, 4, 32, 8>,
                       RowLayout<false, 1, 128, 8>, RowLayout<false, 1, 256, 16, false, 16, 4>,
                       RowLayout<false, 1, 512, 16, false, 16, 2>,
                       RowLayout<false, 1, 512, 32, true, 8>>(p, launch);
}

template <typename scalar_t>
cudaError_t launch_backward(const GumbelSoftmaxParams& p, GumbelSoftmaxBackward args,
                            void* stream) {
  count_from_first_row<scalar_t>(p, args.logits);
  count_from_first_row<scalar_t>(p, args.grad_sample);
  count_from_first_row<scalar_t>(p, args.grad_logits);
  const auto launch = [&](auto layout) {
    return launch_rows(gumbel_softmax_backward_kernel<scalar_t, decltype(layout)>, layout, p, args,
                       stream);
  };
  if (p.inner > 1) {
    return choose_layout<scalar_t, RowLayout<true, 32, 8, 8>, RowLayout<true, 8, 64, 8, true>>(
        p, launch);
  }
  // Backward holds two numbers a code. What of it keeps within 64 registers: floats drawn one
  // vector at a time, or 8 codes a thread.
  constexpr bool kFloat = sizeof(scalar_t) == 4;
  using upto_4096_t = RowLayout<false, 1, kFloat ? 256 : 512, kFloat ? 16 : 8, false,
                                kFloat ? 4 : 8, kFloat ? 4 : 2>;
  using upto_8192_t = RowLayout<false, 1, kFloat ? 512 : 1024, kFloat ? 16 : 8, false,
                                kFloat ? 4 : 8, kFloat ? 2 : 1>;
  return choose_layout<scalar_t, RowLayout<false, 32, 4, 8>, RowLayout<false, 4, 32, 8>,
                       RowLayout<false, 1, 128, 8>, upto_4096_t, upto_8192_t,
                       RowLayout<false, 1, 512, 16, true, 8>>(p, launch);
}

// logits (outer, K, inner) -> R = outer * inner rows -> kRows of the layout a block, kLanes threads
// a row -> sample (outer, K, inner), index (R), kl (R), stats (4, R).
inline cudaError_t launch_gumbel_softmax_forward(const GumbelSoftmaxParams& p,
                                                 const GumbelSoftmaxForward& args, void* stream) {
  return with_cuda_scalar(
      p.dtype, [&](auto scalar) { return launch_forward<decltype(scalar)>(p, args, stream); });
}

// grad_sample, logits (outer, K, inner), grad_kl (R), stats (4, R) -> rows to blocks and threads as
// in the forward -> grad_logits (outer, K, inner).
inline cudaError_t launch_gumbel_softmax_backward(const GumbelSoftmaxParams& p,
                                                  const GumbelSoftmaxBackward& args, void* stream) {
  return with_cuda_scalar(
      p.dtype, [&](auto scalar) { return launch_backward<decltype(scalar)>(p, args, stream); });
}

}  // namespace dalle
