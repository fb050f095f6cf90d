// A warp, for kernels, launches and the emulator. No torch here.
#pragma once

#include <cstdint>

namespace dalle {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;  // the mask of a collective that every lane calls

}  // namespace dalle
