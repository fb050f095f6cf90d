"""Which keys a query sees: the attention patterns of the paper (Figure 11) as one value object.

The stream is `text_len` text positions, then `rows * columns` image positions in raster order. For
every pattern a query at position q sees a key at position k <= q if k is text or if the image
distance q - k is one of the pattern's offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from types import MethodType
from typing import Any, overload

import torch

from dalle_ext._checks import integer
from dalle_ext.ops import sparse_attention_cost as cost
from dalle_ext.ops import sparse_attention_flex as flex
from dalle_ext.reference.sparse_attention import sparse_attention_mask

KINDS = ("row", "column", "conv", "causal")  # whose offsets follow from the grid
OFFSETS = "offsets"  # whose offsets are given


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
    if given:  # by kind "offsets" always, by "conv" in place of its own
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


class _Offsets:
    """`pattern.offsets` are its distances; `AttentionPattern.offsets(...)` makes a pattern."""

    @overload
    def __get__(
        self, instance: None, owner: type[AttentionPattern]
    ) -> Callable[..., AttentionPattern]: ...
    @overload
    def __get__(
        self, instance: AttentionPattern, owner: type[AttentionPattern]
    ) -> tuple[int, ...]: ...
    def __get__(self, instance: AttentionPattern | None, owner: type[AttentionPattern]) -> Any:
        if instance is None:
            return MethodType(_Offsets.offsets, owner)
        (rows, columns), half = instance.grid, instance.kernel_size // 2
        found = _offsets(instance.kind, rows * columns, columns, half, instance.custom_offsets)
        instance.__dict__["offsets"] = found  # where the next look finds it first
        return found

    @staticmethod
    def offsets(
        cls: type[AttentionPattern],
        offsets: Iterable[int],
        *,
        text_len: int,
        grid: Iterable[int],
    ) -> AttentionPattern:
        """The pattern of any list of image distances q - k.

        Args:
            offsets: integers from 0 on, 0 among them, in any order.
            text_len, grid: as of the class.

        Raises:
            ValueError: as the class does.
        """
        return cls(OFFSETS, text_len=text_len, grid=grid, offsets=offsets)


@dataclass(frozen=True, init=False)
class AttentionPattern:
    """An attention pattern for one text length and one image grid; raises ValueError on others.

    Args:
        kind: "row" (the slot itself and one whole row before it, across row ends), "column" (same
            column, this row and earlier), "conv" (centred causal kernel with raster wraparound),
            "causal" (everything up to the query) or "offsets" (the distances that `offsets` lists;
            `AttentionPattern.offsets([0, 1, 32], text_len=..., grid=...)` is the short form).
        text_len: number of text positions, 0 or more.
        grid: (rows, columns) of the image, each at least 1.
        kernel_size: odd width of the conv kernel; only "conv" uses it.
        offsets: the attended image distances q - k of "offsets", or of another reading of "conv";
            must hold 0. Those beyond the grid count for nothing.
        custom_offsets: the field that keeps what was given as `offsets`, so that
            `dataclasses.replace` carries that over, and derives the rest anew.
    """

    kind: str
    _: KW_ONLY
    text_len: int
    grid: tuple[int, int]
    kernel_size: int = 11
    custom_offsets: tuple[int, ...] = field(default=(), repr=False)
    # Of a pattern: the attended image distances on its grid, ascending. Of the class: see there.
    offsets = _Offsets()

    def __init__(
        self, kind: str, *, text_len: int, grid: Iterable[int], kernel_size: int = 11,
        offsets: Iterable[int] | None = None, custom_offsets: Iterable[int] = (),
    ) -> None:  # fmt: skip
        kinds = (*KINDS, OFFSETS)
        _check(kind in kinds, "kind", f"one of {', '.join(kinds)}", kind)
        text_len = integer("AttentionPattern", "text_len", text_len, 0)
        size = _integers("grid", grid, 1, "(rows, columns), integers of at least 1")
        _check(len(size) == 2, "grid", "(rows, columns), integers of at least 1", grid)
        odd = "an odd integer >= 1"
        width = integer("AttentionPattern", "kernel_size", kernel_size, 1, requirement=odd)
        _check(width % 2 == 1, "kernel_size", odd, kernel_size)
        rule = "for kind 'conv' or 'offsets' only, from 0 upwards with 0"
        listed = _integers("offsets", custom_offsets if offsets is None else offsets, 0, rule)
        given = tuple(sorted(set(listed)))
        _check(not given or (kind in ("conv", OFFSETS) and given[0] == 0), "offsets", rule, listed)
        _check(
            bool(given) or kind != OFFSETS, "offsets", "given for kind 'offsets', with 0", listed
        )
        fields = {"kind": kind, "text_len": text_len, "grid": size, "kernel_size": width}
        for name, value in {**fields, "custom_offsets": given}.items():
            object.__setattr__(self, name, value)

    @cached_property
    def runs(self) -> tuple[int, ...]:
        """Half-open runs of "conv" and "offsets", (begin, end, begin, end, ...); else empty."""
        return _runs(self.offsets) if self.kind in ("conv", OFFSETS) else ()

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
