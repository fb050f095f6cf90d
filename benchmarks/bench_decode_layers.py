"""A stack of decoding layers in one call beside the same op by op, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import dalle_ext
import harness
from harness import Case, Error, Ready

CALLS = "PackedLinear and decode_attention, op by op"
KINDS = ("row", "column", "row", "conv")
SLOPE = 1.702


def make(samples: int, width: int, seed: int = 0) -> dalle_ext.DecodeLayers:
    """Four layers as in the 15 M prior of `bench_sampling.py`, halfway through the image."""
    draw = torch.Generator("cpu").manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device="cpu")

    def packed(outputs: int, inputs: int) -> dalle_ext.PackedLinear:
        return dalle_ext.PackedLinear(random(outputs, inputs) / inputs**0.5, random(outputs))

    layers = []
    for kind in KINDS:
        pattern = dalle_ext.AttentionPattern(kind, text_len=64, grid=(16, 16))
        heads = width // 64
        cache = dalle_ext.DecodeCache(pattern, *random(2, 1, heads, 64, 64), samples)
        cache.fill(*random(2, 1, heads, 128, 64))
        norms = [(1 + random(width) / 9, random(width) / 9, 1e-5) for _ in range(2)]
        sizes = (3 * width, width), (width, width), (4 * width, width), (width, 4 * width)
        qkv, out, wide_in, wide_out = (packed(*size) for size in sizes)
        one, two = norms
        layers.append(dalle_ext.DecodeLayer(qkv, out, wide_in, wide_out, (one, two), cache))
    return dalle_ext.DecodeLayers(layers, slope=SLOPE)


def op_by_op(stack: dalle_ext.DecodeLayers, x: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    for layer in stack.layers:
        batch, samples, heads, _, size = layer.cache.image_keys.shape
        packed = layer.qkv(x, norm=layer.norms[0]).view(batch, samples, 3, heads, size)
        q, k, v = packed.unbind(2)
        attended = dalle_ext.decode_attention(q, k, v, layer.cache, slot)
        x = layer.out(attended.view(len(x), -1), add=x)
        x = layer.wide_out(layer.wide_in(x, norm=layer.norms[1], slope=SLOPE), add=x)
    return x


def ready(samples: int, width: int, device: str) -> Ready:
    ours, other = make(samples, width), make(samples, width)
    draw = torch.Generator(device).manual_seed(1)
    x = torch.randn(samples, width, generator=draw, device=device)
    slot = torch.tensor(128, device=device)

    def check(name: str, result: torch.Tensor) -> Error:
        """Beside the definition, in fp32 as well: sums in another order."""
        stack = make(samples, width)
        with dalle_ext.use_reference():
            near = stack(x, slot)
        return Error(float((result - near).abs().max() / near.abs().max()), 1e-5)

    calls = {"ours": lambda: lambda: ours(x, slot), CALLS: lambda: lambda: op_by_op(other, x, slot)}
    read = sum(w.numel() * w.element_size() for w in ours._parameters)
    return Ready(calls, check, read * 1e-9, "GB/s", read)


def cases(scale: str) -> Iterator[Case]:
    """None on a GPU, where the op does not exist."""
    for samples in (1, 8, 64) if scale == "cpu" else ():
        for width in (384, 768):
            yield Case(
                op="decode_layers",
                what=f"decode_layers, {len(KINDS)} of width {width}, {samples} rows",
                ready=partial(ready, samples, width),
                rivals={CALLS: "eager"},
            )


def test_beside_its_ops(case):
    harness.assert_right(harness.measure(case))
