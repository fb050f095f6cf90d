// The other factor of a product, as the CPU kernels read it (powersgd_cpu.h). No torch here.
#pragma once

#include <cstddef>
#include <vector>

#include "powersgd/powersgd_cpu.h"

namespace dalle {

// B (depth, columns) in blocks of kPowerBlock columns, each (depth, kPowerBlock), padded with
// zeros; B's element (k, j) lies at b[k * k_step + j * j_step].
inline std::vector<float> packed_blocks(const float* b, int64_t depth, int64_t columns,
                                        int64_t k_step, int64_t j_step) {
  std::vector<float> packed(static_cast<size_t>(depth * padded_to_block(columns)), 0.0f);
  for (int64_t first = 0; first < columns; first += kPowerBlock) {
    const int64_t count = columns - first < kPowerBlock ? columns - first : kPowerBlock;
    float* const block = packed.data() + first * depth;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < count; ++j) {
        block[k * kPowerBlock + j] = b[k * k_step + (first + j) * j_step];
      }
    }
  }
  return packed;
}

// The Q of compress: its full blocks, then its tail.
inline std::vector<float> packed_with_tail(const PowerMatrix& m) {
  const int64_t tail = tail_columns(m.rank), full = m.rank - tail;
  const int64_t pitch = padded_to_block(m.columns);
  std::vector<float> packed = packed_blocks(m.right, m.columns, full, m.rank, 1);
  const size_t begin = packed.size();
  packed.resize(begin + static_cast<size_t>(ceil_div(tail, kTailColumns) * kTailColumns * pitch));
  for (int64_t c = 0; c < tail; ++c) {
    float* const column = packed.data() + begin + c * pitch;
    for (int64_t k = 0; k < m.columns; ++k) column[k] = m.right[k * m.rank + full + c];
  }
  return packed;
}

}  // namespace dalle
