"""Decode attention slot by slot is sparse attention over the whole stream, whatever the input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dalle_ext
from dalle_ext import AttentionPattern, DecodeCache, decode_attention
from dalle_ext.ops.sparse_attention import KINDS
from dalle_ext.reference.sparse_attention import sparse_attention as whole
from dalle_ext.testing import assert_as_accurate, border_intact, sliced
from support.decoding import ODD, decoded, patterns, stream, uncached

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BY_NIGHT = pytest.mark.night("emulated")


@pytest.mark.parametrize("kind", KINDS)
def test_every_slot_at_the_size_of_the_paper(kind):
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    x = stream(pattern, batch=1)
    want = uncached(dalle_ext.sparse_attention, x, pattern)
    torch.testing.assert_close(decoded(x, pattern), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_some_slots_at_the_size_of_the_paper(kind, device):
    """In caches that `fill` has primed: first, row ends, where a ring goes round, last."""
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    x = stream(pattern, batch=1, samples=3, heads=1, size=64, device=device)
    slots = [0, 31, 32, 33, 192, 527, 1023]
    want = uncached(whole, x.double(), pattern)[:, :, :, slots]
    same = uncached(whole, x, pattern)[:, :, :, slots]
    assert_as_accurate(decoded(x, pattern, slots), same, want)


@pytest.mark.parametrize(("text_len", "grid"), ODD)
def test_every_slot_of_odd_grids(text_len, grid):
    for pattern in patterns(text_len, grid):
        x = stream(pattern, size=5)
        want = uncached(whole, x.double(), pattern)
        assert_as_accurate(decoded(x, pattern), uncached(whole, x, pattern), want)


@pytest.mark.parametrize(("text_len", "grid"), ODD)
def test_slots_of_odd_grids(text_len, grid, device):
    last = grid[0] * grid[1] - 1
    slots = sorted({0, min(grid[1], last), last // 2 + 1, last})
    for pattern in patterns(text_len, grid):
        x = stream(pattern, device=device, size=5)
        want = uncached(whole, x.double(), pattern)[:, :, :, slots]
        same = uncached(whole, x, pattern)[:, :, :, slots]
        assert_as_accurate(decoded(x, pattern, slots), same, want)


@pytest.mark.parametrize("size", [1, 24, 64, 100, 256])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_as_accurate_as_torch(dtype, size, device):
    """Head sizes that are whole vectors and not, for all types."""
    for kind in KINDS:
        pattern = AttentionPattern(kind, text_len=70, grid=(4, 5), kernel_size=3)
        x = stream(pattern, dtype=dtype, device=device, samples=3, size=size)
        slots = [0, 7, 19]
        want = uncached(whole, x.double(), pattern)[:, :, :, slots]
        same = uncached(whole, x, pattern)[:, :, :, slots]
        got = decoded(x, pattern, slots)
        if dtype == torch.float64:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        else:
            assert_as_accurate(got, same, want)


@pytest.mark.parametrize("samples", [1, 2, 5, 9, 16, 17, 33, pytest.param(65, marks=BY_NIGHT)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_number_of_samples(samples, dtype, device):
    """Few, a vector, a tile and more: each has its own way through the text."""
    pattern = AttentionPattern("row", text_len=67, grid=(3, 4))
    x = stream(pattern, batch=1, samples=samples, heads=2, size=32, dtype=dtype, device=device)
    want = uncached(whole, x.double(), pattern)[:, :, :, [9]]
    same = uncached(whole, x, pattern)[:, :, :, [9]]
    assert_as_accurate(decoded(x, pattern, [9]), same, want)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(KINDS),
    text_len=st.integers(0, 70),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(0, 2),
    samples=st.integers(1, 20),
    heads=st.integers(0, 3),
    size=st.integers(1, 40),
    where=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape(device, kind, text_len, grid, batch, samples, heads, size, where, dtype):
    pattern = AttentionPattern(kind, text_len=text_len, grid=grid, kernel_size=5)
    slot = round(where * (grid[0] * grid[1] - 1))
    sizes = {"batch": batch, "samples": samples, "heads": heads, "size": size}
    x = stream(pattern, dtype=dtype, device=device, **sizes)
    want = uncached(whole, x, pattern)[:, :, :, [slot]]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(decoded(x, pattern, [slot]), want, **close)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides(order, dtype, device):
    """Slices of larger tensors, axes in any order: read as they are, nothing else written."""
    pattern = AttentionPattern("column", text_len=6, grid=(4, 3))
    pairs = [
        sliced((2, 3, 4, 24), dtype=dtype, device=device, seed=i, order=order) for i in range(3)
    ]
    views = [view for view, _ in pairs]
    text = torch.randn(2, 2, 4, 6, 24).to(device, dtype)
    slot = torch.tensor(0, device=device)
    got = decode_attention(*views, DecodeCache(pattern, *text, 3), slot)
    plain = [view.clone(memory_format=torch.contiguous_format) for view in views]
    want = decode_attention(*plain, DecodeCache(pattern, *text, 3), slot)
    assert torch.equal(got, want) and got.is_contiguous()
    assert all(border_intact(view, buffer) for view, buffer in pairs)


def test_packed_projection_and_channels_that_are_not_contiguous(device):
    pattern = AttentionPattern("row", text_len=5, grid=(3, 3))
    packed, text = torch.randn(2, 4, 3, 2, 16).to(device), torch.randn(2, 2, 2, 5, 16).to(device)
    slot = torch.tensor(0, device=device)
    parts = packed.unbind(2)
    want = decode_attention(*(x.contiguous() for x in parts), DecodeCache(pattern, *text, 4), slot)
    assert torch.equal(decode_attention(*parts, DecodeCache(pattern, *text, 4), slot), want)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in parts]
    assert turned[0].stride(-1) != 1
    assert torch.equal(decode_attention(*turned, DecodeCache(pattern, *text, 4), slot), want)


def test_scale_and_the_definition_on_demand(device):
    pattern = AttentionPattern("conv", text_len=4, grid=(5, 5), kernel_size=3)
    x = stream(pattern, size=16, device=device)
    caches = [DecodeCache(pattern, *x[1:, :, 0, :, :4], 2) for _ in range(2)]
    for slot in range(25):
        row, at = x[:, :, :, :, 4 + slot], torch.tensor(slot, device=device)
        got = decode_attention(*row, caches[0], at, scale=0.7)
        with dalle_ext.use_reference():
            want = decode_attention(*row, caches[1], at, scale=0.7)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(caches[0].image_keys, caches[1].image_keys)
    assert torch.equal(caches[0].image_values, caches[1].image_values)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_sample(value, device):
    pattern = AttentionPattern("row", text_len=3, grid=(2, 2))
    x = stream(pattern, batch=1, samples=3, size=16, device=device)
    want = decoded(x, pattern, [1])
    x[2, 0, 1, 0, 4] = value  # a value of the new slot
    got = decoded(x, pattern, [1])
    assert not got[0, 1, 0].isfinite().any() and torch.equal(got[0, 1, 1], want[0, 1, 1])
    assert torch.equal(got[0, [0, 2]], want[0, [0, 2]])
