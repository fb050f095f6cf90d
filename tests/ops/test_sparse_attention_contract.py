"""Sparse attention as an operator: registration, tracing, determinism, messages."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import dalle_ext
from dalle_ext import AttentionPattern, sparse_attention
from dalle_ext.ops.sparse_attention import KINDS, OFFSETS
from dalle_ext.reference.sparse_attention import sparse_attention as reference

OPS = torch.ops.dalle_ext
PATTERN = AttentionPattern("conv", text_len=6, grid=(5, 7), kernel_size=3)
RULE = (PATTERN.kind, PATTERN.text_len, *PATTERN.grid, PATTERN.runs, 0.25)


def heads(*, order="bhtd", dtype=torch.float32, batch=2, num_heads=3, size=16, grad=False):
    """q, k, v as (B, H, T, D), stored (B, H, T, D), (B, T, H, D) or packed (B, T, 3, H, D)."""
    shape = {"bhtd": (3, batch, num_heads, 41, size), "bthd": (3, batch, 41, num_heads, size)}
    if order == "packed":
        x = torch.randn(batch, 41, 3, num_heads, size, dtype=dtype).permute(2, 0, 3, 1, 4)
    else:
        x = torch.randn(shape[order], dtype=dtype)
        x = x.transpose(2, 3) if order == "bthd" else x
    q, k, v = (part.requires_grad_(grad) if order != "packed" else part for part in x.unbind())
    return q, k, v


@pytest.mark.parametrize("native", [False, True])
def test_autocast_changes_nothing(native):
    """Neither what the op computes nor its definition, nor their gradients."""
    found = []
    for on in (False, True):
        q, k, v = (x.detach().requires_grad_() for x in heads(order="bhtd"))
        with torch.no_grad():
            for seed, x in enumerate((q, k, v)):
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        call = sparse_attention if native else reference
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = call(q, k, v, PATTERN)
        out.sum().backward()
        found.append((out, q.grad, k.grad, v.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("order", "dtype"),
    [("bhtd", torch.float32), ("bthd", torch.float64), ("packed", torch.bfloat16)],
)
def test_registration(order, dtype):
    q, k, v = heads(order=order, dtype=dtype)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        OPS._sparse_attention_forward.default, (q, k, v, *RULE), test_utils=checks
    )
    out, lse = OPS._sparse_attention_forward(q, k, v, *RULE)
    assert out.stride() == (q.stride() if order == "bthd" else out.stride())
    backward = (torch.randn_like(out), q, k, v, out, lse, *RULE)
    torch.library.opcheck(OPS._sparse_attention_backward.default, backward, test_utils=checks)


def test_fakes_have_the_strides_of_the_results():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for order in ("bhtd", "bthd", "packed"):
        q, k, v = heads(order=order)
        out, lse = OPS._sparse_attention_forward(q, k, v, *RULE)
        real = (out, lse, *OPS._sparse_attention_backward(out, q, k, v, out, lse, *RULE))
        with FakeTensorMode() as mode:
            q, k, v = (mode.from_tensor(x) for x in (q, k, v))
            out, lse = OPS._sparse_attention_forward(q, k, v, *RULE)
            fake = (out, lse, *OPS._sparse_attention_backward(out, q, k, v, out, lse, *RULE))
        for f, r in zip(fake, real, strict=True):
            assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


def test_log_sum_exp_is_natural():
    q, k, v = heads()
    scores = (q @ k.transpose(-2, -1) * 0.25).double()
    want = scores.masked_fill(~PATTERN.mask(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(
        OPS._sparse_attention_forward(q, k, v, *RULE)[1], want, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("grad", [False, True])
def test_compile_without_graph_break(grad):
    q, k, v = heads(grad=grad)
    fresh = dataclasses.replace(PATTERN)  # nobody has looked at it yet
    compiled = torch.compile(
        lambda q, k, v: sparse_attention(q * 2, k, v, fresh), fullgraph=True, backend="aot_eager"
    )
    got, want = compiled(q, k, v), sparse_attention(q * 2, k, v, PATTERN)
    assert torch.equal(got, want)
    if grad:
        got = torch.autograd.grad(got.square().sum(), (q, k, v))
        want = torch.autograd.grad(want.square().sum(), (q, k, v))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_export():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return sparse_attention(q, k, v, PATTERN)

    inputs = heads()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Attention(), inputs, dynamic_shapes=[{0: batch}] * 3)
    assert any("_sparse_attention_forward" in str(node.target) for node in program.graph.nodes)
    larger = heads(batch=5)
    assert torch.equal(program.module()(*larger), sparse_attention(*larger, PATTERN))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_heads", [1, 2, 20])
def test_same_bits_for_any_number_of_threads(kind, num_heads, dtype):
    pattern = AttentionPattern(kind, text_len=50, grid=(12, 12))
    q, k, v, grad = torch.randn(4, 1, num_heads, pattern.length, 32).to(dtype)
    rule = (kind, 50, 12, 12, pattern.runs, 0.2)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out, lse = OPS._sparse_attention_forward(q, k, v, *rule)
            grads = OPS._sparse_attention_backward(grad, q, k, v, out, lse, *rule)
            results.append((out, lse, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_definition_on_demand():
    q, k, v = heads(grad=True)
    with dalle_ext.use_reference():
        got = sparse_attention(q, k, v, PATTERN)
        with dalle_ext.use_reference(False):
            native = sparse_attention(q, k, v, PATTERN)
    assert torch.equal(got, reference(q, k, v, PATTERN))
    assert not torch.equal(native, got)
    torch.testing.assert_close(native, got, rtol=1e-5, atol=1e-5)
    assert torch.equal(sparse_attention(q, k, v, PATTERN), native)


def test_reference_needs_no_native_library(tmp_path):
    code = (
        "import pathlib, torch, dalle_ext\n"
        "from dalle_ext import _native\n"
        "_native.CPU_PROBLEM = 'no library'\n"
        "p = dalle_ext.AttentionPattern('row', text_len=2, grid=(2, 2))\n"
        "q = torch.ones(1, 1, 6, 4)\n"
        "try:\n    dalle_ext.sparse_attention(q, q, q, p)\n"
        "except RuntimeError as error:\n    assert str(error) == 'sparse_attention: no library'\n"
        "else:\n    raise SystemExit('no error')\n"
        "dalle_ext.use_reference()\n"
        "assert torch.equal(dalle_ext.sparse_attention(q, q, q, p), q)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_differentiable_once():
    q, k, v = heads(grad=True)
    (grad,) = torch.autograd.grad(
        sparse_attention(q, k, v, PATTERN).square().sum(), q, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="must be differentiated once"):
        grad.sum().backward()


def bad_arguments():
    q = torch.zeros(1, 2, 41, 16)
    cases = {
        "not a pattern": (
            (q, q, q, "row"),
            TypeError,
            "pattern must be an AttentionPattern, got str",
        ),
        "rank": (
            (q[0], q, q),
            ValueError,
            r"q must be \(B, H, T = 41, D\) for .*, got \(2, 41, 16\)",
        ),
        "grid does not fit T": (
            (q[:, :, :40], q, q),
            ValueError,
            "q must be .* got .1, 2, 40, 16.",
        ),
        "k shape": (
            (q, q[:, :1], q),
            RuntimeError,
            r"k must be of q's shape \(1, 2, 41, 16\), got",
        ),
        "v head size": (
            (q, q, q[..., :8]),
            RuntimeError,
            r"v must be of q's shape .*, got \(1, 2, 41, 8\)",
        ),
        "k dtype": (
            (q, q.double(), q),
            RuntimeError,
            "k must be of q's dtype float32, got float64$",
        ),
        "v dtype": (
            (q.bfloat16(), q.bfloat16(), q.half()),
            RuntimeError,
            "v must be of q's dtype bfloat16, got float16$",
        ),
        "dtype": (
            (q.int(),) * 3,
            RuntimeError,
            "q must be float32, float64, float16 or bfloat16, got int32$",
        ),
        "complex": ((q.to(torch.complex64),) * 3, RuntimeError, "q must be .*, got complex64$"),
        "head size": (
            (q.repeat(1, 1, 1, 17),) * 3,
            RuntimeError,
            "D must be from 1 to 256, got 272",
        ),
        "no head": ((q[..., :0],) * 3, RuntimeError, "D must be from 1 to 256, got 0"),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("arguments", "error", "message"), bad_arguments())
def test_messages(arguments, error, message, reference):
    line = f"^sparse_attention: {message}"
    with dalle_ext.use_reference(reference), pytest.raises(error, match=line):
        sparse_attention(*arguments, *([PATTERN] if len(arguments) == 3 else []), 0.25)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            ("ring", 6, 5, 7, []),
            f"kind must be one of {', '.join((*KINDS, OFFSETS))}, got ring",
        ),
        (("row", -1, 5, 7, []), "text_len must be from 0 to 2.24, got -1"),
        (("row", 6, 0, 7, []), "grid must be at least 1 x 1 and .*, got 0 x 7"),
        (("row", 6, 1 << 20, 1 << 20, []), "grid must be .* at most 2.24 positions"),
        (("row", 6, 5, 6, []), "T must be text_len . rows . columns = 36, got 41"),
        (("conv", 6, 5, 7, []), "runs must be ascending half-open runs from 0 on, got 0 bounds"),
        (("conv", 6, 5, 7, [1, 2]), "runs must be ascending"),
        (("conv", 6, 5, 7, [0, 2, 2, 3]), "runs must be ascending"),
        (("conv", 6, 5, 7, [0, 36]), "runs must be ascending"),
    ],
)
def test_messages_of_the_raw_op(rule, message):
    q = torch.zeros(1, 2, 41, 16)
    with pytest.raises(RuntimeError, match=f"^sparse_attention: {message}"):
        OPS._sparse_attention_forward(q, q, q, *rule, 0.25)


def test_wrong_device():
    q = torch.zeros(1, 2, 41, 16)
    with pytest.raises(ValueError, match="q, k, v must be on one device, got cpu, meta, cpu"):
        sparse_attention(q, q.to("meta"), q, PATTERN)
