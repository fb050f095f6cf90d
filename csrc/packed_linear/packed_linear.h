// The products of a decoding step, CPU only: y = residual + gelu(norm(x) W^T + b), few rows x, W
// packed once.
//
// M rows, K inputs, N outputs. W is cut into panels of kLinearColumns outputs, each stored as
// (K, kLinearColumns): what is read together lies together. An output is one chain of products over
// k = 0 .. K - 1 (pairs of them in bfloat16), whatever M is and whoever computes it: a row has the
// same bits alone and among others. No torch here.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dalle {

inline constexpr int64_t kLinearColumns = 16;

// Null where there is none: gain, shift (K), bias (N), residual (M, N).
struct PackedLinearArgs {
  const float* x;      // (M, K)
  const void* weight;  // (panels, K, 16) floats or (panels, ceil(K / 2), 16, 2) bfloat16
  const float* bias;
  const float* gain;
  const float* shift;
  const float* residual;
  float* normed;  // (M, K) floats, or (M, ceil(K / 2)) pairs: what the products read
  float* out;     // (M, N)
  int64_t rows, inputs, outputs;
  float eps;
  float slope;  // x sigmoid(slope x) follows; 0: nothing does
  bool pairs;   // the weight is bfloat16
};

}  // namespace dalle
