"""The 16-bit formats 1-6-9 and 0-6-10: packing, unpacking, sums of packed buffers.

The raw ops take contiguous tensors; format 0 is 1-6-9, 1 is 0-6-10; the seed is a 0-d int64 tensor
on their device, or None to round to nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dalle_ext import _native
from dalle_ext._checks import no_tangent, seed_word
from dalle_ext._switch import reference_in_use
from dalle_ext.reference import formats as reference

Tensor = torch.Tensor
FORMATS = ("1-6-9", "0-6-10")
ROUNDINGS = ("nearest", "stochastic")


def _counts(beside: Tensor, count: bool) -> Tensor:
    return beside.new_empty((3 if count else 0,), dtype=torch.int64)


def _pack_fake(x: Tensor, format: int, seed: Tensor | None, count: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int16), _counts(x, count)


def _unpack_fake(codes: Tensor, format: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _sum_fake(
    codes: Tensor, format: int, seed: Tensor | None, count: bool
) -> tuple[Tensor, Tensor]:
    return codes.new_empty(codes.shape[1:]), _counts(codes, count)


if _native.CPU_PROBLEM is None:
    _formats_pack = _native.register("_formats_pack", _pack_fake, public="pack")
    _formats_unpack = _native.register("_formats_unpack", _unpack_fake, public="unpack")
    _formats_sum = _native.register("_formats_sum", _sum_fake, public="sum_codes")


def _require_format(op: str, tensor: Tensor, format: str, codes: bool = False) -> None:
    """Raises unless `format` is known, `codes` are int16 and the device has a library."""
    if format not in FORMATS:
        raise ValueError(f"{op}: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if codes and tensor.dtype != torch.int16:
        raise TypeError(f"{op}: codes must be int16, got {tensor.dtype}")
    if not reference_in_use():
        _native.require(op, tensor.device)


def _rounding_seed(
    op: str, rounding: str, seed: int | Tensor | None, device: torch.device
) -> Tensor | None:
    """The seed as a 0-d tensor for stochastic rounding, None for nearest."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}: rounding must be nearest or stochastic, got {rounding!r}")
    if rounding == "nearest":
        if seed is not None:
            raise ValueError(f"{op}: seed must be None with rounding to nearest, got {seed}")
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
            got = f"shape {tuple(seed.shape)} {seed.dtype} on {seed.device}"
            raise ValueError(f"{op}: seed must be a 0-d int64 tensor on {device}, got {got}")
        return seed
    return torch.full((), seed_word(op, seed), dtype=torch.int64, device=device)


class Packed(NamedTuple):
    """int16 codes, and (3,) int64 `counts` on their device.

    Counted are finite numbers beyond the largest value, nonzero finite numbers whose code is 0,
    and infinities with NaN.
    """

    codes: Tensor
    counts: Tensor


def _packed(op: str, x: Tensor, format: str, seed: Tensor | None, count: bool) -> Packed:
    _native.require_floating(op, "x", x.dtype)
    no_tangent(op, x=x)
    _require_format(op, x, format)
    if reference_in_use():
        added = None if seed is None else reference.rounding_words(seed, x.numel(), format)
        codes = reference.encode(x, format, None if added is None else added.view(x.shape))
        return Packed(codes, reference.counts(x, codes, format))
    with torch.no_grad():  # not x.detach(), which would hide a tangent from the op's guard
        return Packed(*_formats_pack(x.contiguous(), FORMATS.index(format), seed, count))


def pack(
    x: Tensor, format: str, *, rounding: str = "nearest", seed: int | Tensor | None = None
) -> Tensor:
    """Codes of x in a 16-bit format of the paper (section 2.4).

    1-6-9 has a sign, 6 bits of exponent (bias 60) and 9 of mantissa: 2^-60 to 15.984375, relative
    error at most 2^-10; 0-6-10 has no sign: up to 15.9921875, error 2^-11. Neither has subnormals,
    Inf or NaN. Larger magnitudes saturate, Inf too; those below 2^-60 become 0 (without rounding
    up), as do NaN and what is negative in 0-6-10. `pack_counted` says how many did.

    Equivalent to `unpack(pack(x, f), f) = x` rounded to the nearest number of the format.

    Args:
        x: float32, float16 or bfloat16, any shape; read as contiguous.
        format: "1-6-9" or "0-6-10".
        rounding: "nearest" (ties away from zero), or "stochastic": up with the probability that
            makes the mean right, without bias for magnitudes from 2^-59 to the largest value.
        seed: for stochastic rounding, as in `gumbel_softmax` (word e % 4 of Philox call e // 4).
            None draws a seed from torch's default generator.

    Returns:
        int16, x's shape. No gradient flows.

    Raises:
        TypeError: dtype of x.
        ValueError: unknown format or rounding, a seed that does not fit.
        RuntimeError: no native library for x's device.
    """
    return _packed("pack", x, format, _rounding_seed("pack", rounding, seed, x.device), False).codes


def pack_counted(
    x: Tensor, format: str, *, rounding: str = "nearest", seed: int | Tensor | None = None
) -> Packed:
    """`pack`, and in the same pass how many elements saturated, vanished or were not finite."""
    return _packed("pack", x, format, _rounding_seed("pack", rounding, seed, x.device), True)


def unpack(codes: Tensor, format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes of `pack` stand for: exact in float32, rounded to nearest even in `dtype`.

    Args:
        codes: int16, any shape; read as contiguous.
        format: "1-6-9" or "0-6-10".
        dtype: float32, float16 or bfloat16.

    Raises:
        TypeError, ValueError, RuntimeError: as `pack`; TypeError for codes or `dtype`.
    """
    _require_format("unpack", codes, format, codes=True)
    _native.require_floating("unpack", "dtype", dtype)
    if reference_in_use():
        return reference.decode(codes, format, dtype)
    return _formats_unpack(codes.contiguous(), FORMATS.index(format), dtype)


def sum_codes(
    codes: Tensor, format: str, *, rounding: str = "nearest", seed: int | Tensor | None = None
) -> Packed:
    """Sum over the first axis of packed buffers, for collectives: float32 inside, packed again.

    Equivalent to `pack_counted(unpack(codes, format).sum(0), format)`, added in the order of the
    buffers, so that every rank that sums the same buffers has the same bits.

    Args:
        codes: (R, ...) int16, R at least 1; the sum has the shape (...). The rest as in `pack`.

    Raises:
        TypeError, ValueError, RuntimeError: as `pack`; ValueError for no buffer.
    """
    _require_format("sum_codes", codes, format, codes=True)
    if codes.dim() == 0 or codes.shape[0] == 0:
        raise ValueError(f"sum_codes: codes must hold a buffer, got shape {tuple(codes.shape)}")
    word = _rounding_seed("sum_codes", rounding, seed, codes.device)
    if reference_in_use():
        total = torch.zeros(codes.shape[1:], dtype=torch.float32, device=codes.device)
        for buffer in codes:
            total = total + reference.decode(buffer, format)
        return _packed("sum_codes", total, format, word, True)
    return Packed(*_formats_sum(codes.contiguous(), FORMATS.index(format), word, True))
