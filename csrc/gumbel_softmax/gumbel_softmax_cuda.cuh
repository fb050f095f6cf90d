// CUDA kernels of gumbel_softmax: one block a row, either axis contiguous. No torch here.
//
// The plain version: forward reads the row three times (maxima, sums, result) and draws the noise
// anew each time, backward twice. Correct first; not yet measured on a GPU. Letters: see
// gumbel_softmax.h.
#pragma once

#include "common/simt.h"
#include "gumbel_softmax/gumbel_softmax.h"

namespace dalle {

constexpr int kGumbelSoftmaxThreads = 256;

// -log(-log u) of gumbel_softmax.h; near 1 the complement of the word keeps the digits of 1 - u.
static __device__ float gumbel_of_word(uint32_t word) {
  const bool near_one = word >= kNearOne;
  const float v = static_cast<float>(near_one ? ~word : word) * 0x1p-32f + 0x1p-33f;
  return -logf(near_one ? -log1pf(-v) : -logf(v));
}

struct MaximumOp {
  template <typename value_t>
  __device__ value_t operator()(value_t a, value_t b) const {
    return b > a ? b : a;
  }
};
struct SumOp {
  template <typename value_t>
  __device__ value_t operator()(value_t a, value_t b) const {
    return a + b;
  }
};
struct MinimumOp {
  template <typename value_t>
  __device__ value_t operator()(value_t a, value_t b) const {
    return b < a ? b : a;
  }
};

// Reduces over the block in a fixed order; every thread gets the result.
template <typename value_t, typename op_t>
__device__ value_t block_reduce(value_t value, op_t op) {
  DALLE_SHARED(value_t, parts, [kGumbelSoftmaxThreads]);
  __syncthreads();  // the last call's readers are done
  parts[threadIdx.x] = value;
  __syncthreads();
  for (unsigned step = kGumbelSoftmaxThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) parts[threadIdx.x] = op(parts[threadIdx.x], parts[threadIdx.x + step]);
    __syncthreads();
  }
  return parts[0];
}

// Calls visit(k, word) for this thread's share of the row's codes, four words of one Philox call at
// a time.
template <typename visit_t>
__device__ void for_codes(const GumbelSoftmaxParams& p, int64_t row, uint64_t seed, visit_t visit) {
  const int64_t first = row * p.num_codes, last = first + p.num_codes;
  for (int64_t call = first / 4 + threadIdx.x; call * 4 < last; call += blockDim.x) {
    const PhiloxWords words = philox_subsequence(static_cast<uint64_t>(call), seed);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t k = call * 4 + j - first;
      if (k >= 0 && k < p.num_codes) visit(k, words.word[j]);
    }
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kGumbelSoftmaxThreads)
    gumbel_softmax_forward_kernel(GumbelSoftmaxParams p, GumbelSoftmaxForward args) {
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits);
  scalar_t* sample = static_cast<scalar_t*>(args.sample);
  const uint64_t seed = static_cast<uint64_t>(*args.seed);
  const float scale = exponent_scale(*args.tau), nan = nanf("");
  const int64_t rows = num_rows(p);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t base = offset_of(p, row, 0);
    const auto logit_of = [&](int64_t k) { return static_cast<float>(logits[base + k * p.inner]); };

    float noisy_max = -INFINITY, logit_max = -INFINITY;
    int64_t best = p.num_codes;
    int bad = 0;
    for_codes(p, row, seed, [&](int64_t k, uint32_t word) {
      const float logit = logit_of(k), noisy = logit + gumbel_of_word(word);
      bad |= !isfinite(logit);
      if (noisy > noisy_max) {  // k rises, so the first of equals stays
        noisy_max = noisy;
        best = k;
      }
      logit_max = fmaxf(logit_max, logit);
    });
    bad = __syncthreads_or(bad);
    const float row_max = block_reduce(noisy_max, MaximumOp());
    best = block_reduce(noisy_max == row_max ? best : p.num_codes, MinimumOp());
    logit_max = block_reduce(logit_max, MaximumOp());

    float sum = 0, plain = 0, entropy = 0;
    for_codes(p, row, seed, [&](int64_t k, uint32_t word) {
      const float logit = logit_of(k);
      sum += exp2f((logit + gumbel_of_word(word) - row_max) * scale);
      const float t = fmaxf((logit - logit_max) * kLog2E, -127.0f), e = exp2f(t);
      plain += e;
      entropy += e * t;
    });
    sum = block_reduce(sum, SumOp());
    plain = block_reduce(plain, SumOp());
    entropy = block_reduce(entropy, SumOp());
    const float inverse = bad ? nan : 1.0f / sum;  // NaN as well where tau is
    if (threadIdx.x == 0) {
      const double log2_sum = log2(static_cast<double>(plain));
      const double kl = (static_cast<double>(entropy) / plain - log2_sum) * 0.69314718055994530942 +
                        log(static_cast<double>(p.num_codes));
      args.index[row] = bad ? 0 : best;
      args.kl[row] = bad ? nan : static_cast<float>(kl);
      args.stats[kNoisyMax * rows + row] = row_max;
      args.stats[kInverseSum * rows + row] = inverse;
      args.stats[kLogitMax * rows + row] = logit_max;
      args.stats[kLog2Sum * rows + row] = static_cast<float>(log2_sum);
    }
    for_codes(p, row, seed, [&](int64_t k, uint32_t word) {
      float y = inverse;
      if (args.hard) {
        y = y * 0.0f + (k == best ? 1.0f : 0.0f);
      } else {
        y *= exp2f((logit_of(k) + gumbel_of_word(word) - row_max) * scale);
      }
      sample[base + k * p.inner] = static_cast<scalar_t>(y);
    });
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kGumbelSoftmaxThreads)
    gumbel_softmax_backward_kernel(GumbelSoftmaxParams p, GumbelSoftmaxBackward args) {
  const scalar_t* logits = static_cast<const scalar_t*>(args.logits);
  const scalar_t* grads = static_cast<const scalar_t*>(args.grad_sample);
  scalar_t* out = static_cast<scalar_t*>(args.grad_logits);
  const uint64_t seed = static_cast<uint64_t>(*args.seed);
  const float scale = exponent_scale(*args.tau);
  const int64_t rows = num_rows(p);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t base = offset_of(p, row, 0);
    const float noisy_max = args.stats[kNoisyMax * rows + row];
    const float inverse = args.stats[kInverseSum * rows + row];
    const float logit_max = args.stats[kLogitMax * rows + row];
    const float log2_sum = args.stats[kLog2Sum * rows + row];
    const auto sample_of = [&](float logit, uint32_t word) {
      return inverse * exp2f((logit + gumbel_of_word(word) - noisy_max) * scale);
    };
    float dot = 0;
    if (grads) {
      for_codes(p, row, seed, [&](int64_t k, uint32_t word) {
        const int64_t at = base + k * p.inner;
        dot += sample_of(static_cast<float>(logits[at]), word) * static_cast<float>(grads[at]);
      });
      dot = block_reduce(dot, SumOp());
    }
    const float grad_kl = args.grad_kl ? args.grad_kl[row] : 0.0f;
    const float constant = logf(static_cast<float>(p.num_codes)) - args.kl[row];
    for_codes(p, row, seed, [&](int64_t k, uint32_t word) {
      const int64_t at = base + k * p.inner;
      const float logit = static_cast<float>(logits[at]);
      float grad = 0;
      if (grads) {
        grad = sample_of(logit, word) * ((static_cast<float>(grads[at]) - dot) * (scale * kLn2));
      }
      if (args.grad_kl) {
        const float t = fmaxf((logit - logit_max) * kLog2E - log2_sum, -127.0f);
        grad += grad_kl * (exp2f(t) * (t * kLn2 + constant));
      }
      out[at] = static_cast<scalar_t>(grad);
    });
  }
}

// One block a row; rows beyond the grid follow in turns.
template <typename kernel_t, typename args_t>
cudaError_t launch_rows(kernel_t kernel, const GumbelSoftmaxParams& p, const args_t& args,
                        void* stream) {
  const int64_t rows = num_rows(p);
  if (rows == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(rows < (1 << 20) ? rows : (1 << 20));
  return launch(kernel, blocks, kGumbelSoftmaxThreads, 0, stream, p, args);
}

inline cudaError_t launch_gumbel_softmax_forward(const GumbelSoftmaxParams& p,
                                                 const GumbelSoftmaxForward& args, void* stream) {
  switch (p.dtype) {
    case GumbelSoftmaxDtype::kFloat:
      return launch_rows(gumbel_softmax_forward_kernel<float>, p, args, stream);
    case GumbelSoftmaxDtype::kHalf:
      return launch_rows(gumbel_softmax_forward_kernel<__half>, p, args, stream);
    case GumbelSoftmaxDtype::kBFloat16:
      return launch_rows(gumbel_softmax_forward_kernel<__nv_bfloat16>, p, args, stream);
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t launch_gumbel_softmax_backward(const GumbelSoftmaxParams& p,
                                                  const GumbelSoftmaxBackward& args, void* stream) {
  switch (p.dtype) {
    case GumbelSoftmaxDtype::kFloat:
      return launch_rows(gumbel_softmax_backward_kernel<float>, p, args, stream);
    case GumbelSoftmaxDtype::kHalf:
      return launch_rows(gumbel_softmax_backward_kernel<__half>, p, args, stream);
    case GumbelSoftmaxDtype::kBFloat16:
      return launch_rows(gumbel_softmax_backward_kernel<__nv_bfloat16>, p, args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dalle
