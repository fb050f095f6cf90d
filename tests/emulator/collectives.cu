// The instructions themselves against plain loops, and fragment layouts against CuTe's strides for
// SM80_16x8x16 and SM80_16x8x8 (an independent source). Under nvcc the same cases ask the hardware.
#include <cmath>

#include "cases.h"

namespace collectives {

using cases::Buffer;
using cases::expect;
using cases::finish;
using dalle::launch;

constexpr uint32_t kAll = 0xffffffffu;

// -- shuffles, votes, reductions -----------------------------------------------------------------

__global__ void shuffles(int* out, int width) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_sync(kAll, 100 + lane, lane * 3 + 1, width);
  out[32 + lane] = __shfl_up_sync(kAll, 100 + lane, 3, width);
  out[64 + lane] = __shfl_down_sync(kAll, 100 + lane, 3, width);
  out[96 + lane] = __shfl_xor_sync(kAll, 100 + lane, 5, width);
  const double wide = __shfl_xor_sync(kAll, lane + 0.25, 1);
  out[128 + lane] = wide == (lane ^ 1) + 0.25;
}
CASE(shuffles) {
  for (int width : {32, 16, 8}) {
    Buffer<int> out(160);
    finish(launch(shuffles, 1, 32, 0, nullptr, out.data(), width));
    for (int lane = 0; lane < 32; ++lane) {
      const int first = lane / width * width, last = first + width - 1;
      expect(out[lane] == 100 + first + (lane * 3 + 1) % width, "index");
      expect(out[32 + lane] == 100 + (lane - 3 < first ? lane : lane - 3), "up");
      expect(out[64 + lane] == 100 + (lane + 3 > last ? lane : lane + 3), "down");
      expect(out[96 + lane] == 100 + ((lane ^ 5) > last ? lane : lane ^ 5), "xor");
      expect(out[128 + lane] == 1, "xor of doubles");
    }
  }
}

__global__ void votes(unsigned* out) {
  const unsigned tid = threadIdx.x;
  const unsigned ballot = __ballot_sync(kAll, tid % 3 == 0);
  const unsigned any = __any_sync(kAll, tid == 40), all = __all_sync(kAll, tid != 40);
  const unsigned count = __syncthreads_count(tid % 5 == 0);
  const unsigned block_any = __syncthreads_or(tid == 63), block_all = __syncthreads_and(tid < 63);
  const int least = __reduce_min_sync(kAll, 20 - static_cast<int>(tid));
  const unsigned most = __reduce_max_sync(kAll, tid * 7), sum = __reduce_add_sync(kAll, tid);
  const unsigned values[] = {
      ballot, any, all, count, block_any, block_all, static_cast<unsigned>(least), most, sum};
  for (int i = 0; i < 9; ++i) out[tid * 9 + static_cast<unsigned>(i)] = values[i];
}
CASE(votes) {
  Buffer<unsigned> out(64 * 9);
  finish(launch(votes, 1, 64, 0, nullptr, out.data()));
  for (unsigned tid = 0; tid < 64; ++tid) {
    const unsigned first = tid / 32 * 32;
    unsigned ballot = 0;
    for (unsigned i = 0; i < 32; ++i) ballot |= static_cast<unsigned>((first + i) % 3 == 0) << i;
    const unsigned wanted[] = {
        ballot,           first == 32,     first == 0, 13, 1, 0, 20u - (first + 31),
        (first + 31) * 7, 32 * first + 496};
    for (unsigned i = 0; i < 9; ++i) {
      // __any_sync gives any non-zero value on hardware.
      const unsigned got = out[tid * 9 + i];
      expect(i == 1 || i == 2 || i == 4 ? (got != 0) == wanted[i] : got == wanted[i],
             "vote " + std::to_string(i) + " of thread " + std::to_string(tid));
    }
  }
}

// Only some lanes take part, in masks that do not overlap.
__global__ void halves(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t mask = lane < 8 ? 0xffu : 0xffffff00u;
  out[lane] = __shfl_xor_sync(mask, lane, lane < 8 ? 4 : 16, lane < 8 ? 8 : 32);
  if (lane % 2 == 0) __syncwarp(0x55555555u);
}
CASE(disjoint_masks) {
  Buffer<int> out(32);
  finish(launch(halves, 1, 32, 0, nullptr, out.data()));
  for (int lane = 0; lane < 8; ++lane) expect(out[lane] == (lane ^ 4), "the first eight");
  for (int lane = 24; lane < 32; ++lane) expect(out[lane] == (lane ^ 16), "the last eight");
}

__global__ void atomics(int* count, float* sum, unsigned* largest) {
  atomicAdd(count, 1);
  atomicAdd(sum, 0.5f);
  atomicMax(largest, blockIdx.x * blockDim.x + threadIdx.x);
  atomicCAS(count + 1, 0, 7);
}
CASE(atomics) {
  Buffer<int> count(2);
  Buffer<float> sum(1);
  Buffer<unsigned> largest(1);
  finish(launch(atomics, 3, 40, 0, nullptr, count.data(), sum.data(), largest.data()));
  expect(count[0] == 120 && count[1] == 7 && sum[0] == 60 && largest[0] == 119, "totals");
}

__global__ void indices(unsigned* out) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned number = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[number * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}
CASE(indices_in_three_dimensions) {
  Buffer<unsigned> out(2 * 3 * 4 * 5 * 6 * 2);
  finish(launch(indices, dim3(2, 3, 4), dim3(5, 6, 2), 0, nullptr, out.data()));
  for (size_t i = 0; i < out.size(); ++i) expect(out[i] == 1, "every thread once");
}

// -- matrices ------------------------------------------------------------------------------------

// Place in a matrix, as column * rows + row, of value v of lane l: CuTe's
// ((4, 8), values) : (lane strides, value strides).
struct Layout {
  int lane_low, lane_high, values[3];
  __host__ __device__ int at(int lane, int value) const {
    int place = lane % 4 * lane_low + lane / 4 * lane_high;
    for (int bit = 0; bit < 3; ++bit) place += (value >> bit & 1) * values[bit];
    return place;
  }
};
__device__ constexpr Layout kA16 = {32, 1, {16, 8, 128}};  // 16 x 16: m + 16 k
__device__ constexpr Layout kB16 = {16, 1, {8, 64, 0}};    // 8 x 16: n + 8 k
__device__ constexpr Layout kD = {32, 1, {16, 8, 0}};      // 16 x 8: m + 16 n
__device__ constexpr Layout kA8 = {16, 1, {8, 64, 0}};     // 16 x 8
__device__ constexpr Layout kB8 = {8, 1, {32, 0, 0}};      // 8 x 8

template <typename scalar_t, bool kSwapped>
__global__ void multiply_16(const float* a, const float* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a_words[4], b_words[2];
  for (int i = 0; i < 4; ++i) {
    a_words[i] = dalle::pack_pair<scalar_t>(a[kA16.at(lane, 2 * i)], a[kA16.at(lane, 2 * i + 1)]);
  }
  for (int i = 0; i < 2; ++i) {
    b_words[i] = dalle::pack_pair<scalar_t>(b[kB16.at(lane, 2 * i)], b[kB16.at(lane, 2 * i + 1)]);
  }
  if (kSwapped) {
    const uint32_t first = a_words[1];
    a_words[1] = a_words[2];
    a_words[2] = first;
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[kD.at(lane, i)];
  dalle::mma_m16n8k16<scalar_t>(sums, a_words, b_words);
  for (int i = 0; i < 4; ++i) d[kD.at(lane, i)] = sums[i];
}
__global__ void multiply_8(const float* a, const float* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a_words[4], b_words[2];
  for (int i = 0; i < 4; ++i) a_words[i] = dalle::to_tf32(a[kA8.at(lane, i)]);
  for (int i = 0; i < 2; ++i) b_words[i] = dalle::to_tf32(b[kB8.at(lane, i)]);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[kD.at(lane, i)];
  dalle::mma_m16n8k8_tf32(sums, a_words, b_words);
  for (int i = 0; i < 4; ++i) d[kD.at(lane, i)] = sums[i];
}

// Small integers, so that every product and sum is exact.
void run_multiply(void (*kernel)(const float*, const float*, float*), int depth) {
  Buffer<float> a(static_cast<size_t>(16 * depth)), b(static_cast<size_t>(8 * depth)), d(128);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * 7 % 23) - 11;
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * 5 % 19) - 9;
  for (size_t i = 0; i < d.size(); ++i) d[i] = static_cast<float>(i);
  finish(launch(kernel, 1, 32, 0, nullptr, a.data(), b.data(), d.data()));
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = static_cast<float>(m + 16 * n);
      for (int k = 0; k < depth; ++k) {
        sum += a[static_cast<size_t>(m + 16 * k)] * b[static_cast<size_t>(n + 8 * k)];
      }
      expect(d[static_cast<size_t>(m + 16 * n)] == sum, "element of a product");
    }
  }
}
CASE(mma_half) { run_multiply(multiply_16<__half, false>, 16); }
CASE(mma_bfloat16) { run_multiply(multiply_16<__nv_bfloat16, false>, 16); }
CASE(mma_tf32) { run_multiply(multiply_8, 8); }
CASE(bug_swapped_registers) { run_multiply(multiply_16<__half, true>, 16); }

template <int kCount, bool kTransposed>
__global__ void load_matrices(uint32_t* out) {
  DALLE_SHARED(uint16_t, rows, [32][24]);  // rows 48 bytes apart
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 24; ++i) rows[lane][i] = static_cast<uint16_t>(lane * 100 + i);
  __syncwarp();
  uint32_t words[kCount];
  if (kTransposed) {
    dalle::ldmatrix_trans(words, rows[lane]);
  } else {
    dalle::ldmatrix(words, rows[lane]);
  }
  for (int i = 0; i < kCount; ++i) {
    const int low = kTransposed ? (8 * i + 2 * t) * 100 + g : (8 * i + g) * 100 + 2 * t;
    const int high = low + (kTransposed ? 100 : 1);
    const uint32_t wanted = static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
    out[lane * kCount + i] = words[i] == wanted;
    // And a transposed fragment through the registers gives the other one.
    if (kCount == 1) {
      const uint32_t turned = dalle::movmatrix_trans(words[i]);
      const int first = kTransposed ? g * 100 + 2 * t : 2 * t * 100 + g;
      const int second = first + (kTransposed ? 1 : 100);
      const uint32_t other = static_cast<uint32_t>(first) | static_cast<uint32_t>(second) << 16;
      out[lane * kCount + i] &= turned == other;
    }
  }
}
template <int kCount, bool kTransposed>
void run_load_matrices() {
  Buffer<uint32_t> out(32 * kCount);
  finish(launch(load_matrices<kCount, kTransposed>, 1, 32, 0, nullptr, out.data()));
  for (size_t i = 0; i < out.size(); ++i) expect(out[i] == 1, "word of a fragment");
}
CASE(ldmatrix_x1) { run_load_matrices<1, false>(); }
CASE(ldmatrix_x2) { run_load_matrices<2, false>(); }
CASE(ldmatrix_x4) { run_load_matrices<4, false>(); }
CASE(ldmatrix_x1_trans) { run_load_matrices<1, true>(); }
CASE(ldmatrix_x2_trans) { run_load_matrices<2, true>(); }
CASE(ldmatrix_x4_trans) { run_load_matrices<4, true>(); }

// -- copies and numbers
// ----------------------------------------------------------------------------

template <int kBytes>
__global__ void copies(const unsigned char* in, unsigned char* out) {
  DALLE_DYNAMIC_SHARED(bytes);
  const int tid = static_cast<int>(threadIdx.x);
  dalle::cp_async<kBytes>(bytes + tid * kBytes, in + tid * kBytes, tid % (kBytes + 1));
  dalle::cp_async_commit();
  dalle::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < kBytes; ++i) out[tid * kBytes + i] = bytes[tid * kBytes + i];
}
template <int kBytes>
void run_copies() {
  Buffer<unsigned char> in(64 * kBytes), out(64 * kBytes);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<unsigned char>(i % 250 + 1);
  finish(launch(copies<kBytes>, 1, 64, 64 * kBytes, nullptr, in.data(), out.data()));
  for (size_t i = 0; i < in.size(); ++i) {
    const size_t tid = i / kBytes, valid = tid % (kBytes + 1);
    expect(out[i] == (i % kBytes < valid ? in[i] : 0), "copied byte");
  }
}
CASE(cp_async_4) { run_copies<4>(); }
CASE(cp_async_8) { run_copies<8>(); }
CASE(cp_async_16) { run_copies<16>(); }

__global__ void numbers(const float* in, float* out, uint4* vectors) {
  const int tid = static_cast<int>(threadIdx.x);
  out[tid] = dalle::exp2_approx(in[tid]);
  out[64 + tid] = dalle::log2_approx(fabsf(in[tid]) + 0.5f);
  out[128 + tid] = dalle::reciprocal_approx(in[tid] + 100.0f);
  const float2 pair = dalle::unpack_pair<__half>(dalle::pack_pair<__half>(in[tid], 2.0f));
  out[192 + tid] = pair.x + pair.y;
  const uint4 vector = dalle::load_vector_once<uint4>(vectors + tid);
  dalle::store_vector(vectors + tid, uint4{vector.w, vector.z, vector.y, vector.x});
}
CASE(numbers) {
  Buffer<float> in(64), out(256);
  Buffer<uint4> vectors(64);
  for (size_t i = 0; i < 64; ++i) {
    in[i] = static_cast<float>(i) * 0.75f - 24.0f;
    vectors[i] = {static_cast<unsigned>(i), 1, 2, 3};
  }
  finish(launch(numbers, 1, 64, 0, nullptr, in.data(), out.data(), vectors.data()));
  const auto near = [](float got, double wanted) {
    return std::fabs(got - wanted) <= 1e-6 * (1 + std::fabs(wanted));
  };
  for (size_t i = 0; i < 64; ++i) {
    expect(near(out[i], std::exp2(in[i])), "power");
    expect(near(out[64 + i], std::log2(std::fabs(in[i]) + 0.5)), "logarithm");
    expect(near(out[128 + i], 1 / (in[i] + 100.0)), "reciprocal");
    expect(out[192 + i] == in[i] + 2, "pair");
    expect(vectors[i].x == 3 && vectors[i].w == i, "vector");
  }
}
__global__ void flushes(float* out) {
  out[0] = dalle::exp2_approx(-127.0f);
  out[1] = dalle::exp2_approx(-125.0f);
  out[2] = dalle::exp2_approx(-INFINITY);
  out[3] = __uint_as_float(dalle::to_tf32(1.0f + 0x1p-11f));  // a tie: away from zero
}
CASE(small_powers_are_zero) {
  Buffer<float> out(4, -1.0f);
  finish(launch(flushes, 1, 1, 0, nullptr, out.data()));
  expect(out[0] == 0 && out[2] == 0, "flushed powers");
  expect(std::fabs(out[1] * 0x1p125f - 1) <= 0x1p-22f, "a small power");
  expect(out[3] == 1.0f + 0x1p-10f, "tf32 tie");
}

__global__ void asks_architecture(int* out) { *out = dalle::kArchitecture; }
CASE(architecture) {
  Buffer<int> out(1);
  finish(launch(asks_architecture, 1, 1, 0, nullptr, out.data()));
  const int device = dalle::device_architecture();  // runs what was compiled for its like or older
  expect(out[0] >= 80 && out[0] <= device, "architecture");
}

}  // namespace collectives
