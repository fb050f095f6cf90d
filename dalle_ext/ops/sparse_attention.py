"""Attention that skips what the pattern masks: public function, fake kernels, gradient.

Letters: B batch, H heads, T positions, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dalle_ext import _native
from dalle_ext._checks import numbers_only, real
from dalle_ext._switch import reference_in_use
from dalle_ext.ops.sparse_attention_pattern import AttentionPattern
from dalle_ext.reference import sparse_attention as reference

Tensor = torch.Tensor


def _like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape, in memory (B, T, H, D) where x has heads inside positions."""
    if x.stride(1) < x.stride(2):
        return x.new_empty(x.size(0), x.size(2), x.size(1), x.size(3)).transpose(1, 2)
    return x.new_empty(x.size(0), x.size(1), x.size(2), x.size(3))


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    text_len: int,
    rows: int,
    columns: int,
    runs: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.size(0), q.size(1), q.size(2), dtype=torch.float64)


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


if _native.CPU_PROBLEM is None:
    _forward = _native.register("_sparse_attention_forward", _forward_fake, differentiable=True)
    _backward = _native.register("_sparse_attention_backward", _backward_fake)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rule: Any) -> Tensor:
        out, lse = _forward(q, k, v, *rule)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _backward(_rows(grad_out), *ctx.saved_tensors, *ctx.rule)
        grads: tuple[Tensor, ...] = found
        if torch.is_grad_enabled():  # create_graph
            grads = tuple(_native.once(g, grad_out, *ctx.saved_tensors[:3]) for g in found)
        return (*grads, *(None for _ in ctx.rule))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _number(scale: Any) -> float:
    numbers_only("sparse_attention", scale=scale)
    found = real(scale)
    if not math.isfinite(found):
        raise ValueError(f"sparse_attention: scale must be a finite number, got {scale!r}")
    return found


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, scale: float | None = None
) -> Tensor:
    """Attention over the keys that `pattern` lets each query see (paper, section 2.2, Figure 11).

    Equivalent to::

        scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~pattern.mask(), -inf)
        return scores.softmax(-1) @ v

    Args:
        q, k, v: (B, H, T, D) of one dtype (float32, float64, float16, bfloat16) and device, D from
            1 to 256, T = pattern.length. Any strides; only a D that is not contiguous is copied.
            16-bit inputs accumulate in float32.
        pattern: which keys each query sees.
        scale: factor on q k^T, a finite number; 1 / sqrt(D) if left out.

    Returns:
        (B, H, T, D) in q's dtype; in memory (B, T, H, D) where q is stored so, so that the heads
        merge without a copy, otherwise contiguous. Differentiable once in q, k, v, in reverse mode.

    Raises:
        TypeError: pattern is not an AttentionPattern, or scale is a tensor that wants a gradient.
        ValueError: q is not (B, H, T, D) with T = pattern.length, scale is not a finite number, or
            devices differ.
        NotImplementedError: forward-mode tangents (`torch.func.jvp`, `jacfwd`).
        RuntimeError: other shapes or dtypes; no native library for q's device.
    """
    if not isinstance(pattern, AttentionPattern):
        name = type(pattern).__name__
        raise TypeError(f"sparse_attention: pattern must be an AttentionPattern, got {name}")
    if q.dim() != 4 or q.size(2) != pattern.length:
        want, got = f"(B, H, T = {pattern.length}, D) for {pattern}", tuple(q.shape)
        raise ValueError(f"sparse_attention: q must be {want}, got {got}")
    if not q.device == k.device == v.device:
        where = f"{q.device}, {k.device}, {v.device}"
        raise ValueError(f"sparse_attention: q, k, v must be on one device, got {where}")
    factor = 1.0 / math.sqrt(max(1, q.size(3))) if scale is None else _number(scale)
    if reference_in_use():
        return reference.sparse_attention(q, k, v, pattern, factor)
    _native.require("sparse_attention", q.device)
    rule = (pattern.kind, pattern.text_len, *pattern.grid, pattern.runs, factor)
    q, k, v = _rows(q), _rows(k), _rows(v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = _Function.apply(q, k, v, *rule)  # type: ignore[no-untyped-call]  # of torch
        return out
    return _forward(q, k, v, *rule)[0]
