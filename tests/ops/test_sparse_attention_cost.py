"""FLOPs and bytes of a pattern: counted pairs and tensors, and figures at the size of the paper."""

from __future__ import annotations

import pytest
import torch

from dalle_ext import AttentionPattern
from dalle_ext.ops.sparse_attention import KINDS

PAPER = {"text_len": 256, "grid": (32, 32)}
# Other readings of "conv" as offsets: 121 from the corner with wraparound, 11 whole rows with
# centred columns (116), and the centred half kernel (61).
CORNER = tuple(o for o in range(352) if o % 32 < 11)
ROWS_11 = tuple(o for o in range(326) if min(o % 32, -o % 32) <= 5)
HALF = tuple(o for o in range(166) if min(o % 32, -o % 32) <= 5)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid"), [(0, (1, 1)), (5, (4, 3)), (3, (7, 1)), (1, (1, 9))])
def test_products_over_attended_pairs(kind, text_len, grid, backward):
    pattern = AttentionPattern(kind, text_len=text_len, grid=grid, kernel_size=3)
    products = 5 if backward else 2  # each a multiplication and an addition a number of the head
    pairs = 2 * 3 * int(pattern.mask().sum())
    assert pattern.flops(2, 3, 40, backward) == products * 2 * 40 * pairs


@pytest.mark.parametrize(
    ("kind", "offsets", "forward", "backward"),
    [
        ("row", (), 41.7, 104.2),
        ("column", (), 39.6, 99.0),
        ("conv", (), 45.3, 113.1),
        ("conv", CORNER, 50.7, 126.7),
        ("conv", ROWS_11, 50.1, 125.2),
        ("conv", HALF, 44.7, 111.8),
        ("causal", (), 104.1, 260.3),
    ],
)
def test_flops_at_the_size_of_the_paper(kind, offsets, forward, backward):
    """In 10^9, 8 x 62 heads of 64; worked out by hand from counts of pairs."""
    pattern = AttentionPattern(kind, offsets=offsets, **PAPER)
    assert round(pattern.flops(8, 62, 64) * 1e-9, 1) == forward
    assert round(pattern.flops(8, 62, 64, backward=True) * 1e-9, 1) == backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(dtype):
    """What `_sparse_attention_forward` and its backward take and give, each tensor once."""
    pattern = AttentionPattern("column", text_len=7, grid=(3, 5))
    q, k, v, grad_out = torch.randn(4, 2, 3, pattern.length, 16).to(dtype)
    rule = (pattern.kind, pattern.text_len, *pattern.grid, pattern.runs)
    out, lse = torch.ops.dalle_ext._sparse_attention_forward(q, k, v, *rule, 0.25)
    grads = torch.ops.dalle_ext._sparse_attention_backward(grad_out, q, k, v, out, lse, *rule, 0.25)
    size = torch.finfo(dtype).bits // 8
    assert pattern.bytes(2, 3, 16, size) == sum(x.nbytes for x in (q, k, v, out, lse))
    moved = (q, k, v, out, lse, grad_out, *grads)
    assert pattern.bytes(2, 3, 16, size, backward=True) == sum(x.nbytes for x in moved)


def test_bytes_at_the_size_of_the_paper():
    """16-bit tensors of 81 MB; the log-sum-exp adds 5 MB."""
    pattern = AttentionPattern("row", **PAPER)
    assert pattern.bytes(8, 62, 64, 2) == 4 * 81_264_640 + 5_079_040
    assert pattern.bytes(8, 62, 64, 2, backward=True) == 8 * 81_264_640 + 5_079_040


def test_nothing_costs_nothing():
    pattern = AttentionPattern("row", **PAPER)
    assert pattern.flops(0, 62, 64) == pattern.bytes(0, 62, 64, 2) == 0


@pytest.mark.parametrize("value", [-1, 2.0, "8"])
@pytest.mark.parametrize("argument", ["batch", "heads", "head_size", "element_size"])
def test_messages(argument, value):
    pattern = AttentionPattern("row", **PAPER)
    sizes = {"batch": 1, "heads": 1, "head_size": 64, "element_size": 2, argument: value}
    message = f"^AttentionPattern: {argument} must be an integer of at least 0, got {value!r}$"
    with pytest.raises(ValueError, match=message):
        pattern.bytes(**sizes)
    del sizes["element_size"]
    if argument in sizes:
        with pytest.raises(ValueError, match=message):
            pattern.flops(**sizes)
