"""Scaled gradients: all gradients of a model by group, and the rule of the scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dalle_ext._checks import integer
from dalle_ext._switch import reference_in_use
from dalle_ext._tensor_table import TensorTable, flat
from dalle_ext.ops import grad_scale_native as native
from dalle_ext.reference import grad_scale_groups as reference

Tensor = torch.Tensor


class GradientStats(NamedTuple):
    """What the gradients of each group held, (G,) tensors on their device.

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
    """Divides any number of gradients by their group's scale, in place, and says what they held.

    Two launches, nothing waits for the device. Elements that are not finite stay so.

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
        elif not table.fits([flats], group_of):
            raise ValueError(f"{op}: table must be of these gradients, got one of other tensors")
        found = native.unscale_all(table.columns[0], table.host, table.rows, scales, check_only)
    counts, squares, largest = found
    return GradientStats(counts[:, 0], counts[:, 1], counts[:, 2], counts[:, 3], squares, largest)


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
        scales: (G,) float32; the paper starts at M 2^13, M replicas; low and high have M = 1.
        since_drop: (G,) int64, updates since the last fall; starts at `window`.
        nonfinite: (G,) int64, as in `GradientStats`.
        grow_on_skip: whether a clean scale grows also where another group was not finite, so that
            the update is skipped (the paper does not say).

    Raises:
        RuntimeError: shapes, dtypes, numbers out of range, no native library.
    """
    native.require_library("update_scales_", scales.device)
    window = integer("update_scales_", "window", window, 1, requirement="an integer, 1 or more")
    rule = (growth, backoff, window, low, high, grow_on_skip)
    update = reference.update_scales_ if reference_in_use() else native.update
    update(scales, since_drop, nonfinite.contiguous(), *rule)
