"""C++ of sparse attention by itself: bf16 products per instruction set, the rules of a pattern."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import dalle_ext  # noqa: F401  (registers the op that names the instruction set)

ROOT = Path(__file__).resolve().parents[2]
RULES = "sparse_attention/sparse_attention.h"
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


def check_rules(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Runs tests/cpp/sparse_attention_rule_test.cpp with `text` as sparse_attention.h."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    (folder / RULES).parent.mkdir(exist_ok=True)
    (folder / RULES).write_text(text)
    source, program = ROOT / "tests/cpp/sparse_attention_rule_test.cpp", folder / "program"
    flags = ["-std=c++20", "-O1", f"-I{folder}", f"-I{ROOT}/csrc"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


def test_rules_of_a_pattern(tmp_path):
    """Bounds, ranges and walks of every kind, at every position of small streams."""
    text = (ROOT / "csrc" / RULES).read_text()
    run = check_rules(tmp_path, text)
    assert run.returncode == 0, run.stdout
    wrong = "latest = place + rule.columns;"
    assert text.count(wrong) == 1
    run = check_rules(tmp_path, text.replace(wrong, "latest = place + rule.columns - 1;"))
    assert run.returncode == 1 and "FAIL row: latest_place at" in run.stdout
