// A program of named cases: `emulator_plain NAME` runs one, without a name it lists them. A case
// ends well, throws std::runtime_error (exit 1, the message on stdout), or dies of a sanitizer.
// nvcc compiles the same files, so that a GPU can confirm what the emulator says.
#pragma once

#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "common/simt.h"

namespace cases {

inline std::map<std::string, std::function<void()>>& all() {
  static std::map<std::string, std::function<void()>> cases;
  return cases;
}

struct Registration {
  Registration(const char* name, std::function<void()> run) { all()[name] = std::move(run); }
};

inline void expect(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error("wrong result: " + what);
}

inline void finish(cudaError_t error) {
#if defined(__CUDACC__)
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
#endif
  expect(error == cudaSuccess, cudaGetErrorString(error));
}

// Memory for host and device. Exactly as long as asked for, so that AddressSanitizer sees its end.
template <typename value_t>
class Buffer {
 public:
  explicit Buffer(size_t count, value_t fill = value_t{}) : count_(count) {
#if defined(__CUDACC__)
    finish(cudaMallocManaged(&data_, count * sizeof(value_t)));
#else
    data_ = static_cast<value_t*>(::operator new(count * sizeof(value_t), std::align_val_t{128}));
#endif
    for (size_t i = 0; i < count; ++i) data_[i] = fill;
  }
  ~Buffer() {
#if defined(__CUDACC__)
    cudaFree(data_);
#else
    ::operator delete(data_, std::align_val_t{128});
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  value_t* data() { return data_; }
  value_t& operator[](size_t i) { return data_[i]; }
  size_t size() const { return count_; }

 private:
  value_t* data_ = nullptr;
  size_t count_;
};

}  // namespace cases

#define CASE(name)                                                           \
  static void case_##name();                                                 \
  static const cases::Registration registration_##name(#name, &case_##name); \
  static void case_##name()
