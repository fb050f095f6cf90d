// Windows of error buffers for compress and project of powersgd: codes on their way from E into
// shared memory and, in compress, the sum with the gradients. No torch here.
#pragma once

#include "powersgd/powersgd_cuda_tile.cuh"

namespace dalle {

constexpr int kFactorLines = 128, kFactorSlab = 32;

// A window is the block of E that a tile of kFactorLines lines reads for one slab of the depth, in
// E's layout: lines x depth (compress) or depth x lines (project). Each thread copies chunks of 8
// codes, kAhead slabs ahead, and adds the gradients to them when they have arrived.
template <bool kProject, int kAhead, typename grad_t>
struct ErrorWindows {
  static constexpr int kRows = kProject ? kFactorSlab : kFactorLines;
  static constexpr int kChunks = (kProject ? kFactorLines : kFactorSlab) / 8;
  static constexpr int kWindowBytes = tile_bytes<kChunks>(kRows);
  static constexpr int kThreadChunks = kRows * kChunks / kProductThreads;  // of a thread
  static constexpr int kRowStep = kProductThreads / kChunks;               // from one to the next
  static constexpr int kGradChunks = kProject ? 0 : static_cast<int>(sizeof(grad_t)) / 2;
  static constexpr int kGradBytes = kThreadChunks * kGradChunks * kProductThreads * 16;
  static constexpr int kBytes = (kAhead + 1) * kWindowBytes + kAhead * kGradBytes;

  const PowerMatrix& m;
  unsigned char* shared;
  int32_t row, column;  // of this thread's first chunk in slab 0 of E
  bool vectors;         // all rows begin at multiples of 16 bytes
  bool adds = false;
  float factor = 0.0f;  // of gradients

  __device__ __forceinline__ ErrorWindows(const PowerMatrix& matrix, unsigned char* bytes,
                                          int32_t line, int32_t k0)
      : m(matrix),
        shared(bytes),
        row((kProject ? k0 : line) + thread_row()),
        column((kProject ? line : k0) + thread_chunk() * 8),
        vectors(matrix.columns % 8 == 0 && is_aligned_16(matrix.error) &&
                (kProject || is_aligned_16(matrix.grad))) {}

  __device__ __forceinline__ static int thread_row() {
    return static_cast<int>(threadIdx.x) / kChunks;
  }
  __device__ __forceinline__ static int thread_chunk() {
    return static_cast<int>(threadIdx.x) % kChunks;
  }
  __device__ __forceinline__ unsigned char* window(int slab) const {
    return shared + slab % (kAhead + 1) * kWindowBytes;
  }
  // Byte offset of this thread's chunk j in a window.
  __device__ __forceinline__ static int offset(int j) {
    return chunk_offset<kChunks>(thread_row() + j * kRowStep, thread_chunk());
  }
  // The gradients of that chunk: no other thread reads them.
  __device__ __forceinline__ unsigned char* grad_chunk(int slab, int j, int part) const {
    const int at = (j * kGradChunks + part) * kProductThreads + static_cast<int>(threadIdx.x);
    return shared + (kAhead + 1) * kWindowBytes + slab % kAhead * kGradBytes + at * 16;
  }

  // Offset of its first code in E, and how many of its codes are inside.
  struct Chunk {
    int64_t begin;
    int32_t count;
  };
  __device__ __forceinline__ Chunk chunk(int slab, int j) const {
    const int32_t y = row + (kProject ? slab * kFactorSlab : 0) + j * kRowStep;
    const int32_t x = column + (kProject ? 0 : slab * kFactorSlab);
    const int32_t columns = static_cast<int32_t>(m.columns);
    const int32_t left = y < static_cast<int32_t>(m.rows) ? columns - x : 0;
    return {int64_t{y} * columns + x, left < 0 ? 0 : left > 8 ? 8 : left};
  }

  // Starts copying a slab of E, and of the gradients where they are to be added.
  __device__ __forceinline__ void start(int slab) const {
#pragma unroll
    for (int j = 0; j < kThreadChunks; ++j) {
      const Chunk c = chunk(slab, j);
      unsigned char* const to = window(slab) + offset(j);
      if (!vectors) {
        copy_scalars(to, c);
        continue;
      }
      const int64_t at = c.count ? c.begin : 0;
      cp_async<16>(to, m.error + at, c.count * 2);
      if constexpr (!kProject) {
        if (!adds) continue;
        const auto* const from =
            reinterpret_cast<const unsigned char*>(static_cast<const grad_t*>(m.grad) + at);
#pragma unroll
        for (int part = 0; part < kGradChunks; ++part) {
          cp_async<16>(grad_chunk(slab, j, part), from + part * 16, c.count * 2);
        }
      }
    }
  }

  // The codes one by one, for rows that begin anywhere; gradients are added at once.
  __device__ __forceinline__ void copy_scalars(unsigned char* to, const Chunk& c) const {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      uint32_t code = i < c.count ? m.error[c.begin + i] : 0;
      if constexpr (!kProject) {
        if (adds && i < c.count) {
          const grad_t grad = static_cast<const grad_t*>(m.grad)[c.begin + i];
          code = encoded_code(decoded_code(code) + static_cast<float>(grad) * factor);
          m.error[c.begin + i] = static_cast<uint16_t>(code);
        }
      }
      reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(code);
    }
  }

  // Adds the gradients to this thread's chunks, which have arrived, and writes E back.
  __device__ __forceinline__ void add(int slab) const {
    if constexpr (!kProject) {
      if (!adds || !vectors) return;
#pragma unroll 1
      for (int j = 0; j < kThreadChunks; ++j) {
        const Chunk c = chunk(slab, j);
        if (c.count == 0) continue;
        unsigned char* const at = window(slab) + offset(j);
        const uint4 before = load_vector<uint4>(at);
        uint32_t words[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
        for (int part = 0; part < kGradChunks; ++part) {
          const uint4 grads = load_vector<uint4>(grad_chunk(slab, j, part));
          const uint32_t each[4] = {grads.x, grads.y, grads.z, grads.w};
#pragma unroll
          for (int w = 0; w < 4 / kGradChunks; ++w) {
            float2 grad;
            if constexpr (kGradChunks == 2) {
              grad = {__uint_as_float(each[2 * w]), __uint_as_float(each[2 * w + 1])};
            } else {
              grad = unpack_pair<grad_t>(each[w]);
            }
            uint32_t& word = words[part * 2 + w];
            word = changed_codes(word, [&](float value, int which) {
              return value + (which ? grad.y : grad.x) * factor;
            });
          }
        }
        const uint4 after{words[0], words[1], words[2], words[3]};
        store_vector(at, after);
        store_vector(m.error + c.begin, after);
      }
    }
  }
};

}  // namespace dalle
