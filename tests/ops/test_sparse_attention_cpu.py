"""The bf16 products of the CPU attention kernel against plain arithmetic, per instruction set."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import dalle_ext  # noqa: F401  (registers the op that names the instruction set)

ROOT = Path(__file__).resolve().parents[2]
LEVELS = {"v2": 16, "v3": 32, "v4": 64, "v4_bf16": 64}  # bytes of a vector


@pytest.mark.parametrize("level", LEVELS)
def test_pairs_against_plain_arithmetic(tmp_path, level):
    """tests/cpp: rounding to bfloat16, order of a pair, products that add up in float."""
    if list(LEVELS).index(level) > list(LEVELS).index(torch.ops.dalle_ext._cpu_isa()):
        pytest.skip(f"this processor has no {level}")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    flags = "-std=c++20 -O2 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi"
    flags += f" -march=x86-64-{level[:2]} -DDALLE_ISA_NAMESPACE=isa_{level}"
    flags += " -mavx512bf16" if level == "v4_bf16" else ""
    flags += f" -DDALLE_ISA_BYTES={LEVELS[level]} -I{ROOT}/csrc"
    source, program = ROOT / "tests/cpp/sparse_attention_pairs_test.cpp", tmp_path / "program"
    subprocess.run([compiler, *flags.split(), str(source), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
