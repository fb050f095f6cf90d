// The torch-facing check of a tensor table: that it still says where the tensors are.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/checks.hpp"
#include "common/element.hpp"
#include "common/tensor_table.h"

namespace dalle {

// columns[c][i] is what row i has in column c. `host` is the table on the CPU, `rows` its copy on
// the tensors' device (the same tensor for CPU ops). A table that is out of date would have the
// kernel write to memory that is no longer the tensors', hence a check of every address. The last
// `num_scalars` columns hold one element a row.
inline TensorTable check_table(
    const char* op, const torch::stable::Tensor& host, const torch::stable::Tensor& rows,
    const std::vector<const std::vector<torch::stable::Tensor>*>& columns, size_t num_scalars = 0) {
  constexpr int64_t kWords = sizeof(TableRow) / sizeof(int64_t);
  const int64_t count = host.dim() == 2 ? host.size(0) : -1;
  for (const auto* table : {&host, &rows}) {
    DALLE_CHECK(table->dim() == 2 && table->size(0) == count && table->size(1) == kWords &&
                    table->is_contiguous() &&
                    table->scalar_type() == torch::headeronly::ScalarType::Long,
                op, "table", "contiguous (tensors, 9) int64", tensor_text(*table));
  }
  DALLE_CHECK(host.is_cpu(), op, "host table", "on the CPU", "another device");
  const auto* expected = static_cast<const TableRow*>(host.const_data_ptr());
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const TableRow& row = expected[i];
    DALLE_CHECK(row.first_chunk == chunks && (i == 0 || row.group >= expected[i - 1].group), op,
                "table", "in order", "row ", i);
    chunks += ceil_div(row.numel, kTableChunk);
    for (size_t c = 0; c < columns.size(); ++c) {
      DALLE_CHECK(static_cast<int64_t>(columns[c]->size()) == count, op, "tensors",
                  "as many as the table has rows", columns[c]->size());
      const torch::stable::Tensor& tensor = (*columns[c])[i];
      const int64_t numel = c + num_scalars < columns.size() ? row.numel : 1;
      DALLE_CHECK(reinterpret_cast<int64_t>(tensor.const_data_ptr()) == row.data[c] &&
                      tensor.numel() == numel && tensor.is_contiguous() &&
                      element_kind(tensor.scalar_type()) == kind_of(row, static_cast<int>(c)) &&
                      tensor.device() == rows.device(),
                  op, "table", "of these tensors", "another address, size, type or device in row ",
                  i, ", column ", c);
    }
  }
  // On the CPU the table that was looked at is the one that is used.
  const auto* used = static_cast<const TableRow*>((rows.is_cpu() ? host : rows).const_data_ptr());
  return {used, count, chunks};
}

}  // namespace dalle
