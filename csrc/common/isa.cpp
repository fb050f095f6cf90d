#include "common/isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace dalle {
namespace {

int supported_level() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  return __builtin_cpu_supports("x86-64-v3") ? 3 : 2;
}

int chosen_level() {
  const int supported = supported_level();
  const char* wish = std::getenv("DALLE_EXT_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return supported;
  const std::string name(wish);
  const int level = name == "v2" ? 2 : name == "v3" ? 3 : name == "v4" ? 4 : 0;
  STD_TORCH_CHECK(level != 0 && level <= supported,
                  "dalle_ext: DALLE_EXT_CPU_ISA must be one of v2 .. v", supported, ", got ", name);
  return level;
}

}  // namespace

int cpu_isa_level() {
  static const int level = chosen_level();
  return level;
}

namespace {
int64_t isa_level() { return cpu_isa_level(); }
}  // namespace

}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) { m.def("_cpu_isa_level() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa_level", TORCH_BOX(&dalle::isa_level));
}
