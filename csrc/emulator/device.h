// CUDA C++ as kernels see it under g++: keywords, shared memory, launch, the built-in functions.
// common/simt.h includes this; never a file that nvcc compiles. No torch here.
//
// Types and their conversions are CUDA's own (cuda_fp16.h, cuda_bf16.h); of their arithmetic, what
// those headers keep for the device is missing here and does not compile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>  // the C++ one: names of <cmath> in the global namespace too, as CUDA has them

#include <bit>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emulator/api.h"
#include "emulator/approximate.h"

// CUDA's headers define some of these as attributes that g++ does not know.
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// Left to the headers it would mean nothing, and every thread would have its array.
#define __shared__ write_DALLE_SHARED_instead_of_shared

// The address of the static char tells declarations and template instances apart.
#define DALLE_SHARED(type, name, ...)                                                      \
  using name##_shared_t = type __VA_ARGS__;                                                \
  static const char name##_declaration = 0;                                                \
  name##_shared_t& name = *static_cast<name##_shared_t*>(::dalle::emulator::static_shared( \
      &name##_declaration, #name, sizeof(name##_shared_t), alignof(name##_shared_t)))
#define DALLE_DYNAMIC_SHARED(name) unsigned char* const name = ::dalle::emulator::dynamic_shared()

namespace dalle {

template <typename... parameters_t, typename... arguments_t>
cudaError_t launch(void (*kernel)(parameters_t...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* /*stream*/, const arguments_t&... arguments) {
  auto call = [kernel,
               parameters = std::tuple<parameters_t...>(static_cast<parameters_t>(arguments)...)] {
    std::apply(kernel, parameters);
  };
  const auto body = [](void* self) { (*static_cast<decltype(call)*>(self))(); };
  return emulator::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, body,
                       &call);
}

constexpr int kArchitecture = emulator::kArchitecture;
constexpr bool kArchitectureSpecific = false;
inline int device_architecture() { return kArchitecture; }  // whatever its limits
inline DeviceLimits device_limits() { return emulator::limits(); }

}  // namespace dalle

// -- barriers and votes ------------------------------------------------------------------------
inline void __syncthreads(DALLE_HERE) {
  dalle::emulator::block_barrier(dalle::emulator::Vote::kNone, 0, location);
}
inline int __syncthreads_or(int predicate, DALLE_HERE) {
  return dalle::emulator::block_barrier(dalle::emulator::Vote::kAny, predicate, location);
}
inline int __syncthreads_and(int predicate, DALLE_HERE) {
  return dalle::emulator::block_barrier(dalle::emulator::Vote::kAll, predicate, location);
}
inline int __syncthreads_count(int predicate, DALLE_HERE) {
  return dalle::emulator::block_barrier(dalle::emulator::Vote::kCount, predicate, location);
}
inline void __syncwarp(uint32_t lanes = dalle::kAllLanes, DALLE_HERE) {
  dalle::emulator::warp_barrier(lanes, location);
}
inline uint32_t __ballot_sync(uint32_t lanes, int predicate, DALLE_HERE) {
  return dalle::emulator::ballot(lanes, predicate, location);
}
inline int __any_sync(uint32_t lanes, int predicate, DALLE_HERE) {
  return dalle::emulator::ballot(lanes, predicate, location) != 0;
}
inline int __all_sync(uint32_t lanes, int predicate, DALLE_HERE) {
  return dalle::emulator::ballot(lanes, !predicate, location) == 0;
}
inline void __threadfence() {}  // one thread runs at a time, its stores are visible at once
inline void __threadfence_block() {}

// -- shuffles and reductions -------------------------------------------------------------------
namespace dalle::emulator {
template <typename value_t>
value_t shuffle_value(Shuffle kind, uint32_t lanes, value_t value, int operand, int width,
                      Location location) {
  static_assert(sizeof(value_t) <= sizeof(uint64_t) && std::is_trivially_copyable_v<value_t>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(value));
  word = shuffle(kind, lanes, word, operand, width, location);
  std::memcpy(&value, &word, sizeof(value));
  return value;
}
}  // namespace dalle::emulator

#define DALLE_EMULATOR_SHUFFLE(name, kind)                                                       \
  template <typename value_t>                                                                    \
  value_t name(uint32_t lanes, value_t value, int operand, int width = warpSize, DALLE_HERE) {   \
    return dalle::emulator::shuffle_value(dalle::emulator::Shuffle::kind, lanes, value, operand, \
                                          width, location);                                      \
  }
DALLE_EMULATOR_SHUFFLE(__shfl_sync, kIndex)
DALLE_EMULATOR_SHUFFLE(__shfl_up_sync, kUp)
DALLE_EMULATOR_SHUFFLE(__shfl_down_sync, kDown)
DALLE_EMULATOR_SHUFFLE(__shfl_xor_sync, kXor)
#undef DALLE_EMULATOR_SHUFFLE

#define DALLE_EMULATOR_REDUCE(name, kind)                                                         \
  template <typename value_t>                                                                     \
  value_t name(uint32_t lanes, value_t value, DALLE_HERE) {                                       \
    static_assert(std::is_integral_v<value_t> && sizeof(value_t) == 4);                           \
    return static_cast<value_t>(dalle::emulator::reduce(dalle::emulator::Reduce::kind,            \
                                                        std::is_signed_v<value_t>, lanes,         \
                                                        static_cast<uint32_t>(value), location)); \
  }
DALLE_EMULATOR_REDUCE(__reduce_add_sync, kAdd)
DALLE_EMULATOR_REDUCE(__reduce_min_sync, kMinimum)
DALLE_EMULATOR_REDUCE(__reduce_max_sync, kMaximum)
DALLE_EMULATOR_REDUCE(__reduce_and_sync, kAnd)
DALLE_EMULATOR_REDUCE(__reduce_or_sync, kOr)
DALLE_EMULATOR_REDUCE(__reduce_xor_sync, kXor)
#undef DALLE_EMULATOR_REDUCE

// -- atomics: one thread runs at a time, so plain arithmetic is atomic ---------------------------
namespace dalle::emulator {
// Not instrumented: the race detector hears of the access from atomic_access.
template <typename value_t, typename Change>
__attribute__((no_sanitize_thread)) value_t atomic(value_t* at, const Change& change,
                                                   Location location) {
  atomic_access(at, sizeof(value_t), location);
  const value_t before = *at;
  *at = change(before);
  return before;
}
}  // namespace dalle::emulator

#define DALLE_EMULATOR_ATOMIC(name, expression)                                         \
  template <typename value_t>                                                           \
  value_t name(value_t* at, std::type_identity_t<value_t> operand, DALLE_HERE) {        \
    const auto change = [operand](value_t before) __attribute__((no_sanitize_thread)) { \
      return static_cast<value_t>(expression);                                          \
    };                                                                                  \
    return dalle::emulator::atomic(at, change, location);                               \
  }
DALLE_EMULATOR_ATOMIC(atomicAdd, before + operand)
DALLE_EMULATOR_ATOMIC(atomicSub, before - operand)
DALLE_EMULATOR_ATOMIC(atomicMin, operand < before ? operand : before)
DALLE_EMULATOR_ATOMIC(atomicMax, before < operand ? operand : before)
DALLE_EMULATOR_ATOMIC(atomicAnd, before& operand)
DALLE_EMULATOR_ATOMIC(atomicOr, before | operand)
DALLE_EMULATOR_ATOMIC(atomicXor, before ^ operand)
DALLE_EMULATOR_ATOMIC(atomicExch, operand)
#undef DALLE_EMULATOR_ATOMIC
template <typename value_t>
value_t atomicCAS(value_t* at, std::type_identity_t<value_t> expected,
                  std::type_identity_t<value_t> desired, DALLE_HERE) {
  const auto change = [expected, desired](value_t before) __attribute__((no_sanitize_thread)) {
    return before == expected ? desired : before;
  };
  return dalle::emulator::atomic(at, change, location);
}

// -- loads and stores with cache hints: plain ones here ------------------------------------------
#define DALLE_EMULATOR_LOAD(name)   \
  template <typename value_t>       \
  value_t name(const value_t* at) { \
    return *at;                     \
  }
DALLE_EMULATOR_LOAD(__ldg)
DALLE_EMULATOR_LOAD(__ldcg)
DALLE_EMULATOR_LOAD(__ldca)
DALLE_EMULATOR_LOAD(__ldcs)
#undef DALLE_EMULATOR_LOAD
#define DALLE_EMULATOR_STORE(name)                                     \
  template <typename value_t>                                          \
  void name(value_t* at, const std::type_identity_t<value_t>& value) { \
    *at = value;                                                       \
  }
DALLE_EMULATOR_STORE(__stcg)
DALLE_EMULATOR_STORE(__stcs)
DALLE_EMULATOR_STORE(__stwb)
#undef DALLE_EMULATOR_STORE

// -- integers ----------------------------------------------------------------------------------
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __brev(uint32_t x) {
  uint32_t reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t count) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) << (count & 31) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t count) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (count & 31));
}

// -- floats --------------------------------------------------------------------------------------
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __expf(float x) { return dalle::emulator::fast_exp(x); }
inline float __logf(float x) { return dalle::emulator::fast_log(x); }
inline float __log2f(float x) { return dalle::emulator::fast_log2(x); }
inline float __fdividef(float a, float b) { return dalle::emulator::fast_divide(a, b); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return dalle::emulator::rsqrt(x); }

// CUDA's overloads of the global namespace.
template <typename a_t, typename b_t>
std::common_type_t<a_t, b_t> min(a_t a, b_t b) {
  using type = std::common_type_t<a_t, b_t>;
  return static_cast<type>(b) < static_cast<type>(a) ? static_cast<type>(b) : static_cast<type>(a);
}
template <typename a_t, typename b_t>
std::common_type_t<a_t, b_t> max(a_t a, b_t b) {
  using type = std::common_type_t<a_t, b_t>;
  return static_cast<type>(a) < static_cast<type>(b) ? static_cast<type>(b) : static_cast<type>(a);
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                     ? "no error"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                  : "invalid argument";
}

#include "emulator/ptx.h"
