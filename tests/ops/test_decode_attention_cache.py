"""The cache of decode attention: which slots it keeps and where, its bytes, its 8-bit form."""

from __future__ import annotations

import pytest
import torch

from dalle.prior.config import PRESETS
from dalle_ext import AttentionPattern, DecodeCache, decode_attention
from dalle_ext.reference import decode_attention as definition
from dalle_ext.reference.sparse_attention import sparse_attention as whole
from support.decoding import ODD, decoded, patterns, stream, text_of, uncached


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


CAPACITIES = {
    "row": 33,
    "column": 1024,
    "conv": 192,  # 5 rows and a half, in whole: the largest offset of rule D is 191
    "causal": 1024,
}


@pytest.mark.parametrize("kind", CAPACITIES)
def test_slots_kept_at_the_size_of_the_paper(kind):
    pattern = AttentionPattern(kind, text_len=256, grid=(32, 32))
    text = torch.zeros(2, 3, 5, 256, 8, dtype=torch.bfloat16)
    cache = DecodeCache(pattern, *text, 7)
    assert cache.image_keys.shape == cache.image_values.shape == (3, 7, 5, CAPACITIES[kind], 8)
    assert cache.num_bytes == 2 * 3 * 7 * 5 * CAPACITIES[kind] * 8 * 2


@pytest.mark.parametrize(
    ("offsets", "capacity"), [([0], 1), ([0, 1, 32], 33), ([0, 32, 64], 65), ([0, 5000], 1)]
)
def test_a_list_takes_the_smallest_ring(offsets, capacity):
    pattern = AttentionPattern.offsets(offsets, text_len=0, grid=(32, 32))
    cache = DecodeCache(pattern, *torch.zeros(2, 1, 1, 0, 4), 1)
    assert cache.image_keys.shape[3] == capacity


def test_the_12b_stack_keeps_at_most_29_percent_of_a_dense_cache():
    config = PRESETS["12b"]
    layers = config.patterns()
    text = torch.zeros(2, 1, config.num_heads, config.text_len, 64, dtype=torch.float16)
    size = {p: DecodeCache(p, *text, 1).num_bytes for p in set(layers)}
    dense = AttentionPattern("causal", text_len=config.text_len, grid=config.grid)
    share = sum(size[p] for p in layers) / (len(layers) * DecodeCache(dense, *text, 1).num_bytes)
    assert len(layers) == 64 and share <= 0.29


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_fill_is_decoding_one_after_another(shared, bits, device):
    for pattern in patterns(3, (4, 6)):
        if bits is not None and pattern.kind not in ("column", "causal"):
            continue
        x = stream(pattern, device=device, samples=2)
        if shared:
            x = x[:, :, :1].expand(-1, -1, 2, -1, -1, -1)
        text = text_of(x, pattern)
        for count in (0, 1, 13, 24):
            one, other = (DecodeCache(pattern, *text, 2, bits=bits) for _ in range(2))
            keys, values = x[1:, :, :, :, 3 : 3 + count]
            one.fill(*((keys[:, 0], values[:, 0]) if shared else (keys, values)))
            for slot in range(count):
                row = x[:, :, :, :, 3 + slot]
                decode_attention(*row, other, torch.tensor(slot, device=device))
            for mine, theirs in zip(one._stores(), other._stores(), strict=True):
                assert torch.equal(mine, theirs), (pattern, count)


def test_reorder_and_set_text(device):
    pattern = AttentionPattern("row", text_len=3, grid=(3, 4))
    x = stream(pattern, samples=3, device=device)
    index = torch.tensor([[2, 2, 0], [1, 0, 1]], device=device)
    chosen = torch.stack([x[:, b, index[b]] for b in range(2)], 1)
    chosen[..., 3 + 7 :, :] = x[..., 3 + 7 :, :]  # after resampling everyone goes on as before
    cache = DecodeCache(pattern, *text_of(x, pattern).flip(-1), 3)
    addresses = [t.data_ptr() for t in (cache.text_keys, *cache._stores())]
    cache.fill(*x[1:, :, :, :, 3 : 3 + 7])
    cache.set_text(*text_of(x, pattern))
    cache.reorder(index)
    assert [t.data_ptr() for t in (cache.text_keys, *cache._stores())] == addresses
    got = decode_attention(*x[:, :, :, :, 3 + 7], cache, torch.tensor(7, device=device))
    torch.testing.assert_close(got, uncached(whole, chosen, pattern)[:, :, :, 7])


# -- 8 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_codes_and_scales_are_those_of_the_definition(dtype, device):
    pattern = AttentionPattern("column", text_len=2, grid=(3, 4))
    x = stream(pattern, size=37, dtype=dtype, device=device) * 3
    x[1, 0, 0, 0, 2] = 0  # a row of zeros
    x[1, 0, 0, 1, 2, 5] = float("nan")
    x[2, 0, 1, 0, 2, 36] = float("inf")
    cache = DecodeCache(pattern, *text_of(x, pattern), 2, bits=8)
    got = decode_attention(*x[:, :, :, :, 2], cache, torch.tensor(0, device=device))
    for rows, codes, scales in (
        (x[1, :, :, :, 2], cache.image_keys, cache.key_scales),
        (x[2, :, :, :, 2], cache.image_values, cache.value_scales),
    ):
        want_codes, want_scales = definition.encode(rows)
        torch.testing.assert_close(scales[..., 0], want_scales, rtol=0, atol=0, equal_nan=True)
        finite = want_scales.isfinite()
        assert torch.equal(codes[:, :, :, 0][finite], want_codes[finite])
    assert got[0, 0, 1].isnan().all() and got[0, 1, 0].isnan().all()
    assert got[0, 0, 0].isfinite().all() and got[1].isfinite().all()


@pytest.mark.parametrize("kind", ["column", "causal"])
@pytest.mark.parametrize("size", [16, 37, 64])
def test_error_of_8_bits(kind, size, device):
    """A code is off by half a scale at most. On normal numbers the result is off by under 1 %."""
    pattern = AttentionPattern(kind, text_len=9, grid=(6, 7))
    x = stream(pattern, size=size, device=device)
    codes, scales = definition.encode(x)
    off = (definition.decode(codes, scales, torch.float64) - x.double()).abs()
    assert bool((off <= scales[..., None].double() * (0.5 + 1e-5)).all())
    slots = [0, 5, 20, 41]
    want = uncached(whole, x.double(), pattern)[:, :, :, slots]
    error = (decoded(x, pattern, slots, bits=8).double() - want).square().mean().sqrt()
    assert 1e-5 < error / want.square().mean().sqrt() < 1e-2
    # Against attention over the numbers that the codes stand for, it is as exact as ever.
    kept = x.clone()
    kept[1:, ..., 9:, :] = definition.decode(*definition.encode(x[1:, ..., 9:, :]), torch.float32)
    want = uncached(whole, kept.double(), pattern)[:, :, :, slots].float()
    torch.testing.assert_close(decoded(x, pattern, slots, bits=8), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["column", "causal"])
def test_bytes_of_8_bits(kind):
    pattern = AttentionPattern(kind, text_len=1, grid=(32, 32))
    cache = DecodeCache(pattern, *torch.zeros(2, 1, 3, 1, 64, dtype=torch.float16), 5, bits=8)
    assert cache.num_bytes == 2 * 5 * 3 * 1024 * (64 + 4)
