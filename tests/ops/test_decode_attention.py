"""Decode attention slot by slot is sparse attention over the whole stream; its cache is small."""

from __future__ import annotations

import pytest
import torch

import dalle_ext
from dalle_ext import AttentionPattern, DecodeCache, decode_attention
from dalle_ext.ops.sparse_attention import KINDS
from dalle_ext.reference import decode_attention as definition
from dalle_ext.reference.sparse_attention import sparse_attention as whole
from dalle_ext.testing import assert_as_accurate

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LISTS = ([0], [0, 1, 7], [0, 3, 4, 5, 11], list(range(0, 60, 3)))
ODD = [(0, (1, 9)), (3, (9, 1)), (13, (5, 7)), (1, (3, 32))]


def patterns(text_len, grid):
    """One of every kind, and lists of offsets."""
    sizes = {"text_len": text_len, "grid": grid}
    yield from (AttentionPattern(kind, kernel_size=5, **sizes) for kind in KINDS)
    yield from (AttentionPattern.offsets(offsets, **sizes) for offsets in LISTS)


def stream(pattern, *, batch=2, samples=2, heads=2, size=8, dtype=torch.float32, device="cpu"):
    """q, k, v (3, B, S, H, text_len + N, D); the text is the same for all samples of a caption."""
    draw = torch.Generator().manual_seed(3)
    shape = (3, batch, samples, heads, pattern.length, size)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    x[:, :, :, :, : pattern.text_len] = x[:, :, :1, :, : pattern.text_len]
    return x.to(device, dtype)


def text_of(x, pattern):
    return (part[:, 0, :, : pattern.text_len] for part in x[1:])


def decoded(x, pattern, *, slots=None, bits=None):
    """(B, S, H, N, D): what every slot attends to, one after another."""
    samples, text = x.shape[2], pattern.text_len
    cache = DecodeCache(pattern, *text_of(x, pattern), samples, bits=bits)
    count = pattern.length - text
    out = []
    for slot in range(count) if slots is None else slots:
        row = x[:, :, :, :, text + slot]
        out.append(decode_attention(*row, cache, torch.tensor(slot, device=x.device)))
    return torch.stack(out, 3)


def uncached(attend, x, pattern):
    out = attend(*x.flatten(1, 2), pattern)
    return out.unflatten(0, x.shape[1:3])[:, :, :, pattern.text_len :]


@pytest.mark.parametrize("kind", KINDS)
def test_every_slot_at_the_size_of_the_paper(kind):
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    x = stream(pattern, batch=1)
    want = uncached(dalle_ext.sparse_attention, x, pattern)
    torch.testing.assert_close(decoded(x, pattern), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("text_len", "grid"), ODD)
def test_every_slot_of_odd_grids(text_len, grid, device):
    for pattern in patterns(text_len, grid):
        x = stream(pattern, device=device, size=5)
        want = uncached(whole, x.double(), pattern)
        assert_as_accurate(decoded(x, pattern), uncached(whole, x, pattern), want)


@pytest.mark.parametrize("size", [1, 24, 64, 100, 256])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_as_accurate_as_torch(dtype, size, device):
    for kind in KINDS:
        pattern = AttentionPattern(kind, text_len=21, grid=(4, 5), kernel_size=3)
        x = stream(pattern, dtype=dtype, device=device, samples=3, size=size)
        want = uncached(whole, x.double(), pattern)
        if dtype == torch.float64:
            torch.testing.assert_close(decoded(x, pattern), want, rtol=1e-12, atol=1e-13)
        else:
            assert_as_accurate(decoded(x, pattern), uncached(whole, x, pattern), want)


@pytest.mark.parametrize(("text_len", "grid"), [*ODD, (256, (32, 32))])
def test_places_are_those_of_the_definition(text_len, grid):
    """Every slot reads its pattern's slots, each once, before they are overwritten."""
    for pattern in patterns(text_len, grid):
        got = torch.ops.dalle_ext._decode_attention_places(pattern.kind, *grid, pattern.runs)
        reads, places = got[:, :-1], definition.decode_places(pattern)
        assert torch.equal(got[:, -1], places)
        assert reads.shape[1] == definition.decode_capacity(pattern)
        want, holds = torch.zeros_like(reads), torch.full((reads.shape[1],), -1)
        offsets = torch.tensor(pattern.offsets)
        for slot, place in enumerate(places.tolist()):
            holds[place] = slot
            seen = slot - offsets[offsets <= slot]
            assert torch.equal(holds[places[seen]], seen)
            want[slot].index_add_(0, places[seen], torch.ones_like(seen))
        assert torch.equal(reads, want)
