"""The raw ops of `powersgd`: fake kernels, and the checks before them.

The raw ops take lists of contiguous matrices and write their results into the last list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dalle_ext import _native
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
    compress_ = _native.register("_powersgd_compress_", _nothing)
    project = _native.register("_powersgd_project", _nothing)
    decompress_ = _native.register("_powersgd_decompress_", _nothing)
    orthogonalize = _native.register("_powersgd_orthogonalize", _orthogonalize_fake)
    torch.library.register_kernel(orthogonalize, "cpu", _orthogonalize_cpu)


def results(errors: Sequence[Tensor], factors: Sequence[Tensor], side: int) -> list[Tensor]:
    """Room for (m or n, r) float32 of each matrix; zeros of an empty one, which no kernel sees."""
    return [
        (f.new_empty if e.numel() else f.new_zeros)((e.shape[side], f.shape[1]))
        for e, f in zip(errors, factors, strict=True)
    ]


def check_errors(op: str, errors: Sequence[Tensor], **others: Sequence[Tensor]) -> None:
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


def check_factor(op: str, name: str, factor: Tensor, length: int, error: Tensor) -> None:
    """Raises unless a factor is float32 (length, r) with 1 <= r <= both sides of its matrix."""
    if factor.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be float32, got {factor.dtype}")
    if factor.dim() != 2 or factor.shape[0] != length or factor.device != error.device:
        got = f"{tuple(factor.shape)} on {factor.device}"
        raise ValueError(f"{op}: {name} must be ({length}, r) on {error.device}, got {got}")
    check_rank(op, factor.shape[1], error)


def check_rank(op: str, rank: int, matrix: Tensor) -> None:
    """Raises unless 1 <= rank <= both sides of the matrix (which may be empty)."""
    most = min(matrix.shape[-2:])
    if rank < 1 or (matrix.numel() > 0 and rank > most):
        raise ValueError(f"{op}: rank must be 1 or more and at most {most}, got {rank}")


def check_grad(op: str, grad: Tensor, error: Tensor) -> None:
    """Raises unless a gradient fits its buffer."""
    _native.require_floating(op, "grads", grad.dtype)
    if grad.shape != error.shape or grad.device != error.device:
        want, got = tuple(error.shape), tuple(grad.shape)
        raise ValueError(
            f"{op}: grads must be {want} on {error.device}, got {got} on {grad.device}"
        )


def check_positive(op: str, name: str, value: float) -> None:
    """Raises unless a number is above 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{op}: {name} must be above 0 and finite, got {value}")
