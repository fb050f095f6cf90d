"""A stack of decoding layers in one call has the bits of its ops one after the other."""

from __future__ import annotations

import math
import threading
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


def test_autocast_changes_nothing():
    """Neither what the op computes nor its definition."""
    x, slot = torch.randn(6, 20), torch.tensor(0)
    for reference in (False, True):
        one, other = stack(SIZES[2]), stack(SIZES[2])
        with dalle_ext.use_reference(reference):
            wanted = other(x, slot)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(one(x, slot), wanted)
        assert all(map(torch.equal, stores(one.layers), stores(other.layers)))


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


@pytest.mark.parametrize("reference", [False, True])
def test_tensors_put_in_the_place_of_a_caches(reference):
    """The next step reads and writes them."""
    sizes = (2, 3, 2, 8, 16, 32)
    one, other = stack(sizes, bits=8), stack(sizes, bits=8)
    x, slot = torch.randn(6, 16), torch.tensor(0)
    for layers in (one.layers, other.layers):
        for each in layers:
            for name, old in vars(each.cache).items():
                if name.startswith(("text_", "image_", "key_", "value_")) and old is not None:
                    setattr(each.cache, name, old.clone() if "image" in name else old.abs() + 1)
    with dalle_ext.use_reference(reference):
        wanted = other(x, slot) if reference else call_by_call(other.layers, x, slot)
        assert torch.equal(one(x, slot), wanted)
    assert all(map(torch.equal, stores(one.layers), stores(other.layers)))


def test_no_gradient_from_parameters_of_a_norm():
    """Not in the definition either, whose caches would keep the graph."""
    gain, shift = (torch.nn.Parameter(torch.ones(16)) for _ in range(2))
    good = layer(patterns(6)[0], (1, 2, 2, 8, 16, 32), seed=0)
    layers = DecodeLayers([replace(good, norms=((gain, shift, 1e-5),) * 2)], slope=SLOPE)
    for reference in (False, True):
        with dalle_ext.use_reference(reference):
            assert not layers(torch.randn(2, 16), torch.tensor(0)).requires_grad
    assert not any(x.requires_grad for x in stores(layers.layers))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_no_caption(bits, reference):
    empty = stack((0, 3, 2, 8, 16, 32), bits=bits)
    with dalle_ext.use_reference(reference):
        assert empty(torch.zeros(0, 16), torch.tensor(0)).shape == (0, 16)
        with pytest.raises(RuntimeError, match="^DecodeLayers: slot must be from 0 to 14, got 15"):
            empty(torch.zeros(0, 16), torch.tensor(15))


@pytest.mark.parametrize("options", [{"bits": 8}, {"weights": BF16, "cache": BF16}], ids=str)
def test_what_is_not_finite_stays_in_its_row(options):
    sizes = (2, 9, 2, 5, 21, 33)
    for bad in (math.nan, math.inf, 3e38):
        one, other = stack(sizes, **options), stack(sizes, **options)
        for x, slot in steps(21, 18, 3):
            harmed = x.clone()
            harmed[4], harmed[13, 0] = bad, -bad
            rest = [row for row in range(18) if row not in (4, 13)]
            found = other(harmed, slot)
            assert torch.equal(one(x, slot)[rest], found[rest])
            assert not found[4].isfinite().any()


@pytest.mark.parametrize(
    "grid, text_lens", [((1, 1), (0, 0, 0, 0)), ((3, 5), (0, 1, 9, 70)), ((1, 7), (3, 0, 3, 1))]
)
def test_grids_and_texts(grid, text_lens):
    def made():
        kinds = ("row", {}), ("column", {}), ("causal", {}), ("conv", {"kernel_size": 3})
        return [
            layer(AttentionPattern(kind, text_len=t, grid=grid, **more), SIZES[2], seed=t)
            for (kind, more), t in zip(kinds, text_lens, strict=True)
        ]

    one, other = DecodeLayers(made(), slope=SLOPE), made()
    for x, slot in steps(20, 6, math.prod(grid)):
        assert torch.equal(one(x, slot), call_by_call(other, x, slot))


def test_stacks_in_several_threads_at_once():
    """More threads than cores, and a cache for each caller."""
    sizes = (1, 4, 2, 32, 64, 256)
    x, before, found = torch.randn(4, 64), torch.get_num_threads(), []
    wanted = [stack(sizes)(x, torch.tensor(0))] * 16

    def work():
        mine = stack(sizes)
        found.extend(mine(x, torch.tensor(0)) for _ in range(4))

    torch.set_num_threads(3)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found, wanted)) and len(found) == 16


def raw_arguments(layers):
    return (
        layers._parameters, *layers._stores(), layers._kinds, layers._rules, layers._eps, SLOPE,
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
        ({"norms": (GOOD.norms[0], (torch.ones(16), torch.ones(16), torch.ones(2, 2)))}, "eps"),
        ({"norms": (GOOD.norms[0],)}, "norms must be two of .*, got 1 of"),
        ({"norms": (3, torch.ones(3, 3))}, "norms must be two of .*, got 2 of"),
        ({"norms": torch.ones(2, 3)}, "norms must be two of .*, got Tensor"),
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
        (GOOD, SLOPE, "layers must be a sequence of DecodeLayer, got DecodeLayer"),
        ([GOOD], torch.ones(2, 2), r"slope must be a finite number, got \(2, 2\) of float32"),
        ([GOOD], "x", "slope must be a finite number, got 'x'"),
        ([GOOD], float("nan"), "slope must be a finite number, got nan"),
    ],
)
def test_a_stack_that_is_none(layers, slope, line):
    with pytest.raises((TypeError, ValueError), match=f"^DecodeLayers: {line}") as caught:
        DecodeLayers(layers, slope=slope)
    assert "\n" not in str(caught.value)


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
    problems = pytest.raises((RuntimeError, TypeError, ValueError), match=f"^DecodeLayers: {line}")
    with dalle_ext.use_reference(reference), problems as caught:
        layers(x, torch.tensor(slot))
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before, stores(layers.layers)))
