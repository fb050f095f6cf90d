"""`AttentionPattern` in the words of FlexAttention; the functions are methods of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from dalle_ext.ops.sparse_attention_pattern import AttentionPattern


def mask_mod(
    pattern: AttentionPattern, device: torch.device | str = "cpu"
) -> Callable[..., torch.Tensor]:
    """The pattern as a `mask_mod(b, h, q_idx, kv_idx)`; "conv" reads a table on `device`."""
    text, (rows, columns) = pattern.text_len, pattern.grid
    if pattern.kind == "causal":
        return lambda b, h, q, k: q >= k
    if pattern.kind == "row":
        return lambda b, h, q, k: (q >= k) & ((k < text) | (q - k <= columns))
    if pattern.kind == "column":
        return lambda b, h, q, k: (q >= k) & ((k < text) | ((q - k) % columns == 0))
    beyond = rows * columns
    seen = torch.zeros(beyond + 1, dtype=torch.bool, device="cpu")  # the last entry stays False
    seen[list(pattern.offsets)] = True
    seen = seen.to(device)
    return lambda b, h, q, k: (q >= k) & ((k < text) | seen[(q - k).clamp(0, beyond)])


def to_block_mask(pattern: AttentionPattern, device: torch.device | str = "cpu") -> BlockMask:
    """The pattern as a block mask for any batch and heads, in blocks of 128."""
    from torch.nn.attention.flex_attention import create_block_mask

    size = pattern.length
    rule = mask_mod(pattern, device)
    return create_block_mask(rule, None, None, size, size, device=str(device))
