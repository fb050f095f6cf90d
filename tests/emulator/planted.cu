// One planted bug in each case named bug_*; tests/emulator/test_planted.py says which build catches
// it. Each clean_* case is the same kernel as it should be.
#include <cmath>

#include "cases.h"

namespace planted {

using cases::Buffer;
using cases::expect;
using cases::finish;
using dalle::launch;

constexpr int kThreads = 128, kWarps = kThreads / 32;

// -- races in shared memory ----------------------------------------------------------------------

// Sum of a block's rows by warps and shared memory, three rows one after another.
template <bool kBarrierAfter>
__global__ void block_sum(const float* in, float* out) {
  DALLE_SHARED(float, parts, [kWarps]);
  for (int row = 0; row < 3; ++row) {
    float sum = in[row * kThreads + threadIdx.x];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += parts[w];
    out[row * kThreads + threadIdx.x] = total;
    if (kBarrierAfter) __syncthreads();
  }
}
template <bool kBarrierAfter>
void run_block_sum() {
  Buffer<float> in(3 * kThreads), out(3 * kThreads);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 7 + i / kThreads);
  finish(launch(block_sum<kBarrierAfter>, 1, kThreads, 0, nullptr, in.data(), out.data()));
  for (int row = 0; row < 3; ++row) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += in[row * kThreads + i];
    for (int i = 0; i < kThreads; ++i) expect(out[row * kThreads + i] == sum, "sum of a row");
  }
}
CASE(bug_no_barrier_after_block_reduction) { run_block_sum<false>(); }
CASE(clean_block_reduction) { run_block_sum<true>(); }

// Neighbours read what a thread wrote, without or with __syncwarp; a shuffle orders nothing.
template <bool kBarrier>
__global__ void warp_exchange(float* out) {
  DALLE_SHARED(float, values, [32]);
  const int lane = static_cast<int>(threadIdx.x);
  values[lane] = static_cast<float>(lane);
  if (kBarrier) {
    __syncwarp();
  } else {
    (void)__shfl_sync(0xffffffffu, lane, 0);
  }
  out[lane] = values[(lane + 1) % 32];
}
template <bool kBarrier>
void run_warp_exchange() {
  Buffer<float> out(32);
  finish(launch(warp_exchange<kBarrier>, 1, 32, 0, nullptr, out.data()));
  for (int i = 0; i < 32; ++i) expect(out[i] == (i + 1) % 32, "the neighbour's value");
}
CASE(bug_no_syncwarp) { run_warp_exchange<false>(); }
CASE(clean_syncwarp) { run_warp_exchange<true>(); }

// Two warps read, one of them reads again, meets and writes: the other warp's read is the race.
__global__ void read_twice(int* out) {
  DALLE_SHARED(int, value, [1]);
  if (threadIdx.x == 0) value[0] = 1;
  __syncthreads();
  int sum = value[0];
  if (threadIdx.x >= 32) {
    sum += value[0];
    __syncwarp();
    if (threadIdx.x == 40) value[0] = 5;
  }
  out[threadIdx.x] = sum;
}
CASE(bug_write_beside_another_warps_read) {
  Buffer<int> out(64);
  finish(launch(read_twice, 1, 64, 0, nullptr, out.data()));
}

// -- cp.async: a ring of two buffers
// ---------------------------------------------------------------

enum class Ring { kClean, kNoBarrierAfterWait, kNoBarrierBeforeCopy, kWaitsForTooFew };
template <Ring kBug>
__global__ void ring_sum(const float4* in, float* out, int tiles) {
  DALLE_DYNAMIC_SHARED(bytes);
  float4(*buffers)[kThreads] = reinterpret_cast<float4(*)[kThreads]>(bytes);
  const int tid = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int tile) {
    if (tile < tiles) dalle::cp_async<16>(&buffers[tile % 2][tid], in + tile * kThreads + tid);
    dalle::cp_async_commit();
  };
  float sum = 0;
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    dalle::cp_async_wait<kBug == Ring::kWaitsForTooFew ? 2 : 1>();
    if (kBug != Ring::kNoBarrierAfterWait) __syncthreads();
    const float4 x = buffers[tile % 2][(tid + 37) % kThreads];
    sum += x.x + 2 * x.y + 3 * x.z + 4 * x.w;
    if (kBug != Ring::kNoBarrierBeforeCopy) __syncthreads();
  }
  out[tid] = sum;
}
template <Ring kBug>
void run_ring() {
  constexpr int kTiles = 4;
  Buffer<float4> in(kTiles * kThreads);
  Buffer<float> out(kThreads);
  for (size_t i = 0; i < in.size(); ++i) {
    const float x = static_cast<float>(i);
    in[i] = {x, x + 1, x + 2, x + 3};
  }
  finish(launch(ring_sum<kBug>, 1, kThreads, 2 * kThreads * sizeof(float4), nullptr, in.data(),
                out.data(), kTiles));
  for (int i = 0; i < kThreads; ++i) {
    float sum = 0;
    for (int tile = 0; tile < kTiles; ++tile) {
      const float4 x = in[tile * kThreads + (i + 37) % kThreads];
      sum += x.x + 2 * x.y + 3 * x.z + 4 * x.w;
    }
    expect(out[i] == sum, "sum over the ring");
  }
}
CASE(bug_no_barrier_after_cp_async_wait) { run_ring<Ring::kNoBarrierAfterWait>(); }
CASE(bug_no_barrier_before_next_cp_async) { run_ring<Ring::kNoBarrierBeforeCopy>(); }
CASE(bug_cp_async_waits_for_too_few) { run_ring<Ring::kWaitsForTooFew>(); }
CASE(clean_cp_async_ring) { run_ring<Ring::kClean>(); }

// -- races in global memory
// ------------------------------------------------------------------------

template <bool kNeighbour>
__global__ void between_blocks(int* out) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  out[at] = static_cast<int>(at);
  if (kNeighbour && at > 0) out[at - 1] = static_cast<int>(at) - 1;  // the same value: still a race
}
template <bool kNeighbour>
void run_between_blocks() {
  Buffer<int> out(64);
  finish(launch(between_blocks<kNeighbour>, 2, 32, 0, nullptr, out.data()));
  for (int i = 0; i < 64; ++i) expect(out[i] == i, "own index");
}
CASE(bug_blocks_write_the_same) { run_between_blocks<true>(); }
CASE(clean_blocks_write_apart) { run_between_blocks<false>(); }

template <bool kBarrier>
__global__ void through_global(const int* in, int* scratch, int* out) {
  const int tid = static_cast<int>(threadIdx.x);
  scratch[tid] = in[tid];
  if (kBarrier) __syncthreads();
  out[tid] = scratch[(tid + 32) % kThreads];
}
template <bool kBarrier>
void run_through_global() {
  Buffer<int> in(kThreads, 5), scratch(kThreads), out(kThreads);
  finish(launch(through_global<kBarrier>, 1, kThreads, 0, nullptr, in.data(), scratch.data(),
                out.data()));
  for (int i = 0; i < kThreads; ++i) expect(out[i] == 5, "the other warp's value");
}
CASE(bug_no_barrier_over_global) { run_through_global<false>(); }
CASE(clean_barrier_over_global) { run_through_global<true>(); }

template <bool kAtomic>
__global__ void histogram(int* bins) {
  const unsigned bin = (blockIdx.x + threadIdx.x) % 4;
  if (kAtomic) {
    atomicAdd(&bins[bin], 1);
  } else {
    bins[bin] += 1;
  }
}
template <bool kAtomic>
void run_histogram() {
  Buffer<int> bins(4);
  finish(launch(histogram<kAtomic>, 3, 32, 0, nullptr, bins.data()));
  for (int i = 0; i < 4; ++i) expect(bins[i] == 24, "count");
}
CASE(bug_sum_without_atomic) { run_histogram<false>(); }
CASE(clean_atomic) { run_histogram<true>(); }

// -- addresses ---------------------------------------------------------------------------------

enum class Where {
  kNone,
  kStatic,
  kDynamic,
  kGlobal,
  kFarShared,
  kVector,
  kVectorCast,
  kRow,
  kCopy
};
template <Where kBug>
__global__ void addresses(float* out) {
  DALLE_SHARED(float, fixed, [64]);
  DALLE_DYNAMIC_SHARED(bytes);
  float* dynamic = reinterpret_cast<float*>(bytes);
  const int tid = static_cast<int>(threadIdx.x), late = tid + 1;
  fixed[kBug == Where::kStatic ? late : tid] = 1;
  __syncthreads();
  dynamic[kBug == Where::kDynamic ? late : kBug == Where::kFarShared ? tid + 40000 : tid] = 2;
  __syncthreads();
  float x = 0;
  if (kBug == Where::kVector) x = dalle::load_vector<float4>(out + 1).x;
  if (kBug == Where::kVectorCast) x = reinterpret_cast<const float4*>(out + 1)->x;
  if (kBug == Where::kRow && tid < 32) {
    uint32_t words[4];
    dalle::ldmatrix(words, bytes + tid % 8 * 24);
    x = static_cast<float>(words[0]);
  }
  if (kBug == Where::kCopy) {
    dalle::cp_async<16>(bytes + tid % 16 * 16, out + 63);
    dalle::cp_async_commit();
    dalle::cp_async_wait<0>();
  }
  __syncthreads();
  out[kBug == Where::kGlobal ? late : tid] = fixed[tid] + x;
}
template <Where kBug>
void run_addresses() {
  Buffer<float> out(64);
  finish(launch(addresses<kBug>, 1, 64, 64 * sizeof(float), nullptr, out.data()));
  for (int i = 0; i < 64; ++i) expect(out[i] == 1, "value");
}
CASE(bug_beyond_static_shared) { run_addresses<Where::kStatic>(); }
CASE(bug_beyond_dynamic_shared) { run_addresses<Where::kDynamic>(); }
CASE(bug_far_beyond_shared) { run_addresses<Where::kFarShared>(); }
CASE(bug_beyond_global) { run_addresses<Where::kGlobal>(); }
CASE(bug_misaligned_vector) { run_addresses<Where::kVector>(); }
CASE(bug_misaligned_cast) { run_addresses<Where::kVectorCast>(); }
CASE(bug_misaligned_ldmatrix_row) { run_addresses<Where::kRow>(); }
CASE(bug_misaligned_cp_async) { run_addresses<Where::kCopy>(); }
CASE(clean_addresses) { run_addresses<Where::kNone>(); }

__global__ void uninitialised(float* out) {
  DALLE_SHARED(float, values, [32]);
  if (threadIdx.x > 0) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}
CASE(bug_uninitialised_shared) {
  Buffer<float> out(32);
  finish(launch(uninitialised, 1, 32, 0, nullptr, out.data()));
  for (int i = 0; i < 32; ++i) expect(out[i] == 1, "value");
}

// -- control flow --------------------------------------------------------------------------------

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
  }
}
__global__ void barrier_and_syncwarp(float* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = 1;
}
__global__ void mask_without_caller(float* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0);
}
__global__ void lane_outside_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}
__global__ void two_collectives(float* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(0xffffffffu, 1.0f, 1)
                                     : static_cast<float>(__ballot_sync(0xffffffffu, 1));
}
__global__ void half_a_warp_multiplies(float* out) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16) return;
  dalle::mma_m16n8k16<__half>(d, a, b);
  out[threadIdx.x] = d[0];
}
__global__ void deep(float* out, int depth) {
  struct Recursion {
    static __device__ float descend(int left) {
      volatile float frame[1024];
      frame[left % 1024] = static_cast<float>(left);
      return left == 0 ? 0.0f : descend(left - 1) + frame[left % 1024];
    }
  };
  out[threadIdx.x] = Recursion::descend(depth);
}
__global__ void early_exit(float* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  const uint32_t lanes = threadIdx.x < 32 ? 0xffffffffu : 0xffu;
  out[threadIdx.x] = __shfl_xor_sync(lanes, static_cast<float>(threadIdx.x), 1);
}

void run_flow(void (*kernel)(float*)) {
  Buffer<float> out(64, -1.0f);
  finish(launch(kernel, 1, 64, 0, nullptr, out.data()));
  for (int i = 0; i < 32; ++i) expect(out[i] == 1, "value");
}
CASE(bug_two_barriers) { run_flow(two_barriers); }
CASE(bug_deadlock) { run_flow(barrier_and_syncwarp); }
CASE(bug_mask_without_caller) { run_flow(mask_without_caller); }
CASE(bug_lane_outside_mask) { run_flow(lane_outside_mask); }
CASE(bug_two_collectives) { run_flow(two_collectives); }
CASE(bug_half_a_warp_multiplies) { run_flow(half_a_warp_multiplies); }
CASE(bug_stack_overflow) {
  Buffer<float> out(32);
  finish(launch(deep, 1, 32, 0, nullptr, out.data(), 1 << 16));
}
CASE(bug_too_many_threads) { finish(launch(two_barriers, 1, 1025, 0, nullptr, nullptr)); }
CASE(bug_too_much_shared) { finish(launch(two_barriers, 1, 32, 1 << 18, nullptr, nullptr)); }
CASE(clean_early_exit) {
  Buffer<float> out(64, -1.0f);
  finish(launch(early_exit, 1, 64, 0, nullptr, out.data()));
  for (int i = 0; i < 64; ++i) expect(out[i] == (i < 40 ? i ^ 1 : -1), "the neighbour's index");
}

}  // namespace planted
