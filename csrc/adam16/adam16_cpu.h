// CPU kernel of adam16 on raw pointers. The table below is what adam16.cpp sees; the kernel is
// compiled once per instruction set (csrc/common/isa.h). No torch here.
#pragma once

#include "adam16/adam16.h"
#include "common/isa.h"

namespace dalle {

struct Adam16Cpu {
  void (*chunks)(const AdamArgs& args, int64_t chunk_begin, int64_t chunk_end);
};

DALLE_FOR_EACH_ISA(Adam16Cpu, adam16_cpu)

}  // namespace dalle

#ifdef DALLE_ISA

#include <type_traits>

#include "common/philox_lanes.h"
#include "common/vector.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

// The kind of with_scalar's element.
template <typename scalar_t>
constexpr ElementKind kKindOf = std::is_same_v<scalar_t, Half>       ? ElementKind::kHalf
                                : std::is_same_v<scalar_t, BFloat16> ? ElementKind::kBFloat16
                                                                     : ElementKind::kFloat;

// A moment kept as codes.
template <Format kFormat>
struct CodedMoment {
  static constexpr bool kCoded = true;
  uint16_t* data;
  Float load(int64_t i, int64_t count) const {
    return (Float)decode<kFormat>(load_codes(data + i, count));
  }
  void store(int64_t i, int64_t count, Word codes) const { store_codes(data + i, count, codes); }
};

struct FloatMoment {
  static constexpr bool kCoded = false;
  float* data;
  Float load(int64_t i, int64_t count) const { return load_up_to(data + i, count, 0.0f); }
  void store(int64_t i, int64_t count, Float value) const { store_up_to(data + i, count, value); }
};

// Random words for the moments of elements i to i + kLanes - 1 of a chunk.
inline Word moments_words(uint32_t offset, int64_t i) {
  Word weyl;
  for (uint32_t lane = 0; lane < kLanes; ++lane) weyl[lane] = lane * kWeylIncrement;
  return moments_word(weyl + (offset + static_cast<uint32_t>(i) * kWeylIncrement));
}

struct MomentCodes {
  Word mean, variance;
};
inline MomentCodes moment_codes(Float mean, Float variance, Word random) {
  const Word m = (Word)mean, v = (Word)variance, magnitude = m & 0x7FFFFFFFu;
  if (any(beyond_codes<Format::k169>(magnitude) | beyond_codes<Format::k0610>(v))) {
    const Word probability = (Word) __builtin_convertvector(variance * kProbabilityScale, Int);
    return {mean_code(m, random), variance_code(v, probability, random)};
  }
  return {magnitude_code<Format::k169>(magnitude, mean_bits(random)) | ((m ^ magnitude) >> 16),
          magnitude_code<Format::k0610>(v, stochastic<Format::k0610>(random))};
}

template <bool kStochastic, typename param_t, typename grad_t, typename mean_t, typename variance_t>
void step_chunk(const AdamFactors& f, int64_t chunk, int64_t count, param_t* params,
                const grad_t* grads, mean_t means, variance_t variances) {
  constexpr bool kCoded = mean_t::kCoded;
  constexpr bool kRoundParams = kStochastic && !std::is_same_v<param_t, float>;
  const PhiloxKeys keys = philox_keys(f.seed);
  const uint64_t calls = first_call(chunk);
  const uint32_t offset = f.offset;
  // Copied to registers: for the compiler, stores to the tensors could change `f`.
  const Float scale = splat(f.grad_factor), beta1 = splat(f.beta1),
              one_minus_beta1 = splat(f.one_minus_beta1);
  const Float beta2 = splat(f.beta2), one_minus_beta2 = splat(f.one_minus_beta2);
  const Float variance_max = splat(f.variance_max),
              inverse_sqrt_correction2 = splat(f.inverse_sqrt_correction2), eps = splat(f.eps);
  const Float decay = splat(f.decay), step_size = splat(f.step_size);
  const auto one = [&](int64_t i, int64_t some, Word for_param) DALLE_INLINE {
    const Float grad = load_up_to(grads + i, some, 0.0f) * scale;
    const Float mean = beta1 * means.load(i, some) + one_minus_beta1 * grad;
    Float variance = beta2 * variances.load(i, some) + one_minus_beta2 * (grad * grad);
    variance = variance > variance_max ? variance_max : variance;
    const Float update = mean / (square_root(variance) * inverse_sqrt_correction2 + eps);
    Float param = load_up_to(params + i, some, 0.0f) * decay - step_size * update;
    if constexpr (kCoded) {
      const MomentCodes codes = moment_codes(mean, variance, moments_words(offset, i));
      means.store(i, some, codes.mean);
      variances.store(i, some, codes.variance);
    } else {
      means.store(i, some, mean);
      variances.store(i, some, variance);
    }
    if constexpr (kRoundParams) {
      param = (Float)round_stochastically<kKindOf<param_t>>((Word)param, for_param);
    }
    store_up_to(params + i, some, param);
  };
  for_pairs(count, [&](int64_t i, int64_t first, int64_t second) DALLE_INLINE {
    TwoWords words = {};
    if constexpr (kRoundParams) words = two_words(keys, calls + static_cast<uint64_t>(i) / 4);
    one(i, first, words.word[0]);
    if (second > 0) one(i + kLanes, second, words.word[1]);
  });
}

void chunks(const AdamArgs& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const TableRow& row = args.table.rows[row_of_chunk(args.table, chunk)];
    const ChunkSpan span = span_of(row, chunk);
    const AdamFactors f = adam_factors(args, row, chunk);
    with_scalar(kind_of(row, kParam), [&](auto param) {
      with_scalar(kind_of(row, kGrad), [&](auto grad) {
        auto* const params = data_of<decltype(param)>(row, kParam) + span.begin;
        const auto* const grads = data_of<decltype(grad)>(row, kGrad) + span.begin;
        const auto step = [&](auto means, auto variances) {
          if (args.stochastic) {
            step_chunk<true>(f, chunk, span.count, params, grads, means, variances);
          } else {
            step_chunk<false>(f, chunk, span.count, params, grads, means, variances);
          }
        };
        if (kind_of(row, kMean) == ElementKind::kShort) {
          step(CodedMoment<Format::k169>{data_of<uint16_t>(row, kMean) + span.begin},
               CodedMoment<Format::k0610>{data_of<uint16_t>(row, kVariance) + span.begin});
        } else {
          step(FloatMoment{data_of<float>(row, kMean) + span.begin},
               FloatMoment{data_of<float>(row, kVariance) + span.begin});
        }
      });
    });
  }
}

}  // namespace

extern const Adam16Cpu adam16_cpu = {chunks};

}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle

#endif  // DALLE_ISA
