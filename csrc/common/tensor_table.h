// Many tensors as one launch sees them: a table of rows, one a tensor, that lies where the kernel
// runs. It is built once for a set of tensors (dalle_ext/_tensor_table.py), so that a step copies
// nothing, reads nothing on the host and can be captured in a CUDA graph. No torch here.
//
// The work is cut into chunks of kTableChunk elements of one tensor, numbered through the table;
// rows are ordered by group, so that the chunks of a group (a resblock) follow one another.
#pragma once

#include "common/element.h"
#include "common/host_device.h"

namespace dalle {

inline constexpr int64_t kTableChunk = 32768;
inline constexpr int kTableColumns = 5;  // tensors of one row: a parameter, its gradient, ...

struct TableRow {
  int64_t data[kTableColumns];  // addresses; 0 in columns that the op does not have
  int64_t numel;                // of each of them
  int64_t first_chunk;
  int64_t kinds;  // ElementKind of column c in bits 4 c to 4 c + 3
  int64_t group;
};
static_assert(sizeof(TableRow) == 9 * sizeof(int64_t), "rows are read from an int64 tensor");

struct TensorTable {
  const TableRow* rows;
  int64_t num_rows, num_chunks;
};

DALLE_HOST_DEVICE ElementKind kind_of(const TableRow& row, int column) {
  return static_cast<ElementKind>((row.kinds >> (4 * column)) & 15);
}

template <typename scalar_t>
DALLE_HOST_DEVICE scalar_t* data_of(const TableRow& row, int column) {
  return reinterpret_cast<scalar_t*>(row.data[column]);
}

// The row that `chunk` belongs to: the last whose first chunk is not beyond it. Rows of no elements
// have no chunk and the first chunk of their successor, so they are never the last such row.
DALLE_HOST_DEVICE int64_t row_of_chunk(const TensorTable& table, int64_t chunk) {
  int64_t low = 0, high = table.num_rows;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (table.rows[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// First chunk of the groups from `group` on.
DALLE_HOST_DEVICE int64_t first_chunk_of_group(const TensorTable& table, int64_t group) {
  int64_t low = 0, high = table.num_rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (table.rows[middle].group < group) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < table.num_rows ? table.rows[low].first_chunk : table.num_chunks;
}

// Elements of `chunk` within its row.
struct ChunkSpan {
  int64_t begin, count;
};
DALLE_HOST_DEVICE ChunkSpan span_of(const TableRow& row, int64_t chunk) {
  const int64_t begin = (chunk - row.first_chunk) * kTableChunk, left = row.numel - begin;
  return {begin, left < kTableChunk ? left : kTableChunk};
}

}  // namespace dalle
