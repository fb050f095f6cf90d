"""The definition of PowerSGD's products with error buffers in 1-6-9 (paper, appendix E.2)."""

from __future__ import annotations

import torch

from .formats import decode, encode

Tensor = torch.Tensor


def compress_(
    error: Tensor, grad: Tensor, q: Tensor, scale: Tensor | None, error_scale: float,
    skip: Tensor | None,
) -> Tensor:  # fmt: skip
    """E += grad / scale where not `skip`; returns P = E Q of the E that is kept."""
    if skip is None or not skip:
        factor = torch.tensor(error_scale, device=grad.device)
        if scale is not None:
            factor = factor / scale
        error.copy_(encode(decode(error, "1-6-9") + grad.float() * factor, "1-6-9"))
    return decode(error, "1-6-9") @ q / error_scale


def project(error: Tensor, p: Tensor, error_scale: float) -> Tensor:
    """Q = E^T P."""
    return decode(error, "1-6-9").t() @ p / error_scale


def decompress_(
    error: Tensor, p: Tensor, q: Tensor, feedback: float, skip: Tensor | None
) -> Tensor:
    """D = P Q^T; what is left of E's codes is E - feedback D."""
    grad = p @ q.t()
    if feedback != 0 and (skip is None or not skip):
        error.copy_(encode(decode(error, "1-6-9") - grad * feedback, "1-6-9"))
    return grad


def orthogonalize(p: Tensor, eps: float) -> Tensor:
    """Householder's Q of P + eps I (rectangular), LAPACK's signs."""
    start = p.clone()
    start.diagonal(dim1=-2, dim2=-1).add_(eps)
    return torch.linalg.qr(start).Q
