"""The raw ops of `formats`: fake kernels, and the checks of formats and seeds before them.

The raw ops take contiguous tensors; format 0 is 1-6-9, 1 is 0-6-10; the seed is a 0-d int64 tensor
on their device, or None to round to nearest.
"""

from __future__ import annotations

import torch

from dalle_ext import _native
from dalle_ext._checks import seed_word
from dalle_ext._switch import reference_in_use

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
    pack = _native.register("_formats_pack", _pack_fake)
    unpack = _native.register("_formats_unpack", _unpack_fake)
    sum_codes = _native.register("_formats_sum", _sum_fake)


def require_format(op: str, tensor: Tensor, format: str, codes: bool = False) -> None:
    """Raises unless `format` is known, `codes` are int16 and the device has a library."""
    if format not in FORMATS:
        raise ValueError(f"{op}: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if codes and tensor.dtype != torch.int16:
        raise TypeError(f"{op}: codes must be int16, got {tensor.dtype}")
    if not reference_in_use():
        _native.require(op, tensor.device)


def rounding_seed(
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
