"""Gradient scaling: the two ends of a residual block (paper Figure 4), unscaling of all gradients
of a model by group, and the update of the scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dalle_ext import _native
from dalle_ext._checks import integer, numbers_only, plain_memory, real
from dalle_ext._switch import reference_in_use
from dalle_ext._tensor_table import TensorTable, flat
from dalle_ext.reference import grad_scale as reference

Tensor = torch.Tensor
MIN_SCALE = 2.0**-126


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
    _grad_scale_scale = _native.register("_grad_scale_scale", _scale_fake, public="scale_gradient")
    _grad_scale_unscale = _native.register(
        "_grad_scale_unscale", _unscale_fake, public="unscale_gradient"
    )
    _grad_scale_unscale_ = _native.register(
        "_grad_scale_unscale_", _unscale_all_fake, public="unscale_gradients_"
    )
    _grad_scale_update_ = _native.register(
        "_grad_scale_update_", _update_fake, public="update_scales_"
    )


def _require_library(op: str, device: torch.device) -> None:
    if not reference_in_use():
        _native.require(op, device)


def _as_scale(op: str, scale: float | Tensor, device: torch.device) -> Tensor:
    """A scale as a 0-d float32 tensor on the device."""
    if isinstance(scale, Tensor):
        numbers_only(op, scale=scale)
        if scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != device:
            got = f"shape {tuple(scale.shape)} {scale.dtype} on {scale.device}"
            raise ValueError(f"{op}: scale must be one float32 on {device}, got {got}")
        return scale
    if not MIN_SCALE <= real(scale) < 2.0**128:  # normal numbers of float32
        invalid = not 0 < real(scale) < math.inf
        requirement = "positive and finite" if invalid else "2^-126 or more and below 2^128"
        raise ValueError(f"{op}: scale must be {requirement}, got {scale}")
    return torch.full((), real(scale), dtype=torch.float32, device=device)


def _check_gradients(op: str, grads: Sequence[Tensor]) -> None:
    """Raises unless there are gradients, dense, of one device and of floating dtypes."""
    if not grads:
        raise ValueError(f"{op}: grads must hold a tensor, got none")
    kinds = {(grad.layout, grad.dtype, grad.device) for grad in grads}  # few, of many gradients
    for layout, dtype, _ in kinds:
        if layout != torch.strided:
            at = [grad.layout for grad in grads].index(layout)
            raise TypeError(f"{op}: grads must be dense, got {layout} at index {at}")
        _native.require_floating(op, "grads", dtype)
    if len({device for _, _, device in kinds}) > 1:
        other = next(grad.device for grad in grads if grad.device != grads[0].device)
        devices = f"{grads[0].device} and {other}"
        raise ValueError(f"{op}: grads must be on one device, got {devices}")


def _group_list(op: str, groups: Sequence[int] | None, count: int, scales: Tensor) -> list[int]:
    """The group of each of `count` tensors; all 0 where none is given."""
    if scales.dim() != 1 or scales.dtype != torch.float32:
        got = f"shape {tuple(scales.shape)} {scales.dtype}"
        raise ValueError(f"{op}: scales must be (G,) float32, got {got}")
    if groups is None:
        return [0] * count
    if len(groups) != count:
        raise ValueError(f"{op}: groups must be one a tensor, {count}, got {len(groups)}")
    indices = list(groups)
    if set(map(type, indices)) != {int}:  # what a model gives is, and there are many
        indices = [integer(op, "groups", group) for group in indices]
    size = len(scales)
    if not 0 <= min(indices) <= max(indices) < size:
        outside = next(group for group in indices if not 0 <= group < size)
        raise ValueError(f"{op}: groups must be 0 or more and below {size}, got {outside}")
    return indices


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
    _native.require_floating(op, "grad", grad.dtype)
    _native.require_floating(op, "dtype", dtype)
    _require_library(op, grad.device)
    factor = _as_scale(op, scale, grad.device)
    if reference_in_use():
        return ScaledGradient(*reference.scale_gradient(grad, factor, dtype))
    return ScaledGradient(*_grad_scale_scale(grad.contiguous(), factor, dtype))


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
    _native.require_floating(op, "grad", grad.dtype)
    if grad.shape != stream.shape or grad.device != stream.device:
        got = f"{tuple(grad.shape)} on {grad.device}"
        expected = f"{tuple(stream.shape)} on {stream.device}"
        raise ValueError(f"{op}: grad must be {expected}, got {got}")
    _require_library(op, stream.device)
    divisor = _as_scale(op, scale, stream.device)
    if reference_in_use():
        return reference.unscale_gradient(stream, grad, divisor)
    return _grad_scale_unscale(stream.contiguous(), grad.contiguous(), divisor)


class GradientStats(NamedTuple):
    """Statistics of the gradients of each group, (G,) tensors on their device.

    Counted (int64) are infinities with NaN, zeros, subnormals as stored before the division, and
    underflows: not zero, but zero after the division, in the gradient's dtype. `sum_squares`
    (float64) and `max_abs` (float32) are of the finite gradients after the division.
    """

    nonfinite: Tensor
    zeros: Tensor
    subnormals: Tensor
    underflowed: Tensor
    sum_squares: Tensor
    max_abs: Tensor

    @property
    def found_nonfinite(self) -> Tensor:
        return self.nonfinite.any()  # 0-d bool: in any group

    @property
    def norm(self) -> Tensor:
        return self.sum_squares.sum().sqrt()  # 0-d float64: of all finite gradients


@torch._disable_dynamo  # torch.compiler.disable would import the compiler with this module
@torch.no_grad()
def unscale_gradients_(
    grads: Sequence[Tensor],
    scales: float | Tensor,
    groups: Sequence[int] | None = None,
    *,
    check_only: bool = False,
    table: TensorTable | None = None,
) -> GradientStats:
    """Divides any number of gradients by their group's scale in place, and returns statistics.

    Two launches, nothing waits for the device. Elements that are not finite stay so.

    Args:
        grads: float32, float16, bfloat16 tensors of one device, dense.
        scales: (G,) float32 on that device, positive, or a number where there is one group.
        groups: of each gradient, in [0, G); all 0 if left out.
        check_only: count, but leave the gradients as they are.
        table: `TensorTable([grads], groups)` of an earlier call, so that nothing is copied to the
            device (in a CUDA graph it has to be given). Its `columns` are not looked at.

    Raises:
        TypeError: dtypes, sparse gradients.
        ValueError: no gradient, several devices, groups or scales that do not fit, a table of
            other tensors.
        RuntimeError: no native library for the device.
    """
    op = "unscale_gradients_"
    _check_gradients(op, grads)
    plain_memory(op, grads=list(grads), scales=scales)
    device = grads[0].device
    _require_library(op, device)
    if not isinstance(scales, Tensor):
        scales = _as_scale(op, scales, device).view(1)
    group_of = _group_list(op, groups, len(grads), scales)
    if reference_in_use():
        results = reference.unscale_gradients_(grads, scales, group_of, check_only)
    else:
        flats = [g if g.is_contiguous() else flat(op, "grads", g) for g in grads]
        if table is None:
            table = TensorTable([flats], group_of)
        elif not table.fits([flats], group_of):
            raise ValueError(f"{op}: table must be of these gradients, got one of other tensors")
        (ordered,) = table.arranged([flats])
        results = _grad_scale_unscale_(ordered, table.host, table.rows, scales, check_only)
    counts, squares, max_abs = results
    return GradientStats(counts[:, 0], counts[:, 1], counts[:, 2], counts[:, 3], squares, max_abs)


def update_scales_(
    scales: Tensor,
    since_drop: Tensor,
    nonfinite: Tensor,
    *,
    growth: float = 2 ** (1 / 1000),
    backoff: float = 2**-0.5,
    window: int = 125,
    low: float = 2.0**7,
    high: float = 2.0**24,
    grow_on_skip: bool = True,
) -> None:
    """Updates the paper's gradient scales (appendix D), on the device and in place.

    A scale whose gradients were finite is multiplied by `growth`, another one by `backoff`, but
    only where it has not fallen in the last `window` updates; all are clamped to [low, high].

    Args:
        scales: (G,) float32; the paper starts at M 2^13, M replicas; low and high have M = 1.
        since_drop: (G,) int64, updates since the last fall; starts at `window`.
        nonfinite: (G,) int64, as in `GradientStats`.
        grow_on_skip: whether a clean scale grows also where another group was not finite, so that
            the update is skipped (the paper does not say).

    Raises:
        RuntimeError: shapes, dtypes, numbers out of range, no native library.
    """
    numbers_only("update_scales_", scales=scales)
    plain_memory("update_scales_", scales=scales, since_drop=since_drop, nonfinite=nonfinite)
    _require_library("update_scales_", scales.device)
    window = integer("update_scales_", "window", window, 1, requirement="an integer, 1 or more")
    rule = (growth, backoff, window, low, high, grow_on_skip)
    update = reference.update_scales_ if reference_in_use() else _grad_scale_update_
    update(scales, since_drop, nonfinite.contiguous(), *rule)
