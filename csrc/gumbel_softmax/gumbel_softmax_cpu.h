// CPU kernels of gumbel_softmax on raw pointers. The table below is what gumbel_softmax.cpp sees;
// the kernels are compiled once per instruction set (csrc/common/isa.h). No torch here.
//
// A unit of work is one row where the codebook axis is contiguous (inner == 1), else kLanes
// neighbouring rows, one a lane. A row's bits do not depend on the unit's neighbours, so neither on
// the threads.
#pragma once

#include "common/isa.h"
#include "gumbel_softmax/gumbel_softmax.h"

namespace dalle {

struct GumbelSoftmaxCpu {
  int64_t (*num_units)(const GumbelSoftmaxParams& p);
  int64_t (*scratch_floats)(const GumbelSoftmaxParams& p);  // each thread brings its own
  void (*forward)(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args,
                  int64_t unit_begin, int64_t unit_end, float* scratch);
  void (*backward)(const GumbelSoftmaxParams& p, const GumbelSoftmaxBackward& args,
                   int64_t unit_begin, int64_t unit_end, float* scratch);
  // Words of elements 0 to count - 1, count a multiple of 32: what tests compare across builds.
  void (*words)(uint64_t seed, int64_t count, uint32_t* out);
};

DALLE_FOR_EACH_ISA(GumbelSoftmaxCpu, gumbel_softmax_cpu)

}  // namespace dalle

#ifdef DALLE_ISA

#include "gumbel_softmax/gumbel_softmax_cpu_columns.h"
#include "gumbel_softmax/gumbel_softmax_cpu_rows.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

int64_t num_units(const GumbelSoftmaxParams& p) {
  return p.inner == 1 ? p.outer : p.outer * units_per_outer(p);
}

int64_t scratch_floats(const GumbelSoftmaxParams& p) {
  return p.inner == 1 ? p.num_codes + ceil_div(p.num_codes, kRowChunk)
                      : column_scratch(p) * blocks_per_unit(p);
}

template <typename scalar_t>
void forward_units(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args, int64_t begin,
                   int64_t end, float* scratch) {
  const PhiloxKeys keys = philox_keys(static_cast<uint64_t>(*args.seed));
  const float scale = exponent_scale(*args.tau);
  for (int64_t unit = begin; unit < end; ++unit) {
    if (p.inner == 1) {
      forward_row<scalar_t>(p, args, keys, scale, unit, scratch);
    } else {
      forward_columns<scalar_t>(p, args, keys, scale, unit, scratch);
    }
  }
}

template <typename scalar_t>
void backward_units(const GumbelSoftmaxParams& p, const GumbelSoftmaxBackward& args, int64_t begin,
                    int64_t end, float* scratch) {
  const PhiloxKeys keys = philox_keys(static_cast<uint64_t>(*args.seed));
  const float scale = exponent_scale(*args.tau);
  for (int64_t unit = begin; unit < end; ++unit) {
    if (p.inner == 1) {
      backward_row<scalar_t>(p, args, keys, scale, unit, scratch);
    } else {
      backward_columns<scalar_t>(p, args, keys, scale, unit, scratch);
    }
  }
}

void forward(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args, int64_t begin,
             int64_t end, float* scratch) {
  with_scalar(p.dtype,
              [&](auto scalar) { forward_units<decltype(scalar)>(p, args, begin, end, scratch); });
}

void backward(const GumbelSoftmaxParams& p, const GumbelSoftmaxBackward& args, int64_t begin,
              int64_t end, float* scratch) {
  with_scalar(p.dtype,
              [&](auto scalar) { backward_units<decltype(scalar)>(p, args, begin, end, scratch); });
}

void words(uint64_t seed, int64_t count, uint32_t* out) {
  const PhiloxKeys keys = philox_keys(seed);
  for (int64_t e = 0; e < count; e += 2 * kLanes) random_words(keys, e / 4, out + e);
}

}  // namespace

extern const GumbelSoftmaxCpu gumbel_softmax_cpu = {num_units, scratch_floats, forward, backward,
                                                    words};

}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle

#endif  // DALLE_ISA
