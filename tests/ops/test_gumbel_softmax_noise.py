"""The noise of gumbel_softmax: the same integers everywhere, and the right distribution."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dalle_ext
from dalle_ext.reference import gumbel_softmax as reference
from support import levels

ROOT = Path(__file__).resolve().parents[2]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]


def test_reference_philox_known_answers():
    # Random123's vector for key 0, counter 0; the others have counters that no element has.
    words = reference.philox(torch.tensor(0), 1)[0].tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", SEEDS)
def test_kernel_draws_the_words_of_the_definition(seed):
    seed = torch.tensor(seed)
    words = torch.ops.dalle_ext._gumbel_softmax_words(seed, 4096)
    assert torch.equal(words.long() & 0xFFFFFFFF, reference.philox(seed, 1024).reshape(-1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("num_codes", "inner"), [(2, 1), (13, 1), (13, 5), (1024, 1), (100, 7)])
def test_codes_are_those_of_the_definition_on_every_back_end(num_codes, inner, seed, device):
    """With equal logits the code is the argmax of the noise alone: the words, bit for bit."""
    rows = 4 * inner
    logits = torch.zeros(4, num_codes, inner, device=device)
    noise = reference.gumbel_noise(torch.tensor(seed), rows, num_codes)
    index = dalle_ext.gumbel_softmax(logits, 1.0, seed=seed).index
    assert torch.equal(index.cpu().flatten(), noise.argmax(1))


@pytest.mark.parametrize("level", levels.LEVELS)
def test_lanes_against_plain_arithmetic(tmp_path, level):
    """tests/cpp: known answers, counters beyond 2**32, accuracy, every 16-bit number."""
    levels.run_cpp_test("gumbel_softmax_test.cpp", level, tmp_path)


DUMP = """
import hashlib, json, sys, torch, dalle_ext
words = torch.ops.dalle_ext._gumbel_softmax_words(torch.tensor(77), 8192)
logits = torch.linspace(-3, 3, 2 * 36 * 25).reshape(2, 36, 5, 5).sin().requires_grad_()
rows = logits.movedim(1, -1).contiguous()
out = [dalle_ext.gumbel_softmax(x, 0.5, dim=d, seed=5) for x, d in ((logits, 1), (rows, 3))]
sum((o.sample.square().sum() + o.kl.sum()) for o in out).backward()
numbers = [x.double().flatten().tolist() for x in (*out[0], *out[1], logits.grad)]
step_ = torch.ops.dalle_ext._adam16_step_  # AdamW16 would import torch's compiler
param, shape = torch.linspace(-1, 1, 20011), torch.linspace(-20, 3, 20011).sin()
codes, count = torch.zeros(2, 20011, dtype=torch.int16), torch.tensor(0)
for size in (1e-2, 1e-4, 3e-9, 1e-3):
    row = [[t] for t in (param, shape * size, codes[0], codes[1], count)]
    table = dalle_ext.TensorTable(row)
    rest = [None, None, None, None, torch.tensor(3), False, 1e-2, 0.9, 0.999, 1e-8, 0.1, 5.0]
    step_(*table.columns, table.host, table.rows, *rest)
grads = [(shape * 9).to(t) for t in (torch.float32, torch.float16, torch.bfloat16)]
grads[1][77] = float("inf")
grads += [g[:n].clone() for g in grads for n in (9, 16, 4129)]
squares = dalle_ext.unscale_gradients_(grads, torch.full((12,), 3.0), range(12)).sum_squares
bits = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (param, codes, squares)]
json.dump([dalle_ext.build_info()["cpu_isa"], words.tolist(), bits, numbers], sys.stdout)
"""


def test_each_instruction_set_agrees():
    """Gumbel-softmax nearly; every bit of AdamW16 and of the norm, which keep replicas equal."""
    results = []
    for level in levels.OFFERED:
        environment = dict(os.environ, DALLE_EXT_CPU_ISA=level)
        run = [sys.executable, "-c", DUMP]
        done = subprocess.run(run, capture_output=True, env=environment, cwd=ROOT, check=True)
        isa, words, bits, numbers = json.loads(done.stdout)
        assert isa == level
        results.append(((words, bits), [torch.tensor(x) for x in numbers]))
    for words, numbers in results[1:]:
        assert words == results[0][0]
        for a, b in zip(results[0][1], numbers, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_noise_is_gumbel():
    noise = reference.gumbel_noise(torch.tensor(1), 1000, 1000)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=0.006)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.015)
    assert (noise < 0).double().mean().item() == pytest.approx(math.exp(-1), abs=0.002)


@pytest.mark.parametrize(("num_codes", "inner"), [(16, 1), (13, 1), (16, 40), (13, 40)])
@pytest.mark.parametrize("seed", [2, 3])
def test_argmax_follows_the_categorical(num_codes, inner, seed):
    logits = torch.randn(num_codes, generator=torch.Generator().manual_seed(seed))
    rows = 40_000
    many = logits[None, :, None].expand(rows // inner, num_codes, inner).contiguous()
    index = dalle_ext.gumbel_softmax(many, 0.3, seed=seed).index
    expected = logits.double().softmax(0) * rows
    chi_square = ((index.flatten().bincount(minlength=num_codes) - expected) ** 2 / expected).sum()
    # Both tails: 1e-4 of chi-square with 12 and 15 degrees of freedom.
    low, high = {13: (1.9, 39.1), 16: (3.1, 44.3)}[num_codes]
    assert low < chi_square < high


def test_relaxed_sample_of_two_codes_is_uniform():
    """tau = 1, two equal logits: sigmoid of a logistic variable, uniform on (0, 1)."""
    y = dalle_ext.gumbel_softmax(torch.zeros(40_000, 2), 1.0, seed=4).sample[:, 0].double()
    for power in (1, 2, 3, 4):
        assert (y**power).mean().item() == pytest.approx(1 / (power + 1), abs=0.006)
    edges = (torch.arange(40_000) + 0.5) / 40_000
    assert (y.sort().values - edges).abs().max() < 0.011  # Kolmogorov-Smirnov at 1e-4


@pytest.mark.parametrize("tau", [2.0, 0.5, 1 / 16])
def test_moments_of_the_relaxed_sample(tau):
    generator = torch.Generator().manual_seed(5)
    logits, rows = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.3]), 60_000
    ours = dalle_ext.gumbel_softmax(logits.expand(rows, 5), tau, seed=5).sample.double()
    exponential = torch.empty(rows, 5, dtype=torch.float64).exponential_(generator=generator)
    theirs = ((logits.double() - exponential.log()) / tau).softmax(1)
    for power in (1, 2):
        a, b = ours**power, theirs**power
        deviation = ((a.var(0) + b.var(0)) / rows).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * deviation).all()


def test_rows_codes_and_seeds_are_independent():
    logits = torch.zeros(500, 128)

    def draw(seed):
        y = dalle_ext.gumbel_softmax(logits, 1.0, seed=seed).sample.double().log()
        return (y - y.mean(1, keepdim=True)).flatten()

    def correlation(a, b):
        return torch.corrcoef(torch.stack([a, b]))[0, 1].abs().item()

    one, two = draw(10), draw(11)
    limit = 4.5 / math.sqrt(logits.numel())
    assert correlation(one, two) < limit
    assert correlation(one, draw(10 + 2**32)) < limit  # the key's high half counts
    for lag in (2, 4, 64, 128, 256):
        assert correlation(one[:-lag], one[lag:]) < limit + 1 / 128  # the mean taken off: -1 / K
    assert one.unique().numel() > 0.99 * one.numel()
