"""The instruction sets that CPU kernels are compiled for, and what a compiler is told for each."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import dalle_ext

ROOT = Path(__file__).resolve().parents[2]
# Bytes of a vector. "generic" is the build of other processors; any machine can run it.
BYTES = {"generic": 16, "v2": 16, "v3": 32, "v4": 64, "v4_bf16": 64}
LEVELS = list(BYTES)
CHOSEN = dalle_ext.build_info()["cpu_isa"] or "generic"  # the highest here, unless told otherwise
# What DALLE_EXT_CPU_ISA may name; the generic build has nothing to choose from.
OFFERED = LEVELS[1 : LEVELS.index(CHOSEN) + 1] or ["generic"]


def run_cpp_test(source: str, level: str, folder: Path) -> None:
    """Compiles `tests/cpp/<source>` for an instruction set, without torch, and runs it."""
    if LEVELS.index(level) > LEVELS.index(CHOSEN):
        pytest.skip(f"this processor has no {level}")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    flags = "-std=c++20 -O2 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi"
    flags += f" -DDALLE_ISA={level} -DDALLE_ISA_NAMESPACE=isa_{level}"
    flags += f" -DDALLE_ISA_BYTES={BYTES[level]} -I{ROOT}/csrc"
    flags += " -DDALLE_ISA_GENERIC" if level == "generic" else f" -march=x86-64-{level[:2]}"
    flags += " -mavx512bf16" if level == "v4_bf16" else ""
    program = folder / "program"
    command = [compiler, *flags.split(), ROOT / "tests/cpp" / source, "-o", program]
    subprocess.run(command, check=True)
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
