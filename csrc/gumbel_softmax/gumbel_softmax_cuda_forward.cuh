// Forward of gumbel_softmax on CUDA: the row in registers, one read, one write, one reduction for
// sample, argmax and KL together. Letters: see gumbel_softmax.h.
#pragma once

#include "gumbel_softmax/gumbel_softmax_cuda_row.cuh"

namespace dalle {

// What a part of a row adds up to. The sums are relative to the part's own maxima.
struct RowPart {
  float noisy_max, sum;             // sum of exp((noisy - noisy_max) / tau)
  int best;                         // first code that has noisy_max
  float logit_max, plain, entropy;  // sums of e = 2^t and e t, t = (logit - logit_max) log2(e)
  float bad;                        // NaN if a logit was not finite
};

__device__ __forceinline__ RowPart shuffle_xor(const RowPart& part, int step) {
  return {shuffle_xor(part.noisy_max, step),
          shuffle_xor(part.sum, step),
          __shfl_xor_sync(kAllLanes, part.best, step),
          shuffle_xor(part.logit_max, step),
          shuffle_xor(part.plain, step),
          shuffle_xor(part.entropy, step),
          shuffle_xor(part.bad, step)};
}

// Places that are no codes are -inf, maxima never are: their differences are defined.
__device__ __forceinline__ RowPart empty_part(int num_codes) {
  return {-FLT_MAX, 0.0f, num_codes, -FLT_MAX, 0.0f, 0.0f, 0.0f};
}

// The part with the larger maximum is not scaled, so the order of a and b does not matter.
__device__ __forceinline__ RowPart merge_parts(const RowPart& a, const RowPart& b, float scale) {
  RowPart r;
  const bool a_leads = a.noisy_max >= b.noisy_max;
  r.noisy_max = a_leads ? a.noisy_max : b.noisy_max;
  const float noisy_gap = (a_leads ? b.noisy_max : a.noisy_max) - r.noisy_max;
  r.sum = (a_leads ? b.sum : a.sum) * exp2_approx(noisy_gap * scale) + (a_leads ? a.sum : b.sum);
  r.best = a.noisy_max == b.noisy_max ? min(a.best, b.best) : a_leads ? a.best : b.best;

  const bool a_holds = a.logit_max >= b.logit_max;
  r.logit_max = a_holds ? a.logit_max : b.logit_max;
  const float gap = (a_holds ? b.logit_max : a.logit_max) - r.logit_max;
  const float t = fmaxf(gap * kLog2E, -127.0f), shrink = exp2_approx(t);
  const float plain = a_holds ? b.plain : a.plain, entropy = a_holds ? b.entropy : a.entropy;
  r.plain = plain * shrink + (a_holds ? a.plain : b.plain);
  r.entropy = (plain * t + entropy) * shrink + (a_holds ? a.entropy : b.entropy);
  r.bad = a.bad + b.bad;
  return r;
}

// Turns the logits of a chunk into exp((noisy - noisy_max) / tau), noisy_max being the chunk's.
template <typename row_t, int kChunk>
__device__ __forceinline__ RowPart take_chunk(const row_t& row, typename row_t::Code first,
                                              uint64_t seed, float scale, float (&values)[kChunk]) {
  RowPart part = empty_part(row.num_codes);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) part.logit_max = fmaxf(part.logit_max, values[i]);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float t = fmaxf((values[i] - part.logit_max) * kLog2E, -127.0f), e = exp2_approx(t);
    part.plain += e;
    part.entropy = e * t + part.entropy;
  }
  row.add_noise(first, seed, values);
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (values[i] > largest) {  // codes rise, so the first of equals stays
      largest = values[i];
      part.best = static_cast<int>(row_t::code_of(first, i));
    }
  }
  part.noisy_max = fmaxf(largest, -FLT_MAX);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    values[i] = exp2_approx((values[i] - part.noisy_max) * scale);
    part.sum += values[i];
  }
  return part;
}

__device__ inline void write_row(const GumbelSoftmaxParams& p, const GumbelSoftmaxForward& args,
                                 int64_t row, const RowPart& part, bool bad, float inverse) {
  const int64_t rows = num_rows(p);
  const double log2_sum = log2(static_cast<double>(part.plain));
  const double kl =
      (static_cast<double>(part.entropy) / part.plain - log2_sum) * 0.69314718055994530942 +
      log(static_cast<double>(p.num_codes));
  args.index[row] = bad ? 0 : part.best;
  args.kl[row] = bad ? nanf("") : static_cast<float>(kl);
  args.stats[kNoisyMax * rows + row] = part.noisy_max;
  args.stats[kInverseSum * rows + row] = inverse;
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

  float held[kChunks][kChunk], peaks[kChunks];
  RowPart part = empty_part(row.num_codes);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    row.load(logits, row.first_code(c), -INFINITY, part.bad, held[c]);
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    peaks[c] = 0.0f;
    if (row.first_code(c) < row.num_codes) {
      const RowPart chunk = take_chunk(row, row.first_code(c), seed, scale, held[c]);
      peaks[c] = chunk.noisy_max;
      part = merge_parts(part, chunk, scale);
    }
  }
  code_t end = row.first_code(kChunks);  // of the chunks that are done
  if constexpr (layout_t::kTail) {
    for (; end < row.num_codes; end += row_t::kSpan) {
      float values[kChunk];
      row.load(logits, end, -INFINITY, part.bad, values);
      part = merge_parts(part, take_chunk(row, end, seed, scale, values), scale);
    }
  }
  part = reduce_row<layout_t>(
      part, empty_part(row.num_codes),
      [&](const RowPart& a, const RowPart& b) { return merge_parts(a, b, scale); });
  const bool bad = part.bad != part.bad;
  const float inverse = bad ? nanf("") : 1.0f / part.sum;  // NaN as well where tau is
  if (row.member == 0 && row.num_codes != 0) write_row(p, args, row.index, part, bad, inverse);

  const auto write = [&](code_t first, float factor, float (&values)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      values[i] *= factor;
      if (args.hard) {
        const bool chosen = row_t::code_of(first, i) == part.best;
        values[i] = inverse * 0.0f + (chosen ? 1.0f : 0.0f);
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
      write(end, inverse, values);
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (row.first_code(c) < row.num_codes) {
      write(row.first_code(c), exp2_approx((peaks[c] - part.noisy_max) * scale) * inverse, held[c]);
    }
  }
}

}  // namespace dalle
