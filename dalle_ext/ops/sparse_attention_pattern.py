"""Which keys a query sees: the attention patterns of the paper (Figure 11) as one value object.

The stream is `text_len` text positions, then `rows * columns` image positions in raster order. For
every pattern a query at position q sees a key at position k <= q if k is text or if the image
distance q - k is one of the pattern's offsets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

import torch

from dalle_ext._checks import integer
from dalle_ext.ops import sparse_attention_cost as cost
from dalle_ext.ops import sparse_attention_flex as flex
from dalle_ext.reference.sparse_attention import sparse_attention_mask

KINDS = ("row", "column", "conv", "causal")


def _offsets(
    kind: str, slots: int, columns: int, half: int, given: tuple[int, ...]
) -> tuple[int, ...]:
    """The attended distances on a grid of `slots` positions."""
    if kind == "row":
        return tuple(range(min(columns + 1, slots)))
    if kind == "column":
        return tuple(range(0, slots, columns))
    if kind == "causal":
        return tuple(range(slots))
    if given:
        return tuple(o for o in given if o < slots)
    reach = range(min(columns * (half + 1), slots))
    return tuple(o for o in reach if min(o % columns, -o % columns) <= half)


def _runs(offsets: tuple[int, ...]) -> tuple[int, ...]:
    held = set(offsets)
    return tuple(o for o in range(offsets[-1] + 2) if (o in held) != (o - 1 in held))


def _check(holds: bool, argument: str, requirement: str, value: object) -> None:
    if not holds:
        raise ValueError(f"AttentionPattern: {argument} must be {requirement}, got {value!r}")


def _integers(argument: str, values: Any, least: int, requirement: str) -> tuple[int, ...]:
    try:
        return tuple(integer("AttentionPattern", argument, n, least) for n in values)
    except (TypeError, ValueError):
        raise ValueError(
            f"AttentionPattern: {argument} must be {requirement}, got {values!r}"
        ) from None


@dataclass(frozen=True, init=False)
class AttentionPattern:
    """An attention pattern for one text length and one image grid; raises ValueError on others.

    Args:
        kind: "row" (the slot itself and one whole row before it, across row ends), "column" (same
            column, this row and earlier), "conv" (centred causal kernel with raster wraparound) or
            "causal" (everything up to the query).
        text_len: number of text positions, 0 or more.
        grid: (rows, columns) of the image, each at least 1.
        kernel_size: odd width of the conv kernel; only "conv" uses it.
        offsets: the attended image distances q - k, for another reading of "conv"; must hold 0.
            Left out, they are the offsets of `kind`.
        custom_offsets: the field that keeps what was given as `offsets`, so that
            `dataclasses.replace` carries that over, and derives the rest anew.
    """

    kind: str
    _: KW_ONLY
    text_len: int
    grid: tuple[int, int]
    kernel_size: int = 11
    custom_offsets: tuple[int, ...] = field(default=(), repr=False)

    def __init__(
        self, kind: str, *, text_len: int, grid: Iterable[int], kernel_size: int = 11,
        offsets: Iterable[int] | None = None, custom_offsets: Iterable[int] = (),
    ) -> None:  # fmt: skip
        _check(kind in KINDS, "kind", f"one of {', '.join(KINDS)}", kind)
        text_len = integer("AttentionPattern", "text_len", text_len, 0)
        size = _integers("grid", grid, 1, "(rows, columns), integers of at least 1")
        _check(len(size) == 2, "grid", "(rows, columns), integers of at least 1", grid)
        odd = "an odd integer >= 1"
        width = integer("AttentionPattern", "kernel_size", kernel_size, 1, requirement=odd)
        _check(width % 2 == 1, "kernel_size", odd, kernel_size)
        rule = "for kind 'conv' only, from 0 upwards with 0"
        listed = _integers("offsets", custom_offsets if offsets is None else offsets, 0, rule)
        given = tuple(sorted(set(listed)))
        _check(not given or (kind == "conv" and given[0] == 0), "offsets", rule, listed)
        fields = {"kind": kind, "text_len": text_len, "grid": size, "kernel_size": width}
        for name, value in {**fields, "custom_offsets": given}.items():
            object.__setattr__(self, name, value)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The attended image distances on this grid, ascending."""
        slots, columns, half = self.grid[0] * self.grid[1], self.grid[1], self.kernel_size // 2
        return _offsets(self.kind, slots, columns, half, self.custom_offsets)

    @cached_property
    def runs(self) -> tuple[int, ...]:
        """Half-open runs of "conv" offsets, (begin, end, begin, end, ...); else empty."""
        return _runs(self.offsets) if self.kind == "conv" else ()

    @property
    def length(self) -> int:
        """Number of positions T = text_len + rows * columns."""
        return self.text_len + self.grid[0] * self.grid[1]

    @property
    def num_pairs(self) -> int:
        """Number of (query, key) pairs attended."""
        text, slots = self.text_len, self.grid[0] * self.grid[1]
        return text * (text + 1) // 2 + slots * text + sum(slots - o for o in self.offsets)

    @property
    def density(self) -> float:
        """Attended share of the causal triangle; 1.0 for "causal"."""
        return self.num_pairs / (self.length * (self.length + 1) // 2)

    def mask(self) -> torch.Tensor:
        """The (T, T) bool mask, entry (query, key), on the CPU."""
        return sparse_attention_mask(self)

    mask_mod = flex.mask_mod
    to_block_mask = flex.to_block_mask
    flops = cost.flops
    bytes = cost.bytes_moved
