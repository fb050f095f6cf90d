"""The definition of gradient scaling at the two ends of a residual block (paper Figure 4)."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def scale_gradient(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """grad * scale in `dtype`, what is not finite as zero; (4,) int64 counts.

    Counted are finite elements that overflow, that vanish, that become subnormal, and elements
    that were not finite.
    """
    wide, finite = grad.float(), grad.isfinite()
    out = (wide * scale).to(dtype)
    fits = out.isfinite()
    out = torch.where(finite & fits, out, torch.zeros_like(out))
    size = out.abs().double()
    flushed = finite & fits & (wide != 0) & (size == 0)
    subnormal = finite & fits & (size > 0) & (size < torch.finfo(dtype).tiny)
    found = [(finite & ~fits), flushed, subnormal, ~finite]
    return out, torch.stack([mask.sum() for mask in found])


def unscale_gradient(stream: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    """stream + grad / scale, quotients that are not finite as zero."""
    quotient = grad.float() / scale
    return stream + torch.where(quotient.isfinite(), quotient, torch.zeros_like(quotient))
