"""fp32 attention on tensor cores (3xTF32), which `DALLE_EXT_CUDA_FP32=3xtf32` asks for.

The emulated `mma` truncates as much as any card that was measured (docs/emulator.md). Errors are
those against float64, beside the errors of torch's fp32 SDPA with the mask.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_ext
from dalle_ext import AttentionPattern
from dalle_ext.ops.sparse_attention import KINDS
from dalle_ext.testing import gradients, max_error, rms_error

NAMES = ("out", "grad_q", "grad_k", "grad_v")


@pytest.fixture(params=[pytest.param("emulated", marks=pytest.mark.emulated),
                        pytest.param("cuda", marks=pytest.mark.cuda)])  # fmt: skip
def backend(request, monkeypatch, emulator):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device here")
    monkeypatch.setenv("DALLE_EXT_CUDA_FP32", "3xtf32")
    if request.param == "cuda":
        yield request.param
        return
    with emulator():
        yield request.param


def normal(pattern, size, heads=1):
    """q, k, v and grad_out (1, H, T, D)."""
    draw = torch.Generator().manual_seed(size)
    return list(torch.randn(4, 1, heads, pattern.length, size, generator=draw))


def run(function, inputs):
    *leaves, grad = inputs
    return (function(*leaves), *gradients(function, leaves, grad))


def ours(pattern, inputs, device="cpu", scale=None):
    got = run(
        lambda *x: dalle_ext.sparse_attention(*x, pattern, scale), [x.to(device) for x in inputs]
    )
    return [x.cpu() for x in got]


def errors(pattern, inputs, device="cpu", scale=None):
    """For each result: its name, max and rms error, and the same of torch's."""
    mask = pattern.mask()
    plain = lambda *x: sdpa(*x, attn_mask=mask, scale=scale)  # noqa: E731
    same, exact = run(plain, inputs), run(plain, [x.double() for x in inputs])
    for name, g, s, e in zip(NAMES, ours(pattern, inputs, device, scale), same, exact, strict=True):
        yield name, (max_error(g, e), rms_error(g, e)), (max_error(s, e), rms_error(s, e)), e


def assert_no_worse(pattern, inputs, device, *, rms=1.0, largest=2.0, scale=None):
    for name, (most, mean), (torch_most, torch_mean), _ in errors(pattern, inputs, device, scale):
        assert mean <= rms * torch_mean, f"{name}: rms {mean:.3e}, torch {torch_mean:.3e}"
        assert most <= largest * torch_most, f"{name}: {most:.3e}, torch {torch_most:.3e}"


@pytest.mark.parametrize("kind", KINDS)
def test_no_worse_than_torch(device, kind):
    pattern = AttentionPattern(kind, text_len=50, grid=(7, 16), kernel_size=5)
    assert_no_worse(pattern, normal(pattern, 64), device)


@pytest.mark.parametrize("size", [24, 33, 128])
def test_head_sizes(device, size):
    """Padded with zeros to 32, 64 and 128; rows that do not begin at multiples of 16 bytes."""
    pattern = AttentionPattern("row", text_len=30, grid=(4, 16))
    assert_no_worse(pattern, normal(pattern, size), device, rms=1.1)


def spread(x):
    """Factors of 1e-2 to 1e2, another for each number."""
    draw = torch.Generator().manual_seed(5)
    return [t * 10 ** (4 * torch.rand(t.shape, generator=draw) - 2) for t in x]


def one_huge_key(x):
    x[1][:, :, 3] *= 100
    return x


def cancelling(x):
    """The two halves of a score nearly cancel, and values share a large part."""
    q, k, v, grad = x
    half = q.size(-1) // 2
    k[..., half:] = -k[..., :half]
    q[..., half:] = q[..., :half] * (1 + 1e-4 * q[..., half:])
    return [q, k, v + 1000, grad]


@pytest.mark.parametrize("change", [one_huge_key, cancelling], ids=lambda f: f.__name__)
def test_adversarial(device, change):
    pattern = AttentionPattern("row", text_len=50, grid=(6, 16))
    assert_no_worse(pattern, change(normal(pattern, 64)), device, rms=1.5)


@pytest.mark.parametrize("change", [spread, lambda x: [30 * t for t in x]], ids=["1e4", "large"])
def test_scores_in_the_hundreds(device, change):
    """What keeps 3xTF32 from being the default: truncated sums of scores are further off."""
    pattern = AttentionPattern("row", text_len=50, grid=(6, 16))
    assert_no_worse(pattern, change(normal(pattern, 64)), device, rms=4.0, largest=5.0)


def test_denormals(device):
    """Values that fp32 holds with a few bits: off by a unit in the last place or two."""
    pattern = AttentionPattern("row", text_len=50, grid=(6, 16))
    q, k, v, grad = normal(pattern, 64)
    for _, (most, _), (torch_most, _), exact in errors(
        pattern, [q, k, v * 1e-40, grad * 1e-2], device
    ):
        assert most <= 2 * torch_most + 2 * 2.0**-149, float(exact.abs().max())


def test_one_visible_key_is_copied(device):
    """Every bit: 3 words of tf32 hold a float."""
    pattern = AttentionPattern("causal", text_len=1, grid=(1, 1))
    q, k, v, grad = normal(pattern, 64)
    assert torch.equal(ours(pattern, [q, k, v, grad], device)[0][0, 0, 0], v[0, 0, 0])


def test_bad_numbers_stay(device):
    pattern = AttentionPattern("row", text_len=5, grid=(3, 9))
    for which in range(3):
        for bad in (float("nan"), float("inf")):
            inputs = normal(pattern, 24)
            inputs[which][0, 0, 20, 2] = bad
            out = ours(pattern, inputs, device)[0]
            assert not bool(out[0, 0, 20].isfinite().all())
            assert which == 2 or bool(out[0, 0, :5].isfinite().all())  # 0 * v is in sums of a tile


def test_same_bits_twice_and_in_a_batch(device):
    pattern = AttentionPattern("conv", text_len=20, grid=(6, 9), kernel_size=3)
    inputs = normal(pattern, 32, heads=2)
    first, again = (ours(pattern, inputs, device) for _ in range(2))
    alone = ours(pattern, [x[:, 1:] for x in inputs], device)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[:, 1:], c)


@pytest.mark.emulated
def test_it_is_the_tensor_cores(emulator, emulated_counts, monkeypatch):
    """3 products for scores, 4 for sums, each 16 x 8 x 8; none unless asked for, or D <= 16."""
    pattern = AttentionPattern("causal", text_len=64, grid=(1, 64))
    with emulator():
        for wish, size, products in (("3xtf32", 64, 7), ("3xtf32", 16, 0), ("", 64, 0)):
            monkeypatch.setenv("DALLE_EXT_CUDA_FP32", wish)
            before = emulated_counts()
            q = torch.zeros(1, 1, pattern.length, size)
            dalle_ext.sparse_attention(q, q, q, pattern)
            done = emulated_counts() - before
            tiles = 3 * 64 * 64  # pairs that warps compute: two on the diagonal, one below
            assert done["mma"] == products * tiles * size / (16 * 8 * 8)
            assert done["conflicts"] == 0


@pytest.mark.emulated
def test_an_unknown_wish_is_an_error(emulator, monkeypatch):
    monkeypatch.setenv("DALLE_EXT_CUDA_FP32", "tf32")
    pattern = AttentionPattern("row", text_len=2, grid=(2, 2))
    q = torch.zeros(1, 1, 6, 32)
    with (
        emulator(),
        pytest.raises(RuntimeError, match="DALLE_EXT_CUDA_FP32 must be 3xtf32 or plain, got tf32"),
    ):
        dalle_ext.sparse_attention(q, q, q, pattern)
