// The only inline PTX: instructions of sm_80 that CUDA C++ does not name. simt.h includes this;
// under g++ csrc/emulator/ptx.h has the same functions. No torch here.
//
// Fragment layouts (g = lane / 4, t = lane % 4; the low half of a word is the first element):
//   A of m16n8k16  a[0] (g, 2t..)   a[1] (g+8, 2t..)   a[2] (g, 2t+8..)   a[3] (g+8, 2t+8..)
//   B of m16n8k16  b[0] (2t.., g)   b[1] (2t+8.., g)                        (k, n)
//   C, D           d[0] (g, 2t)     d[1] (g, 2t+1)     d[2] (g+8, 2t)     d[3] (g+8, 2t+1)
//   A of m16n8k8 (tf32)  a[0] (g, t)   a[1] (g+8, t)   a[2] (g, t+4)   a[3] (g+8, t+4)
//   B of m16n8k8 (tf32)  b[0] (t, g)   b[1] (t+4, g)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace dalle {

// d += a b by all lanes of a warp: a 16 x 16, b 16 x 8, both scalar_t; d 16 x 8 float.
template <typename scalar_t>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<scalar_t, __half> || std::is_same_v<scalar_t, __nv_bfloat16>);
  if constexpr (std::is_same_v<scalar_t, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// d += a b by all lanes of a warp: a 16 x 8, b 8 x 8, both tf32 words of to_tf32; d 16 x 8 float.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x rounded to 10 bits of mantissa, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// kCount (1, 2 or 4) 8 x 8 matrices of 16-bit elements from shared memory: lane 8 i + r passes the
// 16-byte row r of matrix i, and word i gets elements 2t, 2t + 1 of row g (ldmatrix_trans: of
// column g). Addresses of lanes that no matrix needs are not read but must be valid.
template <int kCount>
__device__ __forceinline__ void ldmatrix(uint32_t (&words)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const uint32_t at = shared_address(row);
  if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(words[0])
                 : "r"(at)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at)
                 : "memory");
  }
}

template <int kCount>
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&words)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const uint32_t at = shared_address(row);
  if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(words[0])
                 : "r"(at)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at)
                 : "memory");
  }
}

// Transposes the 8 x 8 matrix of 16-bit elements that a warp holds, one word a lane.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t word) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}

// Starts copying kBytes (4, 8 or 16, both addresses aligned to it) from global to shared memory;
// the bytes from valid_bytes on become zero and are not read. The 16-byte form skips L1.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global,
                                         int valid_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)),
                   "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "n"(kBytes),
                   "r"(valid_bytes)
                 : "memory");
  }
}

// Ends this thread's group of copies; cp_async_wait<n> waits until at most the n latest groups are
// under way. Other threads see the copies only after a barrier behind the wait.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// 2 to the x, log2 x, 1 / x; subnormal arguments and results are zero. By the PTX ISA off by at
// most 2^-22 of the result, 2^-22 of it (of 1 for x in [1/2, 2]), and 1 unit in the last place.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One load or store of 4, 8 or 16 bytes (vector_t is uint32_t, uint2, uint4, float4, ...), the
// address aligned to it; the _once forms tell the caches that the line is not read again.
template <typename vector_t>
__device__ __forceinline__ vector_t load_vector(const void* at) {
  return *static_cast<const vector_t*>(at);
}
template <typename vector_t>
__device__ __forceinline__ vector_t load_vector_once(const void* at) {
  return __ldcs(static_cast<const vector_t*>(at));
}
template <typename vector_t>
__device__ __forceinline__ void store_vector(void* at, const vector_t& value) {
  *static_cast<vector_t*>(at) = value;
}
template <typename vector_t>
__device__ __forceinline__ void store_vector_once(void* at, const vector_t& value) {
  __stcs(static_cast<vector_t*>(at), value);
}

}  // namespace dalle
