// CUDA registration of adam16: guard, launch, check.
#include "adam16/adam16.hpp"
#include "adam16/adam16_cuda.cuh"
#include "common/stream.hpp"

namespace dalle {
namespace {

void adam_step_(DALLE_ADAM_PARAMETERS) {
  const DeviceScope on(rows);
  const AdamArgs args = prepare_adam(DALLE_ADAM_ARGUMENTS);
  check_launch("AdamW16", launch_adam16_step(args, on.stream()));
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, DALLE_CUDA_KEY, m) {
  m.impl("_adam16_step_", TORCH_BOX(&dalle::adam_step_));
}
