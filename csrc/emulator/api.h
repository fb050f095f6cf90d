// What emulated kernels call: plain functions, so that the kernels' objects (which a sanitizer
// may instrument) and the emulator's (which are not) meet here only. No torch here.
#pragma once

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "common/device_limits.h"
#include "common/warp.h"

namespace dalle::emulator {

// A line of a kernel; as a default argument, the line of the call.
using Location = std::source_location;
#define DALLE_HERE ::dalle::emulator::Location location = ::dalle::emulator::Location::current()

// -- a launch ----------------------------------------------------------------------------------
constexpr int kArchitecture = 80;  // of the code: the emulator knows no instructions of sm_90
constexpr size_t kMaxShared = size_t{227} << 10;  // bytes of a block on the largest device
DeviceLimits limits();  // of the device that DALLE_EMULATOR_DEVICE names, by default an sm_90

// Runs body(argument) as every thread of the grid, one block after another, and returns what CUDA
// would for a launch that no device accepts. Throws std::runtime_error, one line, where the kernel
// does what CUDA leaves undefined.
cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                void* argument);

// -- barriers ----------------------------------------------------------------------------------
enum class Vote : int { kNone, kAny, kAll, kCount };
int block_barrier(Vote vote, int predicate, Location location);
void warp_barrier(uint32_t lanes, Location location);

// -- warp collectives: every lane of `lanes` calls the same one ---------------------------------
enum class Shuffle : int { kIndex, kUp, kDown, kXor };
uint64_t shuffle(Shuffle kind, uint32_t lanes, uint64_t word, int operand, int width,
                 Location location);
uint32_t ballot(uint32_t lanes, int predicate, Location location);
enum class Reduce : int { kAdd, kMinimum, kMaximum, kAnd, kOr, kXor };
uint32_t reduce(Reduce kind, bool is_signed, uint32_t lanes, uint32_t word, Location location);
enum class Operand : int { kHalf, kBFloat16 };
void mma_m16n8k16(Operand type, float* d, const uint32_t* a, const uint32_t* b, Location location);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, Location location);
void ldmatrix(uint32_t* words, int count, bool transposed, const void* row, Location location);
uint32_t movmatrix_trans(uint32_t word, Location location);

// -- memory ------------------------------------------------------------------------------------
// The block's array of this declaration; made, and filled with ones bits (NaN), at the first call.
void* static_shared(const void* declaration, const char* name, size_t bytes, size_t alignment);
unsigned char* dynamic_shared();
void cp_async(void* shared, const void* global, int bytes, int valid_bytes, Location location);
void cp_async_commit();
void cp_async_wait(int groups);
// Stops the kernel where `at` is not aligned to `bytes`; tells the race detector.
void vector_access(const void* at, size_t bytes, bool writes, Location location);
void atomic_access(const void* at, size_t bytes, Location location);

}  // namespace dalle::emulator

// Of the thread that runs: only one does at any time.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = dalle::kWarpSize;
