"""The definition of the 16-bit formats 1-6-9 and 0-6-10 (paper, section 2.4 and appendix D).

Bias 60, no subnormals, no Inf, no NaN; code 0 is zero, and 2^-60 itself has no code.
"""

from __future__ import annotations

import torch

from .gumbel_softmax import philox

MANTISSA = {"1-6-9": 9, "0-6-10": 10}
MIN_BITS = 67 << 23  # the bits of 2^-60 as a float
SATURATED, FLUSHED, NONFINITE = range(3)


def rounding_words(seed: torch.Tensor, numel: int, format: str) -> torch.Tensor:
    """(numel,) int64: what stochastic rounding adds to element e, of word e % 4 of call e // 4."""
    words = philox(seed, (numel + 3) // 4).reshape(-1)[:numel]
    return words >> (32 - (23 - MANTISSA[format]))


def encode(x: torch.Tensor, format: str, added: torch.Tensor | None = None) -> torch.Tensor:
    """int16 codes of x, rounded to nearest with ties away from zero.

    With `added` (x's shape) that is added to the bits below the last one kept, then cut off.
    Magnitudes below 2^-60, negative numbers in 0-6-10 and NaN become 0; large ones saturate.
    """
    dropped = 23 - MANTISSA[format]
    bits = x.float().contiguous().view(torch.int32).long()
    magnitude, negative = bits & 0x7FFFFFFF, bits < 0
    addend = 1 << (dropped - 1) if added is None else added
    max_bits = (131 << 23) - (1 << dropped)
    code = (magnitude.clamp(max=max_bits) + addend - MIN_BITS) >> dropped
    code = torch.where((magnitude < MIN_BITS) | (magnitude > 0x7F800000), 0, code)
    if format == "1-6-9":
        code = torch.where(negative & (code != 0), code | 0x8000, code)
    else:
        code = torch.where(negative, 0, code)
    return torch.where(code < 0x8000, code, code - 0x10000).to(torch.int16)


def decode(codes: torch.Tensor, format: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the codes stand for, exact in float32 and then rounded to `dtype`."""
    code = codes.long() & 0xFFFF
    magnitude = code & 0x7FFF if format == "1-6-9" else code
    bits = torch.where(code != 0, (magnitude << (23 - MANTISSA[format])) + MIN_BITS, 0)
    value = bits.to(torch.int32).view(torch.float32)
    return torch.where(code != magnitude, -value, value).to(dtype)


def counts(x: torch.Tensor, codes: torch.Tensor, format: str) -> torch.Tensor:
    """(3,) int64: finite beyond the largest value, nonzero with code 0 (finite), Inf and NaN."""
    value, finite = x.double(), x.isfinite()
    flushed = finite & (value != 0) & (codes == 0)
    saturated = finite & ~flushed & (value.abs() > 16 - 2.0 ** (3 - MANTISSA[format]))
    return torch.stack([saturated.sum(), flushed.sum(), (~finite).sum()])
