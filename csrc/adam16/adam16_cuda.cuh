// CUDA kernel of adam16 and its launch. No torch here. Not yet measured on a GPU.
//
// A block takes one chunk of the table, a thread eight neighbouring elements at a time: 16-byte
// accesses to codes and halves. A second launch counts the update.
#pragma once

#include "adam16/adam16.h"
#include "common/eights.cuh"

namespace dalle {

// The branches of load_kind and store_kind are the same for all threads of a block.
__device__ __forceinline__ void load_kind(ElementKind kind, const void* data, int64_t i,
                                          int64_t count, float (&x)[kEight]) {
  switch (kind) {
    case ElementKind::kHalf:
      return Neighbours<__half, kEight>::load(static_cast<const __half*>(data) + i, count, 0.0f, x);
    case ElementKind::kBFloat16:
      return Neighbours<__nv_bfloat16, kEight>::load(static_cast<const __nv_bfloat16*>(data) + i,
                                                     count, 0.0f, x);
    case ElementKind::kFloat:
    case ElementKind::kNone:
    case ElementKind::kShort:
    case ElementKind::kLong:
    case ElementKind::kDouble:
      break;  // the op has refused all but float
  }
  Neighbours<float, kEight>::load(static_cast<const float*>(data) + i, count, 0.0f, x);
}

template <ElementKind kKind>
__device__ __forceinline__ void round_all(float (&x)[kEight], const uint32_t (&random)[kEight]) {
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    x[j] = __uint_as_float(round_stochastically<kKind>(__float_as_uint(x[j]), random[j]));
  }
}

__device__ __forceinline__ void store_kind(ElementKind kind, void* data, int64_t i, int64_t count,
                                           const float (&x)[kEight]) {
  switch (kind) {
    case ElementKind::kHalf:
      return Neighbours<__half, kEight>::store(static_cast<__half*>(data) + i, count, x);
    case ElementKind::kBFloat16:
      return Neighbours<__nv_bfloat16, kEight>::store(static_cast<__nv_bfloat16*>(data) + i, count,
                                                      x);
    case ElementKind::kFloat:
    case ElementKind::kNone:
    case ElementKind::kShort:
    case ElementKind::kLong:
    case ElementKind::kDouble:
      break;  // the op has refused all but float
  }
  Neighbours<float, kEight>::store(static_cast<float*>(data) + i, count, x);
}

__device__ __forceinline__ void random_eight(uint64_t call, uint64_t seed,
                                             uint32_t (&words)[kEight]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const PhiloxWords four = philox_subsequence(call + half, seed);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[half * 4 + i] = four.word[i];
  }
}

template <Format kFormat>
__device__ __forceinline__ void load_moment(bool coded, const void* data, int64_t i, int64_t count,
                                            float (&x)[kEight]) {
  if (!coded) return load_kind(ElementKind::kFloat, data, i, count, x);
  const uint16_t* const codes = static_cast<const uint16_t*>(data) + i;
  uint32_t eight[kEight];
  load_codes(codes, count, is_aligned_16(codes), eight);
#pragma unroll
  for (int j = 0; j < kEight; ++j) x[j] = __uint_as_float(decode<kFormat>(eight[j]));
}

__device__ __forceinline__ void store_eight(const TableRow& row, AdamColumn column, int64_t i,
                                            int64_t count, const uint32_t (&eight)[kEight]) {
  uint16_t* const codes = data_of<uint16_t>(row, column) + i;
  store_codes(codes, count, is_aligned_16(codes), eight);
}

// A block takes one chunk of one parameter, a thread eight neighbouring elements of it at a time.
template <bool kStochastic>
__global__ void __launch_bounds__(kEightThreads) adam16_step_kernel(AdamArgs args) {
  if (skipped(args)) return;
  DALLE_SHARED(AdamFactors, shared_factors, [1]);
  const int64_t chunk = blockIdx.x;
  const TableRow row = args.table.rows[row_of_chunk(args.table, chunk)];
  if (threadIdx.x == 0) shared_factors[0] = adam_factors(args, row, chunk);
  __syncthreads();
  const AdamFactors f = shared_factors[0];
  const ChunkSpan span = span_of(row, chunk);
  const ElementKind param_kind = kind_of(row, kParam), grad_kind = kind_of(row, kGrad);
  const bool coded = kind_of(row, kMean) == ElementKind::kShort;
  for (int64_t i = threadIdx.x * kEight; i < span.count; i += kEightThreads * kEight) {
    const int64_t at = span.begin + i, count = span.count - i;
    float grad[kEight], mean[kEight], variance[kEight], param[kEight];
    load_kind(grad_kind, data_of<void>(row, kGrad), at, count, grad);
    load_moment<Format::k169>(coded, data_of<void>(row, kMean), at, count, mean);
    load_moment<Format::k0610>(coded, data_of<void>(row, kVariance), at, count, variance);
    load_kind(param_kind, data_of<void>(row, kParam), at, count, param);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const float g = grad[j] * f.grad_factor;
      mean[j] = f.beta1 * mean[j] + f.one_minus_beta1 * g;
      const float v = f.beta2 * variance[j] + f.one_minus_beta2 * (g * g);
      variance[j] = v > f.variance_max ? f.variance_max : v;
      const float update = mean[j] / (sqrtf(variance[j]) * f.inverse_sqrt_correction2 + f.eps);
      param[j] = param[j] * f.decay - f.step_size * update;
    }
    uint32_t words[kEight], codes[kEight];
    if (coded) {
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        words[j] = moments_word(f.offset + static_cast<uint32_t>(i + j) * kWeylIncrement);
        codes[j] = mean_code(__float_as_uint(mean[j]), words[j]);
      }
      store_eight(row, kMean, at, count, codes);
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        const uint32_t probability =
            static_cast<uint32_t>(fminf(variance[j] * kProbabilityScale, 0x1p30f));
        codes[j] = variance_code(__float_as_uint(variance[j]), probability, words[j]);
      }
      store_eight(row, kVariance, at, count, codes);
    } else {
      store_kind(ElementKind::kFloat, data_of<void>(row, kMean), at, count, mean);
      store_kind(ElementKind::kFloat, data_of<void>(row, kVariance), at, count, variance);
    }
    if (kStochastic && param_kind != ElementKind::kFloat) {
      random_eight(first_call(chunk) + static_cast<uint64_t>(i) / 4, f.seed, words);
      if (param_kind == ElementKind::kHalf) {
        round_all<ElementKind::kHalf>(param, words);
      } else {
        round_all<ElementKind::kBFloat16>(param, words);
      }
    }
    store_kind(param_kind, data_of<void>(row, kParam), at, count, param);
  }
}

// A thread counts the update of one parameter.
__global__ void __launch_bounds__(kEightThreads) adam16_count_kernel(AdamArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kEightThreads + threadIdx.x;
  if (row < args.table.num_rows && !skipped(args)) {
    *data_of<int64_t>(args.table.rows[row], kStep) += 1;
  }
}

// Table of P rows: params, grads, means, variances (N_p), step (1) -> chunks of 32,768 elements
// -> a block each -> params, means, variances in place; then steps (P) -> a thread each.
inline cudaError_t launch_adam16_step(const AdamArgs& args, void* stream) {
  if (args.table.num_chunks > 0) {
    const auto kernel = args.stochastic ? adam16_step_kernel<true> : adam16_step_kernel<false>;
    const cudaError_t error = launch(kernel, static_cast<unsigned>(args.table.num_chunks),
                                     kEightThreads, 0, stream, args);
    if (error != cudaSuccess) return error;
  }
  if (args.table.num_rows == 0) return cudaSuccess;
  return launch(adam16_count_kernel,
                static_cast<unsigned>(ceil_div(args.table.num_rows, kEightThreads)), kEightThreads,
                0, stream, args);
}

}  // namespace dalle
