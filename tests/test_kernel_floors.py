"""Floors of kernels from their machine code: what is counted, and the tiles of a pattern."""

from __future__ import annotations

from pathlib import Path

import pytest

import kernel_code
import kernel_floors
import kernel_sizes
from dalle_ext import AttentionPattern
from kernel_code import Way, Work
from kernel_floors import Card, Case

CARD = Card("card", "sm_80", 10, 1e9, 0.5, 2, 1e12)
LOOPS = """
\t.section\t.text._Z4loopv,"ax",@progbits
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0020*/                   HMMA.16816.F32 R4, R4, R8, RZ ;
        /*0030*/                   HMMA.16816.F32 R4, R4, R8, RZ ;
.L_x_1:
        /*0040*/                   LDSM.16.M88.4 R4, [R3] ;
        /*0050*/                   LDSM.16.MT88.2 R4, [R3] ;
        /*0060*/                   HMMA.16816.F32 R4, R4, R8, RZ ;
        /*0070*/                   MUFU.EX2 R4, R4 ;
        /*0080*/              @!P0 BRA `(.L_x_1) ;
        /*0090*/               @P1 BRA `(.L_x_2) ;
        /*00a0*/               @P0 BRA `(.L_x_0) ;
.L_x_2:
        /*00b0*/                   EXIT ;
"""
STRAIGHT = """
\t.section\t.text._Z4straightv,"ax",@progbits
        /*0000*/                   MUFU.RCP R1, R2 ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   MUFU.EX2 R1, R2 ;
        /*0030*/                   FFMA R1, R2, R3, R4 ;
        /*0040*/                   MUFU.LG2 R1, R2 ;
        /*0050*/                   MUFU.EX2 R1, R2 ;
        /*0060*/                   MUFU.EX2 R1, R2 ;
.L_x_0:
        /*0070*/                   EXIT ;
"""


def test_loops_without_the_loops_in_them():
    code = kernel_code.parse_code(LOOPS)["_Z4loopv"]
    inner = Work(issue=5, hmma=1, mufu=1, shared=512 + 256)
    outer = Work(issue=5, hmma=2, mufu=0, shared=512)
    assert kernel_code.products(code) == [outer, inner]


def test_stretches_with_exponentials():
    code = kernel_code.parse_code(STRAIGHT)["_Z4straightv"]
    assert kernel_code.exponentials(code) == Work(issue=5, ffma=1, mufu=4)


def test_innermost_loops_with_plain_products():
    code = kernel_code.parse_code(LOOPS.replace("HMMA.16816.F32 R4, R4, R8, RZ", "FFMA R1, R2"))
    inner = Work(issue=5, ffma=1, mufu=1, shared=512 + 256)
    assert kernel_code.plain_products(code["_Z4loopv"], least=1) == inner
    assert kernel_code.plain_products(code["_Z4loopv"], least=2) == Work()


def test_floors_are_work_over_rates():
    code = kernel_code.parse_code(LOOPS)["_Z4loopv"]
    case = Case("loop", "", bytes=5e6, full=200, masked=300)  # 100 times the outer, 300 the inner
    got = kernel_floors.floors(case, kernel_floors.work_of_case(case, code)[0], CARD)
    a_clock = 1e6 / 10e9  # microseconds of a clock over ten multiprocessors
    wanted = {
        "issue": (100 * 5 + 300 * 5) / 4 * a_clock,
        "tensor": 500 / 0.5 * a_clock,
        "shared": (100 * 512 + 300 * 768) / 128 * a_clock,
        "FFMA": 0,
        "MUFU": 300 / 0.5 * a_clock,
        "bytes": 5.0,
    }
    assert got == pytest.approx(wanted)
    straight = kernel_code.parse_code(STRAIGHT)["_Z4straightv"]
    case = Case("straight", "", 0, warps=1000)
    got = kernel_floors.floors(case, kernel_floors.work_of_case(case, straight)[0], CARD)
    assert got == pytest.approx(
        {"issue": 1250 * a_clock, "FFMA": 500 * a_clock, "MUFU": 8000 * a_clock}
        | dict.fromkeys(("tensor", "shared", "bytes"), 0)
    )


@pytest.mark.parametrize("kind", ["row", "column", "causal"])
def test_tiles_hold_what_the_mask_shows(kind):
    """No visible pair is left out, and little else is computed; 7 % of causal's on the diagonal."""
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    for queries, keys, tile in ((32, 32, 64), (16, 32, 64), (16, 32, 32)):
        full, masked = kernel_sizes.visible_pairs(kind, queries, keys, tile)
        assert full > masked
        assert 0.84 < pattern.num_pairs / (full + masked) < 1
    one_by_one = sum(kernel_sizes.visible_pairs(kind, 1, 1, 1))
    assert one_by_one == pattern.num_pairs


def test_a_case_without_its_kernel_or_work_is_named():
    loop = kernel_code.parse_code(LOOPS)["_Z4loopv"]
    idle = kernel_code.parse_code(STRAIGHT)["_Z4straightv"]

    def table(op, code, but=""):
        cases = list(kernel_sizes.SIZES[op]())
        codes = {case.kernel: code for case in cases if case.kernel != but or not but}
        return kernel_floors.table(codes, "sm_80", cases)

    case = Case("bare", "1e9", 6e9)
    lines, wrong = kernel_floors.table({"bare<float>": loop}, "sm_90a", [case])
    assert wrong == [] and [line.split()[0] for line in lines] == ["H100", "H200"]
    assert "bytes 1395.3*" in lines[1]  # 6 GB at 4.3 TB/s
    lines, wrong = table("sparse_attention", idle)
    assert lines == [] and {line.split()[-3].rstrip(",") for line in wrong} == {"HMMA", "FFMA"}
    lines, wrong = table("gumbel_softmax", loop)
    assert lines == [] and all("must find stretches with MUFU, got none" in line for line in wrong)
    lines, wrong = table("formats", loop, but="formats_sum_kernel<(Format)0>")
    assert lines == [] and len(wrong) == 4
    assert wrong[0].endswith("kernel_floors must find a loop with LDG.128 2 STG.128 1, got none")
    assert wrong[3].startswith("kernel_sizes: formats_sum_kernel<(Format)0> must be a kernel, got")


BRANCHES = """
\t.section\t.text._Z8branchesv,"ax",@progbits
        /*0000*/                   BSSY B0, `(.L_x_3) ;
.L_x_0:
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.EF.128 R4, [R2.64] ;
        /*0030*/                   LDS R1, [R2] ;
        /*0040*/                   STS.128 [R2], R4 ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0060*/                   LDG.E R4, [R2.64] ;
.L_x_4:
        /*0070*/                   SHFL.BFLY PT, R1, R1, 0x1, 0x1f ;
        /*0080*/               @P2 BRA `(.L_x_4) ;
.L_x_2:
        /*0090*/               @P1 BRA `(.L_x_0) ;
        /*00a0*/              @!P3 EXIT ;
        /*00b0*/                   BSYNC B0 ;
        /*00c0*/                   MUFU.RCP R1, R2 ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   STG.E [R2.64], R1 ;
        /*00f0*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("ways", "wanted"),
    [
        ([Way(1, {"SHFL": 1})], [Work(2, shared=128)]),
        ([Way(1, {"LDG": 1})], [Work(5, shared=128)]),
        ([Way(1, {"LDG.128": 1})], [Work(6, shared=128 + 512)]),
        ([Way(1, {"SHFL": 3})], [Work(9, shared=384)]),  # the inner loop thrice in the outer one
        ([Way(1, {"SHFL": 1}), Way(1, {"LDG": 1})], [Work(2, shared=128), Work(3)]),
        ([Way(1, {"LDG.128": 1, "SHFL": 1})], [None]),  # on different branches
        ([Way(1, {"LDG.128": 2}, loop=False)], [Work(14, shared=2 * 640)]),
        ([Way(1, {"STG": 1}, loop=False)], [Work(10, shared=128)]),
        ([Way(1, {"LDG": 1}), Way(1, {"STG": 1}, loop=False)], [Work(5, shared=128), Work(5)]),
        ([Way(1, {"MUFU": 1}, loop=False)], [None]),  # BSYNC goes on behind it
    ],
)
def test_shortest_ways_that_meet_what_a_size_needs(ways, wanted):
    code = kernel_code.parse_code(BRANCHES)["_Z8branchesv"]
    assert kernel_code.works_of(code, ways) == wanted


def test_ways_add_up_and_few_blocks_leave_multiprocessors_idle():
    code = kernel_code.parse_code(BRANCHES)["_Z8branchesv"]
    ways = (Way(100, {"SHFL": 1}), Way(7, {"STG": 1}, loop=False))
    work, missing = kernel_floors.work_of_case(Case("branches", "", 0, ways=ways), code)
    assert (work, missing) == (Work(100 * 2 + 7 * 8, shared=100 * 128), [])
    all_busy = kernel_floors.floors(Case("branches", "", 0), work, CARD)
    one_busy = kernel_floors.floors(Case("branches", "", 0, blocks=1), work, CARD)
    assert one_busy == pytest.approx({pipe: 10 * us for pipe, us in all_busy.items()})
    work, missing = kernel_floors.work_of_case(Case("", "", 0, ways=(Way(1, {"HMMA": 4}),)), code)
    assert (work, missing) == (Work(), ["a loop with HMMA 4"])


def test_bytes_of_shared_memory():
    names = ("LDGSTS.E.BYPASS.128.ZFILL", "LDGSTS.E", "STS.U16", "STS.64", "LDS.128", "LDSM.16.M88")
    assert [kernel_code.work_of([name]).shared for name in names] == [512, 128, 64, 256, 128, 128]


def test_every_op_has_sizes():
    ops = {path.parent.name for path in Path(__file__).parents[1].glob("csrc/*/*_cuda.cu")}
    assert set(kernel_sizes.SIZES) == ops
    for op, cases in kernel_sizes.SIZES.items():
        listed = list(cases())
        assert listed and all(case.kernel.startswith(f"{op}_") for case in listed)
        # More than bytes: some stretch of the machine code is counted.
        assert all(c.ways or c.full or c.masked or c.warps or c.plain for c in listed)


def test_parts_of_the_depth_are_those_of_the_kernel():
    """Of powersgd_cuda_products.cuh: 256 blocks or so, at least 128 of the depth in each."""
    assert kernel_sizes.factor_parts(3968, 3968) == 8
    assert kernel_sizes.factor_parts(128, 3968) == 16
    assert kernel_sizes.factor_parts(128, 256) == 2
    assert kernel_sizes.factor_parts(100_000, 64) == 1
