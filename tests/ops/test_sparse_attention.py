"""Values and gradients of sparse attention against the definition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dalle_ext
from dalle_ext import AttentionPattern
from dalle_ext.ops.sparse_attention import KINDS
from dalle_ext.reference.sparse_attention import sparse_attention as reference
from dalle_ext.testing import assert_as_accurate, border_intact, gradients, sliced
from support import levels

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BY_NIGHT = pytest.mark.night("emulated")


def inputs(shape, dtype=torch.float32, device="cpu", order=None):
    return [sliced(shape, dtype=dtype, device=device, seed=s, order=order) for s in range(4)]


def assert_matches(pattern, shape, dtype, device="cpu", *, order=None, scale=None):
    """Output and the three gradients are as accurate as plain PyTorch's, on slices of buffers."""
    pairs = inputs(shape, dtype, device, order)
    q, k, v, grad = (view for view, _ in pairs)
    ours = lambda *x: dalle_ext.sparse_attention(*x, pattern, scale)  # noqa: E731
    plain = lambda *x: reference(*x, pattern, scale)  # noqa: E731
    exact = [x.double() for x in (q, k, v)]
    assert_as_accurate(ours(q, k, v), plain(q, k, v), plain(*exact))
    got = gradients(ours, (q, k, v), grad)
    same = gradients(plain, (q, k, v), grad)
    for g, s, e in zip(got, same, gradients(plain, exact, grad.double()), strict=True):
        assert_as_accurate(g, s, e)
    assert all(border_intact(view, buffer) for view, buffer in pairs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_torch(kind, dtype, device):
    pattern = AttentionPattern(kind, text_len=13, grid=(9, 11), kernel_size=5)
    assert_matches(pattern, (2, 3, pattern.length, 48), dtype, device)


@pytest.mark.parametrize(
    "kind", ["conv", *(pytest.param(kind, marks=BY_NIGHT) for kind in KINDS if kind != "conv")]
)
def test_as_accurate_as_torch_at_the_size_of_the_paper(kind, backend, device):
    if backend == "emulated" and kind != "row":
        pytest.skip("one head of full size is enough for the emulator")
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    assert_matches(pattern, (1, 1, 1280, 64), torch.float32, device)


@pytest.mark.parametrize("head_size", [16, 24, 40, 64, 72, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes(head_size, dtype, device):
    pattern = AttentionPattern("row", text_len=20, grid=(5, 8))
    assert_matches(pattern, (1, 2, pattern.length, head_size), dtype, device)


@pytest.mark.parametrize(
    ("text_len", "grid", "head_size"),
    [(0, (1, 1), 1), (13, (4, 5), 31), (32, (1, 1), 33), (6, (5, 7), 63), (3, (10, 10), 17)],
)
def test_odd_sizes_in_bfloat16(text_len, grid, head_size, device):
    """The CPU kernel multiplies pairs: a last channel and a last position that have no partner."""
    pattern = AttentionPattern("row", text_len=text_len, grid=grid)
    assert_matches(pattern, (1, 2, pattern.length, head_size), torch.bfloat16, device)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_at_the_size_of_the_paper(kind):
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    assert_matches(pattern, (1, 1, 1280, 64), torch.bfloat16)


@pytest.mark.parametrize(
    ("text_len", "grid"),
    [(0, (1, 1)), (0, (1, 7)), (1, (7, 1)), (31, (1, 1)), (0, (8, 4)), (33, (3, 5))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_edges_in_double(kind, text_len, grid, device):
    pattern = AttentionPattern(kind, text_len=text_len, grid=grid, kernel_size=3)
    shape = (2, 2, pattern.length, 5)
    q, k, v, grad = (view for view, _ in inputs(shape, torch.float64, device))
    ours = lambda *x: dalle_ext.sparse_attention(*x, pattern)  # noqa: E731
    plain = lambda *x: reference(*x, pattern)  # noqa: E731
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(ours(q, k, v), plain(q, k, v), **close)
    for got, want in zip(
        gradients(ours, (q, k, v), grad), gradients(plain, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(got, want, **close)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(KINDS),
    text_len=st.integers(0, 45),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    half=st.integers(0, 5),
    batch=st.integers(0, 2),
    heads=st.integers(0, 3),
    head_size=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape(device, kind, text_len, grid, half, batch, heads, head_size, dtype):
    pattern = AttentionPattern(kind, text_len=text_len, grid=grid, kernel_size=2 * half + 1)
    shape = (batch, heads, pattern.length, head_size)
    q, k, v, grad = (view for view, _ in inputs(shape, dtype, device))
    ours = lambda *x: dalle_ext.sparse_attention(*x, pattern)  # noqa: E731
    plain = lambda *x: reference(*x, pattern)  # noqa: E731
    close = (
        {"rtol": 1e-5, "atol": 3e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    )
    torch.testing.assert_close(ours(q, k, v), plain(q, k, v), **close)
    for got, want in zip(
        gradients(ours, (q, k, v), grad), gradients(plain, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides(order, dtype, device):
    pattern = AttentionPattern("column", text_len=6, grid=(7, 6))
    assert_matches(pattern, (2, 3, pattern.length, 24), dtype, device, order=order)


def test_packed_projection_needs_no_copy(device):
    pattern = AttentionPattern("conv", text_len=10, grid=(6, 6), kernel_size=3)
    packed = torch.randn(2, pattern.length, 3, 4, 16, device=device, requires_grad=True)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = dalle_ext.sparse_attention(q, k, v, pattern)
    merged = out.transpose(1, 2).flatten(2)
    assert merged.data_ptr() == out.data_ptr()  # stored (B, T, H, D) like the input
    (grad,) = torch.autograd.grad(merged.square().sum(), packed)
    plain = reference(q, k, v, pattern).transpose(1, 2).flatten(2)
    (want,) = torch.autograd.grad(plain.square().sum(), packed)
    torch.testing.assert_close(out, reference(q, k, v, pattern), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


def test_head_axis_of_any_stride_is_copied():
    pattern = AttentionPattern("row", text_len=4, grid=(3, 4))
    q, k, v = torch.randn(3, 1, 2, 8, pattern.length).transpose(-1, -2)
    got = dalle_ext.sparse_attention(q, k, v, pattern)
    torch.testing.assert_close(got, reference(q, k, v, pattern), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_scale(scale, device):
    pattern = AttentionPattern("row", text_len=9, grid=(5, 5))
    assert_matches(pattern, (1, 2, pattern.length, 32), torch.float32, device, scale=scale)


@pytest.mark.parametrize("magnitude", [1e-3, 30.0])
def test_small_and_large_scores(magnitude, device):
    pattern = AttentionPattern("row", text_len=40, grid=(6, 6))
    q, k, v = (x * magnitude for x, _ in inputs((1, 2, pattern.length, 32), device=device)[:3])
    exact = reference(q.double(), k.double(), v.double(), pattern)
    assert_as_accurate(
        dalle_ext.sparse_attention(q, k, v, pattern), reference(q, k, v, pattern), exact
    )


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_empty(shape, device):
    pattern = AttentionPattern("row", text_len=2, grid=(2, 2))
    q = torch.zeros(*shape, 6, 8, device=device, requires_grad=True)
    out = dalle_ext.sparse_attention(q, q, q, pattern)
    out.sum().backward()
    assert out.shape == q.shape and q.grad.shape == q.shape


@pytest.mark.parametrize(
    "kind", ["column", *(pytest.param(kind, marks=BY_NIGHT) for kind in KINDS if kind != "column")]
)
def test_gradcheck(kind, device):
    pattern = AttentionPattern(kind, text_len=3, grid=(3, 4), kernel_size=3)
    leaves = [
        x.detach().clone().requires_grad_()
        for x, _ in inputs((1, 2, pattern.length, 4), torch.float64, device)[:3]
    ]
    assert torch.autograd.gradcheck(
        lambda *x: dalle_ext.sparse_attention(*x, pattern, 0.7), leaves, atol=1e-7
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_arrives(dtype, device):
    pattern = AttentionPattern("conv", text_len=7, grid=(6, 6), kernel_size=3)
    leaves = [x.detach().requires_grad_() for x, _ in inputs((1, 2, 43, 16), dtype, device)[:3]]
    dalle_ext.sparse_attention(*leaves, pattern).square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        assert bool(leaf.grad.isfinite().all())
        # The last text key (6), the first image key and the last one get their share.
        assert bool((leaf.grad[:, :, [6, 7, 42]].abs().amax(-1) > 0).all())


def test_only_the_gradients_asked_for():
    pattern = AttentionPattern("row", text_len=2, grid=(2, 3))
    q, k, v = torch.randn(3, 1, 1, 8, 4)
    k.requires_grad_()
    dalle_ext.sparse_attention(q, k, v, pattern).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None


def test_masked_keys_have_no_influence(device):
    pattern = AttentionPattern("conv", text_len=5, grid=(7, 7), kernel_size=3)
    q, k, v = (
        x.contiguous().requires_grad_() for x, _ in inputs((1, 1, 54, 16), device=device)[:3]
    )
    for query in (0, 4, 5, 30, 53):
        out = dalle_ext.sparse_attention(q, k, v, pattern)
        grad_k, grad_v = torch.autograd.grad(out[0, 0, query].square().sum(), (k, v))
        unseen = ~pattern.mask()[query].to(device)
        assert int(grad_k[0, 0, unseen].count_nonzero()) == 0
        assert int(grad_v[0, 0, unseen].count_nonzero()) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nonfinite_input_reaches_every_query_that_sees_it(dtype, kind, which, bad, device):
    pattern = AttentionPattern(kind, text_len=5, grid=(6, 9), kernel_size=3)
    shape = (1, 1, pattern.length, 8)
    leaves = [x.contiguous() for x, _ in inputs(shape, dtype, device)[:3]]
    leaves[which][0, 0, 33, 2] = bad
    want = reference(*leaves, pattern)[0, 0]
    got = dalle_ext.sparse_attention(*leaves, pattern)[0, 0]
    seen = torch.zeros(pattern.length, dtype=torch.bool)
    seen[33] = True
    if which > 0:
        seen = pattern.mask()[:, 33]
    # A key of -inf may well give a score of -inf: a weight of 0, and a finite result.
    broken = (~want.isfinite()).any(-1).cpu() & seen
    assert bool(broken.any()) or (which == 1 and bad == bad)
    assert not bool(got.isfinite().all(-1).cpu()[broken].any())
    ours = lambda *x: dalle_ext.sparse_attention(*x, pattern)  # noqa: E731
    grads = gradients(ours, leaves, torch.ones_like(leaves[0]))
    assert not all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("level", levels.LEVELS)
def test_every_instruction_set(level):
    if level not in levels.OFFERED:
        pytest.skip(f"this processor has no {level}, or this build")
    chosen = (
        "test_as_accurate or test_edges_in_double or test_odd or test_strides or test_gradcheck"
    )
    only_cpu = "not emulated and not cuda"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-k", f"({chosen}) and not paper", "-m", only_cpu]
        + [__file__],
        env={**os.environ, "DALLE_EXT_CPU_ISA": level},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]
