// Every CPU kernel, on fixed numbers, for each instruction set that was compiled and that this
// processor has: exact bits where they are promised (against plain C++, and one hash of all of them
// for all machines), close to exact arithmetic elsewhere. Needs no torch, so that it can be
// compiled for another processor and run under an emulator: cmake -DDALLE_KERNEL_TESTS=ON
#include "check.h"
#include "common/isa.h"

namespace dalle {
namespace {

CpuIsa level;

struct Level {
  const char* name;
  CpuIsa isa;
  bool there;
};

int run() {
#ifdef DALLE_ISA_GENERIC
  const Level levels[] = {{"generic", CpuIsa::kGeneric, true}};
#else
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const Level levels[] = {{"v2", CpuIsa::kV2, true},
                          {"v3", CpuIsa::kV3, v3},
                          {"v4", CpuIsa::kV4, v4},
                          {"v4_bf16", CpuIsa::kV4Bf16, v4 && __builtin_cpu_supports("avx512bf16")}};
#endif
  constexpr uint64_t kHash = 0x692AAE085FECE3BEu;
  int64_t failures = 0;
  for (const Level& one : levels) {
    if (!one.there) {
      std::printf("%s: this processor has none\n", one.name);
      continue;
    }
    level = one.isa;
    Checks checks;
    test_formats(checks);
    test_adam16(checks);
    test_grad_scale(checks);
    test_gumbel_words(checks);
    if (checks.hash != kHash) ++checks.failures;
    std::printf("%s: hash of exact results %016llx, want %016llx\n", one.name,
                static_cast<unsigned long long>(checks.hash),
                static_cast<unsigned long long>(kHash));
    test_powersgd(checks);
    test_gumbel_softmax(checks);
    test_sparse_attention(checks);
    test_decode_attention(checks);
    test_packed_linear(checks);
    test_team(checks);
    test_decode_layers(checks);
    std::printf("%s: %lld cases, %lld failures\n", one.name, static_cast<long long>(checks.cases),
                static_cast<long long>(checks.failures));
    failures += checks.failures;
  }
  return failures != 0;
}

}  // namespace

// In place of common/isa.cpp, which is torch's.
CpuIsa cpu_isa() { return level; }

}  // namespace dalle

int main() { return dalle::run(); }
