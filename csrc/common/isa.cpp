#include "common/isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace dalle {
namespace {

const char* const kNames[] = {"v2", "v3", "v4", "v4_bf16"};  // in the order of CpuIsa

int supported_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("x86-64-v3")) return 0;
  if (!__builtin_cpu_supports("x86-64-v4")) return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

CpuIsa chosen_level() {
  const int supported = supported_level();
  const char* wish = std::getenv("DALLE_EXT_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return static_cast<CpuIsa>(supported);
  std::string names;
  for (int level = 0; level <= supported; ++level) {
    if (std::string(kNames[level]) == wish) return static_cast<CpuIsa>(level);
    names += (level == 0 ? "" : ", ") + std::string(kNames[level]);
  }
  STD_TORCH_CHECK(false, "dalle_ext: DALLE_EXT_CPU_ISA must be one of ", names, ", got ", wish);
  return CpuIsa::kV2;
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa level = chosen_level();
  return level;
}

namespace {
std::string isa_name() { return kNames[static_cast<int>(cpu_isa())]; }
}  // namespace

}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) { m.def("_cpu_isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&dalle::isa_name));
}
