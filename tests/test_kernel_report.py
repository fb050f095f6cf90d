"""The check of registers, spills and opcodes finds what it should."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import kernel_report
from kernel_report import Budget, Kernel

ROOT = Path(__file__).resolve().parents[1]

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4fullv' for 'sm_80'
ptxas info    : Function properties for _Z4fullv
    96 bytes stack frame, 92 bytes spill stores, 88 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 96 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compiling entry function '_Z5emptyv' for 'sm_80'
ptxas info    : Function properties for _Z5emptyv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, 352 bytes cmem[0]
"""
MACHINE_CODE = """
\t.section\t.text._Z4fullv,"ax",@progbits
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0020*/                   HMMA.16816.F32 R4, R4, R8, RZ ;
        /*0030*/                   STL [R1+0x4], R2 ;
"""
SPILLING = """
#include "common/simt.h"
__global__ void __launch_bounds__(1024) spills(const float* in, float* out) {
  float x[120];
#pragma unroll
  for (int i = 0; i < 120; ++i) x[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 120; ++i) {
    for (int j = 0; j < 120; ++j) out[threadIdx.x + i] += x[i] * x[j];
  }
}
__global__ void indexes(float* out, int at) {
  float x[32];
  for (int i = 0; i < 32; ++i) x[i] = out[i] * i;
  x[at] = 1;
  for (int i = 0; i < at; ++i) out[i] = x[(i * at) % 32];
}
template <typename scalar_t> __global__ void multiplies(float* out) {
  static_assert(dalle::kArchitecture == 80 || dalle::kArchitecture == 0);  // 0: the host's pass
  DALLE_DYNAMIC_SHARED(bytes);
  float d[4] = {};
  uint32_t a[4], b[2];
  dalle::cp_async<16>(bytes + threadIdx.x * 16, out + threadIdx.x * 4);
  dalle::cp_async_commit();
  dalle::cp_async_wait<0>();
  __syncthreads();
  dalle::ldmatrix(a, bytes + threadIdx.x * 16);
  dalle::ldmatrix_trans(b, bytes + threadIdx.x * 16);
  dalle::mma_m16n8k16<scalar_t>(d, a, b);
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
template __global__ void multiplies<__half>(float*);
"""


ASKING = """
#include "common/simt.h"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWanted = true;
#else
constexpr bool kWanted = false;
#endif
template <int kAt> __global__ void asks(int* out) {
  static_assert(dalle::kArchitecture == 90 || dalle::kArchitecture == 0);
  static_assert(dalle::kArchitectureSpecific == kWanted);
  out[kAt] = 1;
}
template __global__ void asks<0>(int*);
"""


def test_sm_90_and_sm_90a_differ(tmp_path):
    """A build holds PTX for sm_90 too: instructions of sm_90a alone must not get into it."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "asking.cu"
    source.write_text(ASKING)
    both = [f"--generate-code=arch={a},code={a}" for a in ("compute_90", "compute_90a")]
    command = [nvcc, "-std=c++20", *both, f"-I{ROOT / 'csrc'}", "-c", source]
    subprocess.run([*command, "-o", tmp_path / "object"], check=True)


def test_reads_ptxas_and_machine_code():
    kernels = kernel_report.parse_ptxas(PTXAS, "sm_80")
    assert kernels["_Z4fullv"] == Kernel(registers=255, stack=96, spills=180, shared=4096)
    assert kernels["_Z5emptyv"] == Kernel(registers=4)
    both = kernel_report.parse_ptxas(PTXAS + PTXAS.replace("sm_80", "sm_90a"), "sm_90a")
    assert both == kernels
    opcodes = kernel_report.parse_machine_code(MACHINE_CODE)
    assert opcodes == {"_Z4fullv": Counter(["MOV", "LDGSTS", "HMMA", "STL"])}


def test_short_names():
    names = ["_ZN5dalle4rootI6__halfLi2EEEvNS_6ParamsEPd", "_Z5plainPf"]
    assert list(kernel_report.demangle(names).values()) == ["root<__half, 2>", "plain"]


def test_each_problem_has_its_line():
    budgets = [Budget("f", 64), Budget("f<__half", 128, ("HMMA", "!RED"))]
    good = Kernel(registers=128, opcodes=Counter({"HMMA": 3}))
    assert kernel_report.problems("f<__half, 2>", good, budgets) == []
    bad = Kernel(registers=129, stack=8, spills=4, opcodes=Counter({"LDL": 2, "RED": 1}))
    lines = kernel_report.problems("f<__half, 2>", bad, budgets)
    assert [line.split(": ", 1)[1] for line in lines] == [
        "registers must be at most 128, got 129",
        "spills and stack must be 0 bytes, got 4 and 8",
        "LDL must be absent, got 2",
        "HMMA must be in the machine code, got none",
        "RED must be absent, got 1",
    ]
    assert kernel_report.problems("g", good, budgets) == [
        "g: budget must have a row for it, got none"
    ]


def test_what_a_build_kept_must_be_there(tmp_path):
    with pytest.raises(
        RuntimeError, match="^kernel_report: .*x_cuda.compute_80.cubin must be there"
    ):
        kernel_report.kept_kernels(Path("x_cuda.cu"), "sm_80", tmp_path, PTXAS, "nvdisasm")


def test_every_budget_can_be_read():
    for path in ROOT.glob("csrc/*/*_cuda_budget.txt"):
        of_each = [kernel_report.read_budgets(path, a) for a in kernel_report.ARCHITECTURES]
        assert sum(of_each, []) and all(0 < b.registers <= 255 for b in sum(of_each, [])), path
        prefixes = [[budget.prefix for budget in budgets] for budgets in of_each]
        alike = all(of_one == prefixes[0] for of_one in prefixes)
        number = len(kernel_report.ARCHITECTURES) * len(prefixes[0])
        assert alike and len(kernel_report.read_budgets(path)) == number, (
            f"{path} must have a row per kernel and architecture"
        )


def test_a_row_is_for_one_architecture(tmp_path):
    table = tmp_path / "op_cuda_budget.txt"
    table.write_text("# kernel | architecture | registers | opcodes\nf | sm_80 | 64 | HMMA !RED\n")
    assert kernel_report.read_budgets(table, "sm_80") == [Budget("f", 64, ("HMMA", "!RED"))]
    source = tmp_path / "op_cuda.cu"
    kernel = Kernel(registers=64, opcodes=Counter({"HMMA": 1}))
    read = lambda *_: {"f": kernel}  # noqa: E731
    assert kernel_report.report([source], read, ("sm_80", "sm_90a")) == [
        "sm_90a: f: budget must have a row for it, got none"
    ]
    assert kernel_report.report([source], read, ("sm_80",)) == []


def test_real_spills_and_opcodes(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    disassembler = kernel_report.find_disassembler()
    kernels = kernel_report.compile_kernels(source, "sm_80", nvcc, disassembler)
    spills = kernel_report.problems("spills", kernels["spills"], [Budget("", 64)])
    indexes = kernel_report.problems("indexes", kernels["indexes"], [Budget("", 64)])
    assert any("spills and stack must be 0 bytes" in line for line in spills)
    assert any("spills and stack must be 0 bytes, got 0 and 128" in line for line in indexes)
    if disassembler is None:
        pytest.skip("opcodes: needs nvdisasm (pip install nvidia-cuda-nvdisasm)")
    assert any("LDL must be absent" in line for line in spills)
    claims = [Budget("", 64, ("HMMA", "LDSM", "LDGSTS"))]
    assert kernel_report.problems("multiplies", kernels["multiplies<__half>"], claims) == []
    assert len(kernel_report.problems("indexes", kernels["indexes"], claims)) >= 4
