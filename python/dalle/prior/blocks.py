"""Residual blocks of the prior, and which attention pattern each layer has (paper B.1).

Letters: B batch, T positions of the stream, d width, H heads, D = d / H, L layers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dalle_ext
from dalle.precision import BlockEnds, linear

if TYPE_CHECKING:
    from dalle.prior.config import PriorConfig

GELU_SLOPE = 1.702


class KeysValues(NamedTuple):
    """Keys and values of one attention call, each (B, H, T, D)."""

    keys: Tensor
    values: Tensor


def gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), in the form that keeps one tensor for the backward pass."""
    return F.silu(x * GELU_SLOPE) * (1 / GELU_SLOPE)


def make_linear(fan_in: int, fan_out: int, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with its weight in `dtype` and an fp32 bias (paper appendix D)."""
    layer = nn.Linear(fan_in, fan_out, dtype=torch.float32)
    layer.weight.data = layer.weight.data.to(dtype)
    return layer


class Resblock(nn.Module):
    """What both residual blocks share: the norm, and the dtypes at their ends.

    The identity path and the norm are fp32, what stands between them is `dtype` (paper Fig. 4).

    Attributes:
        ends: set by a training that scales this block's gradients (`ResblockScaler`).
    """

    def __init__(self, d_model: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.dropout, self.dtype = dropout, dtype
        self.norm = nn.LayerNorm(d_model, dtype=torch.float32)
        self.ends: BlockEnds | None = None

    def compute_in_(self, dtype: torch.dtype) -> None:
        """Computes in `dtype` from now on, with the matrices stored in it."""
        self.dtype = dtype
        for part in self.children():
            if isinstance(part, nn.Linear):
                part.weight.data = part.weight.data.to(dtype)

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, d) -> the identity path and what the norm reads."""
        return (x, x) if self.ends is None else self.ends.enter(x)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Identity path x plus the branch's output y, both (B, T, d)."""
        y = F.dropout(y, self.dropout, self.training)
        return x + (y.to(x.dtype) if self.ends is None else self.ends.leave(y))


class AttentionBlock(Resblock):
    """x + out(sparse_attention(qkv(norm(x)))): the first resblock of a layer."""

    def __init__(self, c: PriorConfig) -> None:
        super().__init__(c.d_model, c.dropout, c.compute_dtype)
        self.num_heads = c.num_heads
        self.qkv = make_linear(c.d_model, 3 * c.d_model, c.weight_dtype)
        self.out = make_linear(c.d_model, c.d_model, c.weight_dtype)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, d) -> queries, keys, values (B, H, T, D): views of one packed projection."""
        queries, keys, values = self.project_packed(x).permute(2, 0, 3, 1, 4).unbind(0)
        return queries, keys, values

    def project_packed(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, 3, H, D)."""
        batch, length, width = x.shape
        packed = linear(self.norm(x).to(self.dtype), self.qkv)
        return packed.view(batch, length, 3, self.num_heads, width // self.num_heads)

    def merge(self, x: Tensor, attended: Tensor) -> Tensor:
        """Adds the attended values (B, H, T, D) to the identity path x (B, T, d)."""
        return self.leave(x, linear(attended.transpose(1, 2).reshape(x.shape), self.out))

    def forward(self, x: Tensor, pattern: dalle_ext.AttentionPattern) -> tuple[Tensor, KeysValues]:
        """(B, T, d) -> (B, T, d), and the keys and values for a cache."""
        x, branch = self.enter(x)
        qkv = self.project_packed(branch)
        attended = dalle_ext.sparse_attention_qkvpacked(qkv, pattern)
        _, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.merge(x, attended), KeysValues(keys, values)


class MlpBlock(Resblock):
    """x + wide_out(gelu(wide_in(norm(x)))), four times as wide inside: the second resblock."""

    def __init__(self, c: PriorConfig) -> None:
        super().__init__(c.d_model, c.dropout, c.compute_dtype)
        self.wide_in = make_linear(c.d_model, 4 * c.d_model, c.weight_dtype)
        self.wide_out = make_linear(4 * c.d_model, c.d_model, c.weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        x, branch = self.enter(x)
        hidden = gelu(linear(self.norm(branch).to(self.dtype), self.wide_in))
        return self.leave(x, linear(hidden, self.wide_out))


class Layer(nn.Module):
    """One layer: an attention resblock and an MLP resblock."""

    def __init__(self, c: PriorConfig) -> None:
        super().__init__()
        self.attention = AttentionBlock(c)
        self.mlp = MlpBlock(c)

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
