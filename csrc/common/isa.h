// Which build of the CPU kernels this machine runs. Every <op>_cpu.h is compiled three times, for
// x86-64-v2 (SSE4.2), v3 (AVX2, FMA) and v4 (AVX-512), into namespaces isa_v2, isa_v3, isa_v4; each
// exports one table of function pointers. No torch here.
#pragma once

namespace dalle {

// 2, 3 or 4: the highest level this processor has, or the one that the environment variable
// DALLE_EXT_CPU_ISA (v2, v3, v4) names. Read once, at the first call. An unknown or unsupported
// name throws: a silent other choice would make a test of one level test another.
int cpu_isa_level();

}  // namespace dalle

// The table of the chosen level: DALLE_SELECT_ISA(gumbel_softmax_cpu).forward(...)
#define DALLE_SELECT_ISA(table)                             \
  (::dalle::cpu_isa_level() == 4   ? ::dalle::isa_v4::table \
   : ::dalle::cpu_isa_level() == 3 ? ::dalle::isa_v3::table \
                                   : ::dalle::isa_v2::table)
