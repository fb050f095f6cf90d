// A launch from its limits to its last block.
#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "emulator/approximate.h"
#include "emulator/block.h"
#include "emulator/fault.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace dalle::emulator {

Block block;
Counts counts;
uint64_t approximation_seed = 0;

namespace {

void run_block(uint64_t number) {
  blockIdx = {static_cast<unsigned>(number % gridDim.x),
              static_cast<unsigned>(number / gridDim.x % gridDim.y),
              static_cast<unsigned>(number / gridDim.x / gridDim.y)};
  open_arena(block.shared_bytes);
  race_begin_block();
  if (sigsetjmp(escape, 1) == 0) run_threads();
  block.running = nullptr;
  if (block.failure.empty()) check_red_zones();
  if (!block.failure.empty()) throw std::runtime_error(std::move(block.failure));
}

bool fits(dim3 grid, dim3 threads, size_t shared_bytes, size_t max_shared_bytes) {
  constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535, kMaxBlockZ = 64;
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  return grid.x >= 1 && grid.x <= kMaxGridX && grid.y >= 1 && grid.y <= kMaxGridYZ && grid.z >= 1 &&
         grid.z <= kMaxGridYZ && count >= 1 && count <= kMaxThreads && threads.z <= kMaxBlockZ &&
         shared_bytes <= max_shared_bytes;
}

}  // namespace

cudaError_t run(const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes,
                void (*body)(void*), void* argument) {
  const size_t most = static_cast<size_t>(limits().shared_per_block);
  if (!fits(grid, threads, shared_bytes, most)) return cudaErrorInvalidConfiguration;
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  block.kernel = kernel;
  block.body = body;
  block.argument = argument;
  block.shared_bytes = shared_bytes;
  block.max_shared_bytes = most;
  block.num_threads = static_cast<int>(threads.x * threads.y * threads.z);
  block.num_warps = (block.num_threads + kWarpSize - 1) / kWarpSize;
  block.failure.clear();
  block.running = nullptr;
  gridDim = grid;
  blockDim = threads;
  make_threads();
  race_begin_launch();
  const FaultHandler handler;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, seed_value = seed();
  // Every launch starts from the seed, so that a failure repeats whatever ran before it.
  approximation_seed = seed_value;
  block.random = seed_value ? seed_value * 0x9E3779B97F4A7C15ull | 1 : 0;
  std::vector<uint32_t> order(block.random && blocks <= (uint64_t{1} << 24) ? blocks : 0);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  for (uint64_t i = 0; i < blocks; ++i) run_block(order.empty() ? i : order[i]);
  return cudaSuccess;
}

}  // namespace dalle::emulator

extern "C" __attribute__((visibility("default"))) const void* dalle_emulator_counts() {
  return &dalle::emulator::counts;
}
