"""Decode attention as an operator: registration, tracing, same bits in any company, messages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dalle_ext
from dalle_ext import AttentionPattern, DecodeCache, decode_attention
from dalle_ext.ops.sparse_attention import KINDS
from support import levels
from support.decoding import decoded, stream, text_of

RAW = torch.ops.dalle_ext._decode_attention
PATTERN = AttentionPattern("conv", text_len=6, grid=(5, 7), kernel_size=3)
COLUMN = AttentionPattern("column", text_len=6, grid=(5, 7))
SLOT = torch.tensor(9)


def parts(dtype=torch.float32, samples=4):
    """q, k, v, stored as slices of a packed projection."""
    return torch.randn(2, samples, 3, 3, 16).to(dtype).unbind(2)


def cache_of(pattern=PATTERN, *, bits=None, dtype=torch.float32):
    text = torch.linspace(-9, 9, 2 * 2 * 3 * 6 * 16, dtype=torch.float32).sin()
    text = text.view(2, 2, 3, 6, 16).to(dtype)
    return DecodeCache(pattern, *text, 4, bits=bits)


def arguments(cache, slot=SLOT):
    """Of the raw op."""
    text, stores = (cache.text_keys, cache.text_values), (cache.image_keys, cache.image_values)
    scales, p = (cache.key_scales, cache.value_scales), cache.pattern
    q, k, v = parts(cache.text_keys.dtype)
    return (q, k, v, *text, *stores, *scales, slot, p.kind, *p.grid, p.runs, 0.25)


@pytest.mark.parametrize(
    ("pattern", "bits", "dtype"),
    [(PATTERN, None, torch.float32), (COLUMN, 8, torch.bfloat16), (COLUMN, None, torch.float16)],
    ids=["conv", "8 bits", "column"],
)
def test_opcheck(pattern, bits, dtype):
    cache = cache_of(pattern, bits=bits, dtype=dtype)
    torch.library.opcheck(RAW.default, arguments(cache))


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("text_keys", lambda x: None, "text_keys must be a tensor, got NoneType"),
        ("text_values", lambda x: x.to("meta"), "text_values must be on cpu, got meta"),
        ("image_keys", lambda x: x.float(), "image_keys must be of dtype torch.int8, got torch.f"),
        ("image_values", lambda x: x.mT.contiguous().mT, "image_values must be contiguous, got"),
        ("key_scales", lambda x: x[:1], r"key_scales must be of shape \(2, 4, 3, 35\), got \(1,"),
        ("value_scales", lambda x: x.to_sparse(), "value_scales must be dense"),
        ("value_scales", lambda x: x.requires_grad_(), "value_scales must not require a gradient"),
        ("pattern", lambda x: PATTERN, "pattern must stay as it was made"),
        ("samples", lambda x: 3, "samples must stay as it was made"),
    ],
)
def test_what_takes_the_place_of_a_part_of_a_cache_is_like_it(name, change, line):
    cache = cache_of(COLUMN, bits=8)
    before = getattr(cache, name)
    changed = change(before.clone() if isinstance(before, torch.Tensor) else before)
    with pytest.raises((AttributeError, TypeError, ValueError), match=f"^DecodeCache: {line}.*$"):
        setattr(cache, name, changed)
    assert getattr(cache, name) is before


def test_the_schema_says_what_is_written():
    written = {a.name for a in RAW.default._schema.arguments if a.alias_info is not None}
    assert written == {"image_keys", "image_values", "key_scales", "value_scales"}


@pytest.mark.parametrize("bits", [None, 8])
def test_compile_without_graph_break(bits):
    """A step of two slots; what the first writes the second reads."""
    eager, traced = (cache_of(COLUMN, bits=bits) for _ in range(2))

    def step(q, k, v, cache, slot):
        first = decode_attention(q * 2, k, v, cache, slot)
        return decode_attention(first, k + 1, v, cache, slot + 7)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, k, v = parts()
    for slot in (torch.tensor(3), torch.tensor(11)):
        assert torch.equal(compiled(q, k, v, traced, slot), step(q, k, v, eager, slot))
    assert torch.equal(traced.image_keys, eager.image_keys)
    assert torch.equal(traced.image_values, eager.image_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [None, 8])
def test_same_bits_in_any_company(dtype, bits, device):
    """However many captions, samples and threads there are, and whatever the others hold."""
    kind = "column" if bits else "row"
    pattern = AttentionPattern(kind, text_len=75, grid=(6, 9))
    x = stream(pattern, samples=35, heads=3, size=24, dtype=dtype, device=device)
    slots = [0, 40, 53]
    want = decoded(x, pattern, slots, bits)
    before = torch.get_num_threads()
    try:
        for samples in (1, 2, 3, 4, 7, 9, 16, 17, 33):
            torch.set_num_threads(1 + samples % 3)
            for first in (0, 35 - samples):
                chosen = slice(first, first + samples)
                got = decoded(x[:, 1:, chosen], pattern, slots, bits)
                assert torch.equal(got, want[1:, chosen]), (samples, first)
            torch.set_num_threads(3)
            assert torch.equal(decoded(x, pattern, slots, bits), want)
            if device != "cpu":
                break
    finally:
        torch.set_num_threads(before)


@pytest.mark.night
@pytest.mark.parametrize("level", levels.OFFERED[:-1])
def test_every_instruction_set(level):
    here = Path(__file__)
    chosen = "as_accurate or number_of_samples or any_company or 8_bits or odd or codes"
    files = [str(path) for path in here.parent.glob("test_decode_attention*.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-k", chosen, "-m", "not emulated and not cuda"]
        + files,
        env={**os.environ, "DALLE_EXT_CPU_ISA": level},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty(shape, kind, device):
    batch, samples, heads = shape
    pattern = AttentionPattern(kind, text_len=2, grid=(3, 3))
    cache = DecodeCache(pattern, *torch.zeros(2, batch, heads, 2, 8, device=device), samples)
    row = torch.zeros(batch, samples, heads, 8, device=device)
    out = decode_attention(row, row, row, cache, torch.tensor(4, device=device))
    assert out.shape == row.shape and cache.num_bytes == 0


def test_numbers_do_not_depend_on_the_default_dtype():
    q, k, v = parts()
    want = decode_attention(q, k, v, cache_of(COLUMN, bits=8), SLOT)
    torch.set_default_dtype(torch.float64)
    try:
        cache = cache_of(COLUMN, bits=8)
        cache.fill(torch.zeros(2, 3, 0, 16, dtype=torch.float32), cache.text_keys[:, :, :0])
        got = decode_attention(q, k, v, cache, SLOT)
        assert got.dtype == torch.float32 and cache.key_scales.dtype == torch.float32
        assert torch.equal(got, want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_gradient():
    q, k, v = (x.clone().requires_grad_() for x in parts())
    line = "^decode_attention: q must not require a gradient, got a tensor that does"
    with pytest.raises(TypeError, match=line):
        decode_attention(q, k, v, cache_of(), SLOT)
    with torch.no_grad():
        assert not decode_attention(q, k, v, cache_of(), SLOT).requires_grad
    text = torch.zeros(2, 2, 3, 6, 16, requires_grad=True)
    with pytest.raises(TypeError, match="^DecodeCache: text_keys must not require a gradient"):
        DecodeCache(PATTERN, *text, 4)
    with pytest.raises(NotImplementedError, match="^decode_attention: tensors must be without"):
        RAW(q, k, v, *arguments(cache_of())[3:])


Z = torch.zeros(2, 3, 6, 16)
BAD_CACHES = {
    "pattern": (("row", Z, Z, 4), TypeError, "pattern must be an AttentionPattern, got str"),
    "text_len": (
        (PATTERN, Z[:, :, :5], Z, 4),
        ValueError,
        r"text_keys must be \(B, H, 6, D\) for .*, got \(2, 3, 5, 16\)",
    ),
    "rank": ((PATTERN, Z[0], Z[0], 4), ValueError, "text_keys must be .*, got .3, 6, 16."),
    "values": (
        (PATTERN, Z, Z[:1], 4),
        ValueError,
        r"text_values must be of shape \(2, 3, 6, 16\), got \(1, 3, 6, 16\)",
    ),
    "dtypes": (
        (PATTERN, Z, Z.double(), 4),
        ValueError,
        "text_values must be of dtype torch.float32, got torch.float64",
    ),
    "device": ((PATTERN, Z, Z.to("meta"), 4), ValueError, "text_values must be on cpu, got meta"),
    "integers": ((PATTERN, Z.int(), Z.int(), 4), ValueError, "text_keys must be float32, .*int32"),
    "samples": (
        (PATTERN, Z, Z, 0),
        ValueError,
        "samples must be an integer of at least 1 .*, got 0",
    ),
    "too many": (
        (PATTERN, Z, Z, 2**62),
        ValueError,
        "samples must be an integer of at least 1 and below 2147483648, got 46116",
    ),
    "half": ((PATTERN, Z, Z, 1.5), ValueError, "samples must be an integer of .*, got 1.5"),
    "size": (
        (PATTERN, Z.repeat(1, 1, 1, 17), Z, 1),
        ValueError,
        "D must be from 1 to 256, got 272",
    ),
    "sparse": (
        (PATTERN, Z, Z.to_sparse(), 1),
        TypeError,
        "text_values must be dense, got torch.sp",
    ),
    "not a tensor": ((PATTERN, [1.0], Z, 1), TypeError, "text_keys must be a tensor, got list"),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_messages_of_a_cache(case):
    given, error, message = BAD_CACHES[case]
    with pytest.raises(error, match=f"^DecodeCache: {message}"):
        DecodeCache(*given)


@pytest.mark.parametrize("bits", [4, 16, True, "8", 7.9])
def test_messages_of_bits(bits):
    with pytest.raises(ValueError, match=f"^DecodeCache: bits must be None or 8, got {bits!r}$"):
        DecodeCache(COLUMN, Z, Z, 4, bits=bits)


@pytest.mark.parametrize("kind", ["row", "conv"])
def test_8_bits_are_for_layers_that_keep_many_slots(kind):
    pattern = AttentionPattern(kind, text_len=6, grid=(5, 7))
    with pytest.raises(ValueError, match=f"bits must be None for kind '{kind}' .*, got 8"):
        DecodeCache(pattern, Z, Z, 4, bits=8)


Q = torch.zeros(2, 4, 3, 16)
BAD_CALLS = {
    "cache": ({"cache": PATTERN}, TypeError, "cache must be a DecodeCache, got AttentionPattern"),
    "q shape": (
        {"q": Q[:, :3]},
        ValueError,
        r"q must be \(2, 4, 3, 16\) of the cache, got \(2, 3, 3, 16\)",
    ),
    "v shape": ({"v": Q[..., :8]}, ValueError, r"v must be .* of the cache, got \(2, 4, 3, 8\)"),
    "k dtype": (
        {"k": Q.half()},
        ValueError,
        "k must be torch.float32 of the cache, got torch.float16",
    ),
    "q device": ({"q": Q.to("meta")}, ValueError, "q must be on cpu, got meta"),
    "slot int": ({"slot": 3}, ValueError, "slot must be a 0-d int64 tensor, got 3"),
    "slot dtype": (
        {"slot": torch.tensor(3, dtype=torch.int32)},
        ValueError,
        r"slot must be a 0-d int64 tensor, got \(\) torch.int32",
    ),
    "slot rank": ({"slot": SLOT[None]}, ValueError, r"slot must be a 0-d .*, got \(1,\) .*int64"),
    "slot device": ({"slot": SLOT.to("meta")}, ValueError, "slot must be on cpu, got meta"),
    "slot below": ({"slot": torch.tensor(-1)}, RuntimeError, "slot must be from 0 to 34, got -1"),
    "slot float": (
        {"slot": torch.tensor(3.0)},
        ValueError,
        r"slot must be a 0-d int64 tensor, got \(\) torch.float32",
    ),
    "slot sparse": (
        {"slot": SLOT.to_sparse()},
        TypeError,
        "slot must be dense, got torch.sparse_coo",
    ),
    "slot far": (
        {"slot": torch.tensor(-(2**63))},
        RuntimeError,
        "slot must be from 0 to 34, got -9223372036854775808",
    ),
    "heads": (
        {"k": Q[:, :, :2]},
        ValueError,
        r"k must be \(2, 4, 3, 16\) of the cache, got \(2, 4, 2, 16\)",
    ),
    "batch": (
        {"v": Q[:1]},
        ValueError,
        r"v must be \(2, 4, 3, 16\) of the cache, got \(1, 4, 3, 16\)",
    ),
    "slot above": ({"slot": torch.tensor(35)}, RuntimeError, "slot must be from 0 to 34, got 35"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    "sparse": ({"k": Q.to_sparse()}, TypeError, "k must be dense, got torch.sparse_coo"),
    "not a tensor": ({"q": [0.0]}, TypeError, "q must be a tensor, got list"),
}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_messages_of_a_call(case, reference):
    """And nothing is written then."""
    given, error, message = BAD_CALLS[case]
    call = {"q": Q, "k": Q + 1, "v": Q + 1, "cache": cache_of(), "slot": SLOT} | given
    with dalle_ext.use_reference(reference):
        with pytest.raises(error, match=f"^decode_attention: {message}$") as caught:
            decode_attention(**call)
    assert "\n" not in str(caught.value)
    if isinstance(call["cache"], DecodeCache):
        assert not call["cache"].image_keys.any() and not call["cache"].image_values.any()


FILLS = {
    "too many": (torch.zeros(2, 3, 36, 16), r"keys must be .* with n up to 35, got \(2, 3, 36"),
    "heads": (torch.zeros(2, 2, 5, 16), r"keys must be \(2, 3, n, 16\) or \(2, 4, 3, n, 16\)"),
    "samples": (torch.zeros(2, 3, 3, 5, 16), "keys must be .*, got .2, 3, 3, 5, 16."),
    "rank": (torch.zeros(3, 5, 16), "keys must be .*, got .3, 5, 16."),
    "dtype": (torch.zeros(2, 3, 5, 16).half(), "keys must be of dtype torch.float32, got .*16"),
    "device": (torch.zeros(2, 3, 5, 16, device="meta"), "keys must be on cpu, got meta"),
}


@pytest.mark.parametrize("case", FILLS)
def test_messages_of_fill(case):
    keys, message = FILLS[case]
    with pytest.raises(ValueError, match=f"^DecodeCache: {message}"):
        cache_of().fill(keys, keys)


def test_messages_of_fill_values_set_text_and_reorder():
    cache, rows = cache_of(), torch.zeros(2, 3, 5, 16)
    with pytest.raises(ValueError, match="^DecodeCache: values must be of shape .2, 3, 5, 16."):
        cache.fill(rows, rows[:, :, :4])
    with pytest.raises(ValueError, match="^DecodeCache: text_keys must be of shape .2, 3, 6, 16."):
        cache.set_text(rows, rows)
    for index, message in (
        (torch.zeros(2, 3, dtype=torch.int64), r"index must be \(2, 4\) int64, got \(2, 3\)"),
        (torch.zeros(2, 4, dtype=torch.int32), r"index must be \(2, 4\) int64, got .*int32"),
        (torch.full((2, 4), 4), "index must be from 0 to 3, got 4"),
        (torch.full((2, 4), -1), "index must be from 0 to 3, got -1"),
        (torch.zeros(2, 4, dtype=torch.int64, device="meta"), "index must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=f"^DecodeCache: {message}"):
            cache.reorder(index)


def test_messages_of_the_raw_op():
    good = list(arguments(cache_of()))
    for place, wrong, message in (
        (5, good[5][:, :, :, :9], r"image_keys must be .*, got \(2, 4, 3, 9, 16\) of float32 with"),
        (
            6,
            good[6].double(),
            r"image_values must be contiguous float32 of shape \(2, 4, 3, 14, 16\), "
            r"got \(2, 4, 3, 14, 16\) of float64$",
        ),
        (1, good[1].double(), "k must be of q's dtype float32, got float64$"),
        (7, torch.zeros(2, 4, 3, 14), "scales must be of keys and values, or of neither"),
        (
            3,
            good[3].mT.contiguous().mT,
            r"text_keys must be contiguous float32 of shape \(2, 3, 6, 16\), "
            r"got \(2, 3, 6, 16\) of float32 with strides \(288, 96, 1, 6\)$",
        ),
        (9, SLOT[None], r"slot must be one int64, 0-d, got \(1\) of int64$"),
        (9, SLOT.int(), r"slot must be one int64, 0-d, got \(\) of int32$"),
        (10, "ring", "kind must be one of row, column, conv, causal, offsets, got ring"),
        (13, [1, 2], "runs must be ascending half-open runs"),
    ):
        given = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(RuntimeError, match=f"^decode_attention: {message}"):
            RAW(*given)


def test_cuda_tensors_without_the_cuda_library(monkeypatch):
    from dalle_ext import _native

    monkeypatch.setattr(_native, "CPU_PROBLEM", "no library")
    q, k, v = parts()
    with pytest.raises(RuntimeError, match="^decode_attention: no library$"):
        decode_attention(q, k, v, cache_of(), SLOT)


def test_text_is_copied():
    q, k, v = parts()
    text = torch.randn(2, 2, 3, 9, 16)[:, :, :, 2:8]
    cache = DecodeCache(PATTERN, *text, 4)
    before = text.clone()
    cache.set_text(*(text_of(torch.zeros(3, 2, 4, 3, 6, 16), PATTERN)))
    assert torch.equal(text, before) and not cache.text_keys.any()
