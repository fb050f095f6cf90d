"""`sparse_attention_qkvpacked`: the bits of three views, and a gradient in one tensor."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dalle_ext
from dalle_ext import AttentionPattern, sparse_attention, sparse_attention_qkvpacked
from dalle_ext.ops.sparse_attention import KINDS

OPS = torch.ops.dalle_ext
PATTERN = AttentionPattern("conv", text_len=6, grid=(5, 7), kernel_size=3)
RULE = (PATTERN.kind, PATTERN.text_len, *PATTERN.grid, PATTERN.runs, 0.25)


def packed(dtype=torch.float32, device="cpu", batch=2, heads=3, size=16, length=PATTERN.length):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3, heads, size, generator=generator)
    return qkv.to(device, dtype).requires_grad_()


def of_views(qkv, pattern, scale=None):
    return sparse_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), pattern, scale)


def both(qkv, pattern, scale=None):
    """Output and gradient of the packed form and of three views."""
    results = []
    for attention in (sparse_attention_qkvpacked, of_views):
        out = attention(qkv, pattern, scale)
        grad = torch.linspace(-1, 1, out.numel(), device=out.device).sin().view(out.shape)
        results.append((out, *torch.autograd.grad(out, qkv, grad.to(out.dtype))))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_three_views(kind, dtype, device):
    pattern = AttentionPattern(kind, text_len=6, grid=(5, 7), kernel_size=3)
    (out, grad), (want, wanted_grad) = both(packed(dtype, device), pattern, 0.3)
    assert torch.equal(out, want) and torch.equal(grad, wanted_grad)
    assert grad.is_contiguous() and out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, :, 1:],  # some of the heads
        lambda x: x[..., ::2],  # D is not contiguous
        lambda x: x[..., 3:],
        lambda x: x[:0],
        lambda x: x[1:].expand(2, -1, -1, -1, -1),
        lambda x: x.permute(1, 0, 2, 3, 4).contiguous().permute(1, 0, 2, 3, 4),
    ],
)
def test_any_strides_and_no_batch(view):
    qkv = view(packed().detach()).requires_grad_()
    (out, grad), (want, wanted_grad) = both(qkv, PATTERN)
    assert torch.equal(out, want) and torch.equal(grad, wanted_grad)
    assert grad.shape == qkv.shape


def test_float64_gradient_is_the_derivative():
    pattern = AttentionPattern("row", text_len=2, grid=(2, 3))
    qkv = packed(torch.float64, batch=1, heads=2, size=3, length=8)
    assert torch.autograd.gradcheck(lambda x: sparse_attention_qkvpacked(x, pattern), qkv)


def test_the_gradient_reaches_the_projection_and_a_checkpoint_repeats_it():
    layer = torch.nn.Linear(48, 144)
    x = torch.linspace(-1, 1, 2 * PATTERN.length * 48).cos().view(2, -1, 48)

    def attend(x):
        return sparse_attention_qkvpacked(layer(x).view(2, -1, 3, 3, 16), PATTERN).sum()

    attend(x).backward()
    first = layer.weight.grad.clone()
    layer.weight.grad = None
    checkpoint(attend, x, use_reentrant=False).backward()
    assert first.abs().sum() > 0 and torch.equal(first, layer.weight.grad)


def test_registration_and_compilation():
    qkv = packed().detach()
    parts = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out, lse = OPS._sparse_attention_forward(*parts, *RULE)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        OPS._sparse_attention_backward_qkvpacked.default,
        (torch.randn_like(out), qkv, out, lse, *RULE),
        test_utils=checks,
    )
    compiled = torch.compile(
        lambda x: sparse_attention_qkvpacked(x * 2, PATTERN), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(packed()), sparse_attention_qkvpacked(qkv * 2, PATTERN))


def test_under_the_definition_and_without_a_gradient():
    qkv = packed()
    native = sparse_attention_qkvpacked(qkv, PATTERN)
    with torch.no_grad():
        assert torch.equal(sparse_attention_qkvpacked(qkv, PATTERN), native)
    with dalle_ext.use_reference():
        torch.testing.assert_close(sparse_attention_qkvpacked(qkv, PATTERN), native)


@pytest.mark.parametrize(
    ("qkv", "error", "message"),
    [
        (torch.zeros(1, 41, 3, 16), ValueError, r"qkv must be \(B, T = 41, 3, H, D\)"),
        (torch.zeros(1, 41, 2, 1, 16), ValueError, r"qkv must be \(B, T = 41, 3, H, D\)"),
        (torch.zeros(1, 40, 3, 1, 16), ValueError, r"got \(1, 40, 3, 1, 16\)"),
    ],
)
def test_messages(qkv, error, message):
    with pytest.raises(error, match=message):
        sparse_attention_qkvpacked(qkv, PATTERN)


def test_what_the_raw_operator_refuses():
    qkv = packed().detach()
    out, lse = OPS._sparse_attention_forward(*qkv.permute(2, 0, 3, 1, 4).unbind(0), *RULE)
    call = OPS._sparse_attention_backward_qkvpacked
    with pytest.raises(RuntimeError, match=r"sparse_attention: qkv must be \(B, T, 3, H, D\)"):
        call(out, qkv[:, :, :2], out, lse, *RULE)
    with pytest.raises(RuntimeError, match="sparse_attention: lse must be as the forward"):
        call(out, qkv, out, lse.float(), *RULE)
    with pytest.raises(TypeError, match="pattern must be an AttentionPattern, got str"):
        sparse_attention_qkvpacked(qkv, "row")
