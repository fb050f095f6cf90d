// What the CUDA registration of an op (<op>_cuda.cu) needs of the device: its guard and stream, the
// check after a launch, the dispatch key. Under g++, where the emulator runs the kernels on CPU
// tensors (docs/emulator.md), there is no device, and the key is one that no other tensor has.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "common/simt.h"

#if defined(__CUDACC__)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#define DALLE_CUDA_KEY CUDA
#else
#define DALLE_CUDA_KEY PrivateUse3
#endif

namespace dalle {

#if defined(__CUDACC__)

// aoti_torch_get_current_cuda_stream is part of the stable ABI but defined in libtorch_cuda only,
// and torch loads that library RTLD_LOCAL: dlsym(RTLD_DEFAULT) returns null even where CUDA works.
inline void* current_cuda_stream(int32_t device_index) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Getter>(symbol);
  }();
  STD_TORCH_CHECK(getter != nullptr, "dalle_ext: torch must have CUDA to run a CUDA op, got none");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device_index, &stream) == 0, "dalle_ext: no current CUDA stream");
  return stream;
}

// Makes the tensor's device the current one while it lives.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()),
        stream_(current_cuda_stream(tensor.get_device_index())) {}
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

#else

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
};

#endif

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA launch must succeed, got ",
                  cudaGetErrorString(error));
}

}  // namespace dalle
