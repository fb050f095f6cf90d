"""Floors of kernels from their machine code: what is counted, and the tiles of a pattern."""

from __future__ import annotations

import pytest

import kernel_floors
from dalle_ext import AttentionPattern
from kernel_floors import Card, Case, Work

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
    code = kernel_floors.parse_code(LOOPS)["_Z4loopv"]
    inner = Work(issue=5, hmma=1, mufu=1, shared=512 + 256)
    outer = Work(issue=5, hmma=2, mufu=0, shared=512)
    assert kernel_floors.products(code) == [outer, inner]


def test_stretches_with_exponentials():
    code = kernel_floors.parse_code(STRAIGHT)["_Z4straightv"]
    assert kernel_floors.exponentials(code) == Work(issue=5, ffma=1, mufu=4)


def test_innermost_loops_with_plain_products():
    code = kernel_floors.parse_code(LOOPS.replace("HMMA.16816.F32 R4, R4, R8, RZ", "FFMA R1, R2"))
    inner = Work(issue=5, ffma=1, mufu=1, shared=512 + 256)
    assert kernel_floors.plain_products(code["_Z4loopv"], least=1) == inner
    assert kernel_floors.plain_products(code["_Z4loopv"], least=2) == Work()


def test_floors_are_work_over_rates():
    code = kernel_floors.parse_code(LOOPS)["_Z4loopv"]
    case = Case("loop", "", bytes=5e6, full=200, masked=300)  # 100 times the outer, 300 the inner
    got = kernel_floors.floors(case, code, CARD)
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
    straight = kernel_floors.parse_code(STRAIGHT)["_Z4straightv"]
    got = kernel_floors.floors(Case("straight", "", 0, warps=1000), straight, CARD)
    assert got == pytest.approx(
        {"issue": 1250 * a_clock, "FFMA": 500 * a_clock, "MUFU": 8000 * a_clock}
        | dict.fromkeys(("tensor", "shared", "bytes"), 0)
    )


@pytest.mark.parametrize("kind", ["row", "column", "causal"])
def test_tiles_hold_what_the_mask_shows(kind):
    """No visible pair is left out, and little else is computed; 7 % of causal's on the diagonal."""
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    for queries, keys, tile in ((32, 32, 64), (16, 32, 64), (16, 32, 32)):
        full, masked = kernel_floors.visible_pairs(kind, queries, keys, tile)
        assert full > masked
        assert 0.84 < pattern.num_pairs / (full + masked) < 1
    one_by_one = sum(kernel_floors.visible_pairs(kind, 1, 1, 1))
    assert one_by_one == pattern.num_pairs


def test_a_case_without_its_kernel_or_work_is_named():
    codes = kernel_floors.parse_code(LOOPS)
    named = {"formats_pack_kernel<(Format)0, float>": codes["_Z4loopv"]}
    lines, wrong = kernel_floors.table(named, "sm_90a", "formats")
    assert [line.split()[0] for line in lines] == ["H100", "H200"]
    assert "bytes 1395.3*" in lines[1]  # 6 GB at 4.3 TB/s
    assert len(wrong) == 1 and wrong[0].startswith("kernel_floors: formats_unpack_kernel<")
    idle = kernel_floors.parse_code(STRAIGHT)["_Z4straightv"]
    named = {case.kernel: idle for case in kernel_floors.cases()}
    lines, wrong = kernel_floors.table(named, "sm_80", "sparse_attention")
    assert lines == [] and {line.split()[-3].rstrip(",") for line in wrong} == {"HMMA", "FFMA"}
    named = {case.kernel: codes["_Z4loopv"] for case in kernel_floors.cases()}
    lines, wrong = kernel_floors.table(named, "sm_80", "gumbel_softmax")
    assert lines == [] and all("must find stretches with MUFU, got none" in line for line in wrong)
