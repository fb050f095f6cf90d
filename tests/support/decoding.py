"""Streams of tokens that are decoded slot by slot, for the tests of decode attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dalle_ext import AttentionPattern, DecodeCache, decode_attention
from dalle_ext.ops.sparse_attention import KINDS

LISTS = ([0], [0, 1, 7], [0, 3, 4, 5, 11], list(range(0, 60, 3)))
ODD = [(0, (1, 9)), (3, (9, 1)), (13, (5, 7)), (1, (3, 32))]  # text_len, grid


def patterns(text_len: int, grid: tuple[int, int]) -> Iterator[AttentionPattern]:
    """One of every kind, and lists of offsets."""
    sizes: dict[str, Any] = {"text_len": text_len, "grid": grid}
    yield from (AttentionPattern(kind, kernel_size=5, **sizes) for kind in KINDS)
    yield from (AttentionPattern.offsets(offsets, **sizes) for offsets in LISTS)


def stream(
    pattern: AttentionPattern,
    *,
    batch: int = 2,
    samples: int = 2,
    heads: int = 2,
    size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tensor:
    """q, k, v (3, B, S, H, text_len + N, D); the text is the same for all samples of a caption."""
    draw = torch.Generator().manual_seed(3)
    shape = (3, batch, samples, heads, pattern.length, size)
    x = torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu")
    x[:, :, :, :, : pattern.text_len] = x[:, :, :1, :, : pattern.text_len]
    return x.to(device, dtype)


def text_of(x: Tensor, pattern: AttentionPattern) -> Tensor:
    """Keys and values of the text, (2, B, H, T, D)."""
    return x[1:, :, 0, :, : pattern.text_len]


def decoded(
    x: Tensor,
    pattern: AttentionPattern,
    slots: Iterable[int] | None = None,
    bits: int | None = None,
) -> Tensor:
    """(B, S, H, slots, D): every slot of a stream after the other, or some, each in a cache filled
    with those before it."""
    text, samples = pattern.text_len, x.shape[2]
    cache, out = DecodeCache(pattern, *text_of(x, pattern), samples, bits=bits), []
    for slot in range(pattern.length - text) if slots is None else slots:
        if slots is not None:
            cache = DecodeCache(pattern, *text_of(x, pattern), samples, bits=bits)
            cache.fill(*x[1:, :, :, :, text : text + slot])
        at = torch.tensor(slot, dtype=torch.int64, device=x.device)
        out.append(decode_attention(*x[:, :, :, :, text + slot], cache, at))
    return torch.stack(out, 3)


def uncached(attend: Callable[..., Tensor], x: Tensor, pattern: AttentionPattern) -> Tensor:
    """(B, S, H, N, D): what attention over the whole stream gives the image."""
    out = attend(*x.flatten(1, 2), pattern)
    return out.unflatten(0, x.shape[1:3])[:, :, :, pattern.text_len :]
