"""The CUDA kernels of decode attention: tiles of 16 samples, chunks of keys, every layout.

`tests/ops/test_decode_attention.py` runs on all back ends too; what is here aims at what these
kernels alone have, and at the plan that deals them out to blocks.
"""

from __future__ import annotations

import pytest
import torch

import dalle_ext
from dalle_ext import AttentionPattern, DecodeCache
from dalle_ext.ops.sparse_attention import KINDS
from dalle_ext.reference.decode_attention import decode_places
from dalle_ext.testing import assert_as_accurate

HALF = torch.float16
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ROW = AttentionPattern("row", text_len=37, grid=(5, 9))


def case(pattern, slot, *, batch=1, samples=3, heads=2, size=64, dtype=HALF, bits=None, device):
    """(q, k, v), and a cache that holds the slots before this one."""
    draw = torch.Generator().manual_seed(7)
    numbers = lambda *shape: torch.randn(shape, generator=draw).to(device, dtype)  # noqa: E731
    text = numbers(2, batch, heads, pattern.text_len, size)
    cache = DecodeCache(pattern, *text, samples, bits=bits)
    cache.fill(*numbers(2, batch, samples, heads, slot, size))
    return numbers(3, batch, samples, heads, size), cache


def at(slot, device):
    return torch.tensor(slot, device=device)


def attended(q, cache, slot, dtype, scale=None):
    """The definition in `dtype`, on what the cache holds once the slot has been written."""
    offsets = torch.tensor(cache.pattern.offsets)
    places = decode_places(cache.pattern)[slot - offsets[offsets <= slot]]
    both = []
    for text, image, scales in (
        (cache.text_keys, cache.image_keys, cache.key_scales),
        (cache.text_values, cache.image_values, cache.value_scales),
    ):
        seen = image.cpu()[:, :, :, places].to(dtype)
        if scales is not None:
            seen = seen * scales.cpu()[:, :, :, places, None].to(dtype)
        shared = text.cpu().to(dtype)[:, None].expand(-1, seen.shape[1], -1, -1, -1)
        both.append(torch.cat([shared, seen], 3))
    scores = (q.cpu().to(dtype)[..., None, :] @ both[0].transpose(-2, -1))[..., 0, :]
    weights = (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
    return (weights[..., None, :] @ both[1])[..., 0, :]


def assert_matches(pattern, slot, *, device, scale=None, **more):
    (q, k, v), cache = case(pattern, slot, device=device, **more)
    got = dalle_ext.decode_attention(q, k, v, cache, at(slot, device), scale=scale)
    exact = attended(q, cache, slot, torch.float64, scale)
    assert_as_accurate(got, attended(q, cache, slot, q.dtype, scale), exact)


@pytest.mark.parametrize("size", [4, 8, 40, 64, 72, 128, 33, 136, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_head_sizes(device, dtype, size):
    assert_matches(ROW, 30, dtype=dtype, size=size, samples=6, device=device)


@pytest.mark.parametrize("text_len", [0, 1, 15, 16, 17, 130, 300])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_text_of_any_length(device, dtype, text_len):
    pattern = AttentionPattern("column", text_len=text_len, grid=(5, 9))
    assert_matches(pattern, 40, dtype=dtype, samples=2, heads=1, device=device)


@pytest.mark.parametrize("samples", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_tiles_of_samples(device, dtype, samples):
    assert_matches(ROW, 11, dtype=dtype, samples=samples, batch=2, device=device)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("slot", [0, 1, 72, 73, 250, 575])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_image_keys_of_many_chunks(device, dtype, slot, bits):
    """576 keys: 8 chunks, more keys than a warp loads at once."""
    pattern = AttentionPattern("causal", text_len=5, grid=(24, 24))
    assert_matches(pattern, slot, dtype=dtype, samples=2, heads=1, bits=bits, device=device)


@pytest.mark.parametrize("kind", KINDS)
def test_size_of_the_paper(device, kind):
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    for slot in (0, 31, 33, 700, 1023):
        assert_matches(pattern, slot, heads=1, device=device)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scale(device, scale):
    assert_matches(ROW, 20, scale=scale, device=device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shift", [0, 1, 2, 4], ids="{} elements".format)
def test_rows_of_a_packed_projection(device, dtype, shift):
    """Slices of one (B, S, 3, H, D) tensor, at addresses that 16-byte loads take or not."""
    (q, k, v), cache = case(ROW, 12, batch=2, dtype=dtype, device=device)
    want = dalle_ext.decode_attention(q, k, v, cache, at(12, device))
    packed = torch.zeros(q.numel() * 3 + 8, dtype=dtype, device=device)[shift:]
    packed = packed[: q.numel() * 3].view(2, 3, 3, 2, 64)
    for i, x in enumerate((q, k, v)):
        packed[:, :, i] = x
    got = dalle_ext.decode_attention(*packed.unbind(2), cache, at(12, device))
    assert torch.equal(got, want)


@pytest.mark.parametrize("size", [64, 100, 128, 33, 200])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_are_those_of_the_reference(device, dtype, size):
    pattern = AttentionPattern("column", text_len=3, grid=(4, 5))
    (q, k, v), cache = case(pattern, 13, size=size, dtype=dtype, bits=8, device=device)
    k[0, 0, 0], k[0, 1, 1, 2] = 0, float("inf")
    other = DecodeCache(pattern, cache.text_keys, cache.text_values, 3, bits=8)
    place = decode_places(pattern)[13:14].to(device)
    other.store(place, k[:, :, :, None], v[:, :, :, None])
    dalle_ext.decode_attention(q, k, v, cache, at(13, device))
    for got, want in zip(cache._stores(), other._stores(), strict=True):
        got, want = got[:, :, :, place], want[:, :, :, place]
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_new_slot_is_written(device, kind):
    pattern = AttentionPattern(kind, text_len=3, grid=(4, 5), kernel_size=3)
    for dtype, size in ((HALF, 64), (torch.float32, 33)):
        (q, k, v), cache = case(pattern, 17, dtype=dtype, size=size, device=device)
        before = [x.clone() for x in (cache.image_keys, cache.image_values)]
        dalle_ext.decode_attention(q, k, v, cache, at(17, device))
        place = int(decode_places(pattern)[17])
        for old, new, row in zip(
            before, (cache.image_keys, cache.image_values), (k, v), strict=True
        ):
            old[:, :, :, place] = row
            assert torch.equal(new, old)


@pytest.mark.parametrize("slot", [-1, 45, 2**40])
@pytest.mark.parametrize(("dtype", "size"), [(HALF, 64), (torch.float64, 5)])
def test_slot_out_of_range_is_not_a_number(backend, device, dtype, size, slot):
    if backend == "cpu":
        pytest.skip("the CPU looks at the slot and raises")
    (q, k, v), cache = case(ROW, 20, samples=18, dtype=dtype, size=size, device=device)
    before = [x.clone() for x in cache._stores()]
    assert bool(dalle_ext.decode_attention(q, k, v, cache, at(slot, device)).isnan().all())
    assert all(torch.equal(a, b) for a, b in zip(before, cache._stores(), strict=True))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_has_the_same_bits_alone(device, kind, dtype):
    """Nothing hangs on the other samples, captions and heads, nor on where in a tile one is."""
    pattern = AttentionPattern(kind, text_len=70, grid=(10, 12), kernel_size=3)
    (q, k, v), cache = case(pattern, 100, batch=2, samples=19, dtype=dtype, device=device)
    all_of = dalle_ext.decode_attention(q, k, v, cache, at(100, device))
    for b, samples in ((0, [3]), (1, [18]), (1, list(range(2, 19)))):
        text = [x[b : b + 1, 1:] for x in (cache.text_keys, cache.text_values)]
        part = DecodeCache(pattern, *text, len(samples))
        part.image_keys.copy_(cache.image_keys[b : b + 1, samples, 1:])
        part.image_values.copy_(cache.image_values[b : b + 1, samples, 1:])
        few = [x[b : b + 1, samples, 1:] for x in (q, k, v)]
        got = dalle_ext.decode_attention(*few, part, at(100, device))
        assert torch.equal(got, all_of[b : b + 1, samples, 1:])


def run_counted(emulator, counts, rows, cache, slot):
    with emulator():
        before = counts()
        out = dalle_ext.decode_attention(*rows, cache, torch.tensor(slot))
        return out, counts() - before


@pytest.mark.emulated
@pytest.mark.parametrize(("dtype", "size"), [(HALF, 128), (HALF, 64), (torch.float32, 64)])
def test_plans_have_the_same_bits(emulator, emulated_counts, monkeypatch, dtype, size):
    """One sample and much text: several blocks and a second kernel; or one multiprocessor."""
    pattern = AttentionPattern("causal", text_len=2500 if dtype == HALF else 1200, grid=(12, 24))
    rows, cache = case(pattern, 280, samples=1, heads=1, size=size, dtype=dtype, device="cpu")
    split, done = run_counted(emulator, emulated_counts, rows, cache, 280)
    assert done["blocks"] in (3, 5, 9)  # 2, 4 or 8 of them, and the second kernel's
    exact = attended(rows[0], cache, 280, torch.float64)
    assert_as_accurate(split, attended(rows[0], cache, 280, dtype), exact)
    monkeypatch.setenv("DALLE_EMULATOR_MULTIPROCESSORS", "1")
    whole, done = run_counted(emulator, emulated_counts, rows, cache, 280)
    assert done["blocks"] == 1 and torch.equal(split, whole)


@pytest.mark.emulated
@pytest.mark.parametrize("multiprocessors", ["1", "132"])
@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_tiles_share_a_block_where_there_are_many(
    emulator, emulated_counts, monkeypatch, device, multiprocessors
):
    """One multiprocessor takes several tiles of a head in a block, and the bits are the same."""
    pattern = AttentionPattern("row", text_len=256, grid=(4, 4))
    rows, cache = case(pattern, 9, samples=70, heads=1, device="cpu")
    monkeypatch.setenv("DALLE_EMULATOR_DEVICE", device)
    monkeypatch.setenv("DALLE_EMULATOR_MULTIPROCESSORS", multiprocessors)
    got, done = run_counted(emulator, emulated_counts, rows, cache, 9)
    assert done["blocks"] == (5 if multiprocessors == "132" else 2)
    assert done["mma"] == 5 * 256 * 64 * 2 / (8 * 16)  # once for the 16 samples of a tile
    monkeypatch.setenv("DALLE_EMULATOR_MULTIPROCESSORS", "7")
    assert torch.equal(got, run_counted(emulator, emulated_counts, rows, cache, 9)[0])


def test_not_finite_numbers_stay_with_their_sample(device):
    (q, k, v), cache = case(ROW, 20, samples=4, device=device)
    want = dalle_ext.decode_attention(q, k, v, cache, at(20, device))
    q, k, v = (x.clone() for x in (q, k, v))
    q[0, 1], k[0, 2], v[0, 3] = float("nan"), float("-inf"), float("inf")
    got = dalle_ext.decode_attention(q, k, v, cache, at(20, device))
    assert torch.equal(got[0, 0], want[0, 0])
    assert bool(got[0, 1].isnan().all())
    exact = attended(q, cache, 20, torch.float64)
    for sample in (2, 3):
        torch.testing.assert_close(
            got[0, sample].double().cpu(), exact[0, sample], rtol=2e-3, atol=2e-3, equal_nan=True
        )
