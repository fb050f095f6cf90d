// The current CUDA stream, without c10/cuda.
#pragma once

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace dalle {

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

}  // namespace dalle
