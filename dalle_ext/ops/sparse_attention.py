"""Sparse attention, and which keys a query sees: the patterns of the paper (Figure 11).

The stream is `text_len` text positions, then `rows * columns` image positions in raster order. For
every pattern a query at position q sees a key at position k <= q if k is text or if the image
distance q - k is one of the pattern's offsets.

Letters: B batch, H heads, T positions, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any, overload

import torch

from dalle_ext import _native
from dalle_ext._checks import autograd_only, finite, integer, once_differentiable
from dalle_ext._switch import reference_in_use
from dalle_ext.reference import sparse_attention as reference

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Tensor = torch.Tensor
KINDS = ("row", "column", "conv", "causal")  # whose offsets follow from the grid
OFFSETS = "offsets"  # whose offsets are given
LSE_BYTES = 8  # a float64 a query
DTYPES = ("float32", "float64", "float16", "bfloat16")


def _counts(**counts: int) -> list[int]:
    return [integer("AttentionPattern", name, value, 0) for name, value in counts.items()]


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
    if kind == "conv":
        reach = range(min(columns * (half + 1), slots))
        return tuple(o for o in reach if min(o % columns, -o % columns) <= half)
    wanted = "one that is defined here"
    raise NotImplementedError(f"AttentionPattern: kind must be {wanted}, got {kind!r}")


def _runs(offsets: tuple[int, ...]) -> tuple[int, ...]:
    attended = set(offsets)
    return tuple(o for o in range(offsets[-1] + 2) if (o in attended) != (o - 1 in attended))


def _check(condition: bool, argument: str, requirement: str, value: object) -> None:
    if not condition:
        raise ValueError(f"AttentionPattern: {argument} must be {requirement}, got {value!r}")


def _integers(argument: str, values: Any, minimum: int, requirement: str) -> tuple[int, ...]:
    try:
        return tuple(integer("AttentionPattern", argument, n, minimum) for n in values)
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
        offsets = _offsets(instance.kind, rows * columns, columns, half, instance.custom_offsets)
        instance.__dict__["offsets"] = offsets  # an instance attribute comes before this descriptor
        return offsets

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
        self,
        kind: str,
        *,
        text_len: int,
        grid: Iterable[int],
        kernel_size: int = 11,
        offsets: Iterable[int] | None = None,
        custom_offsets: Iterable[int] = (),
    ) -> None:
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
        # Not at the first look: torch.compile cannot follow the lock that one would take.
        self.__dict__["_runs"] = _runs(self.offsets) if kind in ("conv", OFFSETS) else ()

    @property
    def runs(self) -> tuple[int, ...]:
        """Half-open runs of "conv" and "offsets", (begin, end, begin, end, ...); else empty."""
        runs: tuple[int, ...] = self.__dict__["_runs"]
        return runs

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

    def mask(self) -> Tensor:
        """The (T, T) bool mask, entry (query, key), on the CPU."""
        return reference.sparse_attention_mask(self)

    def mask_mod(self, device: torch.device | str = "cpu") -> Callable[..., Tensor]:
        """The pattern as a `mask_mod(b, h, q_idx, kv_idx)`; "conv" reads a table on `device`."""
        text, (rows, columns) = self.text_len, self.grid
        if self.kind == "causal":
            return lambda b, h, q, k: q >= k
        if self.kind == "row":
            return lambda b, h, q, k: (q >= k) & ((k < text) | (q - k <= columns))
        if self.kind == "column":
            return lambda b, h, q, k: (q >= k) & ((k < text) | ((q - k) % columns == 0))
        beyond = rows * columns
        visible = torch.zeros(beyond + 1, dtype=torch.bool, device="cpu")  # last entry stays False
        visible[list(self.offsets)] = True
        visible = visible.to(device)
        return lambda b, h, q, k: (q >= k) & ((k < text) | visible[(q - k).clamp(0, beyond)])

    def to_block_mask(self, device: torch.device | str = "cpu") -> BlockMask:
        """The pattern as a block mask for any batch and heads, in blocks of 128."""
        from torch.nn.attention.flex_attention import create_block_mask

        size = self.length
        rule = self.mask_mod(device)
        return create_block_mask(rule, None, None, size, size, device=str(device))

    def flops(self, batch: int, heads: int, head_size: int, backward: bool = False) -> int:
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
        return (10 if backward else 4) * head_size * batch * heads * self.num_pairs

    def bytes(
        self,
        batch: int,
        heads: int,
        head_size: int,
        element_size: int,
        backward: bool = False,
    ) -> int:
        """Least memory traffic of attention over this pattern: every tensor once.

        Forward q, k, v, out; backward q, k, v, out, grad_out and the three gradients; all
        (B, H, T, D). Beside them the log-sum-exp, written forward and read backward, which this
        library keeps as (B, H, T) float64, so that the backward makes the forward's probabilities
        again to the last bit.

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
        return batch * heads * self.length * row


def _like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape, in memory (B, T, H, D) where x has heads inside positions."""
    if x.stride(1) < x.stride(2):
        return x.new_empty(x.size(0), x.size(2), x.size(1), x.size(3)).transpose(1, 2)
    return x.new_empty(x.size(0), x.size(1), x.size(2), x.size(3))


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    text_len: int,
    rows: int,
    columns: int,
    runs: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.size(0), q.size(1), q.size(2), dtype=torch.float64)


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _backward_qkvpacked_fake(grad_out: Tensor, qkv: Tensor, *rest: object) -> Tensor:
    return qkv.new_empty(qkv.shape)


if _native.CPU_PROBLEM is None:
    _forward = _native.register(
        "_sparse_attention_forward", _forward_fake, public="sparse_attention", differentiable=True
    )
    _backward = _native.register(
        "_sparse_attention_backward", _backward_fake, public="sparse_attention"
    )
    _backward_qkvpacked = _native.register(
        "_sparse_attention_backward_qkvpacked",
        _backward_qkvpacked_fake,
        public="sparse_attention_qkvpacked",
    )


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rule: Any) -> Tensor:
        out, lse = _forward(q, k, v, *rule)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
        with torch.no_grad():
            grads: tuple[Tensor, ...] = _backward(_rows(grad_out), *saved, *ctx.rule)
        sources = (grad_out, *saved[:3])
        grads = once_differentiable(grads, sources, _native.SECOND_DERIVATIVE)
        return (*grads, *(None for _ in ctx.rule))


class _QkvPackedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *rule: Any) -> Tensor:
        out, lse = _forward(*_unpacked(qkv), *rule)
        ctx.save_for_backward(qkv, out, lse)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
        with torch.no_grad():
            grad: Tensor = _backward_qkvpacked(_rows(grad_out), *saved, *ctx.rule)
        (grad,) = once_differentiable((grad,), (grad_out, saved[0]), _native.SECOND_DERIVATIVE)
        return (grad, *(None for _ in ctx.rule))


def _unpacked(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3, H, D) -> q, k, v (B, H, T, D), views."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like_native(q: Tensor, **others: Tensor) -> None:
    """Checks what the native op asks of its tensors, in the same words. Raises RuntimeError."""
    size, dtype, wrong = q.size(3), _dtype(q), ""
    if not 1 <= size <= 256:
        wrong = f"D must be from 1 to 256, got {size}"
    elif dtype not in DTYPES:
        wrong = f"q must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype}"
    for name, x in others.items():
        if x.shape != q.shape:
            got = ", ".join(map(str, x.shape))
            wrong = wrong or f"{name} must be of q's shape {tuple(q.shape)}, got ({got})"
        if x.dtype != q.dtype:
            wrong = wrong or f"{name} must be of q's dtype {dtype}, got {_dtype(x)}"
    if wrong:
        raise RuntimeError(f"sparse_attention: {wrong}")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _factor(scale: float | None, x: Tensor) -> float:
    """On q k^T; x has D in its last dimension."""
    if scale is None:
        return 1.0 / math.sqrt(max(1, x.size(-1)))
    return finite("sparse_attention", "scale", scale)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, scale: float | None = None
) -> Tensor:
    """Attention over the keys that `pattern` lets each query see (paper, section 2.2, Figure 11).

    Equivalent to::

        scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~pattern.mask(), -inf)
        return scores.softmax(-1) @ v

    Args:
        q, k, v: (B, H, T, D) of one dtype (float32, float64, float16, bfloat16) and device, D from
            1 to 256, T = pattern.length. Any strides; only a D that is not contiguous is copied.
            16-bit inputs accumulate in float32.
        pattern: which keys each query sees.
        scale: factor on q k^T, a finite number; 1 / sqrt(D) if left out.

    Returns:
        (B, H, T, D) in q's dtype; in memory (B, T, H, D) where q is stored so, so that the heads
        merge without a copy, otherwise contiguous. Differentiable once in q, k, v, in reverse mode.

    Raises:
        TypeError: pattern is not an AttentionPattern, or scale is a tensor that wants a gradient.
        ValueError: q is not (B, H, T, D) with T = pattern.length, scale is not a finite number, or
            devices differ.
        NotImplementedError: forward-mode tangents (`torch.func.jvp`, `jacfwd`).
        RuntimeError: other shapes or dtypes; no native library for q's device.
    """
    if not isinstance(pattern, AttentionPattern):
        name = type(pattern).__name__
        raise TypeError(f"sparse_attention: pattern must be an AttentionPattern, got {name}")
    if q.dim() != 4 or q.size(2) != pattern.length:
        want, got = f"(B, H, T = {pattern.length}, D) for {pattern}", tuple(q.shape)
        raise ValueError(f"sparse_attention: q must be {want}, got {got}")
    if not q.device == k.device == v.device:
        where = f"{q.device}, {k.device}, {v.device}"
        raise ValueError(f"sparse_attention: q, k, v must be on one device, got {where}")
    factor = _factor(scale, q)
    if reference_in_use():
        _like_native(q, k=k, v=v)
        return reference.sparse_attention(q, k, v, pattern, factor)
    _native.require("sparse_attention", q.device)
    rule = (pattern.kind, pattern.text_len, *pattern.grid, pattern.runs, factor)
    q, k, v = _rows(q), _rows(k), _rows(v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        autograd_only("sparse_attention")
        out: Tensor = _Function.apply(q, k, v, *rule)  # type: ignore[no-untyped-call]  # of torch
        return out
    return _forward(q, k, v, *rule)[0]


def sparse_attention_qkvpacked(
    qkv: Tensor, pattern: AttentionPattern, scale: float | None = None
) -> Tensor:
    """`sparse_attention` of the three parts of one projection, whose gradient comes back packed.

    Equivalent to::

        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return sparse_attention(q, k, v, pattern, scale)

    but the backward writes the three gradients into one tensor, where autograd of the line above
    stacks them: a copy of 3 B T H D elements less.

    Args:
        qkv: (B, T, 3, H, D), as a linear layer of 3 H D outputs gives it after `view`; dtypes and
            sizes as in `sparse_attention`. Any strides; only a D that is not contiguous is copied.
        pattern: which keys each query sees.
        scale: factor on q k^T, a finite number; 1 / sqrt(D) if left out.

    Returns:
        (B, H, T, D) in qkv's dtype, in memory (B, T, H, D), so that the heads merge without a copy.
        Differentiable once, in reverse mode; the gradient is (B, T, 3, H, D), contiguous.

    Raises:
        TypeError: pattern is not an AttentionPattern, or scale is a tensor that wants a gradient.
        ValueError: qkv is not (B, T, 3, H, D) with T = pattern.length, or scale is not a finite
            number.
        NotImplementedError: forward-mode tangents (`torch.func.jvp`, `jacfwd`).
        RuntimeError: other dtypes; no native library for qkv's device.
    """
    if not isinstance(pattern, AttentionPattern):
        name = type(pattern).__name__
        raise TypeError(
            f"sparse_attention_qkvpacked: pattern must be an AttentionPattern, got {name}"
        )
    if qkv.dim() != 5 or qkv.size(2) != 3 or qkv.size(1) != pattern.length:
        want, got = f"(B, T = {pattern.length}, 3, H, D) for {pattern}", tuple(qkv.shape)
        raise ValueError(f"sparse_attention_qkvpacked: qkv must be {want}, got {got}")
    if reference_in_use() or not (torch.is_grad_enabled() and qkv.requires_grad):
        return sparse_attention(*_unpacked(qkv), pattern, scale)
    factor = _factor(scale, qkv)
    _native.require("sparse_attention_qkvpacked", qkv.device)
    autograd_only("sparse_attention_qkvpacked")
    rule = (pattern.kind, pattern.text_len, *pattern.grid, pattern.runs, factor)
    out: Tensor = _QkvPackedFunction.apply(_rows(qkv), *rule)  # type: ignore[no-untyped-call]  # of torch
    return out
