#include "common/isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace dalle {
namespace {

const char* const kNames[] = {"generic", "v2", "v3", "v4", "v4_bf16"};  // in the order of CpuIsa

// The lowest level that was compiled, and the highest that this processor has.
#ifdef DALLE_ISA_GENERIC
constexpr int kLowest = 0;
int supported_level() { return 0; }
#else
constexpr int kLowest = 1;
int supported_level() {
  __builtin_cpu_init();
#if defined(__clang__) && __clang_major__ < 17  // does not know the levels, only these features
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
#else
  const bool v3 = __builtin_cpu_supports("x86-64-v3"), v4 = __builtin_cpu_supports("x86-64-v4");
#endif
  if (!v3) return 1;
  if (!v4) return 2;
  return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
}
#endif

CpuIsa chosen_level() {
  const int supported = supported_level();
  const char* wish = std::getenv("DALLE_EXT_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return static_cast<CpuIsa>(supported);
  std::string names;
  for (int level = kLowest; level <= supported; ++level) {
    if (std::string(kNames[level]) == wish) return static_cast<CpuIsa>(level);
    names += (level == kLowest ? "" : ", ") + std::string(kNames[level]);
  }
  STD_TORCH_CHECK(false, "dalle_ext: DALLE_EXT_CPU_ISA must be one of ", names, ", got ", wish);
  return static_cast<CpuIsa>(kLowest);
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
