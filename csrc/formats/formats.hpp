// Torch-facing half of the contract: checks the inputs once, allocates outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.hpp"
#include "common/element.hpp"
#include "formats/formats.h"

namespace dalle {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Format check_format(const char* op, int64_t format) {
  DALLE_CHECK(format == 0 || format == 1, op, "format", "0 (1-6-9) or 1 (0-6-10)", format);
  return static_cast<Format>(format);
}

inline void check_codes(const char* op, const Tensor& codes) {
  DALLE_CHECK(codes.scalar_type() == ScalarType::Short, op, "codes", "int16",
              dtype_text(codes.scalar_type()));
  DALLE_CHECK(codes.is_contiguous(), op, "codes", "contiguous", "strides of another layout");
}

inline const int64_t* check_seed(const char* op, const std::optional<Tensor>& seed,
                                 const Tensor& beside) {
  if (!seed) return nullptr;
  DALLE_CHECK(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long &&
                  seed->device() == beside.device(),
              op, "seed", "an int64 scalar on the tensor's device", tensor_text(*seed));
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

// (kNumCounts) zeros, or none.
inline Tensor new_counts(const Tensor& beside, bool wanted) {
  const int64_t size[] = {wanted ? int64_t{kNumCounts} : 0};
  return torch::stable::new_zeros(beside, size, ScalarType::Long);
}

inline int64_t* counts_pointer(const Tensor& counts) {
  return counts.numel() == 0 ? nullptr : static_cast<int64_t*>(counts.mutable_data_ptr());
}

// Codes like `x`, their counts, and the arguments of the kernel that fills both.
inline std::tuple<Tensor, Tensor, PackArgs> prepare_pack(const Tensor& x, int64_t format,
                                                         const std::optional<Tensor>& seed,
                                                         bool count) {
  const ElementKind dtype = check_floating("pack", "x", x.scalar_type());
  DALLE_CHECK(x.is_contiguous(), "pack", "x", "contiguous", "strides of another layout");
  const Format kind = check_format("pack", format);
  const int64_t* const word = check_seed("pack", seed, x);
  Tensor codes = torch::stable::new_empty(x, x.sizes(), ScalarType::Short);
  Tensor counts = new_counts(x, count);
  const PackArgs args{x.const_data_ptr(),
                      word,
                      static_cast<uint16_t*>(codes.mutable_data_ptr()),
                      counts_pointer(counts),
                      x.numel(),
                      kind,
                      dtype};
  return {codes, counts, args};
}

inline std::tuple<Tensor, UnpackArgs> prepare_unpack(const Tensor& codes, int64_t format,
                                                     ScalarType type) {
  check_codes("unpack", codes);
  const ElementKind dtype = check_floating("unpack", "dtype", type);
  const Format kind = check_format("unpack", format);
  Tensor x = torch::stable::new_empty(codes, codes.sizes(), type);
  const UnpackArgs args{static_cast<const uint16_t*>(codes.const_data_ptr()), x.mutable_data_ptr(),
                        codes.numel(), kind, dtype};
  return {x, args};
}

inline std::tuple<Tensor, Tensor, ReduceArgs> prepare_reduce(const Tensor& codes, int64_t format,
                                                             const std::optional<Tensor>& seed,
                                                             bool count) {
  check_codes("sum_codes", codes);
  DALLE_CHECK(codes.dim() >= 1 && codes.size(0) >= 1, "sum_codes", "codes",
              "(R, ...) with R at least 1", shape_text(codes));
  const Format kind = check_format("sum_codes", format);
  const int64_t* const word = check_seed("sum_codes", seed, codes);
  const std::vector<int64_t> shape(codes.sizes().begin() + 1, codes.sizes().end());
  Tensor sum = torch::stable::new_empty(codes, shape, ScalarType::Short);
  Tensor counts = new_counts(codes, count);
  const ReduceArgs args{static_cast<const uint16_t*>(codes.const_data_ptr()),
                        word,
                        static_cast<uint16_t*>(sum.mutable_data_ptr()),
                        counts_pointer(counts),
                        codes.size(0),
                        sum.numel(),
                        kind};
  return {sum, counts, args};
}

}  // namespace dalle
