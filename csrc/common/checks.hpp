// One form for every message of a torch-facing check:
// "<op>: <argument> must be <requirement>, got <value>".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

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

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + ")";
}

}  // namespace dalle
