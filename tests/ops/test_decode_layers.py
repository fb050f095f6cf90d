"""A stack of decoding layers in one call has the bits of its ops one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dalle_ext
from dalle_ext import AttentionPattern, DecodeCache, DecodeLayer, DecodeLayers, PackedLinear

FP32, BF16 = torch.float32, torch.bfloat16
RAW = torch.ops.dalle_ext._decode_layers
SLOPE = 1.702
SIZES = [  # B, S, H, D, d, F
    (1, 1, 1, 5, 7, 9),
    (1, 1, 2, 8, 48, 33),
    (2, 3, 3, 16, 20, 100),
    (1, 20, 1, 64, 33, 70),
]


def patterns(text_len):
    """All that the caches of a stack may be of, on an odd grid."""
    size = {"text_len": text_len, "grid": (3, 5)}
    kinds = [AttentionPattern(kind, **size) for kind in ("row", "column", "causal")]
    return [*kinds, AttentionPattern("conv", kernel_size=3, **size)]


def layer(pattern, sizes, *, seed, weights=FP32, cache=FP32, bits=None, bias=True):
    batch, samples, heads, size, width, hidden = sizes
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    def packed(outputs, inputs):
        weight = random(outputs, inputs) / inputs**0.5
        return PackedLinear(weight, random(outputs) if bias else None, dtype=weights)

    text = random(2, batch, heads, pattern.text_len, size).to(cache)
    inner = heads * size
    return DecodeLayer(
        qkv=packed(3 * inner, width),
        out=packed(width, inner),
        wide_in=packed(hidden, width),
        wide_out=packed(width, hidden),
        norms=tuple((1 + random(width) / 9, random(width) / 9, eps) for eps in (1e-5, 1e-3)),
        cache=DecodeCache(pattern, *text, samples, bits=bits),
    )


def stack(sizes, *, bits=None, **options):
    layers = [
        layer(p, sizes, seed=seed, bits=bits if p.kind in ("column", "causal") else None, **options)
        for seed, p in enumerate(patterns(6))
    ]
    return DecodeLayers(layers, slope=SLOPE)


def call_by_call(layers, x, slot):
    """The same of `PackedLinear` and `decode_attention`."""
    for one in layers:
        batch, samples, heads, _, size = one.cache.image_keys.shape
        packed = one.qkv(x, norm=one.norms[0]).view(batch, samples, 3, heads, size)
        q, k, v = packed.to(one.cache.text_keys.dtype).unbind(2)
        attended = dalle_ext.decode_attention(q, k, v, one.cache, slot)
        x = one.out(attended.float().view(len(x), -1), add=x)
        x = one.wide_out(one.wide_in(x, norm=one.norms[1], slope=SLOPE), add=x)
    return x


def stores(layers):
    return [x for one in layers for x in one.cache._stores()]


def steps(width, rows, count=15):
    draw = torch.Generator().manual_seed(7)
    for slot in range(count):
        yield torch.randn(rows, width, generator=draw), torch.tensor(slot)


@pytest.mark.parametrize(
    "options",
    [{}, {"weights": BF16}, {"weights": BF16, "cache": BF16}, {"bits": 8}, {"bias": False}],
    ids=str,
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_bits_of_its_calls(sizes, options):
    """At every slot, into the caches too, on any number of threads."""
    one, other = stack(sizes, **options), stack(sizes, **options)
    before = torch.get_num_threads()
    try:
        for x, slot in steps(sizes[4], sizes[0] * sizes[1]):
            torch.set_num_threads(1 + int(slot) % 5)
            given = x.clone()
            assert torch.equal(one(x, slot), call_by_call(other.layers, x, slot)), slot
            assert torch.equal(x, given)
    finally:
        torch.set_num_threads(before)
    for found, wanted in zip(stores(one.layers), stores(other.layers), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("weights", "tolerance"), [(FP32, 2e-5), (BF16, 4e-2)])
def test_the_definition(weights, tolerance):
    one, other = (stack(SIZES[2], weights=weights) for _ in range(2))
    for x, slot in steps(20, 6):
        with dalle_ext.use_reference():
            wanted = other(x, slot)
        torch.testing.assert_close(one(x, slot), wanted, atol=tolerance, rtol=tolerance)


def test_a_row_has_the_same_bits_among_any_others():
    sizes = (1, 20, 2, 16, 48, 96)
    whole = stack(sizes)
    alone = [stack((1, samples, *sizes[2:])) for samples in (1, 7)]
    for x, slot in steps(48, 20):
        wanted = whole(x, slot)
        for part in alone:
            rows = part.layers[0].cache.samples
            assert torch.equal(part(x[:rows].clone(), slot), wanted[:rows])


def test_caches_stay_what_they_are():
    """What `set_text`, `fill` and `reorder` do to a cache holds for the next step."""
    sizes = (2, 3, 2, 8, 16, 32)
    one, other = stack(sizes), stack(sizes)
    draw = torch.Generator().manual_seed(3)
    for layers in (one.layers, other.layers):
        for number, each in enumerate(layers):
            fixed = torch.Generator().manual_seed(number)
            text, image = (torch.randn(2, 2, 2, n, 8, generator=fixed) for n in (6, 4))
            each.cache.set_text(*text)
            each.cache.fill(*image)
            each.cache.reorder(torch.tensor([[2, 0, 0], [1, 1, 2]]))
    x = torch.randn(6, 16, generator=draw)
    slot = torch.tensor(4)
    assert torch.equal(one(x, slot), call_by_call(other.layers, x, slot))


def test_no_caption():
    empty = stack((0, 3, 2, 8, 16, 32))
    assert empty(torch.zeros(0, 16), torch.tensor(0)).shape == (0, 16)


def raw_arguments(layers):
    return (
        layers._parameters, layers._text, layers._image, layers._scales, layers._kinds,
        layers._rules, layers._eps, SLOPE,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [None, 8])
def test_opcheck(bits):
    layers = stack(SIZES[2], bits=bits)
    x = torch.randn(6, 20)
    torch.library.opcheck(RAW.default, (x, torch.tensor(2), *raw_arguments(layers)))


def test_compile_without_graph_break():
    one, other = stack(SIZES[2]), stack(SIZES[2])
    compiled = torch.compile(lambda x, slot: one(x, slot) + 1, fullgraph=True, backend="eager")
    for x, slot in steps(20, 6, 3):
        assert torch.equal(compiled(x, slot), other(x, slot) + 1)


GOOD = layer(patterns(6)[0], (1, 2, 2, 8, 16, 32), seed=0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"qkv": GOOD.out}, r"qkv must have a weight of \(48, 16\), got \(16, 16\)"),
        ({"wide_out": GOOD.wide_in}, r"wide_out must have a weight of \(16, 32\), got \(32, 16\)"),
        ({"out": torch.nn.Linear(16, 16)}, "out must be a PackedLinear, got Linear"),
        ({"cache": None}, "cache must be a DecodeCache, got NoneType"),
        (
            {"out": PackedLinear(torch.zeros(16, 16), dtype=BF16)},
            "out must be packed as torch.float32, got torch.bfloat16",
        ),
        ({"norms": (GOOD.norms[0], (torch.ones(3), torch.ones(16), 1e-5))}, "gain must be"),
        ({"norms": (GOOD.norms[0], (torch.ones(16), None, 1e-5))}, "shift must be a tensor"),
        ({"norms": (GOOD.norms[0], (torch.ones(16), torch.ones(16), "x"))}, "eps must be"),
        ({"norms": (GOOD.norms[0],)}, "norms must be two of"),
    ],
)
def test_a_layer_that_does_not_fit(change, line):
    with pytest.raises((TypeError, ValueError), match=f"^DecodeLayers: {line}") as caught:
        DecodeLayers([replace(GOOD, **change)], slope=SLOPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "options", "line"),
    [
        ((1, 3, 2, 8, 16, 32), {}, "cache must be of B, S, H, D and grid"),
        ((1, 2, 2, 8, 16, 32), {"cache": BF16}, "cache must be torch.float32, got torch.bfloat16"),
        ((1, 2, 2, 8, 16, 32), {"cache": torch.float64}, "cache must be torch.float32, got"),
        ((1, 2, 2, 8, 20, 32), {}, "qkv must have a weight of"),
    ],
)
def test_layers_that_do_not_fit_each_other(sizes, options, line):
    other = layer(patterns(6)[1], sizes, seed=1, **options)
    with pytest.raises(ValueError, match=f"^DecodeLayers: {line}"):
        DecodeLayers([GOOD, other], slope=SLOPE)


@pytest.mark.parametrize(
    ("layers", "slope", "line"),
    [
        ([], SLOPE, "layers must be at least one, got none"),
        ([GOOD, 3], SLOPE, "layers must be of DecodeLayer, got int"),
        ([GOOD], "x", "slope must be a finite number, got 'x'"),
        ([GOOD], float("nan"), "slope must be a finite number, got nan"),
    ],
)
def test_a_stack_that_is_none(layers, slope, line):
    with pytest.raises((TypeError, ValueError), match=f"^DecodeLayers: {line}"):
        DecodeLayers(layers, slope=slope)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("x", "slot", "line"),
    [
        (torch.zeros(3, 16), 0, r"x must be contiguous float32 of shape \(2, 16\), got \(3, 16\)"),
        (torch.zeros(2, 15), 0, r"x must be .*, got \(2, 15\) of float32"),
        (torch.zeros(2, 16).double(), 0, r"x must be .*, got \(2, 16\) of float64"),
        (torch.zeros(16, 2).T, 0, r"x must be .*, got \(2, 16\) of float32 with strides \(1, 2\)"),
        (torch.zeros(2, 16).requires_grad_(), 0, "x must not require a gradient"),
        ([[0.0]], 0, "x must be a tensor, got list"),
        (torch.zeros(2, 16), 15, "slot must be from 0 to 14, got 15"),
        (torch.zeros(2, 16), -1, "slot must be from 0 to 14, got -1"),
        (torch.zeros(2, 16), 1.5, "slot must be a 0-d int64 tensor on the CPU"),
    ],
)
def test_a_step_that_does_not_fit(x, slot, line, reference):
    layers = DecodeLayers([layer(patterns(6)[0], (1, 2, 2, 8, 16, 32), seed=0)], slope=SLOPE)
    before = [x.clone() for x in stores(layers.layers)]
    problems = RuntimeError, TypeError, ValueError
    with dalle_ext.use_reference(reference), pytest.raises(problems, match=line) as caught:
        layers(x, torch.tensor(slot))
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before, stores(layers.layers)))
