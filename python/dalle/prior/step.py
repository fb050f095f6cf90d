"""One step of drawing: all layers for one image slot of every row (paper 2.6).

Letters: B captions (with guidance both branches), S samples of each, R = B * S rows, H heads, D
head size, d width, N image slots, K image vocabulary.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dalle_ext
from dalle.prior.blocks import AttentionBlock, KeysValues, Layer, MlpBlock, gelu
from dalle.prior.config import PriorConfig
from dalle_ext.reference.decode_attention import decode_capacity

ROWS = 16  # products of a multiple of so many rows give each row the same bits (docs/sampling.md)


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
    """y = x W^T + b with the weight in the dtype in which the layer computes.

    Rows are padded to a multiple of `ROWS`, so that a row's bits do not depend on how many there
    are. fp16 on the CPU is multiplied in fp32 and rounded once, as in `dalle.precision.linear`.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.dtype = dtype
        wide = dtype == torch.float16 and layer.weight.device.type == "cpu"
        self.weight = layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        if wide:
            self.weight = self.weight.float()
            self.bias = None if layer.bias is None else layer.bias.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        y = F.linear(padded(x).to(self.weight.dtype), self.weight, self.bias)
        return y[:rows].to(self.dtype)


def padded(x: Tensor) -> Tensor:
    """Rows of zeros after those of x (R, n), to a multiple of `ROWS`."""
    missing = -len(x) % ROWS
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def candidate_bytes(config: PriorConfig, guided: bool) -> int:
    """Bytes of the cache for one candidate; with guidance of both branches."""
    size = torch.empty((), dtype=config.compute_dtype, device="cpu").element_size()
    slots = sum(decode_capacity(pattern) for pattern in config.patterns())
    return (1 + guided) * 2 * slots * config.d_model * size


class Step:
    """All layers for one slot of R rows, with the cache of every layer.

    Args:
        prior: in evaluation mode.
        batch: B.
        samples: S.
    """

    def __init__(self, prior: SupportsDecoding, batch: int, samples: int) -> None:
        c = prior.config
        self.batch, self.samples, self.dtype = batch, samples, c.compute_dtype
        self.norm = prior.norm
        # One row more than there are tokens: what stands before the first.
        start = prior.start_of_image.detach()[None]
        self.tokens = torch.cat([prior.image_widen(prior.image_embedding.weight), start])
        self.positions = prior.image_positions()
        self.head = Product(prior.image_head, torch.float32)
        narrow = prior.image_narrow
        self.narrow = Product(narrow, torch.float32) if isinstance(narrow, nn.Linear) else None
        device = self.tokens.device
        sizes = batch, c.num_heads, c.text_len, c.d_model // c.num_heads
        self.layers: list[
            tuple[AttentionBlock, MlpBlock, list[Product], dalle_ext.DecodeCache]
        ] = []
        for layer, pattern in zip(prior.layers, prior.patterns, strict=True):
            assert isinstance(layer, Layer)
            attention, mlp = layer.attention, layer.mlp
            parts = (attention.qkv, attention.out, mlp.wide_in, mlp.wide_out)
            text = torch.zeros(sizes, dtype=self.dtype, device=device)
            cache = dalle_ext.DecodeCache(pattern, text, text, samples)
            self.layers.append((attention, mlp, [Product(p, self.dtype) for p in parts], cache))
        self.slots = torch.arange(c.num_image_tokens, dtype=torch.int64, device=device)
        self.previous = torch.full(
            (batch, samples), c.image_vocab, dtype=torch.int64, device=device
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the image keys and values."""
        return sum(cache.num_bytes for *_, cache in self.layers)

    def fill(self, read: list[list[KeysValues]], given: int) -> None:
        """Takes what `prefill` read for each of B captions, the last `given` keys of the image."""
        for index, (*_, cache) in enumerate(self.layers):
            keys, values = (
                torch.cat(states) for states in zip(*(r[index] for r in read), strict=True)
            )
            length = keys.shape[2] - given
            cache.set_text(keys[:, :, :length], values[:, :, :length])
            if given:
                cache.fill(keys[:, :, length:], values[:, :, length:])

    def reorder(self, index: Tensor) -> None:
        """Sample s of caption b becomes a copy of sample index[b, s]; index (B, S)."""
        for *_, cache in self.layers:
            cache.reorder(index)

    @torch.inference_mode()
    def __call__(self, slot: int, previous: Tensor | None) -> Tensor:
        """(B', S) tokens of the slot before, B' a divisor of B -> logits (B, S, K) fp32."""
        if previous is not None:
            self.previous.view(-1, *previous.shape).copy_(previous)
        else:
            self.previous.fill_(len(self.tokens) - 1)
        x = self.tokens[self.previous.flatten()] + self.positions[slot]
        for attention, mlp, (qkv, out, wide_in, wide_out), cache in self.layers:
            packed = qkv(attention.norm(x).to(self.dtype))
            packed = packed.view(self.batch, self.samples, 3, attention.num_heads, -1)
            q, k, v = packed.unbind(2)
            attended = dalle_ext.decode_attention(q, k, v, cache, self.slots[slot])
            x = x + out(attended.reshape(len(x), -1))
            x = x + wide_out(gelu(wide_in(mlp.norm(x).to(self.dtype))))
        x = self.norm(x)
        if self.narrow is not None:
            x = self.narrow(x)
        return self.head(x).view(self.batch, self.samples, -1)
