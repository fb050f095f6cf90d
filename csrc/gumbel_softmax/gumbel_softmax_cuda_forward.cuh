// Forward of gumbel_softmax on CUDA: the row in registers, one read, one write, one reduction for
// sample, argmax and KL together. Letters: see gumbel_softmax.h.
#pragma once

#include "gumbel_softmax/gumbel_softmax_cuda_row.cuh"

namespace dalle {

// Online softmax of a part of a row. The sums are relative to the part's maxima.
struct RowPart {
  float noisy_max, noisy_sum;           // sum of exp((noisy - noisy_max) / tau)
  int argmax;                           // first code that has noisy_max
  float logit_max, logit_sum, entropy;  // sums of e = 2^t and e t, t = (logit - logit_max) log2(e)
  float nonfinite;                      // NaN if a logit was not finite, else 0
};

__device__ __forceinline__ RowPart shuffle_xor(const RowPart& part, int step) {
  return {shuffle_xor(part.noisy_max, step),
          shuffle_xor(part.noisy_sum, step),
          __shfl_xor_sync(kAllLanes, part.argmax, step),
          shuffle_xor(part.logit_max, step),
          shuffle_xor(part.logit_sum, step),
          shuffle_xor(part.entropy, step),
          shuffle_xor(part.nonfinite, step)};
}

// Elements that are no codes are -inf, maxima never are: their differences are defined.
__device__ __forceinline__ RowPart empty_part(int num_codes) {
  return {-FLT_MAX, 0.0f, num_codes, -FLT_MAX, 0.0f, 0.0f, 0.0f};
}

// The part with the larger maximum is not scaled, so the order of a and b does not matter.
__device__ __forceinline__ RowPart merge_parts(const RowPart& a, const RowPart& b, float scale) {
  RowPart r;
  const bool a_noisy_larger = a.noisy_max >= b.noisy_max;
  r.noisy_max = a_noisy_larger ? a.noisy_max : b.noisy_max;
  const float noisy_gap = (a_noisy_larger ? b.noisy_max : a.noisy_max) - r.noisy_max;
  r.noisy_sum = (a_noisy_larger ? b.noisy_sum : a.noisy_sum) * exp2_approx(noisy_gap * scale) +
                (a_noisy_larger ? a.noisy_sum : b.noisy_sum);
  r.argmax = a.noisy_max == b.noisy_max ? min(a.argmax, b.argmax)
             : a_noisy_larger           ? a.argmax
                                        : b.argmax;

  const bool a_logit_larger = a.logit_max >= b.logit_max;
  r.logit_max = a_logit_larger ? a.logit_max : b.logit_max;
  const float logit_gap = (a_logit_larger ? b.logit_max : a.logit_max) - r.logit_max;
  const float t = fmaxf(logit_gap * kLog2EFloat, -127.0f), rescale = exp2_approx(t);
  const float logit_sum = a_logit_larger ? b.logit_sum : a.logit_sum;
  const float entropy = a_logit_larger ? b.entropy : a.entropy;
  r.logit_sum = logit_sum * rescale + (a_logit_larger ? a.logit_sum : b.logit_sum);
  r.entropy = (logit_sum * t + entropy) * rescale + (a_logit_larger ? a.entropy : b.entropy);
  r.nonfinite = a.nonfinite + b.nonfinite;
  return r;
}

// Turns the logits of a chunk into exp((noisy - noisy_max) / tau), noisy_max being the chunk's.
template <typename row_t, int kChunk>
__device__ __forceinline__ RowPart softmax_chunk(const row_t& row, typename row_t::Code first,
                                                 uint64_t seed, float scale,
                                                 float (&values)[kChunk]) {
  RowPart part = empty_part(row.num_codes);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) part.logit_max = fmaxf(part.logit_max, values[i]);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float t = fmaxf((values[i] - part.logit_max) * kLog2EFloat, -127.0f), e = exp2_approx(t);
    part.logit_sum += e;
    part.entropy = e * t + part.entropy;
  }
  row.add_noise(first, seed, values);
  float noisy_max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (values[i] > noisy_max) {  // codes rise, so the first of equals stays
      noisy_max = values[i];
      part.argmax = static_cast<int>(row_t::code_of(first, i));
    }
  }
  part.noisy_max = fmaxf(noisy_max, -FLT_MAX);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    values[i] = exp2_approx((values[i] - part.noisy_max) * scale);
    part.noisy_sum += values[i];
  }
  return part;
}

__device__ inline void write_row(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args,
                                 int64_t row, const RowPart& part, bool nonfinite,
                                 float inverse_sum) {
  const int64_t rows = num_rows(p);
  const double log2_sum = log2(static_cast<double>(part.logit_sum));
  const double kl =
      (static_cast<double>(part.entropy) / part.logit_sum - log2_sum) * 0.69314718055994530942 +
      log(static_cast<double>(p.num_codes));
  args.index[row] = nonfinite ? 0 : part.argmax;
  args.kl[row] = nonfinite ? nanf("") : static_cast<float>(kl);
  args.stats[kNoisyMax * rows + row] = part.noisy_max;
  args.stats[kInverseSum * rows + row] = inverse_sum;
  args.stats[kLogitMax * rows + row] = part.logit_max;
  args.stats[kLog2Sum * rows + row] = static_cast<float>(log2_sum);
}

// A block takes kRows rows, kLanes threads each; a thread holds kElements codes of its row and,
// where the layout has a tail, reads and draws those beyond a second time.
template <typename scalar_t, typename layout_t>
__global__ void __launch_bounds__(layout_t::kThreads, layout_t::kMinBlocks)
    gumbel_softmax_forward_kernel(GumbelSoftmaxParams p, GumbelSoftmaxForward args) {
  using row_t = Row<scalar_t, layout_t>;
  using code_t = typename row_t::Code;
  constexpr int kChunk = layout_t::kChunk, kChunks = layout_t::kChunks;
  const scalar_t* const logits = static_cast<const scalar_t*>(args.logits);
  scalar_t* const sample = static_cast<scalar_t*>(args.sample);
  const row_t row(p, logits, sample, nullptr);
  const uint64_t seed = static_cast<uint64_t>(*args.seed);
  const float scale = float_exponent_scale(*args.tau);

  float chunk_values[kChunks][kChunk], chunk_max[kChunks];
  RowPart part = empty_part(row.num_codes);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    row.load(logits, row.first_code(c), -INFINITY, part.nonfinite, chunk_values[c]);
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    chunk_max[c] = 0.0f;
    if (row.first_code(c) < row.num_codes) {
      const RowPart chunk = softmax_chunk(row, row.first_code(c), seed, scale, chunk_values[c]);
      chunk_max[c] = chunk.noisy_max;
      part = merge_parts(part, chunk, scale);
    }
  }
  code_t end = row.first_code(kChunks);  // of the chunks that are done
  if constexpr (layout_t::kTail) {
    for (; end < row.num_codes; end += row_t::kSpan) {
      float values[kChunk];
      row.load(logits, end, -INFINITY, part.nonfinite, values);
      part = merge_parts(part, softmax_chunk(row, end, seed, scale, values), scale);
    }
  }
  part = reduce_row<layout_t>(
      part, empty_part(row.num_codes),
      [&](const RowPart& a, const RowPart& b) { return merge_parts(a, b, scale); });
  const bool nonfinite = part.nonfinite != part.nonfinite;
  // NaN as well where tau is.
  const float inverse_sum = nonfinite ? nanf("") : 1.0f / part.noisy_sum;
  if (row.member == 0 && row.num_codes != 0) {
    write_row(p, args, row.index, part, nonfinite, inverse_sum);
  }

  const auto write = [&](code_t first, float factor, float (&values)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      values[i] *= factor;
      if (args.hard) {
        const bool chosen = row_t::code_of(first, i) == part.argmax;
        values[i] = inverse_sum * 0.0f + (chosen ? 1.0f : 0.0f);
      }
    }
    row.store(sample, first, values);
  };
  if constexpr (layout_t::kTail) {  // backwards: what was read last is still in L2
    for (end -= row_t::kSpan; end >= row.first_code(kChunks); end -= row_t::kSpan) {
      float values[kChunk], ignored = 0;
      row.load(logits, end, -INFINITY, ignored, values);
      row.add_noise(end, seed, values);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        values[i] = exp2_approx((values[i] - part.noisy_max) * scale);
      }
      write(end, inverse_sum, values);
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (row.first_code(c) < row.num_codes) {
      write(row.first_code(c), exp2_approx((chunk_max[c] - part.noisy_max) * scale) * inverse_sum,
            chunk_values[c]);
    }
  }
}

}  // namespace dalle
