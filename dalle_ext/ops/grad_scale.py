"""Scaled gradients: the two ends of a residual block (paper Figure 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dalle_ext._checks import numbers_only
from dalle_ext._native import require_floating
from dalle_ext._switch import reference_in_use
from dalle_ext.ops import grad_scale_native as native
from dalle_ext.reference import grad_scale as reference

Tensor = torch.Tensor


class ScaledGradient(NamedTuple):
    """A gradient times a scale, and (4,) int64 `counts` on its device.

    Counted are finite elements that overflowed, nonzero ones that became zero, those that became
    subnormal, and elements that were not finite.
    """

    grad: Tensor
    counts: Tensor


def scale_gradient(
    grad: Tensor, scale: float | Tensor, *, dtype: torch.dtype = torch.float16
) -> ScaledGradient:
    """grad * scale in `dtype`, with infinities and NaN as zero (paper Figure 4, entering a block).

    Equivalent to `(grad.float() * scale).to(dtype).nan_to_num(0, 0, 0)`.

    Args:
        grad: float32, float16 or bfloat16, any shape; read as contiguous.
        scale: positive number, or one float32 element on the gradient's device.
        dtype: of the result.

    Returns:
        `ScaledGradient`. No gradient flows.

    Raises:
        TypeError: dtypes; a tensor that requires a gradient while gradients are recorded.
        ValueError: a scale that is not positive and finite (a tensor on a GPU is not looked at).
        RuntimeError: no native library for the device.
    """
    op = "scale_gradient"
    numbers_only(op, grad=grad)
    require_floating(op, "grad", grad.dtype)
    require_floating(op, "dtype", dtype)
    native.require_library(op, grad.device)
    factor = native.as_scale(op, scale, grad.device)
    if reference_in_use():
        return ScaledGradient(*reference.scale_gradient(grad, factor, dtype))
    return ScaledGradient(*native.scale(grad.contiguous(), factor, dtype))


def unscale_gradient(stream: Tensor, grad: Tensor, scale: float | Tensor) -> Tensor:
    """stream + grad / scale, quotients that are not finite as zero (Figure 4, leaving a block).

    Args:
        stream: float32 gradient of the identity path, any shape; read as contiguous.
        grad: float32, float16 or bfloat16 of that shape.
        scale: as in `scale_gradient`.

    Returns:
        float32, the stream's shape, a new tensor. No gradient flows.

    Raises:
        TypeError, ValueError, RuntimeError: as `scale_gradient`; ValueError for other shapes.
    """
    op = "unscale_gradient"
    numbers_only(op, stream=stream, grad=grad)
    if stream.dtype != torch.float32:
        raise TypeError(f"{op}: stream must be float32, got {stream.dtype}")
    require_floating(op, "grad", grad.dtype)
    if grad.shape != stream.shape or grad.device != stream.device:
        got = f"{tuple(grad.shape)} on {grad.device}"
        wanted = f"{tuple(stream.shape)} on {stream.device}"
        raise ValueError(f"{op}: grad must be {wanted}, got {got}")
    native.require_library(op, stream.device)
    divisor = native.as_scale(op, scale, stream.device)
    if reference_in_use():
        return reference.unscale_gradient(stream, grad, divisor)
    return native.unscale(stream.contiguous(), grad.contiguous(), divisor)  # type: ignore[no-any-return]
