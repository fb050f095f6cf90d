// Tasks of a CPU kernel over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/host_device.h"

namespace dalle {

// The first address in a tensor's memory that 64 divides.
inline char* aligned_memory(torch::stable::Tensor& space) {
  const auto raw = reinterpret_cast<uintptr_t>(space.mutable_data_ptr());
  return reinterpret_cast<char*>((raw + 63) / 64 * 64);
}

// Runs body(workspace, begin, end) over [0, tasks) on torch's threads, each with a piece of
// workspace aligned to 64 bytes. A thread gets at least `grain` tasks.
template <typename Body>
void run_tasks(const torch::stable::Tensor& like, int64_t tasks, int64_t grain, size_t bytes,
               const Body& body) {
  if (tasks == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t pieces = std::clamp<int64_t>(ceil_div(tasks, grain), 1, threads);
  const int64_t piece_bytes = static_cast<int64_t>(bytes + 127) / 64 * 64;
  torch::stable::Tensor space = torch::stable::new_empty(like, {pieces * piece_bytes + 64},
                                                         torch::headeronly::ScalarType::Byte);
  char* const base = aligned_memory(space);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      body(base + i * piece_bytes, i * tasks / pieces, (i + 1) * tasks / pieces);
    }
  });
}

}  // namespace dalle
