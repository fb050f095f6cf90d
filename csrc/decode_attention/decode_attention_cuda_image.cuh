// The image part of decode attention: a warp takes the keys of one sample and head, or one chunk
// of them. They are read once, 16 bytes a lane, kGroups loads of keys under way at a time, then as
// many of values. No torch here. Not yet measured on a GPU.
#pragma once

#include <type_traits>

#include "decode_attention/decode_attention_cuda_chunk.cuh"

namespace dalle {

constexpr int kMaxRanges = 2 * kMaxRuns;

// Which places of the cache a query reads; the new key lies at one of them. In shared memory.
struct DecodePlaces {
  int32_t count, new_place;
  DecodeRange ranges[kMaxRanges];

  // By all threads of a block; a barrier has to follow.
  __device__ void find(const AttentionRule& rule, int32_t slot) {
    const int32_t ends = decode_num_ranges(rule);
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < ends;
         i += static_cast<int32_t>(blockDim.x)) {
      ranges[i] = decode_range(rule, slot, i);
    }
    if (threadIdx.x == 0) {
      count = ends;
      new_place = decode_place(rule, slot);
    }
  }
};

// Finds the places of rising key numbers.
struct PlaceCursor {
  const DecodePlaces& places;
  int32_t range = 0, before = 0;  // keys in the ranges before this one

  __device__ explicit PlaceCursor(const DecodePlaces& of) : places(of) {}
  // The place of key number `key`; -1 beyond the last.
  __device__ __forceinline__ int32_t find(int32_t key) {
    for (; range < places.count; ++range) {
      const DecodeRange at = places.ranges[range];
      if (key - before < at.end - at.begin) return at.begin + key - before;
      before += at.end > at.begin ? at.end - at.begin : 0;
    }
    return -1;
  }
};

// 16 bytes of keys or values as floats.
template <typename scalar_t, int kElements>
__device__ __forceinline__ void widen_words(const uint4& words, float (&x)[kElements]) {
  const uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(scalar_t) == 4) {
      x[w] = __uint_as_float(each[w]);
    } else {
      const float2 pair = unpack_pair<scalar_t>(each[w]);
      x[2 * w] = pair.x;
      x[2 * w + 1] = pair.y;
    }
  }
}

// Four or eight 8-bit codes as floats: 2^23 + 128 + code has the code plus 128 in its last byte.
template <typename scalar_t, int kElements>
__device__ __forceinline__ void widen_codes(uint32_t word, float* x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = (word ^ 0x80808080u) >> (8 * i) & 0xffu;
    x[i] = __uint_as_float(0x4b000000u | byte) - 8388736.0f;
  }
}
template <typename scalar_t, int kElements>
__device__ __forceinline__ void widen_words(const uint2& words, float (&x)[kElements]) {
  static_assert(kElements == 8);
  widen_codes<scalar_t, kElements>(words.x, x);
  widen_codes<scalar_t, kElements>(words.y, x + 4);
}
template <typename scalar_t, int kElements>
__device__ __forceinline__ void widen_words(const uint32_t& word, float (&x)[kElements]) {
  static_assert(kElements == 4);
  widen_codes<scalar_t, kElements>(word, x);
}

// D is a multiple of the elements of a lane, at most kHead; lanes beyond D have zeros.
template <typename scalar_t, int kHead, bool kCoded>
struct ImageChunk {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(scalar_t));  // of a lane
  static constexpr int kLanes = kHead / kElements;                           // of a key
  static constexpr int kKeys = kWarpSize / kLanes;                           // of a load
  // Loads under way: with D = 64 in 16 bits the 33 keys of a row pattern, or the 32 of a column.
  static constexpr int kGroups = kCoded ? 8 : 9;
  static constexpr int kBlock = kGroups * kKeys;
  using Stored = std::conditional_t<kCoded, int8_t, scalar_t>;
  using Words =
      std::conditional_t<!kCoded, uint4, std::conditional_t<kElements == 8, uint2, uint32_t>>;

  const DecodeAttentionParams& p;
  const DecodePlaces& places;
  const SampleTile& tile;
  int sample;     // of the tile
  int64_t first;  // of the places of this sample and head
  int lane, column;
  bool inside;

  __device__ ImageChunk(const DecodeAttentionParams& params, const DecodePlaces& read_places,
                        const SampleTile& of, int sample_of_tile)
      : p(params),
        places(read_places),
        tile(of),
        sample(sample_of_tile),
        first(((int64_t{of.batch} * params.samples + of.first + sample) * params.heads + of.head) *
              params.capacity),
        lane(static_cast<int>(threadIdx.x) % kWarpSize),
        column(lane % kLanes * kElements),
        inside(column < params.head_size) {}

  __device__ __forceinline__ Stored* stored(void* cache, int32_t place) const {
    return static_cast<Stored*>(cache) + (first + place) * p.head_size + column;
  }
  __device__ __forceinline__ uint4 load_row(const DecodeRows& rows) const {
    return inside ? load_vector<uint4>(tile.row<scalar_t>(rows, sample) + column) : uint4{};
  }

  // The new row as it is cached: itself, or codes and their scale.
  __device__ __forceinline__ Words new_words(const DecodeRows& rows, float* scale) const {
    const uint4 words = load_row(rows);
    if constexpr (!kCoded) {
      return words;
    } else {
      float x[kElements];
      widen_words<scalar_t>(words, x);
      float largest = 0.0f;
      bool number = true;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        number = number && x[i] == x[i];
        largest = fmaxf(largest, fabsf(x[i]));
      }
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
        number = __shfl_xor_sync(kAllLanes, static_cast<int>(number), step) != 0 && number;
      }
      *scale = number && largest < INFINITY ? largest / kMaxCode : NAN;
      const bool codes = *scale > 0.0f;
      uint32_t each[2] = {};
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int code = codes ? static_cast<int>(rintf(x[i] / *scale)) : 0;
        each[i / 4] |= (static_cast<uint32_t>(code) & 0xffu) << (i % 4 * 8);
      }
      if constexpr (kElements == 8) {
        return Words{each[0], each[1]};
      } else {
        return each[0];
      }
    }
  }

  // Caches the new row at its place, for the lanes whose key it is (group `mine`; -1: of none), and
  // gives it to them.
  __device__ __forceinline__ void put_new(const DecodeRows& rows, void* cache, float* scales,
                                          int mine, Words (&words)[kGroups],
                                          float (&scale)[kGroups]) const {
    float new_scale = 1.0f;
    const Words row = new_words(rows, &new_scale);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g != mine) continue;
      words[g] = row;
      scale[g] = new_scale;
    }
    if (mine < 0) return;
    if (inside) store_vector(stored(cache, places.new_place), row);
    if (kCoded && column == 0) scales[first + places.new_place] = new_scale;
  }

  // Reads keys or values of the places; zeros where there is none, or the new one. Addresses come
  // first and from 32 bits (at most 2^24 places of 128 elements): then no load needs a branch.
  __device__ __forceinline__ void load(void* cache, const float* scales,
                                       const int32_t (&at)[kGroups], Words (&words)[kGroups],
                                       float (&scale)[kGroups]) const {
    const Stored* const begin = stored(cache, 0);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const bool old = at[g] >= 0 && at[g] != places.new_place;
      const int32_t place = old ? at[g] : 0;
      const Stored* const from = begin + place * p.head_size;
      words[g] = Words{};
      if (old && inside) words[g] = load_vector_once<Words>(from);
      scale[g] = 1.0f;
      if (kCoded && old) scale[g] = scales[first + place];
    }
  }

  // Chunk `chunk` of `chunks`: of every chunks * kBlock keys, kBlock. Fills `row`.
  __device__ void run(int chunk, int chunks, float* row) const {
    float q[kElements];
    widen_words<scalar_t>(load_row(p.q), q);
    const float factor = score_factor<scalar_t>(p.scale);
    float m = -INFINITY, l = 0.0f, out[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      q[i] *= factor;
      out[i] = 0.0f;
    }
    PlaceCursor cursor(places);
#pragma unroll 1
    for (int32_t key = chunk * kBlock + lane / kLanes;; key += chunks * kBlock) {
      int32_t at[kGroups];
      if (places.count == 1) {
        const DecodeRange range = places.ranges[0];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          at[g] = range.begin + key + g * kKeys;
          if (at[g] >= range.end) at[g] = -1;
        }
      } else {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) at[g] = cursor.find(key + g * kKeys);
      }
      uint32_t there = 0;  // bit g: whether there is a key g
      int mine = -1;       // the group of the new key
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (at[g] >= 0) there |= 1u << g;
        if (at[g] == places.new_place) mine = g;
      }
      if (!__any_sync(kAllLanes, there != 0)) break;
      Words words[kGroups];  // of keys, then of values
      float factors[kGroups];
      load(p.image_keys, p.key_scales, at, words, factors);
      if (__any_sync(kAllLanes, mine >= 0)) {
        put_new(p.k, p.image_keys, p.key_scales, mine, words, factors);
      }
      float score[kGroups], most = -INFINITY;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float x[kElements], sum = 0.0f;
        widen_words<scalar_t>(words[g], x);
#pragma unroll
        for (int i = 0; i < kElements; ++i) sum = fmaf(q[i], x[i], sum);
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, step);
        }
        score[g] = (there >> g & 1u) == 0 ? -INFINITY : kCoded ? sum * factors[g] : sum;
        most = fmaxf(most, score[g]);
      }
      __syncwarp();  // keeps the compiler from loading values above: no registers for both
      load(p.image_values, p.value_scales, at, words, factors);
      if (__any_sync(kAllLanes, mine >= 0)) {
        put_new(p.v, p.image_values, p.value_scales, mine, words, factors);
      }
#pragma unroll
      for (int step = kLanes; step < kWarpSize; step *= 2) {
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
      }
      const float m_new = fmaxf(m, most), shift = shift_of(m_new);
      const float rescale = weight_of<scalar_t>(m - shift);
      m = m_new;
      l *= rescale;
#pragma unroll
      for (int i = 0; i < kElements; ++i) out[i] *= rescale;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float weight = weight_of<scalar_t>(score[g] - shift);
        l += weight;
        float x[kElements];
        widen_words<scalar_t>(words[g], x);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          out[i] = fmaf(kCoded ? weight * factors[g] : weight, x[i], out[i]);
        }
      }
    }
#pragma unroll
    for (int step = kLanes; step < kWarpSize; step *= 2) {
      l += __shfl_xor_sync(kAllLanes, l, step);
#pragma unroll
      for (int i = 0; i < kElements; ++i) out[i] += __shfl_xor_sync(kAllLanes, out[i], step);
    }
    if (lane >= kLanes) return;
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
      store_vector(row + column + i, float4{out[i], out[i + 1], out[i + 2], out[i + 3]});
    }
    if (lane == 0) ChunkRow<kHead>::end(row, m, l);
  }
};

}  // namespace dalle
