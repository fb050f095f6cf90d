// The devices whose limits the emulator can have for a launcher: DALLE_EMULATOR_DEVICE, and
// DALLE_EMULATOR_MULTIPROCESSORS in place of its number of them.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "emulator/block.h"

namespace dalle::emulator {
namespace {

struct NamedLimits {
  const char* name;
  DeviceLimits limits;
};
constexpr NamedLimits kDevices[] = {
    {"sm_80", {108, 163 << 10, 164 << 10, 1 << 10}},                          // A100
    {"sm_90", {132, static_cast<int64_t>(kMaxShared), 228 << 10, 1 << 10}}};  // H100, H200

}  // namespace

DeviceLimits limits() {
  const char* name = std::getenv("DALLE_EMULATOR_DEVICE");
  const char* count = std::getenv("DALLE_EMULATOR_MULTIPROCESSORS");
  const std::string wanted = name && *name ? name : "sm_90";
  for (const NamedLimits& device : kDevices) {
    if (wanted != device.name) continue;
    DeviceLimits limits = device.limits;
    if (count && *count) limits.multiprocessors = std::atoi(count);
    if (limits.multiprocessors > 0) return limits;
    throw std::runtime_error(
        std::string("emulator: DALLE_EMULATOR_MULTIPROCESSORS must be a positive number, got ") +
        count);
  }
  throw std::runtime_error("emulator: DALLE_EMULATOR_DEVICE must be sm_80 or sm_90, got " + wanted);
}

}  // namespace dalle::emulator
