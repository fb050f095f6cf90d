"""The definition of PowerSGD's products with error buffers in 1-6-9 (paper, appendix E.2)."""

from __future__ import annotations

import torch

from . import without_autocast
from .formats import decode, encode

Tensor = torch.Tensor


def compress_(
    error: Tensor,
    grad: Tensor,
    q: Tensor,
    scale: Tensor | None,
    error_scale: float,
    skip: Tensor | None,
    fast: bool = False,
) -> Tensor:
    """E += grad / scale where not `skip`; returns P = E Q of the E that is kept."""
    if skip is None or not skip:
        factor = torch.tensor(error_scale, device=grad.device, dtype=torch.float32)
        if scale is not None:
            factor = factor / scale
        error.copy_(encode(decode(error, "1-6-9") + grad.float() * factor, "1-6-9"))
    return _product(decode(error, "1-6-9"), q, fast) / error_scale


def project(error: Tensor, p: Tensor, error_scale: float, fast: bool = False) -> Tensor:
    """Q = E^T P."""
    return _product(decode(error, "1-6-9").t(), p, fast) / error_scale


def _product(values: Tensor, factor: Tensor, fast: bool) -> Tensor:
    """Of decoded codes and a factor, float32; `fast`: of both as half words, codes times 2^11."""
    with without_autocast(values):
        if not fast:
            return values @ factor
        return (values * 2048).half().float() @ factor.half().float() / 2048


def decompress_(
    error: Tensor, p: Tensor, q: Tensor, feedback: float, skip: Tensor | None, fast: bool = False
) -> Tensor:
    """D = P Q^T, `fast`: of P and Q in tf32; what is left of E's codes is E - feedback D."""
    with without_autocast(p):
        grad = _tf32(p) @ _tf32(q).t() if fast else p @ q.t()
    if feedback != 0 and (skip is None or not skip):
        error.copy_(encode(decode(error, "1-6-9") - grad * feedback, "1-6-9"))
    return grad


def _tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, ties away from zero."""
    return (x.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)


def orthogonalize(p: Tensor, eps: float) -> Tensor:
    """Householder's Q of P + eps I (rectangular), LAPACK's signs."""
    start = p.clone()
    start.diagonal(dim1=-2, dim2=-1).add_(eps)
    q: Tensor = torch.linalg.qr(start).Q
    return q
