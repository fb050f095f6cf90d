"""The raw ops of `gumbel_softmax`: fake kernels and gradient. `ops/gumbel_softmax.py` calls them.

They take contiguous logits and tau (float64) and seed (int64) as 0-d tensors on their device.
"""

from __future__ import annotations

from typing import Any

import torch

from dalle_ext import _native

Tensor = torch.Tensor


def _forward_fake(
    logits: Tensor, tau: Tensor, seed: Tensor, dim: int, hard: bool, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (*logits.shape[:dim], *logits.shape[dim + 1 :])
    return (
        logits.new_empty(logits.shape),
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty((4, *rows), dtype=torch.float32),
    )


def _backward_fake(
    grad_sample: Tensor | None, grad_kl: Tensor | None, logits: Tensor, *rest: object
) -> Tensor:
    return logits.new_empty(logits.shape)


def _words_fake(seed: Tensor, count: int) -> Tensor:
    return seed.new_empty((count,), dtype=torch.int32)


if _native.CPU_PROBLEM is None:
    _forward = _native.register("_gumbel_softmax_forward", _forward_fake, differentiable=True)
    _backward = _native.register("_gumbel_softmax_backward", _backward_fake)
    _native.register("_gumbel_softmax_words", _words_fake)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tau: Tensor, seed: Tensor, dim: int, hard: bool, first_row: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        sample, index, kl, stats = _forward(logits, tau, seed, dim, hard, first_row)
        ctx.save_for_backward(logits, tau, seed, kl, stats)
        ctx.dim, ctx.first_row = dim, first_row
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return sample, index, kl

    @staticmethod
    def backward(
        ctx: Any, grad_sample: Tensor | None, grad_index: None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_sample is None and grad_kl is None:
            return None, None, None, None, None, None
        given = [x for x in (grad_sample, grad_kl) if x is not None]
        with torch.no_grad():
            grad_sample = None if grad_sample is None else grad_sample.contiguous()
            grad_kl = None if grad_kl is None else grad_kl.contiguous()
            grad = _backward(grad_sample, grad_kl, *ctx.saved_tensors, ctx.dim, ctx.first_row)
        if torch.is_grad_enabled():  # create_graph
            grad = _native.Once.apply(grad, ctx.saved_tensors[0], *given)
        return grad, None, None, None, None, None


def gumbel_softmax(
    logits: Tensor, tau: Tensor, seed: Tensor, dim: int, hard: bool, first_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """sample, index and kl of contiguous logits over axis `dim` >= 0."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Function.apply(logits, tau, seed, dim, hard, first_row)
    return _forward(logits, tau, seed, dim, hard, first_row)[:3]
