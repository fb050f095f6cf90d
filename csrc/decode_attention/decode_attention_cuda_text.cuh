// The text part of decode attention: a warp takes one chunk of the text for the 16 samples of a
// tile, which share its keys and values. No torch here. Not yet measured on a GPU.
#pragma once

#include "decode_attention/decode_attention_cuda_chunk.cuh"

namespace dalle {

// Keys [begin, end) of the text are those of a chunk, `step` a multiple of them at a time.
struct TextSpan {
  int32_t begin, end;

  __device__ TextSpan(const AttentionRule& rule, int chunk, int step) {
    const int32_t share = (rule.text_len + kTextChunks - 1) / kTextChunks;
    const int32_t span = (share + step - 1) / step * step;
    begin = chunk * span;
    end = begin + span < rule.text_len ? begin + span : rule.text_len;
  }
};

// fp16 and bf16: samples are the rows of mma.m16n8k16. Which index of a product an element has does
// not matter as long as both operands agree, so that lanes read 16 neighbouring bytes of a row and
// no operand passes through shared memory (g = lane / 4, t = lane % 4):
//   scores  lane t reads elements 32 u + 8 t .. + 7 of queries and keys: two steps of 16
//   output  lane g reads elements 8 g .. 8 g + 7 of two values: column g of eight tiles of 8, so a
//           lane ends with elements 16 t .. 16 t + 15 of samples g and g + 8
template <typename scalar_t, int kHead>
struct TextChunk {
  static_assert(kHead % 64 == 0 && sizeof(scalar_t) == 2);
  static constexpr int kParts = kHead / 64;
  static constexpr int kKeys = 16;  // at a time, and their values

  __device__ static __forceinline__ uint4 load(const scalar_t* row, int column, bool valid) {
    return valid ? load_vector<uint4>(row + column) : uint4{};
  }

  __device__ static void run(const DecodeAttentionParams& p, const SampleTile& tile, int chunk,
                             float* rows) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
    const int64_t begin_of_head = (int64_t{tile.batch} * p.heads + tile.head) * p.rule.text_len;
    const TextSpan span(p.rule, chunk, kKeys);
    const float factor = score_factor<scalar_t>(p.scale);
    uint4 q[2][kParts][2];  // of samples g and g + 8
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const scalar_t* row = tile.row<scalar_t>(p.q, g + 8 * i);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const int column = part * 64 + u * 32 + t * 8;
          q[i][part][u] = load(row, column, column < p.head_size && span.begin < span.end);
        }
      }
    }
    float out[kParts * 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
#pragma unroll 1
    for (int32_t first = span.begin; first < span.end; first += kKeys) {
      uint4 values[kParts][4];  // of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t key = first + t * 2 + i % 2 + i / 2 * 8;
        const scalar_t* row =
            static_cast<const scalar_t*>(p.text_values) + (begin_of_head + key) * p.head_size;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int column = part * 64 + g * 8;
          values[part][i] = load(row, column, key < span.end && column < p.head_size);
        }
      }
      float score[kKeys / 8][4] = {};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const int32_t key = first + n * 8 + g;
        const scalar_t* row =
            static_cast<const scalar_t*>(p.text_keys) + (begin_of_head + key) * p.head_size;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            const int column = part * 64 + u * 32 + t * 8;
            const uint4 k = load(row, column, key < span.end && column < p.head_size);
            const uint4 &a = q[0][part][u], &b = q[1][part][u];
            mma_m16n8k16<scalar_t>(score[n], {a.x, b.x, a.y, b.y}, {k.x, k.y});
            mma_m16n8k16<scalar_t>(score[n], {a.z, b.z, a.w, b.w}, {k.z, k.w});
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // rows g and g + 8
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = score[n][2 * i + e];
            x = first + n * 8 + t * 2 + e < span.end ? x * factor : -INFINITY;
            most = fmaxf(most, x);
          }
        }
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        const float m_new = fmaxf(m[i], most), shift = shift_of(m_new);
        const float rescale = weight_of<scalar_t>(m[i] - shift);
        m[i] = m_new;
        l[i] *= rescale;
#pragma unroll
        for (int n = 0; n < kParts * 8; ++n) {
          out[n][2 * i] *= rescale;
          out[n][2 * i + 1] *= rescale;
        }
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = score[n][2 * i + e];
            x = weight_of<scalar_t>(x - shift);
            l[i] += x;
          }
        }
      }
      add_values(score, values, out);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(kAllLanes, l[i], 1);
      l[i] += __shfl_xor_sync(kAllLanes, l[i], 2);
      float* row = rows + (g + 8 * i) * ChunkRow<kHead>::kStride;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int j = 0; j < 8; j += 4) {
            const auto at = [&](int n) { return out[part * 8 + j + n][2 * i + e]; };
            store_vector(row + part * 64 + t * 16 + e * 8 + j, float4{at(0), at(1), at(2), at(3)});
          }
        }
      }
      if (t == 0) ChunkRow<kHead>::end(row, m[i], l[i]);
    }
  }

  // out += weights (16 samples x 16 keys) times values, weights in scalar_t.
  __device__ static __forceinline__ void add_values(const float (&weight)[2][4],
                                                    const uint4 (&values)[kParts][4],
                                                    float (&out)[kParts * 8][4]) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = weight[i / 2];
      a[i] = pack_pair<scalar_t>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
    const auto low = [](uint32_t x, uint32_t y) { return (x & 0xffffu) | y << 16; };
    const auto high = [](uint32_t x, uint32_t y) { return x >> 16 | (y & 0xffff0000u); };
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t words[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4& row = values[part][i];
        words[i][0] = row.x, words[i][1] = row.y, words[i][2] = row.z, words[i][3] = row.w;
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t even[2] = {low(words[0][w], words[1][w]), low(words[2][w], words[3][w])};
        const uint32_t odd[2] = {high(words[0][w], words[1][w]), high(words[2][w], words[3][w])};
        mma_m16n8k16<scalar_t>(out[part * 8 + 2 * w], a, even);
        mma_m16n8k16<scalar_t>(out[part * 8 + 2 * w + 1], a, odd);
      }
    }
  }
};

// fp32: plain products. A lane has 4 keys x 4 samples of 32 x 16 scores, then 8 samples x 4 (or 8)
// elements of the output; between them weights pass through the chunk's own rows, which it fills
// last.
template <int kHead>
struct TextChunk<float, kHead> {
  static constexpr int kKeys = 32;                        // at a time
  static constexpr int kQuads = kHead / 64;               // 4 elements of a lane each
  static constexpr int kWeightStride = kTileSamples + 4;  // floats
  static_assert((kKeys + 1) * kWeightStride <= kTileSamples * ChunkRow<kHead>::kStride);

  __device__ static void run(const DecodeAttentionParams& p, const SampleTile& tile, int chunk,
                             float* rows) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int key_lane = lane % 8, sample_lane = lane / 8;           // of scores
    const int column = lane % 16 * 4, first_sample = lane / 16 * 8;  // of the output
    const int64_t begin_of_head = (int64_t{tile.batch} * p.heads + tile.head) * p.rule.text_len;
    const float* text_keys = static_cast<const float*>(p.text_keys) + begin_of_head * p.head_size;
    const float* text_values =
        static_cast<const float*>(p.text_values) + begin_of_head * p.head_size;
    const TextSpan span(p.rule, chunk, kKeys);
    const float factor = score_factor<float>(p.scale);
    float* weights = rows;  // of 32 keys x 16 samples, then what 16 sums are multiplied by
    float* rescales = weights + kKeys * kWeightStride;
    const float* q = tile.row<float>(p.q, sample_lane * 4);
    float m[4], l[4], out[8][kQuads][4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) m[j] = -INFINITY, l[j] = 0.0f;
#pragma unroll 1
    for (int32_t first = span.begin; first < span.end; first += kKeys) {
      const int32_t last = span.end - 1;
      float score[4][4] = {};  // of keys key_lane + 8 i and samples 4 sample_lane + j
      const float* k = text_keys + int64_t{first + key_lane} * p.head_size;
#pragma unroll 1
      for (int d = 0; d < p.head_size; d += 4) {
        float4 y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool valid = first + key_lane + 8 * i <= last;
          y[i] = valid ? load_vector<float4>(k + i * 8 * p.head_size + d) : float4{};
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool valid = sample_lane * 4 + j < tile.count;
          const float4 x = valid ? load_vector<float4>(q + j * p.q.sample + d) : float4{};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // On their own first: D terms added one after another would round too much.
            float sum = fmaf(x.y, y[i].y, x.x * y[i].x);
            sum = fmaf(x.z, y[i].z, sum);
            score[i][j] += fmaf(x.w, y[i].w, sum);
          }
        }
      }
      float rescale[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float most = -INFINITY;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = score[i][j];
          x = first + key_lane + 8 * i <= last ? x * factor : -INFINITY;
          most = fmaxf(most, x);
        }
#pragma unroll
        for (int step = 1; step < 8; step *= 2) {
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
        }
        const float m_new = fmaxf(m[j], most), shift = shift_of(m_new);
        rescale[j] = weight_of<float>(m[j] - shift);
        m[j] = m_new;
        l[j] *= rescale[j];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = score[i][j];
          x = weight_of<float>(x - shift);
          l[j] += x;
        }
      }
      __syncwarp();  // all have read the last weights
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_vector(weights + (key_lane + 8 * i) * kWeightStride + sample_lane * 4,
                     float4{score[i][0], score[i][1], score[i][2], score[i][3]});
      }
      if (key_lane == 0) {
        store_vector(rescales + sample_lane * 4,
                     float4{rescale[0], rescale[1], rescale[2], rescale[3]});
      }
      __syncwarp();
      add_values(p, text_values, first, last, weights + first_sample, rescales + first_sample,
                 column, out);
    }
    __syncwarp();  // all have read the last weights
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      float* row = rows + (first_sample + s) * ChunkRow<kHead>::kStride + column;
#pragma unroll
      for (int c = 0; c < kQuads; ++c) {
        const float (&x)[4] = out[s][c];
        store_vector(row + c * 64, float4{x[0], x[1], x[2], x[3]});
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int step = 1; step < 8; step *= 2) l[j] += __shfl_xor_sync(kAllLanes, l[j], step);
      float* row = rows + (sample_lane * 4 + j) * ChunkRow<kHead>::kStride;
      if (key_lane == 0) ChunkRow<kHead>::end(row, m[j], l[j]);
    }
  }

  // out = rescale * out + weights times the values from `first` on; weights beyond `last` are 0.
  __device__ static __forceinline__ void add_values(const DecodeAttentionParams& p,
                                                    const float* values, int32_t first,
                                                    int32_t last, const float* weights,
                                                    const float* rescales, int column,
                                                    float (&out)[8][kQuads][4]) {
#pragma unroll
    for (int s = 0; s < 8; ++s) {
#pragma unroll
      for (int i = 0; i < kQuads * 4; ++i) out[s][i / 4][i % 4] *= rescales[s];
    }
#pragma unroll 4
    for (int key = 0; key < kKeys; ++key) {
      const int32_t at = first + key < last ? first + key : last;
      const float4 low = load_vector<float4>(weights + key * kWeightStride);
      const float4 high = load_vector<float4>(weights + key * kWeightStride + 4);
      const float w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int c = 0; c < kQuads; ++c) {
        const bool inside = column + c * 64 < p.head_size && first + key <= last;
        const float* from = values + int64_t{at} * p.head_size + column + c * 64;
        const float4 x = inside ? load_vector<float4>(from) : float4{};
#pragma unroll
        for (int s = 0; s < 8; ++s) {
          out[s][c][0] = fmaf(w[s], x.x, out[s][c][0]);
          out[s][c][1] = fmaf(w[s], x.y, out[s][c][1]);
          out[s][c][2] = fmaf(w[s], x.z, out[s][c][2]);
          out[s][c][3] = fmaf(w[s], x.w, out[s][c][3]);
        }
      }
    }
  }
};

}  // namespace dalle
