"""The definition of decode attention: one position of every sample, over a cache.

Letters: B captions, S samples of each, H heads, D head size, T text positions, N image slots of a
(rows, columns) grid in raster order, C slots that a cache holds.

A cache keeps what later slots will read. "column" keeps the grid column by column, "causal" as it
is; for every other pattern slot p lies at p % C, C one more than the largest offset.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import without_autocast

MAX_CODE = 127  # of the 8-bit form


def decode_capacity(pattern: Any) -> int:
    """C: how many image slots a cache of `pattern` keeps."""
    rows, columns = pattern.grid
    capacity: int = rows * columns if pattern.kind == "column" else pattern.offsets[-1] + 1
    return capacity


def decode_places(pattern: Any) -> torch.Tensor:
    """(N,) int64: where a cache of `pattern` keeps each image slot."""
    rows: int
    columns: int
    rows, columns = pattern.grid
    slot = torch.arange(rows * columns, dtype=torch.int64, device="cpu")
    if pattern.kind == "column":
        return slot % columns * rows + slot // columns
    return slot % decode_capacity(pattern)


def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8-bit form of rows (..., D): int8 codes, and fp32 scales (...), max |x| / 127.

    A row with an infinity or NaN decodes to NaN; one of zeros to zeros. Otherwise a number is off
    by at most half its scale, besides rounding.
    """
    x = x if x.dtype == torch.float64 else x.float()
    scales = x.abs().amax(-1).float() / MAX_CODE
    codes = (x / scales[..., None]).round().nan_to_num(0.0).to(torch.int8)
    return codes, torch.where(scales.isfinite(), scales, math.nan)


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of the 8-bit form."""
    return (codes.to(dtype) * scales[..., None].to(dtype)).to(dtype)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: Any,
    slot: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Writes k and v of `slot` into the cache, then attends to the text and the slot's pattern.

    q, k, v and the result are (B, S, H, D); `cache` is a `dalle_ext.DecodeCache`.
    """
    pattern, at = cache.pattern, int(slot)
    slots = pattern.grid[0] * pattern.grid[1]
    if not 0 <= at < slots:
        raise RuntimeError(f"decode_attention: slot must be from 0 to {slots - 1}, got {at}")
    places = decode_places(pattern).to(q.device)
    cache.store(places[at : at + 1], k[:, :, :, None], v[:, :, :, None])
    seen = places[[at - o for o in reversed(pattern.offsets) if o <= at]]
    parts = []
    for text, image in zip((cache.text_keys, cache.text_values), cache.read(seen), strict=True):
        shared = text[:, None].expand(-1, q.shape[1], -1, -1, -1)
        parts.append(torch.cat([shared, image], 3))  # (B, S, H, T + seen, D)
    keys, values = parts
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    with without_autocast(q):
        scores = (q[:, :, :, None] @ keys.transpose(-2, -1)) * factor
        return (scores.softmax(-1) @ values)[:, :, :, 0]
