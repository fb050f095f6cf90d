// What forward and backward of gumbel_softmax share on CUDA: which thread holds which codes, their
// loads and stores, the noise, the reduction over a row. Letters: see gumbel_softmax.h.
#pragma once

#include <cfloat>
#include <type_traits>

#include "common/simt.h"
#include "gumbel_softmax/gumbel_softmax.h"

namespace dalle {

// How a block works: kRows rows, kLanes threads a row, each holding kElements codes in registers.
// Codes lie side by side (kStrided = false; kRows > 1 only within a warp) or `inner` apart, then
// neighbouring threads take neighbouring rows. kTail: codes beyond kLanes * kElements are read and
// drawn a second time. kChunk codes are drawn at a time; kMinBlocks bounds the registers.
template <bool kIsStrided, int kRowCount, int kLaneCount, int kElementCount, bool kHasTail = false,
          int kChunkCount = (kElementCount < 16 ? kElementCount : 16), int kBlocks = 1>
struct RowLayout {
  static constexpr bool kStrided = kIsStrided, kTail = kHasTail;
  static constexpr int kRows = kRowCount, kLanes = kLaneCount, kElements = kElementCount;
  static constexpr int kThreads = kRows * kLanes;
  static constexpr int kChunk = kChunkCount;
  static constexpr int kChunks = kElements / kChunk;
  static constexpr int kMinBlocks = kBlocks;
  static constexpr int kInWarp =
      kStrided ? kWarpSize / kRows : (kLanes < kWarpSize ? kLanes : kWarpSize);
  static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024 && kElements % kChunk == 0);
  static_assert(kStrided ? kWarpSize % kRows == 0 : (kRows == 1 || kLanes <= kWarpSize));
};

// Words of kCalls Philox calls at once, so that the keys of a round are made once for all of them.
template <int kCalls>
__device__ __forceinline__ void philox_calls(const uint64_t (&subsequences)[kCalls], uint64_t seed,
                                             uint32_t (&words)[kCalls][4]) {
#pragma unroll
  for (int i = 0; i < kCalls; ++i) {
    words[i][0] = words[i][1] = 0;
    words[i][2] = static_cast<uint32_t>(subsequences[i]);
    words[i][3] = static_cast<uint32_t>(subsequences[i] >> 32);
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kCalls; ++i) {
      const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiply0) * words[i][0];
      const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiply1) * words[i][2];
      words[i][0] = static_cast<uint32_t>(product1 >> 32) ^ words[i][1] ^ key0;
      words[i][1] = static_cast<uint32_t>(product1);
      words[i][2] = static_cast<uint32_t>(product0 >> 32) ^ words[i][3] ^ key1;
      words[i][3] = static_cast<uint32_t>(product0);
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// logit - log(-log u), u = (word + 1/2) 2^-32. Near 1 the logarithm's approximation has no digits
// left of 1 - u = v: there a polynomial in v gives -log(1 - v) / v, to 2e-8. What lg2.approx may be
// off by leaves -log u right to 2^-21 of it, as log2(v) is -1/2 at most, and the noise g to
// 2^-21 + 2^-22 max(ln 2, |g|), besides rounding.
__device__ __forceinline__ float add_gumbel(float logit, uint32_t word) {
  const bool near_one = word >= kNearOne;
  const float v = static_cast<float>(near_one ? ~word : word) * 0x1p-32f + 0x1p-33f;
  float series = 0.39189881f;
  series = series * v + 0.046397245f;
  series = series * v + 0.22618632f;
  series = series * v + 0.24718295f;
  series = series * v + 0.3334747f;
  series = series * v + 0.49999738f;
  series = series * v + 1.0f;
  const float exponential = near_one ? series * v : -kLn2Float * log2_approx(v);
  return logit - kLn2Float * log2_approx(exponential);
}

// log2(e) / tau in float, divided by every thread: 64-bit division is slow on most cards.
// Other taus as in exponent_scale.
__device__ __forceinline__ float float_exponent_scale(double tau) {
  if (!(tau > 0.0)) return nanf("");
  return fminf(kLog2EFloat / static_cast<float>(tau), 3.0e38f);
}

// One row as one thread sees it. Its codes come in units of kWidth that start at element numbers
// divisible by kWidth: whole Philox calls, and aligned vectors where the tensor begins aligned.
// Codes that lie side by side are addressed by the same numbers, from where row 0 of the larger
// batch would begin: a second offset would take two registers more.
template <typename scalar_t, typename layout_t>
struct Row {
  static constexpr bool kStrided = layout_t::kStrided;
  static constexpr int kWidth = kStrided ? 4 : 16 / static_cast<int>(sizeof(scalar_t));
  static constexpr int kUnits = layout_t::kChunk / kWidth;  // of a chunk
  static constexpr int kStep = layout_t::kLanes * kWidth;   // codes between a thread's units
  static constexpr int kSpan = layout_t::kLanes * layout_t::kChunk;  // between its chunks
  // A code's number; 32 bits unless kStep beyond the last code may not fit.
  using Code = std::conditional_t<layout_t::kTail, int64_t, int>;

  int64_t index, base, inner;  // base: offset of code 0 in memory
  uint64_t element;            // element number of code 0
  int num_codes;               // 0 beyond the last row
  int member;                  // of the kLanes threads
  bool aligned;

  __device__ __forceinline__ Row(const GumbelSoftmaxParams& p, const void* a, const void* b,
                                 const void* c) {
    const int thread = static_cast<int>(threadIdx.x);
    member = kStrided ? thread / layout_t::kRows : thread % layout_t::kLanes;
    index = static_cast<int64_t>(blockIdx.x) * layout_t::kRows +
            (kStrided ? thread % layout_t::kRows : thread / layout_t::kLanes);
    num_codes = index < num_rows(p) ? static_cast<int>(p.num_codes) : 0;
    element = element_of(p, index);
    inner = kStrided ? p.inner : 1;
    base = kStrided ? offset_of(p, index, 0) : static_cast<int64_t>(element);
    const uintptr_t bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
                           reinterpret_cast<uintptr_t>(c);
    aligned = kStrided || bits % 16 == 0;
  }

  // First code of this thread's chunk: up to kWidth - 1 before code 0.
  __device__ __forceinline__ Code first_code(int64_t chunk) const {
    return static_cast<Code>(chunk * kSpan) + member * kWidth - static_cast<int>(element % kWidth);
  }
  __device__ __forceinline__ bool full_unit(Code k) const {
    return aligned && k >= 0 && k + kWidth <= num_codes;
  }
  __device__ __forceinline__ bool inside(Code k) const { return k >= 0 && k < num_codes; }

  // A chunk from `data`; elements that are no codes get `filling`. A nonfinite code makes
  // `nonfinite` NaN.
  __device__ __forceinline__ void load(const scalar_t* data, Code first, float filling,
                                       float& nonfinite, float (&values)[layout_t::kChunk]) const {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const Code k = first + unit * kStep;
      float* const to = values + unit * kWidth;
      if (!full_unit(k)) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          to[j] = filling;
          if (inside(k + j)) {
            to[j] = static_cast<float>(data[base + (k + j) * inner]);
            nonfinite = to[j] * 0.0f + nonfinite;
          }
        }
        continue;
      }
      if constexpr (kStrided) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) to[j] = static_cast<float>(data[base + (k + j) * inner]);
      } else {
        const scalar_t* const from = data + base + k;
        const uint4 words =
            layout_t::kTail ? load_vector<uint4>(from) : load_vector_once<uint4>(from);
        unpack(words.x, to, 0);
        unpack(words.y, to, 1);
        unpack(words.z, to, 2);
        unpack(words.w, to, 3);
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) nonfinite = to[j] * 0.0f + nonfinite;
    }
  }

  __device__ __forceinline__ void store(scalar_t* data, Code first,
                                        const float (&values)[layout_t::kChunk]) const {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const Code k = first + unit * kStep;
      const float* const from = values + unit * kWidth;
      if (!kStrided && full_unit(k)) {
        const uint4 words{pack(from, 0), pack(from, 1), pack(from, 2), pack(from, 3)};
        store_vector_once(data + base + k, words);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (inside(k + j)) data[base + (k + j) * inner] = static_cast<scalar_t>(from[j]);
      }
    }
  }

  // Turns a chunk of logits into noisy ones.
  __device__ __forceinline__ void add_noise(Code first, uint64_t seed,
                                            float (&values)[layout_t::kChunk]) const {
    constexpr int kCalls = layout_t::kChunk / 4, kCallsOfUnit = kWidth / 4;
    uint64_t subsequences[kCalls];
    uint32_t words[kCalls][4];
#pragma unroll
    for (int call = 0; call < kCalls; ++call) {
      const Code k = first + call / kCallsOfUnit * kStep;
      subsequences[call] =
          (element + static_cast<uint64_t>(static_cast<int64_t>(k))) / 4 + call % kCallsOfUnit;
    }
    philox_calls(subsequences, seed, words);
#pragma unroll
    for (int i = 0; i < layout_t::kChunk; ++i) {
      values[i] = add_gumbel(values[i], words[i / 4][i % 4]);
    }
  }

  // Code of element i of a chunk.
  __device__ __forceinline__ static Code code_of(Code first, int i) {
    return first + i / kWidth * kStep + i % kWidth;
  }

 private:
  __device__ __forceinline__ static void unpack(uint32_t word, float* to, int i) {
    if constexpr (sizeof(scalar_t) == 4) {
      to[i] = __uint_as_float(word);
    } else {
      const float2 pair = unpack_pair<scalar_t>(word);
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
  }
  __device__ __forceinline__ static uint32_t pack(const float* from, int i) {
    if constexpr (sizeof(scalar_t) == 4) {
      return __float_as_uint(from[i]);
    } else {
      return pack_pair<scalar_t>(from[2 * i], from[2 * i + 1]);
    }
  }
};

__device__ __forceinline__ float shuffle_xor(float value, int step) {
  return __shfl_xor_sync(kAllLanes, value, step);
}

// Merges the values of a row's threads in a fixed order; each of them gets the result. `merge` must
// give the same for (a, b) and (b, a), and leave a as it is beside `identity`. At most one call a
// kernel: the shared memory is not guarded against a second.
template <typename layout_t, typename value_t, typename merge_t>
__device__ __forceinline__ value_t reduce_row(value_t value, const value_t& identity,
                                              const merge_t& merge) {
  constexpr int kFirst = layout_t::kStrided ? layout_t::kRows : 1;
  const auto within_warp = [&] {
#pragma unroll
    for (int step = kFirst; step < kFirst * layout_t::kInWarp; step *= 2) {
      value = merge(value, shuffle_xor(value, step));
    }
  };
  within_warp();
  if constexpr (layout_t::kLanes > layout_t::kInWarp) {
    constexpr int kWarps = layout_t::kLanes / layout_t::kInWarp;
    DALLE_SHARED(value_t, parts, [kWarps][layout_t::kRows]);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int row = lane % layout_t::kRows, member = lane / layout_t::kRows;
    if (member == 0) parts[warp][row] = value;
    __syncthreads();
    value = identity;
    for (int w = member; w < kWarps; w += layout_t::kInWarp) value = merge(value, parts[w][row]);
    within_warp();
  }
  return value;
}

}  // namespace dalle
