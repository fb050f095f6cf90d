// Which build of the CPU kernels this machine runs. Every <op>_cpu.h is compiled four times, for
// x86-64-v2 (SSE4.2), v3 (AVX2, FMA), v4 (AVX-512) and v4_bf16 (products of bfloat16 pairs as
// well), into namespaces isa_v2, isa_v3, isa_v4, isa_v4_bf16; each exports one table of function
// pointers. No torch here.
#pragma once

namespace dalle {

enum class CpuIsa { kV2, kV3, kV4, kV4Bf16 };

// The highest level this processor has, or the one that the environment variable DALLE_EXT_CPU_ISA
// (v2, v3, v4, v4_bf16) names. Read once, at the first call. An unknown or unsupported name throws:
// a silent other choice would make a test of one level test another.
CpuIsa cpu_isa();

}  // namespace dalle

// The table of the chosen level: DALLE_SELECT_ISA(gumbel_softmax_cpu).forward(...)
#define DALLE_SELECT_ISA(table)                                                 \
  (::dalle::cpu_isa() == ::dalle::CpuIsa::kV4Bf16 ? ::dalle::isa_v4_bf16::table \
   : ::dalle::cpu_isa() == ::dalle::CpuIsa::kV4   ? ::dalle::isa_v4::table      \
   : ::dalle::cpu_isa() == ::dalle::CpuIsa::kV3   ? ::dalle::isa_v3::table      \
                                                  : ::dalle::isa_v2::table)
