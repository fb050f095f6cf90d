// Which build of the CPU kernels this machine runs. On x86-64 every <op>_cpu.h is compiled for
// x86-64-v2 (SSE4.2), v3 (AVX2, FMA) and v4 (AVX-512), into namespaces isa_v2, isa_v3, isa_v4; each
// exports one table of function pointers. Where a kernel takes common/pairs.h it is compiled
// once more, for v4_bf16 (products of bfloat16 pairs as well). Elsewhere there is one build,
// isa_generic: what the compiler makes for the processor it is asked for (NEON on aarch64);
// CMakeLists.txt defines DALLE_ISA_GENERIC then. No torch here.
#pragma once

namespace dalle {

enum class CpuIsa { kGeneric, kV2, kV3, kV4, kV4Bf16 };

// The highest level this processor has, or the one that the environment variable DALLE_EXT_CPU_ISA
// (generic; v2, v3, v4, v4_bf16) names. Read once, at the first call. An unknown or unsupported
// name throws: a silent other choice would make a test of one level test another.
CpuIsa cpu_isa();

}  // namespace dalle

// Declares the table of each level, before the kernels themselves: DALLE_FOR_EACH_ISA(FormatsCpu,
// formats_cpu). What is not compiled for v4_bf16 has no table there, and none is referenced.
#ifdef DALLE_ISA_GENERIC
#define DALLE_FOR_EACH_ISA(type, table) \
  namespace isa_generic {               \
  extern const type table;              \
  }
#else
#define DALLE_FOR_EACH_ISA(type, table) \
  namespace isa_v2 {                    \
  extern const type table;              \
  }                                     \
  namespace isa_v3 {                    \
  extern const type table;              \
  }                                     \
  namespace isa_v4 {                    \
  extern const type table;              \
  }                                     \
  namespace isa_v4_bf16 {               \
  extern const type table;              \
  }
#endif

// The table of the chosen level: DALLE_SELECT_ISA(gumbel_softmax_cpu).forward(...). What is not
// compiled for v4_bf16 runs as v4 there.
#ifdef DALLE_ISA_GENERIC
#define DALLE_SELECT_ISA(table) (::dalle::isa_generic::table)
#else
#define DALLE_SELECT_ISA(table)                                          \
  (::dalle::cpu_isa() >= ::dalle::CpuIsa::kV4   ? ::dalle::isa_v4::table \
   : ::dalle::cpu_isa() == ::dalle::CpuIsa::kV3 ? ::dalle::isa_v3::table \
                                                : ::dalle::isa_v2::table)
#endif

// The same of a kernel that takes common/pairs.h, for its bfloat16 tensors.
#ifdef DALLE_ISA_GENERIC
#define DALLE_SELECT_ISA_BFLOAT16(table) DALLE_SELECT_ISA(table)
#else
#define DALLE_SELECT_ISA_BFLOAT16(table)                                        \
  (::dalle::cpu_isa() == ::dalle::CpuIsa::kV4Bf16 ? ::dalle::isa_v4_bf16::table \
                                                  : DALLE_SELECT_ISA(table))
#endif
