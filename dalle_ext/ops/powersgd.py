"""PowerSGD: products with error buffers in 1-6-9, and Householder orthogonalisation of P.

The raw ops take lists of contiguous matrices and write their results into the last list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dalle_ext import _native
from dalle_ext._checks import numbers_only, plain_memory
from dalle_ext._switch import reference_in_use
from dalle_ext.reference import powersgd as reference

Tensor = torch.Tensor


def _nothing(*_: object) -> None:
    return None


def _orthogonalize_fake(p: Tensor, eps: float) -> Tensor:
    return torch.empty_like(p)


def _orthogonalize_cpu(p: Tensor, eps: float) -> Tensor:
    return reference.orthogonalize(p, eps).contiguous()  # LAPACK is the CPU's kernel


if _native.CPU_PROBLEM is None:
    _powersgd_compress_ = _native.register(
        "_powersgd_compress_", _nothing, public="powersgd_compress_"
    )
    _powersgd_project = _native.register("_powersgd_project", _nothing, public="powersgd_project")
    _powersgd_decompress_ = _native.register(
        "_powersgd_decompress_", _nothing, public="powersgd_decompress_"
    )
    _powersgd_orthogonalize = _native.register(
        "_powersgd_orthogonalize", _orthogonalize_fake, public="orthogonalize"
    )
    torch.library.register_kernel("dalle_ext::_powersgd_orthogonalize", "cpu", _orthogonalize_cpu)


def _results(errors: Sequence[Tensor], factors: Sequence[Tensor], side: int) -> list[Tensor]:
    """Room for (m or n, r) float32 of each matrix; zeros of an empty one, which no kernel sees."""
    return [
        (torch.empty if e.numel() else torch.zeros)(
            (e.shape[side], f.shape[1]), dtype=f.dtype, device=f.device
        )
        for e, f in zip(errors, factors, strict=True)
    ]


def _check_plain(op: str, **arguments: Sequence[Tensor] | Tensor | None) -> None:
    """Raises TypeError where a derivative would be lost, or a tensor is one of `torch.func`."""
    numbers_only(op, **arguments)
    plain_memory(op, **arguments)


def _check_errors(op: str, errors: Sequence[Tensor], **others: Sequence[Tensor]) -> None:
    """Raises unless there are int16 matrices on one device and lists of the same length."""
    if not errors:
        raise ValueError(f"{op}: errors must hold a matrix, got none")
    for name, tensors in others.items():
        if len(tensors) != len(errors):
            raise ValueError(f"{op}: {name} must be {len(errors)} tensors, got {len(tensors)}")
    for error in errors:
        if error.dtype != torch.int16:
            raise TypeError(f"{op}: errors must be int16 codes, got {error.dtype}")
        if error.dim() != 2 or not error.is_contiguous():
            got = f"shape {tuple(error.shape)}, strides {error.stride()}"
            raise ValueError(f"{op}: errors must be contiguous matrices, got {got}")
    if not reference_in_use():
        _native.require(op, errors[0].device)


def _check_factor(op: str, name: str, factor: Tensor, length: int, error: Tensor) -> None:
    """Raises unless a factor is float32 (length, r) with 1 <= r <= both sides of its matrix."""
    if factor.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be float32, got {factor.dtype}")
    if factor.dim() != 2 or factor.shape[0] != length or factor.device != error.device:
        got = f"{tuple(factor.shape)} on {factor.device}"
        raise ValueError(f"{op}: {name} must be ({length}, r) on {error.device}, got {got}")
    _check_rank(op, factor.shape[1], error)


def _check_rank(op: str, rank: int, matrix: Tensor) -> None:
    """Raises unless 1 <= rank <= both sides of the matrix (which may be empty)."""
    max_rank = min(matrix.shape[-2:])
    if rank < 1 or (matrix.numel() > 0 and rank > max_rank):
        raise ValueError(f"{op}: rank must be 1 or more and at most {max_rank}, got {rank}")


def _check_grad(op: str, grad: Tensor, error: Tensor) -> None:
    """Raises unless a gradient fits its buffer."""
    _native.require_floating(op, "grads", grad.dtype)
    if grad.shape != error.shape or grad.device != error.device:
        want, got = tuple(error.shape), tuple(grad.shape)
        raise ValueError(
            f"{op}: grads must be {want} on {error.device}, got {got} on {grad.device}"
        )


def _check_positive(op: str, name: str, value: float) -> None:
    """Raises unless a number is above 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{op}: {name} must be above 0 and finite, got {value}")


def powersgd_compress_(
    errors: Sequence[Tensor],
    grads: Sequence[Tensor],
    qs: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    error_scale: float = 1.0,
    skip: Tensor | None = None,
    fast: bool = False,
) -> list[Tensor]:
    """Adds gradients to error buffers and multiplies these with Q, in one pass (paper E.2, 2, 3).

    Equivalent, for each matrix, to `E += G / scale; P = E @ Q` with E kept in 1-6-9: `errors`
    holds `pack(E * error_scale, "1-6-9")`, and P is made of the E that is kept. The matrices of a
    call share launches; no result depends on the number of threads, or on the other matrices.

    Args:
        errors: (m, n) int16 each, changed in place; zeros to begin with.
        grads: (m, n) float32, float16 or bfloat16. An Inf would saturate and a NaN become 0: the
            caller looks for them first and sets `skip`.
        qs: (n, r) float32.
        scale: one float32 on the device, the loss scale that the gradients carry.
        error_scale: moves E into the range of the format, 2^-60 to 16; a power of two is exact.
        skip: one float32 on the device; where it is not 0 the buffers stay as they are.
        fast: on CUDA P is a product of half words: E * error_scale is exact from 2^-26 on, off by
            2^-36 at most below; Q, up to 65504, is off by 2^-11 of it or 2^-25. CPU: no change.

    Returns:
        P of each matrix, (m, r) float32.

    Raises:
        TypeError, ValueError: dtypes, shapes, lists, numbers that do not fit; a rank too large; a
            tensor that wants a gradient (none flows).
    """
    op = "powersgd_compress_"
    _check_plain(op, errors=errors, grads=grads, qs=qs, scale=scale, skip=skip)
    _check_errors(op, errors, grads=grads, qs=qs)
    _check_positive(op, "error_scale", error_scale)
    for error, grad, q in zip(errors, grads, qs, strict=True):
        _check_grad(op, grad, error)
        _check_factor(op, "qs", q, error.shape[1], error)
    if reference_in_use():
        rows = zip(errors, grads, qs, strict=True)
        return [reference.compress_(*row, scale, error_scale, skip, fast) for row in rows]
    ps = _results(errors, qs, 0)
    _powersgd_compress_(
        list(errors),
        [g.contiguous() for g in grads],
        [q.contiguous() for q in qs],
        ps,
        scale,
        error_scale,
        skip,
        fast,
    )
    return ps


def powersgd_project(
    errors: Sequence[Tensor],
    ps: Sequence[Tensor],
    *,
    error_scale: float = 1.0,
    fast: bool = False,
) -> list[Tensor]:
    """Q = E^T P of each matrix, (n, r) float32 (paper E.2, 6); arguments as `powersgd_compress_`.

    Args:
        ps: (m, r) float32.

    Raises:
        TypeError, ValueError: as `powersgd_compress_`.
    """
    _check_plain("powersgd_project", errors=errors, ps=ps)
    _check_errors("powersgd_project", errors, ps=ps)
    _check_positive("powersgd_project", "error_scale", error_scale)
    for error, p in zip(errors, ps, strict=True):
        _check_factor("powersgd_project", "ps", p, error.shape[0], error)
    if reference_in_use():
        return [reference.project(e, p, error_scale, fast) for e, p in zip(errors, ps, strict=True)]
    qs = _results(errors, ps, 1)
    _powersgd_project(list(errors), [p.contiguous() for p in ps], qs, error_scale, fast)
    return qs


def powersgd_decompress_(
    errors: Sequence[Tensor],
    ps: Sequence[Tensor],
    qs: Sequence[Tensor],
    *,
    machines: int = 1,
    error_scale: float = 1.0,
    skip: Tensor | None = None,
    feedback: bool = True,
    fast: bool = False,
) -> list[Tensor]:
    """D = P Q^T in float32, and in the same pass E -= D / machines (paper E.2, 11 and 12).

    Args:
        errors, error_scale, skip: as `powersgd_compress_`.
        ps, qs: (m, r) and (n, r) float32.
        machines: 1 where D is a mean over machines, their number where it is a sum.
        feedback: False leaves the buffers as they are.
        fast: on CUDA P and Q are rounded to 10 bits of mantissa. On the CPU it changes nothing.

    Returns:
        D of each matrix, (m, n) float32.

    Raises:
        TypeError, ValueError: as `powersgd_compress_`.
    """
    op = "powersgd_decompress_"
    _check_plain(op, errors=errors, ps=ps, qs=qs, skip=skip)
    _check_errors(op, errors, ps=ps, qs=qs)
    _check_positive(op, "error_scale", error_scale)
    if machines < 1:
        raise ValueError(f"{op}: machines must be 1 or more, got {machines}")
    for error, p, q in zip(errors, ps, qs, strict=True):
        _check_factor(op, "ps", p, error.shape[0], error)
        _check_factor(op, "qs", q, error.shape[1], error)
    factor = error_scale / machines if feedback else 0.0
    if reference_in_use():
        rows = zip(errors, ps, qs, strict=True)
        return [reference.decompress_(*row, factor, skip, fast) for row in rows]
    grads = [
        torch.empty(e.shape, dtype=p.dtype, device=p.device)
        for e, p in zip(errors, ps, strict=True)
    ]
    _powersgd_decompress_(
        list(errors),
        [p.contiguous() for p in ps],
        [q.contiguous() for q in qs],
        grads,
        factor,
        skip,
        fast,
    )
    return grads


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
        _check_positive(op, "eps", eps)
    if reference_in_use():
        return reference.orthogonalize(P, eps)
    _native.require(op, P.device)
    flat = P.reshape(-1, *P.shape[-2:]).contiguous()
    return _powersgd_orthogonalize(flat, eps).view(P.shape)
