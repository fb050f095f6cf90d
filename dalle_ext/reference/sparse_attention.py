"""The definition of sparse attention, by a dense mask made from coordinates.

Letters: B batch, H heads, T positions, D head size, N image positions of a (rows, columns) grid.
The stream is `text_len` text positions, then the N image positions in raster order.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import without_autocast


def sparse_attention_mask(pattern: Any) -> torch.Tensor:
    """The (T, T) bool mask of `pattern`: entry (query, key) says whether the query sees the key.

    Paper section 2.2 and Figure 11: a text query sees the text up to itself; an image query sees
    all text and the image keys of its pattern; nobody sees a later position.
    """
    rows, columns = pattern.grid
    slot = torch.arange(rows * columns, dtype=torch.int64, device="cpu")
    query, key = slot[:, None], slot[None, :]
    distance = query - key
    if pattern.custom_offsets:
        image = torch.isin(distance, slot[list(pattern.offsets)])
    elif pattern.kind == "row":  # the slot itself and one whole row before it, across row ends
        image = distance <= columns
    elif pattern.kind == "column":
        image = query % columns == key % columns
    elif pattern.kind == "conv":  # a centred causal kernel that runs on across row ends
        half = pattern.kernel_size // 2
        across = torch.minimum(distance % columns, -distance % columns)
        image = (distance < columns * (half + 1)) & (across <= half)
    elif pattern.kind == "causal":
        image = torch.ones_like(distance, dtype=torch.bool)
    else:
        wanted = "one that is defined here"
        raise NotImplementedError(f"AttentionPattern: kind must be {wanted}, got {pattern.kind!r}")
    mask = slot.new_zeros(pattern.length, pattern.length, dtype=torch.bool)
    text = pattern.text_len
    mask[:, :text] = mask.new_ones(pattern.length, text).tril()
    mask[text:, text:] = image & (distance >= 0)
    return mask


def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Any, scale: float | None = None
) -> torch.Tensor:
    """softmax(mask(q k^T scale)) v in q's dtype; q, k, v and the result are (B, H, T, D)."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = sparse_attention_mask(pattern).to(q.device)
    with without_autocast(q):
        scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~mask, -math.inf)
        return torch.softmax(scores, dim=-1) @ v
