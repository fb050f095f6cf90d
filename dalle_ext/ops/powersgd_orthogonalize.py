"""Householder orthogonalisation of PowerSGD's factor P."""

from __future__ import annotations

import torch

from dalle_ext import _native
from dalle_ext._checks import numbers_only
from dalle_ext._switch import reference_in_use
from dalle_ext.ops import powersgd_native as native
from dalle_ext.reference import powersgd as reference

Tensor = torch.Tensor


def orthogonalize(P: Tensor, eps: float = 1e-6) -> Tensor:
    """Orthonormal columns that span those of P + eps I: Householder's Q (paper E.2, 5).

    Equivalent to `torch.linalg.qr(P + eps * eye(n, r)).Q`, and on the CPU that: signs are LAPACK's.
    A matrix of zeros gives columns of I, one of lower rank orthonormal columns all the same.

    Args:
        P: (..., n, r) float32, n >= r >= 1.
        eps: added to the diagonal of the upper r rows.

    Raises:
        TypeError, ValueError: another dtype or shape, a P that wants a gradient (none flows), eps
            negative or not finite.
    """
    op = "orthogonalize"
    numbers_only(op, P=P)
    if P.dtype != torch.float32:
        raise TypeError(f"{op}: P must be float32, got {P.dtype}")
    if P.dim() < 2 or not P.shape[-2] >= P.shape[-1] >= 1:
        raise ValueError(f"{op}: P must be (..., n, r) with n >= r >= 1, got {tuple(P.shape)}")
    if eps != 0:
        native.check_positive(op, "eps", eps)
    if reference_in_use():
        return reference.orthogonalize(P, eps)
    _native.require(op, P.device)
    flat = P.reshape(-1, *P.shape[-2:]).contiguous()
    return native.orthogonalize(flat, eps).view(P.shape)  # type: ignore[no-any-return]
