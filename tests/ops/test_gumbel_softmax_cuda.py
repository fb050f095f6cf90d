"""gumbel_softmax on each back end: every layout of the CUDA kernels, one noise, one result."""

from __future__ import annotations

import math

import pytest
import torch

import dalle_ext
from dalle_ext.reference import gumbel_softmax as reference
from support import approximate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [  # (R, K): each layout with K innermost, whole and cut vectors, odd K, beyond registers
    (37, 2),
    (35, 29),
    (9, 32),
    (5, 250),
    (7, 256),
    (48, 1000),
    (48, 1023),
    (40, 4095),
    (6, 8191),
    (4, 16389),
    (2, 65536),
]
COLUMNS = [(2, 2, 33), (1, 127, 40), (2, 64, 20), (1, 130, 40), (1, 1030, 40), (1, 2051, 20)]
CASES = [(shape, 1) for shape in ROWS] + [(shape, 1) for shape in COLUMNS]


def logits_of(shape, dtype, device, offset=0):
    """Normal numbers that begin `offset` elements into their storage."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(count)
    numbers = 2.0 * torch.randn(count + offset, generator=generator, dtype=torch.float64)
    return numbers.to(dtype).to(device)[offset:].view(shape)


def define(logits, tau, dim, seed):
    tau = torch.tensor(tau, dtype=torch.float64, device=logits.device)
    seed = torch.tensor(seed, device=logits.device)
    return reference.gumbel_softmax(logits, tau, dim=dim, hard=False, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_each_layout(backend, device, dtype, shape, dim):
    logits = logits_of(shape, dtype, device).requires_grad_()
    weight = logits_of(shape, dtype, device, offset=8)
    got = dalle_ext.gumbel_softmax(logits, 0.25, dim=dim, seed=21)
    same, exact = (define(x, 0.25, dim, 21) for x in (logits.detach(), logits.detach().double()))

    allowed = approximate.sample_error(21, logits.detach(), dim, 0.25) * exact[0]
    approximate.assert_as_accurate(backend, got.sample.detach(), same[0], exact[0], allowed)
    assert (got.kl - exact[2]).abs().max() < 2e-5
    assert torch.equal(got.index, exact[1])  # with this seed no two codes are nearly equal

    def gradient(function, x):
        x = x.detach().requires_grad_()
        y, _, kl = function(x)
        loss = (y.double() * weight.double()).sum() + kl.double().sum()
        return torch.autograd.grad(loss, x)[0]

    ours = gradient(lambda x: dalle_ext.gumbel_softmax(x, 0.25, dim=dim, seed=21), logits)
    plain = gradient(lambda x: define(x, 0.25, dim, 21), logits)
    true = gradient(lambda x: define(x, 0.25, dim, 21), logits.double())
    allowed = approximate.gradient_error(21, logits.detach(), dim, 0.25, weight, 1.0)
    approximate.assert_as_accurate(backend, ours, plain, true, allowed)


def test_noise_is_as_exact_as_documented(backend, device):
    """log(y0 / y1) is the difference of two noises; docs/ops.md says how far each may be off."""
    logits = torch.zeros(4000, 2, device=device)
    y = dalle_ext.gumbel_softmax(logits, 1.0, seed=5).sample.double().cpu().log()
    noise = reference.gumbel_noise(torch.tensor(5), 4000, 2)
    error = (y[:, 0] - y[:, 1] - (noise[:, 0] - noise[:, 1])).abs()
    bound = 2 * approximate.UNIT + approximate.UNIT * noise.abs().clamp(min=math.log(2))
    bound = (bound + approximate.UNIT + 4 * approximate.ROUNDING * noise.abs()).sum(1)  # and ex2
    assert bool((error <= bound).all())
    if backend == "emulated":
        assert (error / bound).max() > 0.5, "the emulator's instructions are off by what they may"


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 5])
@pytest.mark.parametrize("shape", [(200, 7), (60, 130), (8, 1022), (3, 5000), (2, 33, 17)])
def test_noise_alone_chooses_the_same_codes(device, shape, seed):
    """Equal logits: the code is a function of the integers that were drawn."""
    index = dalle_ext.gumbel_softmax(torch.zeros(shape, device=device), 1.0, seed=seed).index
    rows = index.numel()
    noise = reference.gumbel_noise(torch.tensor(seed), rows, shape[1])
    assert torch.equal(index.cpu().flatten(), noise.argmax(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_storage_that_is_not_aligned(device, dtype, offset):
    logits = logits_of((3, 300), dtype, device, offset).requires_grad_()
    aligned = logits.detach().clone().requires_grad_()
    results = []
    for x in (logits, aligned):
        out = dalle_ext.gumbel_softmax(x, 0.5, seed=3)
        loss = out.sample.square().sum() + out.kl.sum()
        results.append((*out, *torch.autograd.grad(loss, x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(6, 515), (1, 1030, 9)])
def test_twice_the_same_bits(device, shape):
    logits = logits_of(shape, torch.float32, device).requires_grad_()
    results = []
    for _ in range(2):
        out = dalle_ext.gumbel_softmax(logits, 1 / 16, hard=True, seed=4)
        loss = out.sample.sin().sum() + out.kl.sum()
        results.append((*out, *torch.autograd.grad(loss, logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_first_of_equal_codes_is_chosen(device):
    """The noise vanishes beside 1e30, so all codes that have it are equal."""
    logits = torch.zeros(4, 600, device=device)
    for row, places in enumerate([(5, 6), (3, 599), (130, 131, 400), (0, 300)]):
        logits[row, list(places)] = 1e30
    index = dalle_ext.gumbel_softmax(logits, 1.0, seed=5).index
    assert index.tolist() == [5, 3, 130, 0]


@pytest.mark.parametrize("logit", [-torch.finfo(torch.float32).max, 1e30])
def test_rows_without_any_difference(device, logit):
    out = dalle_ext.gumbel_softmax(torch.full((2, 10), logit, device=device), 1.0, seed=6)
    assert torch.equal(out.index.cpu(), torch.zeros(2, dtype=torch.int64))
    assert torch.allclose(out.sample, torch.full_like(out.sample, 0.1))
    assert out.kl.abs().max() < 1e-6


@pytest.mark.emulated
def test_a_warp_takes_four_rows_and_a_block_one(emulated_counts, emulator):
    blocks = []
    for shape in [(64, 9), (64, 200), (6, 1000), (2, 8192)]:
        before = emulated_counts()
        with emulator():
            dalle_ext.gumbel_softmax(torch.zeros(shape), 1.0, seed=7)
        counts = emulated_counts()
        counts.subtract(before)
        blocks.append((counts["blocks"], counts["barriers"]))
    assert [count for count, _ in blocks] == [2, 16, 6, 2]
    assert [barriers for _, barriers in blocks[:2]] == [0, 0], "small rows meet in shuffles only"
