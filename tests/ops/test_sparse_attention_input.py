"""Sparse attention at the limits of its input: errors and results, equal on every back end."""

from __future__ import annotations

import pytest
import torch

import dalle_ext
from dalle_ext import AttentionPattern, _native
from dalle_ext.reference.sparse_attention import sparse_attention as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
PATTERN = AttentionPattern("row", text_len=3, grid=(2, 4))


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def closeness(dtype):
    unit = torch.finfo(dtype).eps
    return {"rtol": 8 * unit, "atol": 8 * unit}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 17, 65, 100, 129, 255, 256])
def test_any_head_size_up_to_256(device, size, dtype):
    q, k, v = numbers(3, 1, 2, PATTERN.length, size).to(dtype).to(device)
    got = dalle_ext.sparse_attention(q, k, v, PATTERN)
    want = reference(q.double(), k.double(), v.double(), PATTERN)
    torch.testing.assert_close(got.double(), want, **closeness(dtype))


@pytest.mark.parametrize("size", [0, 257])
def test_head_size_out_of_range(device, size):
    q = zeros(1, 1, PATTERN.length, size, device=device)
    with pytest.raises(
        RuntimeError, match=rf"sparse_attention: D must be from 1 to 256, got {size}"
    ):
        dalle_ext.sparse_attention(q, q, q, PATTERN)


@pytest.mark.parametrize("other", [torch.float16, torch.float64])
def test_mixed_dtypes(device, other):
    q = zeros(1, 1, PATTERN.length, 8, device=device)
    with pytest.raises(RuntimeError, match=r"sparse_attention: k must be of q's dtype"):
        dalle_ext.sparse_attention(q, q.to(other), q, PATTERN)
    with pytest.raises(RuntimeError, match=r"sparse_attention: v must be of q's dtype"):
        dalle_ext.sparse_attention(q, q, q.to(other), PATTERN)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool])
def test_other_dtypes(device, dtype):
    q = zeros(1, 1, PATTERN.length, 8, dtype=dtype, device=device)
    with pytest.raises(RuntimeError, match=r"sparse_attention: q must be float32, float64"):
        dalle_ext.sparse_attention(q, q, q, PATTERN)


def test_cuda_tensor_without_the_cuda_library(monkeypatch):
    monkeypatch.setattr(_native, "CUDA_PROBLEM", "_C_cuda.so must be built, got no such file")
    with pytest.raises(RuntimeError, match=r"sparse_attention: _C_cuda.so must be built"):
        _native.require("sparse_attention", torch.device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "pattern",
    [
        AttentionPattern("row", text_len=0, grid=(3, 4)),
        AttentionPattern("column", text_len=0, grid=(1, 1)),
        AttentionPattern("causal", text_len=5, grid=(1, 1)),
        AttentionPattern("conv", text_len=2, grid=(1, 1), kernel_size=11),
        AttentionPattern("conv", text_len=4, grid=(3, 5), kernel_size=21),
    ],
    ids=["no text", "one position", "grid 1 x 1", "conv at 1 x 1", "kernel beyond the grid"],
)
def test_small_patterns(device, pattern, dtype):
    q, k, v = numbers(3, 2, 1, pattern.length, 16).to(dtype).to(device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = dalle_ext.sparse_attention(*leaves, pattern)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    want = reference(*doubles, pattern)
    torch.testing.assert_close(got.double(), want, **closeness(dtype))
    got_grads = torch.autograd.grad(got.square().sum(), leaves)
    want_grads = torch.autograd.grad(want.square().sum(), doubles)
    for g, w in zip(got_grads, want_grads, strict=True):
        # Differences of products of sums over D: a hundred roundings of numbers of size 1 to 10.
        unit = torch.finfo(dtype).eps * max(1.0, float(w.abs().max()))
        torch.testing.assert_close(g.double(), w, rtol=16 * unit, atol=100 * unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_no_batch_or_no_heads(device, shape, dtype):
    q = zeros(*shape, PATTERN.length, 8, dtype=dtype, device=device).requires_grad_()
    out = dalle_ext.sparse_attention(q, q, q, PATTERN)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_axis_that_is_not_contiguous(device, dtype):
    q, k, v = numbers(3, 1, 2, 16, PATTERN.length).to(dtype).to(device).transpose(-1, -2)
    got = dalle_ext.sparse_attention(q, k, v, PATTERN)
    contiguous = [x.contiguous() for x in (q, k, v)]
    assert torch.equal(got, dalle_ext.sparse_attention(*contiguous, PATTERN))


def test_raw_op_wants_contiguous_heads(device):
    q = zeros(1, 1, 8, PATTERN.length, device=device).transpose(-1, -2)
    rule = (PATTERN.kind, PATTERN.text_len, *PATTERN.grid, PATTERN.runs)
    line = r"^sparse_attention: q must be contiguous along D, got .* of float32 with strides"
    with pytest.raises(RuntimeError, match=line):
        torch.ops.dalle_ext._sparse_attention_forward(q, q, q, *rule, 1.0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here")
def test_saved_sums_on_another_device():
    q = zeros(1, 1, PATTERN.length, 16, device="cuda")
    rule = (PATTERN.kind, PATTERN.text_len, *PATTERN.grid, PATTERN.runs, 1.0)
    out, lse = torch.ops.dalle_ext._sparse_attention_forward(q, q, q, *rule)
    with pytest.raises(RuntimeError, match="sparse_attention: lse must be on q's device, got cpu"):
        torch.ops.dalle_ext._sparse_attention_backward(out, q, q, q, out, lse.cpu(), *rule)
