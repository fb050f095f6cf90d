// Householder's Q of P + eps I in blocks of reflectors, for any number of blocks at once and
// without one of them ever waiting for another inside a launch. No torch here. Not yet measured on
// a GPU.
//
// A strip is kWidth neighbouring columns; a block of threads takes one, and each thread keeps full
// rows of it in registers. Launch s has a block for each of the strips s, s + 1, ... of each
// matrix: it applies the reflectors of strip s - 1 all at once, as I - V T^T V^T, and strip s is
// factored in place. So a factorisation is one launch a strip, and the strip that the next launch
// waits for is always the first to be done. The last launch makes Q: to a strip of I it applies the
// reflectors of the same strip and of those before it, last first; no strip needs another.
//
// The work memory of a matrix: its columns one after another, which become V (zeros above the
// pivots, ones on them); then T of each strip. Columns are padded to full strips, rows to full
// threads, with zeros, so that no loop checks a bound.
//
// As LAPACK's geqrf and orgqr: the sign of R's diagonal is opposite to the pivot's, a column that
// is zero below its pivot gives no reflection. Columns are first scaled by powers of two, which
// changes neither Q nor a bit of a mantissa, so that no square leaves the range of float.
#pragma once

#include "common/simt.h"
#include "powersgd/powersgd.h"

namespace dalle {

constexpr int kMaxWidth = 8;
constexpr int kMaxResidentRows = 8192;  // rows that a block's registers hold

// Floats from one column to the next: the rows that the kernel for this length has.
inline int64_t householder_stride(int64_t length) {
  for (const int64_t rows : {256, 1024, 2048, 4096, kMaxResidentRows}) {
    if (length <= rows) return rows;
  }
  return length;
}

// Of one matrix: the columns, and T of each strip.
inline int64_t householder_floats(int64_t length, int64_t rank) {
  return ceil_div(rank, kMaxWidth) * kMaxWidth * (householder_stride(length) + kMaxWidth);
}

// Folds kN values of each lane by `combine`, so that lane l holds value l % kN of all lanes: half
// as many in each step, in one order.
template <int kN, typename Combine>
__device__ __forceinline__ float fold(const float (&values)[kN], const Combine& combine) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kN == 1) {
    return values[0];
  } else {
    constexpr int kHalf = kN / 2;
    const bool upper = (lane & kHalf) != 0;
    float fewer[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float keep = upper ? values[i + kHalf] : values[i];
      const float send = upper ? values[i] : values[i + kHalf];
      fewer[i] = combine(keep, __shfl_xor_sync(kAllLanes, send, kHalf));
    }
    return fold(fewer, combine);
  }
}

// The same value of all lanes that hold it after `fold`: those kN apart.
template <int kN, typename Combine>
__device__ __forceinline__ float join(float value, const Combine& combine) {
#pragma unroll
  for (int step = kN; step < kWarpSize; step *= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

struct Plus {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// What the threads of a block tell each other.
template <int kThreads, int kWidth>
struct HouseholderShared {
  static constexpr int kAtOnce = kWidth < 16 / kWidth ? kWidth : 16 / kWidth;
  static constexpr int kSums = kAtOnce * kWidth;  // reflectors and columns, of a thread at once
  static constexpr int kPasses = kWidth / kAtOnce;
  float parts[kPasses < 2 ? 2 : kPasses][kThreads / kWarpSize][kWarpSize];  // of each warp
  float pivots[2][kWidth];
  float t[kWidth][kWidth], dots[kWidth][kWidth], by[kWidth][kWidth];
};

// The strip of a matrix that a block works on. kRows: rows of one thread, each kThreads below the
// previous one; 0: the rows stay in memory, for matrices that registers cannot hold.
template <int kThreads, int kRows, int kWidth>
struct Strip {
  using Shared = HouseholderShared<kThreads, kWidth>;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr bool kResident = kRows > 0;

  Shared& shared;
  float* base;  // element (row, c) at base[row * row_stride + c * column_stride]
  int64_t row_stride, column_stride;
  int length, columns;  // in range at `base`
  float x_of_row[kResident ? kRows : 1][kWidth];

  // Calls body(row, x) for this thread's rows, x of kWidth floats. kChanges: x is kept.
  template <bool kChanges, typename Body>
  __device__ __forceinline__ void each(const Body& body) {
    if constexpr (kResident) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        body(static_cast<int>(threadIdx.x) + i * kThreads, x_of_row[i]);
    } else {
      for (int row = threadIdx.x; row < length; row += kThreads) {
        load(row, x_of_row[0]);
        body(row, x_of_row[0]);
        if (kChanges) store(row, x_of_row[0]);
      }
    }
  }

  __device__ __forceinline__ void load(int row, float (&x)[kWidth]) const {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const bool inside = row < length && c < columns;
      x[c] = inside ? base[row * row_stride + c * column_stride] : 0.0f;
    }
  }
  __device__ __forceinline__ void store(int row, const float (&x)[kWidth]) const {
    if (row >= length) return;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      if (c < columns) base[row * row_stride + c * column_stride] = x[c];
    }
  }
  // Between registers and memory; nothing where the rows are in memory anyway.
  __device__ __forceinline__ void fetch() {
    if constexpr (kResident) each<true>([&](int row, float (&x)[kWidth]) { load(row, x); });
  }
  __device__ __forceinline__ void write_back() {
    if constexpr (kResident) each<false>([&](int row, float (&x)[kWidth]) { store(row, x); });
  }

  // Columns of P + eps I from `first` on, each scaled by a power of two to a largest element in
  // [1, 2), or zero.
  __device__ __forceinline__ void begin(const float* p, int64_t rank, int rows, int first,
                                        float eps) {
    float column_max[kWidth] = {};
    each<true>([&](int row, float (&x)[kWidth]) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        x[c] = row < rows && first + c < rank ? p[row * rank + first + c] : 0.0f;
        if (row == first + c && row < rank) x[c] += eps;
        column_max[c] = fmaxf(column_max[c], fabsf(x[c]));
      }
    });
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    shared.parts[0][warp][lane] = join<kWidth>(fold(column_max, Larger()), Larger());
    __syncthreads();
    float scale[kWidth];
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      float max_abs = 0;
      for (int w = 0; w < kWarps; ++w) max_abs = fmaxf(max_abs, shared.parts[0][w][c]);
      const uint32_t exponent = __float_as_uint(max_abs) & 0x7F800000u;
      const uint32_t highest = 253u << 23;  // of more, the inverse would be no normal number
      scale[c] = __uint_as_float((254u << 23) - (exponent < highest ? exponent : highest));
    }
    __syncthreads();
    each<true>([&](int, float (&x)[kWidth]) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) x[c] *= scale[c];
    });
  }

  // The strip minus V T' V^T times it: V is kWidth columns, `stride` apart; T' = T^T takes the
  // reflectors off, T puts them on.
  template <bool kTransposed>
  __device__ __forceinline__ void reflect(const float* v, int64_t stride, const float* t) {
    constexpr int kAtOnce = Shared::kAtOnce, kSums = Shared::kSums;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int k = threadIdx.x / kWidth, c = threadIdx.x % kWidth;
    if (k < kWidth) shared.t[k][c] = t[kTransposed ? c * kWidth + k : k * kWidth + c];
#pragma unroll
    for (int from = 0; from < kWidth; from += kAtOnce) {
      float sums[kSums] = {};
      each<false>([&](int row, const float (&x)[kWidth]) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const float value = v[(from + j) * stride + row];
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sums[j * kWidth + i] += value * x[i];
        }
      });
      shared.parts[from / kAtOnce][warp][lane] = join<kSums>(fold(sums, Plus()), Plus());
    }
    __syncthreads();
    if (k < kWidth) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) {
        sum += shared.parts[k / kAtOnce][w][k % kAtOnce * kWidth + c];
      }
      shared.dots[k][c] = sum;
    }
    __syncthreads();
    if (k < kWidth) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += shared.t[k][j] * shared.dots[j][c];
      shared.by[k][c] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float by[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) by[i] = shared.by[j][i];
      each<true>([&](int row, float (&x)[kWidth]) {
        const float value = v[j * stride + row];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x[i] -= value * by[i];
      });
    }
  }

  // The sums over the block of one value for each column, in every thread.
  __device__ __forceinline__ void sum_columns(float (&sums)[kWidth], int buffer) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    shared.parts[buffer][warp][lane] = join<kWidth>(fold(sums, Plus()), Plus());
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w += kWarpSize / kWidth) {
      const int from = w + lane / kWidth;
      total += from < kWarps ? shared.parts[buffer][from][lane % kWidth] : 0.0f;
    }
    total = join<kWidth>(total, Plus());
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sums[c] = __shfl_sync(kAllLanes, total, c);
  }

  // Factors the strip, whose first pivot is in row `first`: V replaces it, and T is written.
  __device__ __forceinline__ void factor(int first, float* t) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const int pivot_row = first + k;
      float sums[kWidth] = {};  // of the rows below the pivot: column k times each
      each<false>([&](int row, const float (&x)[kWidth]) {
        const float value = row > pivot_row ? x[k] : 0.0f;
#pragma unroll
        for (int c = 0; c < kWidth; ++c) sums[c] += value * x[c];
        if (row == pivot_row) {
#pragma unroll
          for (int c = 0; c < kWidth; ++c) shared.pivots[k % 2][c] = x[c];
        }
      });
      sum_columns(sums, k % 2);
      float tau = 0, scale = 0;
      if (!(sums[k] <= 0)) {  // NaN comes out as NaN
        const float pivot = shared.pivots[k % 2][k];
        const float norm = sqrtf(pivot * pivot + sums[k]);
        const float diagonal = pivot >= 0 ? -norm : norm;
        tau = (diagonal - pivot) / diagonal;
        scale = 1 / (pivot - diagonal);
      }
      float dots[kWidth];  // of v with each column
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        dots[c] = tau != 0 ? shared.pivots[k % 2][c] + scale * sums[c] : 0.0f;
      }
      each<true>([&](int row, float (&x)[kWidth]) {
        const float v = row > pivot_row ? scale * x[k] : row == pivot_row ? 1.0f : 0.0f;
#pragma unroll
        for (int c = k + 1; c < kWidth; ++c) x[c] -= tau * dots[c] * v;
        x[k] = v;
      });
      const int i = threadIdx.x;  // row i of T is this thread's alone
      if (i < k) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < k; ++j) sum += j >= i ? shared.t[i][j] * dots[j] : 0.0f;
        shared.t[i][k] = -tau * sum;
      } else if (i < kWidth) {
        shared.t[i][k] = i == k ? tau : 0.0f;
      }
      if (i < kWidth) t[i * kWidth + k] = shared.t[i][k];
    }
  }
};

// Where a matrix of the batch has what.
template <int kThreads, int kRows, int kWidth>
struct HouseholderMatrix {
  const float* p;
  float *columns, *blocks, *out;
  int64_t stride;  // of columns

  __device__ HouseholderMatrix(const OrthogonalizeArgs& args, int64_t index)
      : p(args.p + index * args.length * args.rank),
        columns(args.work + index * args.work_floats),
        out(args.out + index * args.length * args.rank),
        stride(kRows > 0 ? kThreads * kRows : args.length) {
    blocks = columns + ceil_div(args.rank, kWidth) * kWidth * stride;
  }
  __device__ float* strip(int64_t at) const { return columns + at * kWidth * stride; }
  __device__ float* block(int64_t at) const { return blocks + at * kWidth * kWidth; }
};

// A block takes one strip of kWidth columns, a thread every kThreads-th row of it.
template <int kThreads, int kRows, int kWidth>
__global__ void __launch_bounds__(kThreads)
    powersgd_householder_kernel(OrthogonalizeArgs args, int done) {
  using shared_t = HouseholderShared<kThreads, kWidth>;
  DALLE_SHARED(shared_t, shared, [1]);
  const int strips = static_cast<int>(ceil_div(args.rank, kWidth)) - done;
  const HouseholderMatrix<kThreads, kRows, kWidth> m(args, blockIdx.x / strips);
  const int at = done + blockIdx.x % strips, first = at * kWidth;
  Strip<kThreads, kRows, kWidth> strip{
      shared[0], m.strip(at), 1, m.stride, static_cast<int>(m.stride), kWidth};
  if (done == 0) {
    strip.begin(m.p, args.rank, static_cast<int>(args.length), first, args.eps);
  } else {
    strip.fetch();
    strip.template reflect<true>(m.strip(done - 1), m.stride, m.block(done - 1));
  }
  if (at == done) strip.factor(first, m.block(at));
  strip.write_back();
}

// A block makes one strip of kWidth columns of Q, a thread every kThreads-th row of it.
template <int kThreads, int kRows, int kWidth>
__global__ void __launch_bounds__(kThreads) powersgd_form_kernel(OrthogonalizeArgs args) {
  using shared_t = HouseholderShared<kThreads, kWidth>;
  DALLE_SHARED(shared_t, shared, [1]);
  const int strips = static_cast<int>(ceil_div(args.rank, kWidth));
  const HouseholderMatrix<kThreads, kRows, kWidth> m(args, blockIdx.x / strips);
  // The strip with the most reflectors first.
  const int at = strips - 1 - static_cast<int>(blockIdx.x % strips), first = at * kWidth;
  const int left = static_cast<int>(args.rank) - first;
  Strip<kThreads, kRows, kWidth> strip{shared[0],
                                       m.out + first,
                                       args.rank,
                                       1,
                                       static_cast<int>(args.length),
                                       left < kWidth ? left : kWidth};
  strip.template each<true>([&](int row, float (&x)[kWidth]) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) x[c] = row == first + c ? 1.0f : 0.0f;
  });
  for (int block = at; block >= 0; --block) {
    strip.template reflect<false>(m.strip(block), m.stride, m.block(block));
  }
  strip.write_back();
}

template <int kThreads, int kRows, int kWidth>
cudaError_t launch_householder(const OrthogonalizeArgs& args, void* stream) {
  const int64_t strips = ceil_div(args.rank, kWidth);
  for (int done = 0; done < strips; ++done) {
    const dim3 grid(static_cast<unsigned>((strips - done) * args.batch));
    const cudaError_t error = launch(powersgd_householder_kernel<kThreads, kRows, kWidth>, grid,
                                     dim3(kThreads), 0, stream, args, done);
    if (error != cudaSuccess) return error;
  }
  return launch(powersgd_form_kernel<kThreads, kRows, kWidth>,
                dim3(static_cast<unsigned>(strips * args.batch)), dim3(kThreads), 0, stream, args);
}

// p (batch, n, r) -> strips of 8 or 2 columns -> a block each, a launch for every strip that is
// factored -> V and T in work (batch, work_floats) -> a block a strip -> out (batch, n, r).
inline cudaError_t launch_powersgd_orthogonalize(const OrthogonalizeArgs& args, void* stream) {
  if (args.batch == 0) return cudaSuccess;
  if (args.length <= 256) return launch_householder<128, 2, 8>(args, stream);
  if (args.length <= 1024) return launch_householder<256, 4, 8>(args, stream);
  if (args.length <= 2048) return launch_householder<512, 4, 8>(args, stream);
  if (args.length <= 4096) return launch_householder<512, 8, 8>(args, stream);
  if (args.length <= kMaxResidentRows) return launch_householder<512, 16, 2>(args, stream);
  return launch_householder<512, 0, 8>(args, stream);
}

}  // namespace dalle
