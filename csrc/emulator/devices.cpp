// The devices that the emulator can be for a launcher: DALLE_EMULATOR_DEVICE, and
// DALLE_EMULATOR_MULTIPROCESSORS in place of its number of them.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "emulator/block.h"

namespace dalle::emulator {
namespace {

constexpr Device kDevices[] = {
    {80, {108, 163 << 10, 164 << 10, 1 << 10}},                          // A100
    {90, {132, static_cast<int64_t>(kMaxShared), 228 << 10, 1 << 10}}};  // H100, H200

}  // namespace

Device device() {
  const char* name = std::getenv("DALLE_EMULATOR_DEVICE");
  const char* count = std::getenv("DALLE_EMULATOR_MULTIPROCESSORS");
  const std::string wanted = name && *name ? name : "sm_90";
  for (Device device : kDevices) {
    if (wanted != "sm_" + std::to_string(device.architecture)) continue;
    if (count && *count) device.limits.multiprocessors = std::atoi(count);
    if (device.limits.multiprocessors > 0) return device;
    throw std::runtime_error(
        std::string("emulator: DALLE_EMULATOR_MULTIPROCESSORS must be a positive number, got ") +
        count);
  }
  throw std::runtime_error("emulator: DALLE_EMULATOR_DEVICE must be sm_80 or sm_90, got " + wanted);
}

}  // namespace dalle::emulator
