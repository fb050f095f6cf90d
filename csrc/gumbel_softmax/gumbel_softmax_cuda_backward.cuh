// Backward of gumbel_softmax on CUDA: noise and sample drawn again from the seed, one reduction,
// no atomics. Letters: see gumbel_softmax.h.
//
//   grad_l = y (g - <g, y>) / tau + grad_kl p (ln p + ln K - kl)
#pragma once

#include "gumbel_softmax/gumbel_softmax_cuda_row.cuh"

namespace dalle {

// What the gradient of a row needs besides its logits and grad_sample.
struct RowGradient {
  float scale, noisy_max, inverse_sum;           // of the sample
  float logit_max, log2_sum, grad_kl, constant;  // of the KL term; constant is ln K - kl
  uint64_t seed;
  bool with_sample, with_kl;

  template <typename row_t>
  __device__ __forceinline__ RowGradient(const GumbelSoftmaxParams& p,
                                         const GumbelSoftmaxBackward& args, const row_t& row) {
    const int64_t rows = num_rows(p), at = row.num_codes != 0 ? row.index : 0;
    scale = float_exponent_scale(*args.tau);
    noisy_max = args.stats[kNoisyMax * rows + at];
    inverse_sum = args.stats[kInverseSum * rows + at];
    logit_max = args.stats[kLogitMax * rows + at];
    log2_sum = args.stats[kLog2Sum * rows + at];
    with_sample = args.grad_sample != nullptr;
    with_kl = args.grad_kl != nullptr;
    grad_kl = with_kl ? args.grad_kl[at] : 0.0f;
    constant = logf(static_cast<float>(p.num_codes)) - args.kl[at];
    seed = static_cast<uint64_t>(*args.seed);
  }

  // Turns logits into y / tau and the gradients g into g y / tau + the KL term, so that afterwards
  // grad_l = g - <g, y> * logits; returns the chunk's <g, y>.
  template <typename row_t, int kChunk>
  __device__ __forceinline__ float gradient_chunk(const row_t& row, typename row_t::Code first,
                                                  float (&logits)[kChunk],
                                                  float (&g)[kChunk]) const {
    float kl_term[kChunk], dot = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      kl_term[i] = 0;
      if (with_kl) {
        const float t = fmaxf((logits[i] - logit_max) * kLog2EFloat - log2_sum, -127.0f);
        kl_term[i] = grad_kl * (exp2_approx(t) * (t * kLn2Float + constant));
      }
    }
    if (with_sample) {
      row.add_noise(first, seed, logits);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float y = inverse_sum * exp2_approx((logits[i] - noisy_max) * scale);
        dot = y * g[i] + dot;
        logits[i] = y * (scale * kLn2Float);
        g[i] = logits[i] * g[i] + kl_term[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        logits[i] = 0;
        g[i] = kl_term[i];
      }
    }
    return dot;
  }
};

// A block takes kRows rows, kLanes threads each; a thread holds kElements codes of its row, logit
// and gradient, and reads those of a tail a second time.
template <typename scalar_t, typename layout_t>
__global__ void __launch_bounds__(layout_t::kThreads, layout_t::kMinBlocks)
    gumbel_softmax_backward_kernel(GumbelSoftmaxParams p, GumbelSoftmaxBackward args) {
  using row_t = Row<scalar_t, layout_t>;
  using code_t = typename row_t::Code;
  constexpr int kChunk = layout_t::kChunk, kChunks = layout_t::kChunks;
  const scalar_t* const logits = static_cast<const scalar_t*>(args.logits);
  const scalar_t* const grads = static_cast<const scalar_t*>(args.grad_sample);
  scalar_t* const out = static_cast<scalar_t*>(args.grad_logits);
  const row_t row(p, logits, grads, out);
  const RowGradient gradient(p, args, row);
  const auto load = [&](code_t first, float (&x)[kChunk], float (&g)[kChunk]) {
    float ignored = 0;
    row.load(logits, first, -INFINITY, ignored, x);
    if (grads) {
      row.load(grads, first, 0.0f, ignored, g);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) g[i] = 0;
    }
  };
  const auto write = [&](code_t first, float dot, const float (&x)[kChunk], float (&g)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) g[i] = -dot * x[i] + g[i];
    row.store(out, first, g);
  };

  float x[kChunks][kChunk], g[kChunks][kChunk], dot = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) load(row.first_code(c), x[c], g[c]);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (row.first_code(c) < row.num_codes) {
      dot += gradient.gradient_chunk(row, row.first_code(c), x[c], g[c]);
    }
  }
  code_t end = row.first_code(kChunks);  // of the chunks that are done
  if constexpr (layout_t::kTail) {
    for (; end < row.num_codes; end += row_t::kSpan) {
      float values[kChunk], weights[kChunk];
      load(end, values, weights);
      dot += gradient.gradient_chunk(row, end, values, weights);
    }
  }
  dot = reduce_row<layout_t>(dot, 0.0f, [](float a, float b) { return a + b; });
  if constexpr (layout_t::kTail) {  // backwards: what was read last is still in L2
    for (end -= row_t::kSpan; end >= row.first_code(kChunks); end -= row_t::kSpan) {
      float values[kChunk], weights[kChunk];
      load(end, values, weights);
      gradient.gradient_chunk(row, end, values, weights);
      write(end, dot, values, weights);
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (row.first_code(c) < row.num_codes) write(row.first_code(c), dot, x[c], g[c]);
  }
}

}  // namespace dalle
