"""The Gumbel-softmax relaxation of a codebook choice: the public function.

Letters: K codebook size, R rows (all other axes in logical order).
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch

from dalle_ext import _native
from dalle_ext._checks import integer, numbers_only, seed_word
from dalle_ext._switch import reference_in_use
from dalle_ext.ops import gumbel_softmax_native as native
from dalle_ext.reference import gumbel_softmax as reference

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
        seed: of the noise, an int or a 0-d int64 tensor on the logits' device. The same seed gives
            the same noise on every device: element number row * K + k takes word (number % 4) of
            Philox4x32-10 call number // 4. None draws a seed from torch's default generator, so
            that `torch.manual_seed` fixes it.
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
        given: Any = {"dim": dim, "hard": hard, "seed": seed, "first_row": first_row}
        return GumbelSoftmax(*reference.gumbel_softmax(logits, tau, **given))
    _native.require("gumbel_softmax", logits.device)
    if logits.is_contiguous():
        axis = dim % logits.dim()
        return GumbelSoftmax(*native.gumbel_softmax(logits, tau, seed, axis, hard, first_row))
    rows = logits.movedim(dim, -1).contiguous()  # no copy where the codebook axis is innermost
    sample, index, kl = native.gumbel_softmax(rows, tau, seed, rows.dim() - 1, hard, first_row)
    return GumbelSoftmax(sample.movedim(-1, dim), index, kl)
