"""The definition of a stack of decoding layers, made of those of its two ops."""

from __future__ import annotations

import math
from typing import Any

import torch

from dalle_ext.reference.decode_attention import decode_attention
from dalle_ext.reference.packed_linear import packed_linear


def decode_layers(x: torch.Tensor, slot: torch.Tensor, layers: Any, slope: float) -> torch.Tensor:
    """(R, d) -> (R, d); `layers` are `dalle_ext.DecodeLayer`s, whose caches are written."""

    def product(layer: Any, x: torch.Tensor, norm: Any, slope: float, add: Any) -> torch.Tensor:
        options = (layer.outputs, layer.bias, *norm, slope, add)
        return packed_linear(x, layer.weight, *options)

    slots, at = math.prod(layers[0].cache.pattern.grid), int(slot)
    if not 0 <= at < slots:
        raise RuntimeError(f"DecodeLayers: slot must be from 0 to {slots - 1}, got {at}")
    none = (None, None, 0.0)
    for layer in layers:
        batch, samples, heads, _, size = layer.cache.image_keys.shape
        qkv = product(layer.qkv, x, layer.norms[0], 0.0, None)
        packed = qkv.view(batch, samples, 3, heads, size).to(layer.cache.text_keys.dtype)
        q, k, v = packed.unbind(2)
        attended = decode_attention(q, k, v, layer.cache, slot).reshape(len(x), heads * size)
        x = product(layer.out, attended.float(), none, 0.0, x)
        hidden = product(layer.wide_in, x, layer.norms[1], slope, None)
        x = product(layer.wide_out, hidden, none, 0.0, x)
    return x
