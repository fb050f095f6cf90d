"""The raw ops of `grad_scale`: fake kernels, and the checks before them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dalle_ext import _native
from dalle_ext._checks import integer, numbers_only, real
from dalle_ext._switch import reference_in_use

Tensor = torch.Tensor


def _scale_fake(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape, dtype=dtype), grad.new_empty((4,), dtype=torch.int64)


def _unscale_fake(stream: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    return stream.new_empty(stream.shape)


def _unscale_all_fake(
    grads: list[Tensor], host: Tensor, rows: Tensor, scales: Tensor, check_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups = scales.shape[0]
    return (
        scales.new_empty((groups, 4), dtype=torch.int64),
        scales.new_empty((groups,), dtype=torch.float64),
        scales.new_empty((groups,)),
    )


def _update_fake(*_: object) -> None:
    return None


if _native.CPU_PROBLEM is None:
    scale = _native.register("_grad_scale_scale", _scale_fake)
    unscale = _native.register("_grad_scale_unscale", _unscale_fake)
    unscale_all = _native.register("_grad_scale_unscale_", _unscale_all_fake)
    update = _native.register("_grad_scale_update_", _update_fake)


def require_library(op: str, device: torch.device) -> None:
    if not reference_in_use():
        _native.require(op, device)


LEAST_SCALE = 2.0**-126


def as_scale(op: str, scale: float | Tensor, device: torch.device) -> Tensor:
    """A scale as a 0-d float32 tensor on the device."""
    if isinstance(scale, Tensor):
        numbers_only(op, scale=scale)
        if scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != device:
            got = f"shape {tuple(scale.shape)} {scale.dtype} on {scale.device}"
            raise ValueError(f"{op}: scale must be one float32 on {device}, got {got}")
        return scale
    if not LEAST_SCALE <= real(scale) < 2.0**128:  # normal numbers of float32
        usual = not 0 < real(scale) < math.inf
        requirement = "positive and finite" if usual else "2^-126 or more and below 2^128"
        raise ValueError(f"{op}: scale must be {requirement}, got {scale}")
    return torch.full((), real(scale), dtype=torch.float32, device=device)


def check_gradients(op: str, grads: Sequence[Tensor]) -> None:
    """Raises unless there are gradients, dense, of one device and of floating dtypes."""
    if not grads:
        raise ValueError(f"{op}: grads must hold a tensor, got none")
    for i, grad in enumerate(grads):
        if grad.layout != torch.strided:
            raise TypeError(f"{op}: grads must be dense, got {grad.layout} in place {i}")
        _native.require_floating(op, "grads", grad.dtype)
        if grad.device != grads[0].device:
            devices = f"{grads[0].device} and {grad.device}"
            raise ValueError(f"{op}: grads must be on one device, got {devices}")


def group_list(op: str, groups: Sequence[int] | None, count: int, scales: Tensor) -> list[int]:
    """The group of each of `count` tensors; all 0 where none is given."""
    if scales.dim() != 1 or scales.dtype != torch.float32:
        got = f"shape {tuple(scales.shape)} {scales.dtype}"
        raise ValueError(f"{op}: scales must be (G,) float32, got {got}")
    if groups is None:
        return [0] * count
    if len(groups) != count:
        raise ValueError(f"{op}: groups must be one a tensor, {count}, got {len(groups)}")
    found = [integer(op, "groups", group) for group in groups]
    for group in found:
        if not 0 <= group < len(scales):
            raise ValueError(f"{op}: groups must be 0 or more and below {len(scales)}, got {group}")
    return found
