"""Which keys a query sees: the attention patterns of the paper (Figure 11) as one value object.

The stream is `text_len` text positions, then `rows * columns` image positions in raster order. For
every pattern a query at position q sees a key at position k <= q if k is text or if the image
distance q - k is one of the pattern's offsets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field

import torch

from dalle_ext.ops import sparse_attention_cost as cost
from dalle_ext.ops import sparse_attention_flex as flex
from dalle_ext.reference.sparse_attention import sparse_attention_mask

KINDS = ("row", "column", "conv", "causal")


def _check(holds: bool, argument: str, requirement: str, value: object) -> None:
    if not holds:
        raise ValueError(f"AttentionPattern: {argument} must be {requirement}, got {value!r}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least


@dataclass(frozen=True)
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
    """

    kind: str
    _: KW_ONLY
    text_len: int
    grid: tuple[int, int]
    kernel_size: int = 11
    offsets: tuple[int, ...] = field(default=(), repr=False)
    custom_offsets: bool = field(init=False, default=False)
    runs: tuple[int, ...] = field(init=False, default=(), repr=False, compare=False)
    """Half-open runs of "conv" offsets, (begin, end, begin, end, ...); empty for other kinds."""

    def __post_init__(self) -> None:
        _check(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}", self.kind)
        _check(_is_int(self.text_len, 0), "text_len", "an integer of at least 0", self.text_len)
        grid, size = tuple(self.grid), self.kernel_size
        holds = len(grid) == 2 and all(_is_int(n, 1) for n in grid)
        _check(holds, "grid", "(rows, columns), integers of at least 1", self.grid)
        _check(_is_int(size, 1) and size % 2 == 1, "kernel_size", "an odd integer >= 1", size)
        slots, columns, half = grid[0] * grid[1], grid[1], size // 2
        given = tuple(sorted(set(self.offsets)))
        holds = not given or (self.kind == "conv" and given[0] == 0)
        _check(holds, "offsets", "for kind 'conv' only, from 0 upwards with 0", self.offsets)
        offsets: Iterable[int] = (o for o in given if o < slots)
        if self.kind == "row":
            offsets = range(min(columns + 1, slots))
        elif self.kind == "column":
            offsets = range(0, slots, columns)
        elif self.kind == "causal":
            offsets = range(slots)
        elif not given:
            reach = range(min(columns * (half + 1), slots))
            offsets = (o for o in reach if min(o % columns, -o % columns) <= half)
        found = tuple(offsets)
        held = set(found)
        bounds = [o for o in range(slots + 1) if (o in held) != (o - 1 in held)]
        derived = {"grid": grid, "offsets": found, "custom_offsets": bool(given)}
        derived["runs"] = tuple(bounds) if self.kind == "conv" else ()
        for name, value in derived.items():
            object.__setattr__(self, name, value)

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
