"""Scaled gradients: the ends of a residual block, all gradients at once, and the scales' rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dalle_ext._switch import reference_in_use
from dalle_ext._tensor_table import TensorTable, flat
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


class GradientStats(NamedTuple):
    """What the gradients of each group held, on their device.

    Attributes:
        nonfinite: (G,) int64, infinities and NaN.
        zeros: (G,) int64.
        subnormals: (G,) int64, as stored, before the division.
        underflowed: (G,) int64, not zero but zero after the division, in the gradient's dtype.
        sum_squares: (G,) float64, of the finite gradients after the division.
        max_abs: (G,) float32, the same.
    """

    nonfinite: Tensor
    zeros: Tensor
    subnormals: Tensor
    underflowed: Tensor
    sum_squares: Tensor
    max_abs: Tensor

    @property
    def found_nonfinite(self) -> Tensor:
        """0-d bool: whether any group has a gradient that is not finite."""
        return (self.nonfinite != 0).any()

    @property
    def norm(self) -> Tensor:
        """0-d float64: global norm of the finite gradients after the division."""
        return self.sum_squares.sum().sqrt()


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
        TypeError: dtypes.
        ValueError: a scale that is not positive and finite (a tensor on a GPU is not looked at).
        RuntimeError: no native library for the device.
    """
    op = "scale_gradient"
    native.require_floating(op, "grad", grad.dtype)
    native.require_floating(op, "dtype", dtype)
    native.require_library(op, grad.device)
    factor = native.as_scale(op, scale, grad.device)
    if reference_in_use():
        return ScaledGradient(*reference.scale_gradient(grad.detach(), factor, dtype))
    return ScaledGradient(*native.scale(grad.detach().contiguous(), factor, dtype))


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
    if stream.dtype != torch.float32:
        raise TypeError(f"{op}: stream must be float32, got {stream.dtype}")
    native.require_floating(op, "grad", grad.dtype)
    if grad.shape != stream.shape or grad.device != stream.device:
        got = f"{tuple(grad.shape)} on {grad.device}"
        wanted = f"{tuple(stream.shape)} on {stream.device}"
        raise ValueError(f"{op}: grad must be {wanted}, got {got}")
    native.require_library(op, stream.device)
    divisor = native.as_scale(op, scale, stream.device)
    stream, grad = stream.detach(), grad.detach()
    if reference_in_use():
        return reference.unscale_gradient(stream, grad, divisor)
    return native.unscale(stream.contiguous(), grad.contiguous(), divisor)  # type: ignore[no-any-return]


@torch.compiler.disable
@torch.no_grad()
def unscale_gradients_(
    grads: Sequence[Tensor],
    scales: float | Tensor,
    groups: Sequence[int] | None = None,
    *,
    check_only: bool = False,
    table: TensorTable | None = None,
) -> GradientStats:
    """Divides any number of gradients by their group's scale, in place, and says what they held.

    One pass, two launches, nothing waits for the device. Elements that are not finite stay so.

    Args:
        grads: float32, float16, bfloat16 tensors of one device, dense.
        scales: (G,) float32 on that device, positive, or a number where there is one group.
        groups: of each gradient, in [0, G); all 0 if left out.
        check_only: count, but leave the gradients as they are.
        table: `TensorTable([grads], groups)` of an earlier call, so that nothing is copied to the
            device (in a CUDA graph it has to be given).

    Raises:
        TypeError: dtypes, sparse gradients.
        ValueError: no gradient, several devices, groups or scales that do not fit, a table of
            other tensors.
        RuntimeError: no native library for the device.
    """
    op = "unscale_gradients_"
    native.check_gradients(op, grads)
    device = grads[0].device
    native.require_library(op, device)
    if not isinstance(scales, Tensor):
        scales = native.as_scale(op, scales, device).view(1)
    group_of = native.group_list(op, groups, len(grads), scales)
    if reference_in_use():
        found = reference.unscale_gradients_(grads, scales, group_of, check_only)
    else:
        flats = [g if g.is_contiguous() else flat(op, "grads", g) for g in grads]
        if table is None:
            table = TensorTable([flats], group_of)
        elif not table.fits([flats]):
            raise ValueError(f"{op}: table must be of these gradients, got one of other tensors")
        found = native.unscale_all(table.columns[0], table.host, table.rows, scales, check_only)
    counts, squares, largest = found
    return GradientStats(*counts.unbind(1), squares, largest)


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
    """The rule of the paper's gradient scales (appendix D), on the device and in place.

    A scale whose gradients were finite is multiplied by `growth`, another one by `backoff`, but
    only where it has not fallen in the last `window` updates; all are clamped to [low, high].

    Args:
        scales: (G,) float32; the paper starts at M 2^13, M the number of replicas.
        since_drop: (G,) int64, updates since the last fall; starts at `window`.
        nonfinite: (G,) int64, as in `GradientStats`.
        low, high: the paper's M 2^7 and M 2^24 with M = 1.
        grow_on_skip: whether a clean scale grows also where another group was not finite, so that
            the update is skipped (the paper does not say).

    Raises:
        RuntimeError: shapes, dtypes, numbers out of range, no native library.
    """
    native.require_library("update_scales_", scales.device)
    rule = (growth, backoff, window, low, high, grow_on_skip)
    if reference_in_use():
        reference.update_scales_(scales, since_drop, nonfinite, *rule)
    else:
        native.update(scales, since_drop, nonfinite, *rule)
