"""The two ends of a residual block with its own gradient scale (paper Figure 4).

Forward they only change the dtype. Backward, the gradient that enters the block from the identity
path is multiplied by the scale, and what leaves the block is divided by it and added to the
identity path's; both ends set infinities and NaN to zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import dalle_ext
from dalle.errors import SECOND_DERIVATIVE
from dalle_ext._checks import once_differentiable

COUNTS = ("overflow", "underflow", "subnormal", "nonfinite")  # of `scale_gradient`
LOWEST, BINS = -64, 80  # exponents of the histogram: floor(log2 |g|) from -64 to 15
SAMPLED = 4096  # gradient elements a block looks at for its histogram


class _Enter(torch.autograd.Function):
    """x -> identity path, input of the branch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scale)
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, stream: Tensor, branch: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grad = dalle_ext.unscale_gradient(stream, branch, ctx.saved_tensors[0])
        return *once_differentiable([grad], (stream, branch), SECOND_DERIVATIVE), None


class _Leave(torch.autograd.Function):
    """Output of the branch -> fp32; the counts leave the backward pass as the probe's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, probe: Tensor, sampling: bool) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype, ctx.sampling = y.dtype, sampling
        return y.float() if y.dtype != torch.float32 else y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            scaled, counts = dalle_ext.scale_gradient(grad, ctx.saved_tensors[0], dtype=ctx.dtype)
            size = counts.new_full((1,), grad.numel())
            bins = exponents(grad) if ctx.sampling else counts.new_zeros(BINS)
            counted = torch.cat([counts, size, bins]).double()
        return *once_differentiable([scaled], (grad,), SECOND_DERIVATIVE), None, counted, None


def exponents(grad: Tensor) -> Tensor:
    """(BINS,) int64 histogram of floor(log2 |g|) over about 4,096 nonzero finite elements."""
    flat = grad.detach().reshape(-1).float()
    stride = max(1, flat.numel() // SAMPLED) | 1  # odd, so that it meets every channel
    sample = flat[::stride]
    exponent = torch.frexp(sample).exponent - 1
    usable = sample.isfinite() & (sample != 0)
    bin_index = torch.where(usable, (exponent - LOWEST).clamp(0, BINS - 1), -1)
    return (bin_index[:, None] == torch.arange(BINS, device=grad.device, dtype=torch.int64)).sum(0)


class BlockEnds:
    """The ends of one residual block: `x, y = enter(x)`, then `x + leave(branch(y))`.

    Made by `ResblockScaler`, one for each block.

    Attributes:
        scale: 0-d fp32, a view of the scaler's.
        probe: collects what the backward passes count, as a gradient, so that it also arrives from
            compiled and recomputed blocks.
        sampling: whether the exponents of the gradient are counted too.
    """

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        size = len(COUNTS) + 1 + BINS
        self.probe = torch.zeros(size, dtype=torch.float64, device=scale.device).requires_grad_()
        self.sampling = False

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 x (any shape) -> the identity path and the branch's input, both x."""
        ends: tuple[Tensor, Tensor] = _Enter.apply(x, self.scale)  # type: ignore[no-untyped-call]  # of torch
        return ends

    def leave(self, y: Tensor) -> Tensor:
        """The branch's output in any dtype -> fp32; its gradient is scaled in y's dtype."""
        out: Tensor
        out = _Leave.apply(y, self.scale, self.probe, self.sampling)  # type: ignore[no-untyped-call]  # of torch
        return out

    def hook(self, first: nn.Module, last: nn.Module) -> list[RemovableHandle]:
        """Puts the ends around a branch that begins with `first` and ends with `last`.

        For blocks whose code must stay unchanged: `first` (its norm) gets the branch's input,
        `last` returns fp32 whatever it computed. Remove with the handles returned.
        """

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return self.enter(args[0])[1], *args[1:]

        def after(_: nn.Module, __: tuple[Any, ...], result: Tensor) -> Tensor:
            return self.leave(result)

        return [first.register_forward_pre_hook(before), last.register_forward_hook(after)]
