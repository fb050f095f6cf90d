"""1-6-9 and 0-6-10 on every back end: all codes, every rounding boundary, counts, sums."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import dalle_ext
from dalle_ext.reference import formats as reference

FORMATS = ("1-6-9", "0-6-10")
MANTISSA = {"1-6-9": 9, "0-6-10": 10}
LARGEST = {"1-6-9": 15.984375, "0-6-10": 15.9921875}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def every_code(device="cpu"):
    return torch.arange(65536, dtype=torch.int32, device=device).to(torch.int16)


def value_of(code: int, format: str) -> Fraction:
    """The number a code stands for, by the words of the definition."""
    if code == 0:
        return Fraction(0)
    bits = MANTISSA[format]
    sign = -1 if format == "1-6-9" and code & 0x8000 else 1
    exponent = (code & 0x7FFF if format == "1-6-9" else code) >> bits
    mantissa = code & ((1 << bits) - 1)
    return sign * Fraction(2) ** (exponent - 60) * (1 + Fraction(mantissa, 1 << bits))


def bits_to_float(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_both_ways(format, device):
    codes = every_code(device)
    values = dalle_ext.unpack(codes, format)
    assert values.dtype == torch.float32 and values.device.type == device
    expected = [float(value_of(code, format)) for code in range(65536)]
    assert values.double().tolist() == expected
    again = dalle_ext.pack(values, format)
    changed = (again != codes).nonzero().flatten().tolist()
    assert changed == ([0x8000] if format == "1-6-9" else [])  # "-0": -2^-60 has no code either
    assert values.max() == LARGEST[format]


def test_codes_of_the_paper_facts(device):
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e9, -1e9, 2.0**-60], device=device)
    codes = dalle_ext.pack(x, "1-6-9").to(torch.int32) & 0xFFFF
    assert codes.tolist() == [0x7800, 0xF800, 0, 0, 0x7FFF, 0xFFFF, 0]
    codes = dalle_ext.pack(x, "0-6-10").to(torch.int32) & 0xFFFF
    assert codes.tolist() == [0xF000, 0, 0, 0, 0xFFFF, 0, 0]


@pytest.mark.parametrize("format", FORMATS)
def test_every_rounding_boundary(format, device):
    """Between two neighbours the midpoint goes up (away from zero), the float below it down."""
    codes = torch.arange(2, 65536 if format == "0-6-10" else 32768, device=device)
    upper = dalle_ext.unpack(codes.to(torch.int16), format)
    lower = dalle_ext.unpack((codes - 1).to(torch.int16), format)
    middle = (lower.double() + upper.double()).div(2).float()  # exact: one bit more of mantissa
    below = torch.nextafter(middle, torch.zeros_like(middle))
    signs = (1.0, -1.0) if format == "1-6-9" else (1.0,)
    for sign in signs:
        assert torch.equal(
            dalle_ext.unpack(dalle_ext.pack(sign * middle, format), format), sign * upper
        )
        assert torch.equal(
            dalle_ext.unpack(dalle_ext.pack(sign * below, format), format), sign * lower
        )


@pytest.mark.parametrize("format", FORMATS)
def test_monotone_over_all_floats(format, device):
    """A float every 4,093 bit patterns, all exponents, and the same negated."""
    x = bits_to_float(torch.arange(0, 0x7F800000, 4093 if device == "cuda" else 40093)).to(device)
    values = dalle_ext.unpack(dalle_ext.pack(x, format), format)
    assert (values.diff() >= 0).all() and values[0] == 0 and values[-1] == LARGEST[format]
    inside = (x >= 2.0**-59) & (x <= LARGEST[format])
    error = ((values - x).double() / x.double())[inside].abs().max()
    assert error <= 2.0 ** -(MANTISSA[format] + 1)
    negated = dalle_ext.unpack(dalle_ext.pack(-x, format), format)
    assert torch.equal(negated, -values if format == "1-6-9" else torch.zeros_like(values))


@pytest.mark.parametrize("format", FORMATS)
def test_special_values_and_their_counts(format, device):
    largest, inf, nan = LARGEST[format], math.inf, math.nan
    x = torch.tensor(
        [largest, 15.9999, 3e38, -3e38, inf, -inf, nan, -nan, 0.0, -0.0, 2.0**-60, 1e-30, -1e-30,
         1e-40, 1.0, -1.0], device=device
    )  # fmt: skip
    codes, counts = dalle_ext.pack_counted(x, format)
    got = dalle_ext.unpack(codes, format).tolist()
    if format == "1-6-9":
        assert got == [largest] * 3 + [-largest, largest, -largest] + [0.0] * 8 + [1.0, -1.0]
        assert counts.tolist() == [3, 4, 4]
    else:
        assert got == [largest] * 3 + [0.0, largest, 0.0] + [0.0] * 8 + [1.0, 0.0]
        assert counts.tolist() == [2, 6, 4]
    assert torch.equal(counts.cpu(), reference.counts(x, codes, format).cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 33, 4097, 20011])
def test_matches_the_definition(format, dtype, rounding, numel, device):
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator) * 2.0 ** torch.randint(
        -64, 6, (numel,), generator=generator
    )
    x = x.to(dtype).to(device)
    seed = None if rounding == "nearest" else 5
    codes, counts = dalle_ext.pack_counted(x, format, rounding=rounding, seed=seed)
    added = None
    if seed is not None:
        added = reference.rounding_words(torch.tensor(seed, device=device), numel, format)
    assert torch.equal(codes, reference.encode(x, format, added))
    assert torch.equal(counts, reference.counts(x, codes, format))
    assert torch.equal(codes, dalle_ext.pack(x, format, rounding=rounding, seed=seed))
    for out in DTYPES:
        assert torch.equal(
            dalle_ext.unpack(codes, format, out), reference.decode(codes, format, out)
        )


@pytest.mark.parametrize("format", FORMATS)
def test_stochastic_rounding_has_the_right_mean(format, backend, device):
    draws = 20_000 if backend == "emulated" else 200_000
    ulp = 2.0 ** -MANTISSA[format]
    for share in (0.0, 0.125, 0.5, 0.9):
        x = torch.full((draws,), 0.75 + share * ulp / 2)
        values = dalle_ext.unpack(
            dalle_ext.pack(x.to(device), format, rounding="stochastic", seed=11), format
        )
        ups = int((values > 0.75).sum())
        assert set(values.unique().tolist()) <= {0.75, 0.75 + ulp / 2}
        sigma = math.sqrt(draws * share * (1 - share))
        assert abs(ups - draws * share) <= 4 * sigma


def test_stochastic_rounding_draws_by_element_and_seed(device):
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(device)

    def draw(values, seed):
        return dalle_ext.pack(values, "1-6-9", rounding="stochastic", seed=seed)

    first = draw(x, 3)
    assert torch.equal(first, draw(x, 3)) and not torch.equal(first, draw(x, 4))
    assert torch.equal(first, draw(x, torch.tensor(3, device=device)))
    assert torch.equal(first[:64], draw(x[:64], 3))
    torch.manual_seed(1)
    fresh = dalle_ext.pack(x, "1-6-9", rounding="stochastic")
    torch.manual_seed(1)
    assert torch.equal(fresh, dalle_ext.pack(x, "1-6-9", rounding="stochastic"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 9), (3, 4, 5), (8, 4099), (2, 0)])
def test_sums_of_buffers(format, shape, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    codes = dalle_ext.pack(x.abs(), format)
    sums = dalle_ext.sum_codes(codes, format)
    total = torch.zeros(shape[1:], device=device)
    for buffer in codes:
        total = total + dalle_ext.unpack(buffer, format)
    assert torch.equal(sums.codes, dalle_ext.pack(total, format))
    assert torch.equal(sums.counts, dalle_ext.pack_counted(total, format).counts)
    with dalle_ext.use_reference():
        assert torch.equal(sums.codes, dalle_ext.sum_codes(codes, format).codes)


def test_sums_saturate_and_say_so(device):
    codes = dalle_ext.pack(torch.tensor([[9.0, -9.0, 1.0]] * 2, device=device), "1-6-9")
    sums = dalle_ext.sum_codes(codes, "1-6-9")
    assert dalle_ext.unpack(sums.codes, "1-6-9").tolist() == [15.984375, -15.984375, 2.0]
    assert sums.counts.tolist() == [2, 0, 0]


def test_slices_and_strides(device):
    """Buffers that begin off a 16-byte boundary, and views that are not contiguous."""
    base = torch.randn(3, 70, generator=torch.Generator().manual_seed(2)).to(device)
    for view in (base.flatten()[1:], base.flatten()[3:66], base.t(), base[:, 5:17]):
        codes = dalle_ext.pack(view, "1-6-9")
        assert codes.shape == view.shape and torch.equal(codes, reference.encode(view, "1-6-9"))
        part = dalle_ext.pack(base.flatten(), "1-6-9")[1:]
        assert torch.equal(dalle_ext.unpack(part, "1-6-9"), reference.decode(part, "1-6-9"))
        assert torch.equal(
            dalle_ext.unpack(codes.t(), "1-6-9"), reference.decode(codes.t(), "1-6-9")
        )


def test_threads_do_not_change_bits():
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(dalle_ext.pack_counted(x * 9, "1-6-9", rounding="stochastic", seed=1))
    torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].counts, found[1].counts)
