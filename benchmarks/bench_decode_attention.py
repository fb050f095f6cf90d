"""Decode attention: one step of every candidate beside what samplers do without the op.

Rivals: on a CPU the torch ops that `dalle` drew with before there was the op (a cache of all slots,
the visible ones sliced out); on a GPU SDPA and FlexAttention on a dense static cache of text and
image, one query a candidate, masked by the pattern. `pytest benchmarks/bench_decode_attention.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import dalle_ext
import harness
from dalle_ext.testing import accuracy
from harness import Call, Case, Error, Ready

Tensor = torch.Tensor
Layer = Callable[[], Tensor]
OPS = "torch ops, cache of all slots"
SDPA, FLEX = "torch SDPA, dense cache", "FlexAttention, dense cache"
GOALS = {"row": {OPS: 5.0}, "column": {OPS: 5.0}}
BANDWIDTH, OVERHEAD, LAUNCH_US = 4.8e12, 1.3, 3.0  # of an H200: bytes a second, goal over floor


@dataclass(frozen=True)
class Size:
    """One step of `layers` layers, each with a cache of its own: of several, all from memory.

    Attributes:
        share: the slot, as a share of the image; 0.5 is the middle of the middle row.
        bits: of image keys and values, or None.
    """

    kind: str
    samples: int
    dtype: torch.dtype = torch.float32
    bits: int | None = None
    heads: int = 12
    head_size: int = 64
    text_len: int = 256
    grid: tuple[int, int] = (32, 32)
    layers: int = 1
    share: float = 0.5

    @property
    def pattern(self) -> dalle_ext.AttentionPattern:
        return dalle_ext.AttentionPattern(self.kind, text_len=self.text_len, grid=self.grid)

    @property
    def slot(self) -> int:
        rows, columns = self.grid
        return int(rows * self.share) * columns + int(columns * self.share)

    @property
    def seen(self) -> list[int]:
        """The image slots that the query sees, ascending."""
        return [self.slot - o for o in reversed(self.pattern.offsets) if o <= self.slot]

    def __str__(self) -> str:
        name = str(self.dtype)[6:] + ("" if self.bits is None else f" {self.bits} bits")
        sizes = f"{self.text_len}+{self.grid[0]}x{self.grid[1]} S{self.samples} H{self.heads}"
        layers = f" {self.layers} layers" if self.layers > 1 else ""
        return f"{sizes} D{self.head_size} {name}{layers}"

    @property
    def bytes(self) -> int:
        """Least traffic of a layer: text and visible slots once, q, k, v, out and the new slot."""
        element = torch.empty((), dtype=self.dtype).element_size()
        row = self.heads * self.head_size * element
        slots = self.heads * (self.head_size + 4 if self.bits else self.head_size * element)
        image = 2 * self.samples * len(self.seen) * slots
        return 2 * self.text_len * row + image + self.samples * 4 * row


def torch_ops(size: Size, qkv: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """(B, S, H, D) as `_attend` of dalle/prior/decode.py of November 2026 computed it."""
    query, key, value = (x[:, :, :, None] for x in qkv)
    image_keys, image_values = image
    text_keys, text_values = text
    slot, columns = size.slot, size.grid[1]
    image_keys[:, :, :, slot] = key[:, :, :, 0]
    image_values[:, :, :, slot] = value[:, :, :, 0]
    visible: slice | Tensor = torch.tensor(size.seen)
    if size.kind == "row":
        visible = slice(max(0, slot - columns), slot + 1)
    elif size.kind == "column":
        visible = slice(slot % columns, slot + 1, columns)
    elif size.kind == "causal":
        visible = slice(0, slot + 1)
    shared = query[:, :, :, 0].transpose(1, 2)  # (B, H, S, D): all samples against one text
    text_scores = (shared @ text_keys.transpose(-2, -1)).transpose(1, 2)
    image_scores = (query @ image_keys[:, :, :, visible].transpose(-2, -1))[:, :, :, 0]
    scores = torch.cat([text_scores, image_scores], -1).float() / math.sqrt(size.head_size)
    weights = scores.softmax(-1).to(query.dtype)
    text_weights, image_weights = weights.split(
        [size.text_len, scores.shape[-1] - size.text_len], -1
    )
    mixed = (text_weights.transpose(1, 2) @ text_values).transpose(1, 2)
    return mixed + (image_weights[:, :, :, None] @ image_values[:, :, :, visible])[:, :, :, 0]


def dense(size: Size, name: str, qkv: Tensor, text: Tensor, image: Tensor) -> Layer:
    """One query a candidate against a cache of text and all slots."""
    query, key, value = (x[0, :, :, None] for x in qkv)  # (S, H, 1, D)
    at = size.text_len + size.slot
    shared = text[:, 0, None].expand(-1, size.samples, -1, -1, -1)
    keys, values = torch.cat([shared, image[:, 0]], 3).unbind()
    mask = size.pattern.mask()[at].to(qkv.device)

    def step(attend: Callable[..., Tensor]) -> Tensor:
        keys[:, :, at], values[:, :, at] = key[:, :, 0], value[:, :, 0]
        return attend(query, keys, values).transpose(1, 2)

    if name == SDPA:
        allowed = mask[None, None, None]
        return lambda: step(lambda q, k, v: sdpa(q, k, v, attn_mask=allowed))
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(
        lambda b, h, q, k: mask[k], None, None, 1, len(mask), device=str(qkv.device)
    )
    return harness.compiled(
        lambda: step(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks))
    )


def ready(size: Size, names: tuple[str, ...], device: str) -> Ready:
    draw = torch.Generator(device).manual_seed(0)
    s, h, d = size.samples, size.heads, size.head_size
    slots = size.grid[0] * size.grid[1]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device).to(size.dtype)

    packed = random(1, s, 3, h, d)  # as one projection gives them
    qkv = packed.permute(2, 0, 1, 3, 4)
    text, image = random(2, 1, h, size.text_len, d), random(2, 1, s, h, slots, d)
    at = torch.tensor(size.slot, device=device)

    def layer(name: str) -> Layer:
        if name == OPS:
            mine = image.clone()
            return lambda: torch_ops(size, qkv, text, mine)
        if name != "ours":
            return dense(size, name, qkv, text, image)
        cache = dalle_ext.DecodeCache(size.pattern, *text, s, bits=size.bits)
        cache.fill(*image[:, :, :, :, : size.slot])
        return lambda: dalle_ext.decode_attention(*qkv, cache, at)

    def build(name: str) -> Call:
        layers = [layer(name) for _ in range(size.layers)]

        def step() -> Tensor:
            for one in layers[1:]:
                one()
            return layers[0]()

        return torch.no_grad()(step)

    def check(name: str, result: Any) -> Error:
        """Against the definition in float64, three samples; 8 bits: a hundredth of the values."""
        got = result.view(s, h, d)
        length = size.text_len + size.slot + 1
        worst, factor = Error(0.0, 1.0), 2 if name == "ours" else 4  # torch rounds between its ops
        for sample in {0, s // 2, s - 1}:
            stream = torch.cat([text[:, 0], image[:, 0, sample, :, : size.slot]], 2)
            keys, values = torch.cat([stream, qkv[1:, 0, sample, :, None]], 2)[:, None]
            seen = size.pattern.mask()[length - 1, :length].to(device)
            row = [qkv[0, 0, sample, None, :, None], keys[..., seen, :], values[..., seen, :]]
            near, want = sdpa(*row), sdpa(*(x.double() for x in row))
            found = Error(*accuracy(got[sample][None, :, None], near, want, factor=factor))
            if size.bits is not None:
                found = Error(found.found, max(found.most, 0.01))
            if not found.found / found.most <= worst.found / worst.most:
                worst = found
        return worst

    moved, keys = size.bytes * size.layers, size.text_len + len(size.seen)
    flops = 4 * d * h * s * keys * size.layers
    calls = {name: partial(build, name) for name in ("ours", *names)}
    return Ready(calls, check, moved * 1e-9, "GB/s", moved, flops, str(size.dtype)[6:])


def case(
    size: Size, rivals: dict[str, str], goals: dict[str, float], us: float | None = None
) -> Case:
    return Case(
        op="decode_attention",
        what=f"decode_attention {size.kind} {size}",
        ready=partial(ready, size, tuple(rivals)),
        rivals=rivals,
        goals=goals,
        goal_us=us,
    )


def cases(scale: str) -> Iterator[Case]:
    """Of a CPU the base preset's heads, of a GPU the 12b preset's."""
    if scale == "cpu":
        for kind, goals in GOALS.items():
            for layers in (1, 6):
                yield case(Size(kind, 64, layers=layers), {OPS: "eager"}, goals)
        for kind in ("conv", "causal"):
            yield case(Size(kind, 64), {OPS: "eager"}, {})
        for samples in (1, 512):
            yield case(Size("row", samples), {OPS: "eager"}, {})
        yield case(Size("row", 64, torch.bfloat16, layers=6), {OPS: "eager"}, {})
        yield case(Size("column", 64, bits=8, layers=6), {OPS: "eager"}, {})
        return
    short = torch.bfloat16
    for kind in ("row", "column", "conv", "causal"):
        for samples in (64, 1, 512):
            size = Size(kind, samples, short, heads=62)
            us = size.bytes / BANDWIDTH * 1e6 * OVERHEAD + LAUNCH_US
            tiny = Size(kind, min(samples, 3), short, None, 2, 16, 5, (4, 4))
            yield case(size if scale == "gpu" else tiny, {SDPA: "eager", FLEX: "flex"}, {}, us)
    for kind in ("column", "causal"):
        size = Size(kind, 64, short, 8, heads=62)
        us = size.bytes / BANDWIDTH * 1e6 * OVERHEAD + LAUNCH_US
        tiny = Size(kind, 3, short, 8, 2, 16, 5, (4, 4))
        yield case(size if scale == "gpu" else tiny, {SDPA: "eager"}, {}, us)


def test_beside_torch(case):
    rows = harness.measure(case)
    harness.assert_right(rows)
    assert all(row["ratio"] > 1 for row in rows), harness.table(rows)
