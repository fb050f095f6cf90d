// One form for every message of a torch-facing check:
// "<op>: <argument> must be <requirement>, got <value>".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cctype>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

// DALLE_CHECK(cond, "sparse_attention", "tau", "positive", tau). Not STD_TORCH_CHECK: that one puts
// the function, the file and the line of the build machine in front of the message.
#define DALLE_CHECK(condition, op, argument, requirement, ...)                                  \
  do {                                                                                          \
    if (!(condition)) {                                                                         \
      ::dalle::fail_check(op, ": ", argument, " must be ", requirement, ", got ", __VA_ARGS__); \
    }                                                                                           \
  } while (false)

namespace dalle {

template <typename... Parts>
[[noreturn]] void fail_check(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// "(3, 4)" of the numbers at(0), at(1), ...
template <typename At>
std::string tuple_text(int64_t count, const At& at) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(at(i));
  return text + ")";
}

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  return tuple_text(tensor.dim(), [&](int64_t d) { return tensor.size(d); });
}

// The name that Python has: "float64" for Double, "uint8" for Byte.
inline std::string dtype_text(torch::headeronly::ScalarType type) {
  using Type = torch::headeronly::ScalarType;
  constexpr std::pair<Type, const char*> kNames[] = {
      {Type::Byte, "uint8"},
      {Type::Char, "int8"},
      {Type::Short, "int16"},
      {Type::Int, "int32"},
      {Type::Long, "int64"},
      {Type::Half, "float16"},
      {Type::Float, "float32"},
      {Type::Double, "float64"},
      {Type::ComplexHalf, "complex32"},
      {Type::ComplexFloat, "complex64"},
      {Type::ComplexDouble, "complex128"},
  };
  for (const auto& [other, name] : kNames) {
    if (type == other) return name;
  }
  std::string text = torch::headeronly::toString(type);  // "BFloat16", "Bool", "Float8_e4m3fn"
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

// Shape and dtype, and the strides where they are not those of a contiguous tensor.
inline std::string tensor_text(const torch::stable::Tensor& tensor) {
  std::string text = shape_text(tensor) + " of " + dtype_text(tensor.scalar_type());
  if (tensor.is_contiguous()) return text;
  return text + " with strides " +
         tuple_text(tensor.dim(), [&](int64_t d) { return tensor.stride(d); });
}

}  // namespace dalle
