// Contract of powersgd, shared by host and device: products with error buffers of 1-6-9 codes
// (paper, section 2.5 and appendix E.2). No torch here.
//
// E (m, n) is an error buffer, as codes of E times error_scale. P (m, r), Q (n, r), all row-major.
//   compress     E += G / scale, then P = E Q of the E that is kept
//   project      Q = E^T P
//   decompress   D = P Q^T, and E -= D / machines
// Each element of a product is summed in one order, whatever the number of threads.
#pragma once

#include "formats/formats.h"

namespace dalle {

inline constexpr int64_t kMaxLines = int64_t{1} << 30;  // m and n are below: kernels count in int

struct PowerMatrix {
  uint16_t* error;     // (m, n)
  const void* grad;    // (m, n) of grad_kind: compress
  const float* left;   // P: project, decompress
  const float* right;  // Q: compress, decompress
  float* out;          // P (m, r): compress; Q (n, r): project; D (m, n): decompress
  float* partials;  // CUDA: sums of each part of the depth (parts, m or n, r); null with one part
  int64_t rows, columns, rank;
  int64_t tile_begin;  // tiles of the matrices before it, of whatever tile a kernel takes
  int32_t parts;       // CUDA: of the depth of compress or project
  ElementKind grad_kind;
};

// What the matrices of one call have in common.
struct PowerFactors {
  const float* scale;  // (1) of the gradients, or null
  const float* skip;   // (1) not zero: the buffers stay as they are; or null
  float error_scale;   // of the codes; a power of two keeps all else exact
  float feedback;      // times D is subtracted from the codes' values; 0: the buffers stay
};

DALLE_HOST_DEVICE bool skipped(const PowerFactors& f) {
  return f.skip != nullptr && *f.skip != 0.0f;
}

// A gradient times this is in the units of the codes.
DALLE_HOST_DEVICE float gradient_factor(const PowerFactors& f) {
  return f.scale == nullptr ? f.error_scale : f.error_scale / *f.scale;
}

struct OrthogonalizeArgs {
  const float* p;  // (batch, n, r)
  float* work;     // (batch, work_floats)
  float* out;      // (batch, n, r)
  int64_t batch, length, rank, work_floats;
  float eps;
};

}  // namespace dalle
