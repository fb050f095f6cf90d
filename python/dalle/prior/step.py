"""One step of drawing: all layers for one image slot of every row (paper 2.6).

Letters: B captions (with guidance both branches), S samples of each, R = B * S rows, H heads, D
head size, d width, N image slots, K image vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dalle_ext
from dalle.devices import without_autocast
from dalle.errors import EnvironmentProblem, UsageError
from dalle.memory import free_memory, require_memory
from dalle.prior.blocks import GELU_SLOPE, KeysValues, Layer, gelu
from dalle.prior.config import PriorConfig
from dalle_ext._switch import reference_in_use
from dalle_ext.ops.decode_attention import CODED_KINDS
from dalle_ext.reference.decode_attention import decode_capacity

WEIGHTS = ("fp32", "bf16")
ROWS = 16  # products of a multiple of so many rows give each row the same bits (docs/sampling.md)


Multiply = Callable[[Tensor], Tensor]
"""x (R, n) -> (R, m): `Product`, `PackedProduct`."""


class SupportsDecoding(Protocol):
    """What drawing needs of a `Prior`, which calls it."""

    training: bool
    patterns: tuple[dalle_ext.AttentionPattern, ...]
    layers: nn.ModuleList
    norm: nn.LayerNorm
    start_of_text: nn.Parameter
    start_of_image: nn.Parameter
    image_embedding: nn.Embedding
    image_head: nn.Linear

    @property
    def config(self) -> PriorConfig: ...
    @property
    def image_widen(self) -> nn.Module: ...
    @property
    def image_narrow(self) -> nn.Module: ...
    def embed_text(self, text: Tensor) -> Tensor: ...
    def embed_image(self, image_tokens: Tensor) -> Tensor: ...
    def image_positions(self) -> Tensor: ...
    def run_layers(
        self, x: Tensor, patterns: tuple[dalle_ext.AttentionPattern, ...]
    ) -> tuple[Tensor, list[KeysValues]]: ...
    def check_text(self, text: Tensor) -> None: ...
    def check_image_tokens(self, tokens: Tensor, length: int, batch: int) -> None: ...
    def eval(self) -> Self: ...
    def train(self, mode: bool = True) -> Self: ...


class Product:
    """add + act(norm(x) W^T + b) in PyTorch, the matrix in the dtype in which the layer computes.

    Rows are padded to a multiple of `rows`, so that a row's bits do not depend on how many there
    are. fp16 on the CPU is multiplied in fp32 and rounded once, as in `dalle.precision.linear`.

    Args:
        layer: W and b.
        dtype: of the product.
        rows: see above.
        norm: of the rows; None leaves it out.
        act: `gelu` of the blocks follows.
    """

    def __init__(
        self,
        layer: nn.Linear,
        dtype: torch.dtype,
        rows: int,
        norm: nn.LayerNorm | None = None,
        act: bool = False,
    ) -> None:
        self.dtype, self.rows, self.norm, self.act = dtype, rows, norm, act
        wide = dtype == torch.float16 and layer.weight.device.type == "cpu"
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.weight, self.bias = layer.weight.detach().to(dtype), bias
        if wide:
            self.weight = self.weight.float()
            self.bias = None if layer.bias is None else layer.bias.detach().float()

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        count = len(x)
        x = (x if self.norm is None else self.norm(x)).to(self.dtype)
        x = F.pad(x, (0, 0, 0, -count % self.rows)).to(self.weight.dtype)
        y = F.linear(x, self.weight, self.bias)[:count].to(self.dtype)
        y = gelu(y) if self.act else y
        return y if add is None else add + y.to(add.dtype)


class PackedProduct:
    """norm(x) W^T + b in fp32 by `dalle_ext.PackedLinear`: rows never depend on each other."""

    def __init__(self, layer: nn.Linear, norm: nn.LayerNorm | None = None) -> None:
        self.packed = dalle_ext.PackedLinear(layer.weight, layer.bias, dtype=torch.float32)
        self.norm = None if norm is None else norm_of(norm)

    def __call__(self, x: Tensor) -> Tensor:
        return self.packed(x, norm=self.norm)


def norm_of(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach(), norm.bias.detach(), norm.eps


def products(layer: Layer, dtype: torch.dtype, rows: int) -> list[Product]:
    """The four of a layer, for `EagerLayers`."""
    attention, mlp = layer.attention, layer.mlp
    return [
        Product(attention.qkv, dtype, rows, norm=attention.norm),
        Product(attention.out, dtype, rows),
        Product(mlp.wide_in, dtype, rows, norm=mlp.norm, act=True),
        Product(mlp.wide_out, dtype, rows),
    ]


def packed_layer(
    layer: Layer, cache: dalle_ext.DecodeCache, dtype: torch.dtype
) -> dalle_ext.DecodeLayer:
    """The same for `dalle_ext.DecodeLayers`."""
    attention, mlp = layer.attention, layer.mlp

    def pack(part: nn.Linear) -> dalle_ext.PackedLinear:
        return dalle_ext.PackedLinear(part.weight, part.bias, dtype=dtype)

    return dalle_ext.DecodeLayer(
        qkv=pack(attention.qkv),
        out=pack(attention.out),
        wide_in=pack(mlp.wide_in),
        wide_out=pack(mlp.wide_out),
        norms=(norm_of(attention.norm), norm_of(mlp.norm)),
        cache=cache,
    )


def layer_bits(pattern: dalle_ext.AttentionPattern, bits: int | None) -> int | None:
    """`cache_bits` of a layer: patterns that keep few slots keep them as they are."""
    return bits if pattern.kind in CODED_KINDS else None


def candidate_bytes(config: PriorConfig, guided: bool, bits: int | None = None) -> int:
    """Bytes of the cache for one candidate; with guidance of both branches."""
    size = torch.empty((), dtype=config.compute_dtype, device="cpu").element_size()
    plain, coded = config.d_model * size, config.d_model + 4 * config.num_heads  # bytes a slot
    total = sum(
        decode_capacity(pattern) * (plain if layer_bits(pattern, bits) is None else coded)
        for pattern in config.patterns()
    )
    return (1 + guided) * 2 * total


def fitting(prior: SupportsDecoding, limit: int, guided: bool, bits: int | None = None) -> int:
    """The most images, up to `limit`, whose cache fits the free memory; 0 where not even one does.

    Fewer than `limit` are a power of two.
    """
    free = free_memory(prior.start_of_text.device)
    each = candidate_bytes(prior.config, guided, bits)
    if free is None or limit * each <= free:
        return limit
    count = free // each
    return 1 << count.bit_length() - 1 if count else 0


def require_cache(
    prior: SupportsDecoding, count: int, guided: bool, bits: int | None = None
) -> None:
    """Raises EnvironmentProblem where the cache of so many images at a time cannot fit."""
    fits = fitting(prior, count, guided, bits)
    if fits < count:
        advice = f"max_batch {fits} would fit" if fits else "take a smaller model"
        device = prior.start_of_text.device
        needed = count * candidate_bytes(prior.config, guided, bits)
        require_memory("generate", needed, f"{count} candidates at a time", advice, device)


def check_weights(weights: str, device: torch.device) -> None:
    """Raises unless `weights` is of `WEIGHTS` and, where it is bf16, a gain on `device`.

    Raises:
        UsageError: another word.
        EnvironmentProblem: no bf16 dot products here.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"Decoder: weights must be {' or '.join(WEIGHTS)}, got {weights!r}")
    isa = dalle_ext.build_info()["cpu_isa"]
    if weights == "bf16" and (device.type != "cpu" or isa != "v4_bf16"):
        got = f"a CPU of level {isa}" if device.type == "cpu" else device
        raise EnvironmentProblem(
            f"Decoder: weights bf16 must have a CPU with bf16 dot products (avx512_bf16), got {got}"
        )


class EagerLayers:
    """All layers for one slot by `Product` and `decode_attention`: what a GPU's graph captures.

    Args:
        dtype: of the caches.
    """

    def __init__(
        self, parts: list[list[Product]], caches: list[dalle_ext.DecodeCache], dtype: torch.dtype
    ) -> None:
        self.layers, self.dtype = list(zip(parts, caches, strict=True)), dtype

    def __call__(self, x: Tensor, slot: Tensor) -> Tensor:
        """(R, d) -> (R, d), as `dalle_ext.DecodeLayers`."""
        for (qkv, out, wide_in, wide_out), cache in self.layers:
            batch, samples, heads = cache.image_keys.shape[:3]
            packed = qkv(x).view(batch, samples, 3, heads, -1)
            packed = packed if packed.dtype == self.dtype else packed.to(self.dtype)
            q, k, v = packed.unbind(2)
            attended = dalle_ext.decode_attention(q, k, v, cache, slot)
            x = out(attended.view(len(x), -1), x)
            x = wide_out(wide_in(x), x)
        return x


class Step:
    """All layers for one slot of R rows, with the cache of every layer.

    On the CPU all layers are one call. On a GPU a step is one captured graph, replayed.

    Args:
        prior: in evaluation mode.
        batch: B.
        samples: S.
        rows: products are made of a multiple of so many rows, where the device's library gives a
            row other bits among other numbers of them.
        weights: "fp32" as stored, "bf16" rounds the matrices and what they multiply.
        bits: of the cache, `SamplingConfig.cache_bits`.

    Raises:
        UsageError: weights is neither.
        EnvironmentProblem: no bf16 dot products here.
    """

    def __init__(
        self,
        prior: SupportsDecoding,
        batch: int,
        samples: int,
        rows: int = ROWS,
        weights: str = "fp32",
        bits: int | None = None,
    ) -> None:
        c = prior.config
        self.batch, self.samples, self.dtype = batch, samples, c.compute_dtype
        # One row more than there are tokens: what stands before the first.
        start = prior.start_of_image.detach()[None]
        with without_autocast(start):
            self.tokens = torch.cat([prior.image_widen(prior.image_embedding.weight), start])
        self.positions = prior.image_positions()
        device = self.tokens.device
        check_weights(weights, device)
        packed = device.type == "cpu" and not reference_in_use() and self.dtype != torch.float16
        sizes = batch, c.num_heads, c.text_len, c.d_model // c.num_heads
        text = torch.zeros(sizes, dtype=self.dtype, device=device)
        self.caches = [
            dalle_ext.DecodeCache(p, text, text, samples, bits=layer_bits(p, bits))
            for p in prior.patterns
        ]
        matrix = torch.bfloat16 if weights == "bf16" else self.dtype
        layers = [layer for layer in prior.layers if isinstance(layer, Layer)]
        self.layers: Callable[[Tensor, Tensor], Tensor]
        if packed:
            both = zip(layers, self.caches, strict=True)
            stack = [packed_layer(layer, cache, matrix) for layer, cache in both]
            self.layers = dalle_ext.DecodeLayers(stack, slope=GELU_SLOPE)
        else:
            parts = [products(layer, matrix, rows) for layer in layers]
            self.layers = EagerLayers(parts, self.caches, self.dtype)

        def product(layer: nn.Linear, norm: nn.LayerNorm | None) -> Multiply:
            if packed:
                return PackedProduct(layer, norm)
            return Product(layer, torch.float32, rows, norm)

        narrow, norm = prior.image_narrow, prior.norm
        self.head = []
        if isinstance(narrow, nn.Linear):
            self.head.append(product(narrow, norm))
        self.head.append(product(prior.image_head, None if self.head else norm))
        self.slots = torch.arange(c.num_image_tokens, dtype=torch.int64, device=device)
        self.slot = self.slots[0].clone()
        self.previous = torch.full(
            (batch, samples), c.image_vocab, dtype=torch.int64, device=device
        )
        self._replay: Callable[[], Tensor] | None = None
        self._capture = device.type == "cuda"

    @property
    def num_bytes(self) -> int:
        """Bytes of the image keys and values."""
        return sum(cache.num_bytes for cache in self.caches)

    def fill(self, read: list[list[KeysValues]], given: int) -> None:
        """Takes what `prefill` read for each of B captions, the last `given` keys of the image."""
        for index, cache in enumerate(self.caches):
            keys, values = (
                torch.cat(states) for states in zip(*(r[index] for r in read), strict=True)
            )
            length = keys.shape[2] - given
            cache.set_text(keys[:, :, :length], values[:, :, :length])
            if given:
                cache.fill(keys[:, :, length:], values[:, :, length:])

    def reorder(self, index: Tensor) -> None:
        """Sample s of caption b becomes a copy of sample index[b, s]; index (B, S)."""
        for cache in self.caches:
            cache.reorder(index)

    @torch.inference_mode()
    def __call__(self, slot: int, previous: Tensor | None) -> Tensor:
        """(B', S) tokens of the slot before, B' a divisor of B -> logits (B, S, K) fp32."""
        if previous is not None:
            self.previous.view(-1, *previous.shape).copy_(previous)
        else:
            self.previous.fill_(len(self.tokens) - 1)
        self.slot.copy_(self.slots[slot])
        if self._capture and self._replay is None:
            self._capture = False
            self._replay = captured(self._run)
        return self._run() if self._replay is None else self._replay()

    def _run(self) -> Tensor:
        """A step of what stands in the buffers `previous` and `slot`; reads neither on the host."""
        x = torch.index_select(self.tokens, 0, self.previous.view(-1))
        x += torch.index_select(self.positions, 0, self.slot.view(1))
        with without_autocast(x):  # products compute in dtypes of their own
            x = self.layers(x, self.slot)
            for part in self.head:
                x = part(x)
        return x.view(self.batch, self.samples, -1)


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
    """`run` as a CUDA graph to replay; None, said once, where it cannot be captured.

    It runs once before, on a stream of its own: libraries allocate at their first call.
    """
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
    except RuntimeError as error:
        warnings.warn(
            f"Decoder: steps run one kernel at a time, the graph was refused: {error}", stacklevel=2
        )
        return None

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
