"""C++ of sparse attention by itself: bf16 products per instruction set, the rules of a pattern."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support import levels

ROOT = Path(__file__).resolve().parents[2]
RULES = "sparse_attention/sparse_attention.h"


@pytest.mark.parametrize("level", levels.LEVELS)
def test_pairs_against_plain_arithmetic(tmp_path, level):
    """tests/cpp: rounding to bfloat16, order of a pair, products that add up in float."""
    levels.run_cpp_test("sparse_attention_pairs_test.cpp", level, tmp_path)


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
    wrong = "latest = index + rule.columns;"
    assert text.count(wrong) == 1
    run = check_rules(tmp_path, text.replace(wrong, "latest = index + rule.columns - 1;"))
    assert run.returncode == 1 and "FAIL row: latest_index at" in run.stdout
