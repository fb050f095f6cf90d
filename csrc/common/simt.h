// The one header a kernel includes: CUDA as nvcc knows it, or, under g++, the emulator that runs
// the same source on the CPU (docs/emulator.md). No torch here.
//
// What a kernel takes from here instead of CUDA's own syntax, because g++ has to understand it:
// - DALLE_SHARED(float, parts, [kThreads]); is static shared memory, __shared__ float
//   parts[kThreads].
// - DALLE_DYNAMIC_SHARED(bytes); is unsigned char bytes[] of the launch's size, aligned to 128
//   bytes, at most one in a kernel.
// - launch(kernel, grid, block, shared_bytes, stream, arguments...) stands for <<< >>>.
// - kArchitecture in a kernel is the architecture it is compiled for, 80 for sm_80 and 90 for sm_90
//   and sm_90a, so that `if constexpr` can choose instructions; kArchitectureSpecific is true for
//   sm_90a and its like, which alone have wgmma. device_architecture() on the host is that of the
//   current device, so that a launcher can choose a kernel; device_limits() is what it has.
// The instructions that CUDA C++ does not name (mma, ldmatrix, cp.async, ...) are in ptx.cuh.
#pragma once

#include "common/device_limits.h"
#include "common/warp.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DALLE_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define DALLE_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace dalle {

// Dynamic shared memory over 48 KiB has to be asked for; the request stays with the kernel.
template <typename... parameters_t, typename... arguments_t>
cudaError_t launch(void (*kernel)(parameters_t...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* stream, const arguments_t&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const void* const entry = reinterpret_cast<const void*>(kernel);
    cudaError_t error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes));
    // As many blocks side by side as the shared memory of a multiprocessor holds, before L1.
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(entry, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    }
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<parameters_t>(arguments)...);
  return cudaGetLastError();
}

#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 0;  // host code
#endif
#if defined(__CUDA_ARCH_SPECIFIC__)
constexpr bool kArchitectureSpecific = __CUDA_ARCH_SPECIFIC__ != 0;
#else
constexpr bool kArchitectureSpecific = false;
#endif

// 10 * major + minor of the current device; 0 where there is none.
inline int device_architecture() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return 0;
  }
  return 10 * major + minor;
}

// Those of the current device. Where there is none, what every device has: the launch will say
// what is wrong.
inline DeviceLimits device_limits() {
  constexpr int64_t kShared = 48 * 1024;
  const auto ask = [](cudaDeviceAttr attribute, int64_t otherwise) {
    int device = 0, value = 0;
    const bool known = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
    return known ? int64_t{value} : otherwise;
  };
  return {ask(cudaDevAttrMultiProcessorCount, 1),
          ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, kShared),
          ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor, kShared),
          ask(cudaDevAttrReservedSharedMemoryPerBlock, 0)};
}

}  // namespace dalle

#include "common/ptx.cuh"

#else
#include "emulator/device.h"
#endif

namespace dalle {

// Two floats rounded to a word of two scalar_t (__half or __nv_bfloat16), the first in the low
// half; and back.
template <typename scalar_t>
__device__ __forceinline__ uint32_t pack_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename scalar_t>
__device__ __forceinline__ float2 unpack_pair(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t word) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
}

}  // namespace dalle
