"""The definition of gradient scaling: the two ends of a residual block (paper Figure 4), unscaling
by group, and the scales' rule (2.4 and appendix D)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor


def scale_gradient(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """grad * scale in `dtype`, what is not finite as zero; (4,) int64 counts.

    Counted are finite elements that overflow, that become zero, that become subnormal, and
    elements that were not finite.
    """
    value, finite = grad.float(), grad.isfinite()
    out = (value * scale).to(dtype)
    fits = out.isfinite()
    out = torch.where(finite & fits, out, torch.zeros_like(out))
    size = out.abs().double()
    flushed = finite & fits & (value != 0) & (size == 0)
    subnormal = finite & fits & (size > 0) & (size < torch.finfo(dtype).tiny)
    masks = [(finite & ~fits), flushed, subnormal, ~finite]
    return out, torch.stack([mask.sum() for mask in masks])


def unscale_gradient(stream: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    """stream + grad / scale, quotients that are not finite as zero."""
    quotient = grad.float() / scale
    return stream + torch.where(quotient.isfinite(), quotient, torch.zeros_like(quotient))


def unscale_gradients_(
    grads: Sequence[Tensor], scales: Tensor, groups: Sequence[int], check_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Divides each gradient by its group's scale in place (unless `check_only`) and counts.

    Returns:
        (G, 4) int64: not finite, zero, subnormal, not zero but zero after the division; (G,)
        float64 sums of squares and (G,) float32 largest magnitudes of the finite quotients.
    """
    counts = torch.zeros(len(scales), 4, dtype=torch.int64, device=scales.device)
    squares = torch.zeros(len(scales), dtype=torch.float64, device=scales.device)
    max_abs = torch.zeros(len(scales), dtype=torch.float32, device=scales.device)
    for grad, group in zip(grads, groups, strict=True):
        size, finite = grad.double().abs(), grad.isfinite()
        quotient = (grad.float() / scales[group]).to(grad.dtype)
        subnormal = (size > 0) & (size < torch.finfo(grad.dtype).tiny)
        underflowed = (size > 0) & (quotient == 0)
        masks = [~finite, size == 0, subnormal, underflowed]
        counts[group] += torch.stack([mask.sum() for mask in masks])
        kept = torch.where(finite, size, torch.zeros_like(size))
        squares[group] += (kept / scales[group].double()).square().sum()
        if grad.numel():
            max_abs[group] = torch.maximum(max_abs[group], kept.max().float() / scales[group])
        if not check_only:
            grad.copy_(quotient)
    return counts, squares, max_abs


def update_scales_(
    scales: Tensor,
    since_drop: Tensor,
    nonfinite: Tensor,
    growth: float,
    backoff: float,
    window: int,
    low: float,
    high: float,
    grow_on_skip: bool,
) -> None:
    """Clean scales grow, others fall at most once in `window` updates; in place."""
    since, bad = since_drop + 1, nonfinite != 0
    falls = bad & (since >= window)
    grows = ~bad if grow_on_skip else ~bad & ~bad.any()
    factor = torch.where(falls, backoff, torch.where(grows, growth, 1.0)).to(scales)
    scales.mul_(factor).clamp_(low, high)
    since_drop.copy_(torch.where(falls, 0, since.clamp(max=window)))
