// CUDA kernels of powersgd and their launch: the products are in powersgd_cuda_products.cuh and
// powersgd_cuda_decompress.cuh. No torch here. Not yet measured on a GPU.
#pragma once

#include "powersgd/powersgd_cuda_decompress.cuh"
#include "powersgd/powersgd_cuda_products.cuh"

namespace dalle {

constexpr int kPowerThreads = 256;

// The sum over the block of what its threads give, the same in every thread.
__device__ __forceinline__ double block_sum(double value, double* parts) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kPowerThreads / 32; ++w) total += parts[w];
  return total;
}

// x -= tau (v . x) v over [k, n), v_k = 1 and the rest in `v`: one warp.
__device__ __forceinline__ void reflect(const float* v, float tau, float* x, int64_t k, int64_t n) {
  const int lane = threadIdx.x % 32;
  float dot = lane == 0 ? x[k] : 0.0f;
  for (int64_t i = k + 1 + lane; i < n; i += 32) dot += v[i] * x[i];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(0xFFFFFFFFu, dot, step);
  const float by = tau * dot;
  if (lane == 0) x[k] -= by;
  for (int64_t i = k + 1 + lane; i < n; i += 32) x[i] -= by * v[i];
}

// Householder's Q of P + eps I, as LAPACK's geqrf and orgqr make it: one block a matrix, columns in
// `work` as rows. The sign of R's diagonal is opposite to the pivot's; a column that is zero below
// its pivot gives no reflection.
__global__ void __launch_bounds__(kPowerThreads)
    powersgd_orthogonalize_kernel(OrthogonalizeArgs args) {
  DALLE_SHARED(double, parts, [kPowerThreads / 32]);
  DALLE_DYNAMIC_SHARED(bytes);
  float* const taus = reinterpret_cast<float*>(bytes);
  const int64_t n = args.length, rank = args.rank;
  const float* const p = args.p + blockIdx.x * n * rank;
  float* const out = args.out + blockIdx.x * n * rank;
  float* const work = args.work + blockIdx.x * n * rank;
  const int warp = threadIdx.x / 32, warps = kPowerThreads / 32;
  for (int64_t i = threadIdx.x; i < n * rank; i += kPowerThreads) {
    const int64_t row = i / rank, column = i % rank;
    work[column * n + row] = p[i] + (row == column ? args.eps : 0.0f);
  }
  __syncthreads();
  for (int64_t k = 0; k < rank; ++k) {
    float* const v = work + k * n;
    double below = 0;
    for (int64_t i = k + 1 + threadIdx.x; i < n; i += kPowerThreads) {
      below += static_cast<double>(v[i]) * static_cast<double>(v[i]);
    }
    below = block_sum(below, parts);
    const double pivot = static_cast<double>(v[k]);
    double tau = 0, by = 0;
    if (below > 0) {
      const double norm = sqrt(pivot * pivot + below);
      const double diagonal = pivot >= 0 ? -norm : norm;
      tau = (diagonal - pivot) / diagonal;
      by = 1 / (pivot - diagonal);
    }
    if (threadIdx.x == 0) taus[k] = static_cast<float>(tau);
    for (int64_t i = k + 1 + threadIdx.x; i < n; i += kPowerThreads) {
      v[i] = static_cast<float>(static_cast<double>(v[i]) * by);
    }
    __syncthreads();
    for (int64_t j = k + 1 + warp; j < rank; j += warps) {
      reflect(v, static_cast<float>(tau), work + j * n, k, n);
    }
    __syncthreads();
  }
  for (int64_t k = rank - 1; k >= 0; --k) {
    float* const v = work + k * n;
    const float tau = taus[k];
    for (int64_t j = k + 1 + warp; j < rank; j += warps) reflect(v, tau, work + j * n, k, n);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kPowerThreads) {
      v[i] = i < k ? 0.0f : i == k ? 1.0f - tau : -tau * v[i];
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < n * rank; i += kPowerThreads) {
    out[i] = work[i % rank * n + i / rank];
  }
}

inline cudaError_t launch_powersgd_orthogonalize(const OrthogonalizeArgs& args, void* stream) {
  if (args.batch == 0) return cudaSuccess;
  return launch(powersgd_orthogonalize_kernel, dim3(static_cast<unsigned>(args.batch)),
                dim3(kPowerThreads), static_cast<size_t>(args.rank) * sizeof(float), stream, args);
}

}  // namespace dalle
