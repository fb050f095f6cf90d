"""How the CUDA kernels deal queries out to blocks: the plan, and emulated plans of two devices."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import dalle_ext
from dalle_ext import AttentionPattern
from dalle_ext.reference.sparse_attention import sparse_attention as reference
from dalle_ext.testing import assert_as_accurate, gradients

ROOT = Path(__file__).resolve().parents[2]


def test_plan_against_list_scheduling(tmp_path):
    """tests/cpp: no other number of parts, nor of blocks side by side, ends 5 % earlier."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    source, program = ROOT / "tests/cpp/sparse_attention_plan_test.cpp", tmp_path / "program"
    flags = ["-std=c++20", "-O2", f"-I{ROOT}/csrc"]
    subprocess.run([compiler, *flags, source, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def heads_of(heads, length, size):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(4, 1, heads, length, size, generator=generator).half().unbind(0)


def copied_pairs(emulator, counts, pattern, tensors):
    """Blocks, and pairs of tiles that they have copied to shared memory, of a forward."""
    with emulator():
        before = counts()
        dalle_ext.sparse_attention(*tensors, pattern)
        done = counts() - before
    return done["blocks"], done["copied_bytes"] / (2 * 64 * tensors[0].shape[-1] * 2)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("device", "multiprocessors", "size", "blocks", "pairs"),
    [
        # Alone on a multiprocessor: 4 steps a head, each a block with all of its text.
        ("sm_80", 108, 128, 4, 3 + 3 + 3 + 4),
        ("sm_90", 132, 128, 4, 3 + 3 + 3 + 4),
        # Two side by side, one a head: of 3 text tiles an A100 keeps none, an H100 one. A tile that
        # ends one step and begins the next stays.
        ("sm_80", 1, 128, 1, 1 + 1 + 3 + 4),
        ("sm_90", 1, 128, 1, 1 + 1 + 1 + 3),
        ("sm_80", 1, 64, 1, 3 + 1),
        ("sm_90", 1, 64, 1, 3 + 1),
    ],
)
def test_both_plans(
    emulator, emulated_counts, monkeypatch, device, multiprocessors, size, blocks, pairs
):
    """What is copied follows from the text that a block keeps: shared memory of sm_80 and sm_90."""
    monkeypatch.setenv("DALLE_EMULATOR_DEVICE", device)
    monkeypatch.setenv("DALLE_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
    pattern = AttentionPattern("causal", text_len=192, grid=(8, 8))
    q, k, v, grad = heads_of(2, pattern.length, size)
    got = copied_pairs(emulator, emulated_counts, pattern, (q, k, v))
    assert got == (2 * blocks, 2 * pairs)
    with emulator():
        ours = lambda *x: dalle_ext.sparse_attention(*x, pattern)  # noqa: E731
        results = (ours(q, k, v), *gradients(ours, (q, k, v), grad))
    plain = lambda *x: reference(*x, pattern)  # noqa: E731
    same = (plain(q, k, v), *gradients(plain, (q, k, v), grad))
    true = [x.double() for x in (q, k, v)]
    exact = (plain(*true), *gradients(plain, true, grad.double()))
    for g, s, e in zip(results, same, exact, strict=True):
        assert_as_accurate(g, s, e)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DALLE_EMULATOR_DEVICE", "sm_70", "must be sm_80 or sm_90, got sm_70"),
        ("DALLE_EMULATOR_MULTIPROCESSORS", "0", "must be a positive number, got 0"),
    ],
)
def test_devices_that_the_emulator_is_not(emulator, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    q = torch.zeros(1, 1, 4, 16).half()
    with emulator(), pytest.raises(RuntimeError, match=f"emulator: {name} {message}"):
        dalle_ext.sparse_attention(q, q, q, AttentionPattern("row", text_len=0, grid=(2, 2)))
