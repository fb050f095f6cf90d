"""PowerSGD's products with error buffers in 1-6-9."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dalle_ext._switch import reference_in_use
from dalle_ext.ops import powersgd_native as native
from dalle_ext.reference import powersgd as reference

Tensor = torch.Tensor


@torch.no_grad()
def powersgd_compress_(
    errors: Sequence[Tensor], grads: Sequence[Tensor], qs: Sequence[Tensor], *,
    scale: Tensor | None = None, error_scale: float = 1.0, skip: Tensor | None = None,
    fast: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Adds gradients to error buffers and multiplies these with Q, in one pass (paper E.2, 2, 3).

    Equivalent, for each matrix, to `E += G / scale; P = E @ Q` with E kept in 1-6-9: `errors`
    holds `pack(E * error_scale, "1-6-9")`, and P is made of the E that is kept. The matrices of a
    call share launches; no result depends on the number of threads, or on the other matrices.

    Args:
        errors: (m, n) int16 each, changed in place; zeros to begin with.
        grads: (m, n) float32, float16 or bfloat16. An Inf would saturate and a NaN vanish: whoever
            calls looks for them first and says so in `skip`.
        qs: (n, r) float32.
        scale: one float32 on the device, what the gradients were multiplied with.
        error_scale: moves E into the range of the format, 2^-60 to 16; a power of two is exact.
        skip: one float32 on the device; where it is not 0 the buffers stay as they are.
        fast: on CUDA P is a product of half words: E * error_scale is exact from 2^-26 on, off by
            2^-36 at most below; Q, up to 65504, is off by 2^-11 of it or 2^-25. CPU: no change.

    Returns:
        P of each matrix, (m, r) float32.

    Raises:
        TypeError, ValueError: dtypes, shapes, lists, numbers that do not fit; a rank too large.
    """
    op = "powersgd_compress_"
    native.check_errors(op, errors, grads=grads, qs=qs)
    native.check_positive(op, "error_scale", error_scale)
    for error, grad, q in zip(errors, grads, qs, strict=True):
        native.check_grad(op, grad, error)
        native.check_factor(op, "qs", q, error.shape[1], error)
    if reference_in_use():
        found = zip(errors, grads, qs, strict=True)
        return [reference.compress_(*one, scale, error_scale, skip, fast) for one in found]
    ps = native.results(errors, qs, 0)
    native.compress_(
        list(errors), [g.contiguous() for g in grads], [q.contiguous() for q in qs], ps, scale,
        error_scale, skip, fast)  # fmt: skip
    return ps


@torch.no_grad()
def powersgd_project(
    errors: Sequence[Tensor], ps: Sequence[Tensor], *, error_scale: float = 1.0, fast: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Q = E^T P of each matrix, (n, r) float32 (paper E.2, 6); arguments as `powersgd_compress_`.

    Args:
        ps: (m, r) float32.

    Raises:
        TypeError, ValueError: as `powersgd_compress_`.
    """
    native.check_errors("powersgd_project", errors, ps=ps)
    native.check_positive("powersgd_project", "error_scale", error_scale)
    for error, p in zip(errors, ps, strict=True):
        native.check_factor("powersgd_project", "ps", p, error.shape[0], error)
    if reference_in_use():
        return [reference.project(e, p, error_scale, fast) for e, p in zip(errors, ps, strict=True)]
    qs = native.results(errors, ps, 1)
    native.project(list(errors), [p.contiguous() for p in ps], qs, error_scale, fast)
    return qs


@torch.no_grad()
def powersgd_decompress_(
    errors: Sequence[Tensor], ps: Sequence[Tensor], qs: Sequence[Tensor], *, machines: int = 1,
    error_scale: float = 1.0, skip: Tensor | None = None, feedback: bool = True, fast: bool = False,
) -> list[Tensor]:  # fmt: skip
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
    native.check_errors(op, errors, ps=ps, qs=qs)
    native.check_positive(op, "error_scale", error_scale)
    if machines < 1:
        raise ValueError(f"{op}: machines must be 1 or more, got {machines}")
    for error, p, q in zip(errors, ps, qs, strict=True):
        native.check_factor(op, "ps", p, error.shape[0], error)
        native.check_factor(op, "qs", q, error.shape[1], error)
    by = error_scale / machines if feedback else 0.0
    if reference_in_use():
        found = zip(errors, ps, qs, strict=True)
        return [reference.decompress_(*one, by, skip, fast) for one in found]
    grads = [p.new_empty(e.shape) for e, p in zip(errors, ps, strict=True)]
    native.decompress_(
        list(errors), [p.contiguous() for p in ps], [q.contiguous() for q in qs], grads, by,
        skip, fast)  # fmt: skip
    return grads
