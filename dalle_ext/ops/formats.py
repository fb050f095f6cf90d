"""The 16-bit formats 1-6-9 and 0-6-10: packing, unpacking, sums of packed buffers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dalle_ext._native import require_floating
from dalle_ext._switch import reference_in_use
from dalle_ext.ops import formats_native as native
from dalle_ext.ops.formats_native import FORMATS, require_format, rounding_seed
from dalle_ext.reference import formats as reference

Tensor = torch.Tensor


class Packed(NamedTuple):
    """int16 codes, and (3,) int64 `counts` on their device.

    Counted are finite numbers beyond the largest value, nonzero finite numbers whose code is 0,
    and infinities with NaN.
    """

    codes: Tensor
    counts: Tensor


def _packed(op: str, x: Tensor, format: str, seed: Tensor | None, count: bool) -> Packed:
    require_floating(op, "x", x.dtype)
    require_format(op, x, format)
    if reference_in_use():
        added = None if seed is None else reference.rounding_words(seed, x.numel(), format)
        codes = reference.encode(x, format, None if added is None else added.view(x.shape))
        return Packed(codes, reference.counts(x, codes, format))
    return Packed(*native.pack(x.detach().contiguous(), FORMATS.index(format), seed, count))


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
    return _packed("pack", x, format, rounding_seed("pack", rounding, seed, x.device), False).codes


def pack_counted(
    x: Tensor, format: str, *, rounding: str = "nearest", seed: int | Tensor | None = None
) -> Packed:
    """`pack`, and in the same pass how many elements saturated, vanished or were not finite."""
    return _packed("pack", x, format, rounding_seed("pack", rounding, seed, x.device), True)


def unpack(codes: Tensor, format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes of `pack` stand for: exact in float32, rounded to nearest even in `dtype`.

    Args:
        codes: int16, any shape; read as contiguous.
        format: "1-6-9" or "0-6-10".
        dtype: float32, float16 or bfloat16.

    Raises:
        TypeError, ValueError, RuntimeError: as `pack`; TypeError for codes or `dtype`.
    """
    require_format("unpack", codes, format, codes=True)
    require_floating("unpack", "dtype", dtype)
    if reference_in_use():
        return reference.decode(codes, format, dtype)
    return native.unpack(codes.contiguous(), FORMATS.index(format), dtype)  # type: ignore[no-any-return]


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
    require_format("sum_codes", codes, format, codes=True)
    if codes.dim() == 0 or codes.shape[0] == 0:
        raise ValueError(f"sum_codes: codes must hold a buffer, got shape {tuple(codes.shape)}")
    word = rounding_seed("sum_codes", rounding, seed, codes.device)
    if reference_in_use():
        total = torch.zeros(codes.shape[1:], dtype=torch.float32, device=codes.device)
        for buffer in codes:
            total = total + reference.decode(buffer, format)
        return _packed("sum_codes", total, format, word, True)
    return Packed(*native.sum_codes(codes.contiguous(), FORMATS.index(format), word, True))
