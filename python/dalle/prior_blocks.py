"""Residual blocks of the prior, and which attention pattern each layer has (paper B.1).

Letters: B batch, T positions of the stream, d width, H heads, D = d / H, L layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dalle_ext

GELU_SLOPE = 1.702


class KeysValues(NamedTuple):
    """Keys and values of one attention call, each (B, H, T, D)."""

    keys: Tensor
    values: Tensor


def layer_kinds(num_layers: int) -> tuple[str, ...]:
    """The pattern of each layer: column where (i - 2) mod 4 = 0, row elsewhere, conv in the last.

    Layers count from 1. Equivalent to the paper's 64: row, column, row, row, ..., conv.
    """
    kinds = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, num_layers + 1)]
    return (*kinds[:-1], "conv")


def gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), in the form that keeps one tensor for the backward pass."""
    return F.silu(x * GELU_SLOPE) * (1 / GELU_SLOPE)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer` in x's dtype; the parameters stay as they are stored."""
    if layer.weight.dtype == x.dtype:
        return layer(x)
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class AttentionBlock(nn.Module):
    """x + out(sparse_attention(qkv(norm(x)))): the first resblock of a layer.

    The identity path and the norm are fp32, what stands between them is `dtype` (paper Fig. 4).
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.dtype = num_heads, dropout, dtype
        self.norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, d) -> queries, keys, values (B, H, T, D): views of one packed projection."""
        batch, length, width = x.shape
        packed = linear(self.norm(x).to(self.dtype), self.qkv)
        heads = packed.view(batch, length, 3, self.num_heads, width // self.num_heads)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return queries, keys, values

    def merge(self, x: Tensor, attended: Tensor) -> Tensor:
        """Adds the attended values (B, H, T, D) to the identity path x (B, T, d)."""
        y = linear(attended.transpose(1, 2).reshape(x.shape), self.out)
        return x + F.dropout(y, self.dropout, self.training).to(x.dtype)

    def forward(self, x: Tensor, pattern: dalle_ext.AttentionPattern) -> tuple[Tensor, KeysValues]:
        """(B, T, d) -> (B, T, d), and the keys and values for a cache."""
        queries, keys, values = self.project(x)
        attended = dalle_ext.sparse_attention(queries, keys, values, pattern)
        return self.merge(x, attended), KeysValues(keys, values)


class MlpBlock(nn.Module):
    """x + wide_out(gelu(wide_in(norm(x)))), four times as wide inside: the second resblock."""

    def __init__(self, d_model: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.dropout, self.dtype = dropout, dtype
        self.norm = nn.LayerNorm(d_model)
        self.wide_in = nn.Linear(d_model, 4 * d_model)
        self.wide_out = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        hidden = gelu(linear(self.norm(x).to(self.dtype), self.wide_in))
        y = linear(hidden, self.wide_out)
        return x + F.dropout(y, self.dropout, self.training).to(x.dtype)


class Layer(nn.Module):
    """One layer: an attention resblock and an MLP resblock."""

    def __init__(self, d_model: int, num_heads: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = AttentionBlock(d_model, num_heads, dropout, dtype)
        self.mlp = MlpBlock(d_model, dropout, dtype)

    def forward(self, x: Tensor, pattern: dalle_ext.AttentionPattern) -> tuple[Tensor, KeysValues]:
        x, cached = self.attention(x, pattern)
        return self.mlp(x), cached

    def init_weights(self, num_layers: int, gain: float) -> None:
        """Weights N(0, gain / sqrt(fan_in)), biases 0, the two outputs times 1 / sqrt(2 L)."""
        attention, mlp = self.attention, self.mlp
        for part in (attention.qkv, attention.out, mlp.wide_in, mlp.wide_out):
            std = gain / math.sqrt(part.in_features)
            if part is attention.out or part is mlp.wide_out:
                std /= math.sqrt(2 * num_layers)
            nn.init.normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)
