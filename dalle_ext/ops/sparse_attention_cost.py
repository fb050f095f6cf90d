"""What attention over a pattern costs at least: the numbers that benchmarks divide by.

The functions are methods of `AttentionPattern`. Letters: B batch, H heads, T positions, D head
size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_ext._checks import integer

if TYPE_CHECKING:
    from dalle_ext.ops.sparse_attention_pattern import AttentionPattern

LSE_BYTES = 8  # a float64 a query


def flops(
    pattern: AttentionPattern, batch: int, heads: int, head_size: int, backward: bool = False
) -> int:
    """Floating point operations that attention over this pattern needs.

    Only attended pairs count, and of each only the matrix products, 2 D apiece: q k^T and p v
    forward (4 D); q k^T again, p^T dO, dO v^T, dS k and dS^T q backward (10 D). A kernel that
    computes what the mask throws away does more.

    Args:
        batch, heads, head_size: B, H, D of the tensors.
        backward: the backward's in place of the forward's; a training step needs both.

    Raises:
        ValueError: a number is not an integer of at least 0.
    """
    batch, heads, head_size = _counts(batch=batch, heads=heads, head_size=head_size)
    return (10 if backward else 4) * head_size * batch * heads * pattern.num_pairs


def bytes_moved(
    pattern: AttentionPattern,
    batch: int,
    heads: int,
    head_size: int,
    element_size: int,
    backward: bool = False,
) -> int:
    """Least memory traffic of attention over this pattern: every tensor once.

    Forward q, k, v, out; backward q, k, v, out, grad_out and the three gradients; all (B, H, T, D).
    Beside them the log-sum-exp, written forward and read backward, which this library keeps as
    (B, H, T) float64, so that the backward makes the forward's probabilities again to the last bit.

    Args:
        batch, heads, head_size: B, H, D of the tensors.
        element_size: bytes of one element, 2 for float16 and bfloat16.
        backward: the backward's in place of the forward's; a training step needs both.

    Raises:
        ValueError: a number is not an integer of at least 0.
    """
    batch, heads, head_size, element_size = _counts(
        batch=batch, heads=heads, head_size=head_size, element_size=element_size
    )
    row = (8 if backward else 4) * head_size * element_size + LSE_BYTES
    return batch * heads * pattern.length * row


def _counts(**counts: int) -> list[int]:
    return [integer("AttentionPattern", name, value, 0) for name, value in counts.items()]
