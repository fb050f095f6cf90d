"""Decode attention: one new position of every sample against text and image slots seen before.

Letters: B captions, S samples of each, H heads, D head size, T text positions, N image slots, C
slots that the cache of a pattern holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dalle_ext import _native
from dalle_ext._checks import finite, integer, tensor_text, untracked
from dalle_ext._switch import reference_in_use
from dalle_ext.ops.sparse_attention import AttentionPattern
from dalle_ext.reference import decode_attention as reference

Tensor = torch.Tensor
OP, CACHE = "decode_attention", "DecodeCache"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CODED_KINDS = ("column", "causal")  # that keep many slots


def _fake(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


if _native.CPU_PROBLEM is None:
    _decode_attention = _native.register("_decode_attention", _fake, public=OP)


class DecodeCache:
    """What decode attention reads of B captions with S samples each: text, and image slots.

    Of the image it keeps what the pattern reads again. "row" and lists of offsets: a ring of the
    largest offset + 1 slots ("row" columns + 1, 11 x 11 "conv" on 32 x 32 192). "column": all,
    column by column. "causal": all. Slots are filled in order, by `decode_attention` or `fill`.

    Args:
        pattern: whose text_len is T.
        text_keys, text_values: (B, H, T, D) of one dtype (float32, float64, float16, bfloat16) and
            device, D from 1 to 256. Copied, once for all samples of a caption.
        samples: S, at least 1.
        bits: 8 keeps image keys and values as int8 with one float32 scale a slot and head, max /
            127 (for "column" and "causal"); None in the dtype of the text.

    Attributes:
        text_keys, text_values: (B, H, T, D).
        image_keys, image_values: (B, S, H, C, D).
        key_scales, value_scales: (B, S, H, C) float32 with `bits` 8, else None.
        A contiguous tensor of the same shape, dtype and device may take the place of each.

    Raises:
        TypeError: pattern is not an AttentionPattern; text that requires a gradient while gradients
            are recorded.
        ValueError: shapes, dtypes, devices, samples, or bits that do not fit.
    """

    def __init__(
        self,
        pattern: AttentionPattern,
        text_keys: Tensor,
        text_values: Tensor,
        samples: int,
        *,
        bits: int | None = None,
    ) -> None:
        if not isinstance(pattern, AttentionPattern):
            name = type(pattern).__name__
            raise TypeError(f"{CACHE}: pattern must be an AttentionPattern, got {name}")
        untracked(CACHE, text_keys=text_keys, text_values=text_values)
        self.pattern, self.bits = pattern, bits
        self.samples = integer(CACHE, "samples", samples, 1, 2**31)
        if text_keys.dim() != 4 or text_keys.size(2) != pattern.text_len:
            want = f"(B, H, {pattern.text_len}, D) for {pattern}"
            raise ValueError(f"{CACHE}: text_keys must be {want}, got {tuple(text_keys.shape)}")
        if text_keys.dtype not in DTYPES:
            want = "float32, float64, float16 or bfloat16"
            raise ValueError(f"{CACHE}: text_keys must be {want}, got {text_keys.dtype}")
        batch, heads, _, size = text_keys.shape
        if not 1 <= size <= 256:
            raise ValueError(f"{CACHE}: D must be from 1 to 256, got {size}")
        self._like("text_values", text_values, text_keys)
        if bits is not None and (isinstance(bits, bool) or bits != 8):
            raise ValueError(f"{CACHE}: bits must be None or 8, got {bits!r}")
        if bits is not None and pattern.kind not in CODED_KINDS:
            want = f"None for kind {pattern.kind!r} (8 is for {' and '.join(CODED_KINDS)})"
            raise ValueError(f"{CACHE}: bits must be {want}, got {bits}")
        self.text_keys = text_keys.detach().clone(memory_format=torch.contiguous_format)
        self.text_values = text_values.detach().clone(memory_format=torch.contiguous_format)
        self._places = reference.decode_places(pattern).to(text_keys.device)
        shape = (batch, self.samples, heads, reference.decode_capacity(pattern), size)
        stored = text_keys.dtype if bits is None else torch.int8
        self.image_keys = text_keys.new_zeros(shape, dtype=stored)
        self.image_values = text_keys.new_zeros(shape, dtype=stored)

        def scales() -> Tensor | None:
            return None if bits is None else text_keys.new_zeros(shape[:4], dtype=torch.float32)

        self.key_scales, self.value_scales = scales(), scales()

    def __setattr__(self, name: str, value: Any) -> None:
        """A tensor may take another's place where it is like it; all else stays as it was made."""
        if name in self.__dict__:
            old = self.__dict__[name]
            if not isinstance(old, Tensor):
                raise AttributeError(f"{CACHE}: {name} must stay as it was made, got another")
            untracked(CACHE, **{name: value})
            self._like(name, value, old)
            if not value.is_contiguous():
                raise ValueError(f"{CACHE}: {name} must be contiguous, got {tensor_text(value)}")
        super().__setattr__(name, value)

    @property
    def num_bytes(self) -> int:
        """Bytes of image keys and values of all B * S samples, scales included."""
        return sum(x.numel() * x.element_size() for x in self._stores())

    def _stores(self) -> list[Tensor]:
        stores = (self.image_keys, self.image_values, self.key_scales, self.value_scales)
        return [x for x in stores if x is not None]

    def _like(self, name: str, x: Tensor, other: Tensor) -> None:
        for what, got, want in (
            ("of shape", tuple(x.shape), tuple(other.shape)),
            ("of dtype", x.dtype, other.dtype),
            ("on", x.device, other.device),
        ):
            if got != want:
                raise ValueError(f"{CACHE}: {name} must be {what} {want}, got {got}")

    def set_text(self, text_keys: Tensor, text_values: Tensor) -> None:
        """Other captions in the same memory, so that a CUDA graph reads them; shapes as before."""
        untracked(CACHE, text_keys=text_keys, text_values=text_values)
        self._like("text_keys", text_keys, self.text_keys)
        self._like("text_values", text_values, self.text_values)
        self.text_keys.copy_(text_keys)
        self.text_values.copy_(text_values)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Keys and values of slots 0 to n - 1, as if they had been decoded one after another.

        Args:
            keys, values: (B, H, n, D), the same for all samples, or (B, S, H, n, D); n up to N.

        Raises:
            ValueError: another shape, dtype or device.
        """
        untracked(CACHE, keys=keys, values=values)
        batch, samples, heads, capacity, size = self.image_keys.shape
        n, slots = keys.size(-2) if keys.dim() in (4, 5) else -1, len(self._places)
        shared = keys.dim() == 4
        want = (batch, heads, n, size) if shared else (batch, samples, heads, n, size)
        if tuple(keys.shape) != want or n > slots:
            either = f"({batch}, {heads}, n, {size}) or ({batch}, {samples}, {heads}, n, {size})"
            got = tuple(keys.shape)
            raise ValueError(f"{CACHE}: keys must be {either} with n up to {slots}, got {got}")
        self._like("keys", keys, self.text_keys.new_empty(1).expand(keys.shape))
        self._like("values", values, keys)
        kept = slice(max(0, n - capacity), n)
        parts = [x[..., kept, :] for x in (keys, values)]
        if shared:
            parts = [x[:, None].expand(-1, samples, -1, -1, -1) for x in parts]
        self.store(self._places[kept], *parts)

    def store(self, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes (B, S, H, n, D) to n places, (n,) int64, in PyTorch; coded where the cache is."""
        for x, image, scales in (
            (keys, self.image_keys, self.key_scales),
            (values, self.image_values, self.value_scales),
        ):
            if scales is None:
                image.index_copy_(3, places, x.to(image.dtype))
            else:
                codes, factors = reference.encode(x)
                image.index_copy_(3, places, codes)
                scales.index_copy_(3, places, factors)

    def read(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at n places, (n,) int64: (B, S, H, n, D) in the dtype of the text."""
        found = []
        for image, scales in (
            (self.image_keys, self.key_scales),
            (self.image_values, self.value_scales),
        ):
            x = image.index_select(3, places)
            if scales is not None:
                x = reference.decode(x, scales.index_select(3, places), self.text_keys.dtype)
            found.append(x)
        return found[0], found[1]

    def reorder(self, index: Tensor) -> None:
        """Sample s of caption b becomes a copy of sample index[b, s], for resampling.

        Args:
            index: (B, S) int64 on the cache's device, each from 0 to S - 1; looked at on the CPU.

        Raises:
            ValueError: another shape, dtype or device, or a number out of range.
        """
        untracked(CACHE, index=index)
        shape = tuple(self.image_keys.shape[:2])
        if tuple(index.shape) != shape or index.dtype != torch.int64:
            got = f"{tuple(index.shape)} {index.dtype}"
            raise ValueError(f"{CACHE}: index must be {shape} int64, got {got}")
        if index.device != self.image_keys.device:
            where = f"on {self.image_keys.device}, got {index.device}"
            raise ValueError(f"{CACHE}: index must be {where}")
        if index.device.type == "cpu" and index.numel():
            low, high = (int(x) for x in index.aminmax())
            if low < 0 or high >= self.samples:
                wrong, most = low if low < 0 else high, self.samples - 1
                raise ValueError(f"{CACHE}: index must be from 0 to {most}, got {wrong}")
        for store in self._stores():
            for image, order in zip(store, index, strict=True):
                image.copy_(image.index_select(0, order))


def _check(q: Tensor, k: Tensor, v: Tensor, cache: DecodeCache, slot: Tensor) -> None:
    batch, samples, heads, _, size = cache.image_keys.shape
    want, text = (batch, samples, heads, size), cache.text_keys
    for name, x in (("q", q), ("k", k), ("v", v)):
        if tuple(x.shape) != want:
            raise ValueError(f"{OP}: {name} must be {want} of the cache, got {tuple(x.shape)}")
        if x.dtype != text.dtype:
            raise ValueError(f"{OP}: {name} must be {text.dtype} of the cache, got {x.dtype}")
        if x.device != text.device:
            raise ValueError(f"{OP}: {name} must be on {text.device}, got {x.device}")
    if not isinstance(slot, Tensor) or slot.dtype != torch.int64 or slot.dim() != 0:
        got = f"{tuple(slot.shape)} {slot.dtype}" if isinstance(slot, Tensor) else repr(slot)
        raise ValueError(f"{OP}: slot must be a 0-d int64 tensor, got {got}")
    if slot.layout != torch.strided:
        raise TypeError(f"{OP}: slot must be dense, got {slot.layout}")
    if slot.device != text.device:
        raise ValueError(f"{OP}: slot must be on {text.device}, got {slot.device}")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: DecodeCache,
    slot: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Writes the keys and values of one slot into the cache, and attends to what the slot sees.

    Equivalent, for every sample, to row `T + slot` of `sparse_attention` over the text and all
    slots up to this one. A sample's result depends on its own numbers, the pattern and the slot
    alone: not on B, S or the number of threads, to the last bit.

    Args:
        q, k, v: (B, S, H, D) of the cache's dtype and device. Any strides, as parts of a packed
            projection have them; only a D that is not contiguous is copied. 16-bit inputs
            accumulate in float32.
        cache: written in place.
        slot: 0-d int64 on the device, from 0 to N - 1, the same for all samples; slots come in
            order. A GPU does not look at it beforehand: out of range there, nothing is written and
            the result is NaN.
        scale: factor on q k^T, a finite number; 1 / sqrt(D) if left out.

    Returns:
        (B, S, H, D), contiguous. No gradient flows.

    Raises:
        TypeError: cache is not a DecodeCache; a tensor that requires a gradient while gradients are
            recorded.
        ValueError: shapes, dtypes or devices other than the cache's; scale is not finite.
        RuntimeError: slot out of range, on the CPU; no native library for the device.
    """
    if not isinstance(cache, DecodeCache):
        raise TypeError(f"{OP}: cache must be a DecodeCache, got {type(cache).__name__}")
    untracked(OP, q=q, k=k, v=v)
    _check(q, k, v, cache, slot)
    factor = 1.0 / math.sqrt(q.size(3)) if scale is None else finite(OP, "scale", scale)
    if reference_in_use():
        return reference.decode_attention(q, k, v, cache, slot, factor)
    _native.require(OP, q.device)
    pattern = cache.pattern
    stores: Sequence[Tensor | None] = (
        cache.text_keys, cache.text_values, cache.image_keys, cache.image_values,
        cache.key_scales, cache.value_scales,
    )  # fmt: skip
    rule = (pattern.kind, *pattern.grid, pattern.runs, factor)
    given: Any = (_rows(q), _rows(k), _rows(v), *stores, slot, *rule)
    if torch.compiler.is_compiling():
        out: Tensor = _decode_attention(*given)
    else:  # what the op's own guard would find is ruled out; it costs more than a small step
        with torch._C._AutoDispatchBelowAutograd():
            out = _decode_attention(*given)
    return out
