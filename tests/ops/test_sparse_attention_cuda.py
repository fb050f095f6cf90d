"""The tensor-core kernels of sparse attention: every head size, tile shape, stride; and their work.

`tests/ops/test_sparse_attention.py` runs on all back ends too; what is here aims at what these
kernels alone have: tiles of 64, text that stays in shared memory or not, heads padded with zeros.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dalle_ext
from dalle_ext import AttentionPattern
from dalle_ext.ops.sparse_attention import KINDS
from dalle_ext.reference.sparse_attention import sparse_attention as reference
from dalle_ext.testing import assert_as_accurate, gradients

HALVES = [torch.float16, torch.bfloat16]
BORDER = 12345.0


def heads_of(shape, dtype, device, padding=8):
    """q, k, v, grad as slices of one buffer: rows begin at multiples of 2 * padding bytes."""
    batch, heads, length, size = shape
    wide = -(-(size + padding) // padding) * padding
    generator = torch.Generator().manual_seed(size)
    buffer = torch.full((4, batch, length + 1, heads, wide), BORDER, dtype=dtype)
    numbers = torch.randn(4, batch, length, heads, size, generator=generator)
    buffer[:, :, :length, :, :size] = numbers.to(dtype)
    return buffer.to(device)[:, :, :length, :, :size].transpose(2, 3).unbind(0)


def run(function, inputs, grad):
    return (function(*inputs), *gradients(function, inputs, grad))


def assert_matches(pattern, heads, size, dtype, device, *, batch=2, padding=8, scale=None):
    q, k, v, grad = heads_of((batch, heads, pattern.length, size), dtype, device, padding)
    plain = lambda *x: reference(*x, pattern, scale)  # noqa: E731
    got = run(lambda *x: dalle_ext.sparse_attention(*x, pattern, scale), (q, k, v), grad)
    same = run(plain, (q, k, v), grad)
    exact = run(plain, [x.double() for x in (q, k, v)], grad.double())
    for g, s, e in zip(got, same, exact, strict=True):
        assert_as_accurate(g, s, e)


@pytest.mark.parametrize("size", [2, 16, 30, 32, 34, 48, 64, 72, 80, 90, 96, 112, 128])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_head_sizes(device, dtype, size):
    pattern = AttentionPattern("row", text_len=70, grid=(6, 16))
    assert_matches(pattern, 1, size, dtype, device)


@pytest.mark.parametrize(
    ("text_len", "grid"),
    [(0, (3, 5)), (1, (1, 1)), (64, (8, 8)), (13, (9, 11)), (130, (12, 12)), (63, (2, 65))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_tiles(device, kind, text_len, grid):
    pattern = AttentionPattern(kind, text_len=text_len, grid=grid, kernel_size=5)
    assert_matches(pattern, 2, 64, torch.float16, device)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(KINDS),
    text_len=st.integers(0, 150),
    grid=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    half=st.integers(0, 7),
    heads=st.integers(1, 2),
    size=st.integers(1, 64).map(lambda n: 2 * n),
    padding=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from(HALVES),
)
def test_any_shape(device, kind, text_len, grid, half, heads, size, padding, dtype):
    pattern = AttentionPattern(kind, text_len=text_len, grid=grid, kernel_size=2 * half + 1)
    q, k, v, grad = heads_of((1, heads, pattern.length, size), dtype, device, padding)
    got = run(lambda *x: dalle_ext.sparse_attention(*x, pattern), (q, k, v), grad)
    want = run(lambda *x: reference(*x, pattern), [x.double() for x in (q, k, v)], grad.double())
    unit = torch.finfo(dtype).eps
    for g, w in zip(got, want, strict=True):
        largest = max(1.0, float(w.abs().max()))
        torch.testing.assert_close(g.double(), w, rtol=8 * unit, atol=8 * unit * largest)


@pytest.mark.parametrize("padding", [2, 4, 8], ids=["4 bytes", "8 bytes", "16 bytes"])
@pytest.mark.parametrize("kind", ["column", "conv"])
def test_rows_that_begin_at_multiples_of(device, kind, padding):
    pattern = AttentionPattern(kind, text_len=20, grid=(7, 12), kernel_size=3)
    assert_matches(pattern, 2, 36, torch.float16, device, padding=padding)


@pytest.mark.parametrize(("size", "padding"), [(33, 8), (32, 1), (136, 8)])
def test_what_tensor_cores_cannot_take(device, size, padding):
    pattern = AttentionPattern("row", text_len=9, grid=(4, 7))
    assert_matches(pattern, 1, size, torch.float16, device, padding=padding)


@pytest.mark.parametrize("kind", ["causal", "conv"])
def test_text_beyond_shared_memory(device, kind):
    """13 tiles; an A100 keeps 8 of them, an H100 12."""
    pattern = AttentionPattern(kind, text_len=830, grid=(4, 8), kernel_size=3)
    assert_matches(pattern, 1, 64, torch.float16, device)


@pytest.mark.parametrize("offsets", [(0, 1, 31, 32, 33, 95), (0, 130), tuple(range(0, 200, 3))])
def test_any_offsets(device, offsets):
    pattern = AttentionPattern("conv", text_len=33, grid=(20, 10), offsets=offsets)
    assert_matches(pattern, 1, 32, torch.float16, device)


def test_offsets_beyond_the_table(device):
    """8,100 offsets back do not fit: these take the kernels without tensor cores."""
    pattern = AttentionPattern("conv", text_len=0, grid=(1, 8110), offsets=(0, 1, 8100))
    q = torch.randn(1, 1, pattern.length, 2, device=device).half()
    got = dalle_ext.sparse_attention(q, q, q, pattern)[0, 0, -9:].float()
    keys = q[0, 0].float()
    places = torch.arange(8101, 8110)
    seen = torch.stack([places, places - 1, places - 8100], 1).to(device)
    scores = (keys[places.to(device)][:, None] * keys[seen]).sum(-1) / 2**0.5
    want = (scores.softmax(-1)[..., None] * keys[seen]).sum(1)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale", [-0.3, 2.0])
def test_scale(device, scale):
    pattern = AttentionPattern("row", text_len=40, grid=(5, 9))
    assert_matches(pattern, 1, 64, torch.bfloat16, device, scale=scale)


def test_scale_zero_is_the_mean(device):
    pattern = AttentionPattern("row", text_len=40, grid=(5, 9))
    q, k, v, _ = heads_of((1, 1, pattern.length, 64), torch.float16, device)
    k = k.clone()
    k[0, 0, 60] = float("-inf")  # 0 * inf: not a number for whoever sees it, nothing for others
    got = dalle_ext.sparse_attention(q, k, v, pattern, 0.0)[0, 0].cpu()
    seen = pattern.mask()[:, 60]
    mean = (pattern.mask().double() @ v[0, 0].double().cpu()) / pattern.mask().sum(1, keepdim=True)
    torch.testing.assert_close(got[~seen].double(), mean[~seen], rtol=1e-3, atol=1e-3)
    assert bool(got[seen].isnan().all())


@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_same_bits_and_alone_as_in_a_batch(backend, device, kind):
    """Nothing hangs on the order of blocks or, but for the CPU kernel, on how many share a head."""
    pattern = AttentionPattern(kind, text_len=70, grid=(10, 12), kernel_size=3)
    q, k, v, grad = (x.clone() for x in heads_of((2, 2, pattern.length, 64), HALVES[0], device))
    ours = lambda *x: dalle_ext.sparse_attention(*x, pattern)  # noqa: E731
    first, again = (run(ours, (q, k, v), grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if backend == "cpu":
        return
    alone = run(ours, [x[1:, 1:] for x in (q, k, v)], grad[1:, 1:])
    assert all(torch.equal(a[1:, 1:], b) for a, b in zip(first, alone, strict=True))


@pytest.mark.night("emulated")  # at this size the next test runs them, and smaller ones are exact
@pytest.mark.parametrize("kind", KINDS)
def test_size_of_the_paper(device, kind):
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    assert_matches(pattern, 1, 64, torch.float16, device, batch=1)


def pairs_of(counts, products, size):
    """(query, key) pairs that tensor cores computed, of so many products of D each."""
    return counts["mma"] * 16 * 8 * 16 / (products * size)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("kind", "forward", "backward"),
    [("row", 0.85, 0.85), ("column", 0.85, 0.85), ("conv", 0.6, 0.6), ("causal", 0.95, 0.9)],
)
def test_useful_share_at_the_size_of_the_paper(emulator, emulated_counts, kind, forward, backward):
    """What the mask hides is skipped: attended pairs over those that were computed."""
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    q, k, v, grad = heads_of((1, 1, 1280, 64), torch.float16, "cpu")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with emulator():
        start = emulated_counts()
        out = dalle_ext.sparse_attention(*leaves, pattern)
        middle = emulated_counts()
        torch.autograd.grad(out, leaves, grad)
        end = emulated_counts()
    assert pattern.num_pairs / pairs_of(middle - start, 2, 64) >= forward
    # grad_q: 3 products, grad_k and grad_v: 4.
    assert pattern.num_pairs / pairs_of(end - middle, 7, 64) >= backward
    assert (end - start)["conflicts"] == 0


@pytest.mark.emulated
@pytest.mark.parametrize("size", [32, 64, 80, 96, 128])
def test_no_bank_conflicts(emulator, emulated_counts, size):
    pattern = AttentionPattern("row", text_len=70, grid=(6, 16))
    q, k, v, grad = heads_of((1, 1, pattern.length, size), torch.float16, "cpu")
    with emulator():
        start = emulated_counts()
        run(lambda *x: dalle_ext.sparse_attention(*x, pattern), (q, k, v), grad)
        done = emulated_counts() - start
    assert done["ldmatrix"] > 0
    assert done["conflicts"] == 0


@pytest.mark.emulated
def test_image_keys_are_read_once(emulator, emulated_counts):
    """Row attention, one block a head: K and V reach shared memory once, 4 bytes an element."""
    pattern = AttentionPattern("row", text_len=64, grid=(8, 16))
    heads = 264  # one block each: more than enough for every multiprocessor
    q = torch.zeros(heads, 1, pattern.length, 16, dtype=torch.float16)
    with emulator():
        start = emulated_counts()
        dalle_ext.sparse_attention(q, q, q, pattern)
        done = emulated_counts() - start
    assert done["copied_bytes"] == heads * pattern.length * 16 * 2 * 2
