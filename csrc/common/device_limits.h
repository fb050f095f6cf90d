// What a CUDA device has for the blocks of a kernel; device_limits() of common/simt.h asks it.
#pragma once

#include <cstdint>

namespace dalle {

struct DeviceLimits {
  int64_t multiprocessors;
  int64_t shared_per_block;           // most bytes of a block, static and dynamic
  int64_t shared_per_multiprocessor;  // for all its blocks, each with shared_reserved more
  int64_t shared_reserved;
};

}  // namespace dalle
