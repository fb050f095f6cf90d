"""The Gumbel-softmax relaxation of a codebook choice.

Letters: K codebook size, R rows (all other axes in logical order). The raw ops take contiguous
logits, and tau (float64) and seed (int64) as 0-d tensors on their device.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch

from dalle_ext import _native
from dalle_ext._checks import autograd_only, integer, numbers_only, once_differentiable, seed_word
from dalle_ext._switch import reference_in_use
from dalle_ext.reference import gumbel_softmax as reference

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _forward_fake(
    logits: Tensor, tau: Tensor, seed: Tensor, dim: int, hard: bool, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (*logits.shape[:dim], *logits.shape[dim + 1 :])
    return (
        logits.new_empty(logits.shape),
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty((4, *rows), dtype=torch.float32),
    )


def _backward_fake(
    grad_sample: Tensor | None, grad_kl: Tensor | None, logits: Tensor, *rest: object
) -> Tensor:
    return logits.new_empty(logits.shape)


def _words_fake(seed: Tensor, count: int) -> Tensor:
    return seed.new_empty((count,), dtype=torch.int32)


if _native.CPU_PROBLEM is None:
    _forward = _native.register(
        "_gumbel_softmax_forward", _forward_fake, public="gumbel_softmax", differentiable=True
    )
    _backward = _native.register(
        "_gumbel_softmax_backward", _backward_fake, public="gumbel_softmax"
    )
    _native.register("_gumbel_softmax_words", _words_fake)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tau: Tensor, seed: Tensor, dim: int, hard: bool, first_row: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        sample, index, kl, stats = _forward(logits, tau, seed, dim, hard, first_row)
        ctx.save_for_backward(logits, tau, seed, kl, stats)
        ctx.dim, ctx.first_row = dim, first_row
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return sample, index, kl

    @staticmethod
    def backward(
        ctx: Any, grad_sample: Tensor | None, grad_index: None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_sample is None and grad_kl is None:
            return None, None, None, None, None, None
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
        incoming = [x for x in (grad_sample, grad_kl) if x is not None]
        with torch.no_grad():
            grad_sample = None if grad_sample is None else grad_sample.contiguous()
            grad_kl = None if grad_kl is None else grad_kl.contiguous()
            grad = _backward(grad_sample, grad_kl, *saved, ctx.dim, ctx.first_row)
        sources = (saved[0], *incoming)
        grads = once_differentiable([grad], sources, _native.SECOND_DERIVATIVE)
        return *grads, None, None, None, None, None


def _contiguous(
    logits: Tensor, tau: Tensor, seed: Tensor, dim: int, hard: bool, first_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """sample, index and kl of contiguous logits over axis `dim` >= 0."""
    if torch.is_grad_enabled() and logits.requires_grad:
        autograd_only("gumbel_softmax")
        outputs: tuple[Tensor, Tensor, Tensor]
        outputs = _Function.apply(logits, tau, seed, dim, hard, first_row)  # type: ignore[no-untyped-call]  # of torch
        return outputs
    return _forward(logits, tau, seed, dim, hard, first_row)[:3]


class GumbelSoftmax(NamedTuple):
    """What `gumbel_softmax` returns.

    Attributes:
        sample: shape and dtype of the logits; sums to 1 over the codebook axis.
        index: int64, the shape without the codebook axis; argmax of the noisy logits.
        kl: float32 (float64 for float64 logits), the shape without the codebook axis, in nats.
    """

    sample: Tensor
    index: Tensor  # type: ignore[assignment]  # a field may hide tuple.index
    kl: Tensor


def _scalar(name: str, value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`value` as a 0-d tensor on `device`, never reading the device."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    numbers_only("gumbel_softmax", **{name: value})
    if value.dim() != 0 or value.device != device:
        got = f"shape {tuple(value.shape)} on {value.device}"
        raise ValueError(f"gumbel_softmax: {name} must be a 0-d tensor on {device}, got {got}")
    if value.is_floating_point() != dtype.is_floating_point or value.dtype == torch.bool:
        raise TypeError(f"gumbel_softmax: {name} must be {dtype}, got {value.dtype}")
    return value.to(dtype)


def gumbel_softmax(
    logits: Tensor,
    tau: float | Tensor,
    *,
    dim: int = 1,
    hard: bool = False,
    seed: int | Tensor | None = None,
    first_row: int = 0,
) -> GumbelSoftmax:
    """Draws relaxed one-hot vectors over `dim`, and the KL term beside them (paper, section 2.1).

    Equivalent to, with Gumbel noise g of the logits' shape::

        sample = ((logits + g) / tau).softmax(dim)
        index = (logits + g).argmax(dim)
        p = logits.softmax(dim); kl = (p * p.log()).sum(dim) + log(K)

    Args:
        logits: any shape, K >= 1 along `dim`; float32, float16, bfloat16 (both computed in
            float32), float64 (computed by the definition in `dalle_ext.reference`). Read where
            they are if contiguous or if contiguous with `dim` moved to the end; else copied once.
        tau: temperature > 0, a float or a 0-d tensor on the logits' device (which is not read on
            the host: a tau that is not positive then gives NaN). No gradient flows to tau, and a
            tensor that requires one is refused.
        dim: the codebook axis.
        hard: give the one-hot vector of `index` forward, the gradient of the soft sample backward.
        seed: of the noise, an int or a 0-d int64 tensor on the logits' device; None draws one from
            torch's default generator. Element number row * K + k takes word (number % 4) of
            Philox4x32-10 call number // 4 on every device. A GPU's logarithms are less exact than
            a CPU's (`docs/ops.md`): `index` may differ where two noisy logits are nearly equal.
        first_row: rows of a larger batch before these, whose noise these get as its part.

    Returns:
        GumbelSoftmax(sample, index, kl). Sample and kl are differentiable once in logits (reverse
        mode). A row with a logit that is NaN or infinite gives NaN and index 0.

    Raises:
        TypeError: dtype of logits, tau or seed; a tau that requires a gradient.
        NotImplementedError: forward-mode tangents (`torch.func.jvp`, `jacfwd`).
        ValueError: dim or first_row out of range, K = 0, tau not positive, a seed or tau of another
            device.
        RuntimeError: no native library for the logits' device.
    """
    if logits.dtype not in DTYPES:
        names = "float32, float64, float16 or bfloat16"
        raise TypeError(f"gumbel_softmax: logits must be {names}, got {logits.dtype}")
    dim = integer("gumbel_softmax", "dim", dim)
    if not -logits.dim() <= dim < logits.dim() or logits.size(dim) == 0:
        raise ValueError(
            f"gumbel_softmax: dim must be an axis of logits that is not empty, got {dim} "
            f"for shape {tuple(logits.shape)}"
        )
    if not isinstance(tau, Tensor):
        if not isinstance(tau, numbers.Real):
            raise TypeError(f"gumbel_softmax: tau must be a float or 0-d tensor, got {tau!r}")
        tau = float(tau)
        if not 0.0 < tau < math.inf:
            raise ValueError(f"gumbel_softmax: tau must be positive and finite, got {tau}")
    first_row = integer("gumbel_softmax", "first_row", first_row)
    if not 0 <= first_row < 2**31:
        raise ValueError(f"gumbel_softmax: first_row must be in [0, 2^31), got {first_row}")
    if seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=logits.device)
    elif not isinstance(seed, Tensor):
        seed = seed_word("gumbel_softmax", seed, "an int or int64 tensor")
    tau = _scalar("tau", tau, torch.float64, logits.device)
    seed = _scalar("seed", seed, torch.int64, logits.device)
    if reference_in_use() or logits.dtype == torch.float64:
        options: Any = {"dim": dim, "hard": hard, "seed": seed, "first_row": first_row}
        return GumbelSoftmax(*reference.gumbel_softmax(logits, tau, **options))
    _native.require("gumbel_softmax", logits.device)
    if logits.is_contiguous():
        axis = dim % logits.dim()
        return GumbelSoftmax(*_contiguous(logits, tau, seed, axis, hard, first_row))
    rows = logits.movedim(dim, -1).contiguous()  # no copy where the codebook axis is innermost
    sample, index, kl = _contiguous(rows, tau, seed, rows.dim() - 1, hard, first_row)
    return GumbelSoftmax(sample.movedim(-1, dim), index, kl)
