"""The two ends of a residual block with its own gradient scale (paper Figure 4).

Forward they only change the dtype. Backward, the gradient that enters the block from the identity
path is multiplied by the scale, and what leaves the block is divided by it and added to the
identity path's; both ends set infinities and NaN to zero.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import dalle_ext
from dalle.errors import SECOND_DERIVATIVE, UsageError
from dalle.precision import branch
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

    Made by `ResblockScaler`, one for each block. The first forward pass that records gradients is
    looked at, unless it is compiled: between the ends there must be one branch. An identity path in
    there would carry the scaled gradient out of the block.

    Args:
        scale: 0-d fp32, a view of the scaler's.
        name: of the block, for messages.
        number: of the block in `groups`.
        groups: parameter -> number of its block, where it is known.

    Attributes:
        probe: collects what the backward passes count, as a gradient, so that it also arrives from
            compiled and recomputed blocks.
        sampling: whether the exponents of the gradient are counted too.
        checked: whether the branch was found to be one.
    """

    def __init__(
        self,
        scale: Tensor,
        name: str = "",
        number: int = 0,
        groups: Mapping[Tensor, int] | None = None,
    ) -> None:
        self.scale, self.name, self.number, self.groups = scale, name, number, groups
        size = len(COUNTS) + 1 + BINS
        self.probe = torch.zeros(size, dtype=torch.float64, device=scale.device).requires_grad_()
        self.sampling = self.checked = False

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles: without the parameters, which the scaler gives back."""
        return {**self.__dict__, "groups": None}

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 x (any shape) -> the identity path and the branch's input, both x."""
        ends: tuple[Tensor, Tensor] = _Enter.apply(x, self.scale)  # type: ignore[no-untyped-call]  # of torch
        return ends

    def leave(self, y: Tensor) -> Tensor:
        """The branch's output in any dtype -> fp32; its gradient is scaled in y's dtype.

        Raises:
            UsageError: the first time, where `enter` and `leave` do not surround one branch.
        """
        if self._unchecked():
            self._check(y)
        out: Tensor
        out = _Leave.apply(y, self.scale, self.probe, self.sampling)  # type: ignore[no-untyped-call]  # of torch
        return out

    def _unchecked(self) -> bool:
        # First whether it is compiled, so that the compiler guards on nothing else.
        return not torch.compiler.is_compiling() and not self.checked and torch.is_grad_enabled()

    def _check(self, y: Tensor, branch_input: Tensor | None = None) -> None:
        if y.grad_fn is None:
            return
        enter, leave = _Enter._backward_cls, _Leave._backward_cls
        fault = branch.fault_of(y, enter, leave, self._owned(), branch_input)
        if fault is not None:
            raise self.error(fault)
        self.checked = branch.has_input(y, enter)

    def _owned(self) -> Callable[[Tensor], bool] | None:
        """Whether a leaf of the graph is a parameter of this block; None where it cannot be known.

        FSDP2 computes with other tensors than the parameters, which are `DTensor`s.
        """
        groups, number = self.groups, self.number
        if groups is None or any(hasattr(param, "device_mesh") for param in groups):
            return None
        return lambda leaf: groups.get(leaf) == number

    def error(self, fault: str) -> UsageError:
        """One line about this block."""
        name = f" {self.name}" if self.name else ""
        return UsageError(
            f"ResblockScaler: the ends of block{name} must hold one branch, got {fault}"
        )

    def hook(self, first: nn.Module, last: nn.Module) -> list[RemovableHandle]:
        """Puts the ends around a branch that begins with `first` and ends with `last`.

        For blocks whose code must stay unchanged: `first` (its norm) gets the branch's input,
        `last` returns fp32 whatever it computed. Remove with the handles returned. A block
        `x = x + f(norm1(x)); x = x + g(norm2(x))` has two branches, so it is two blocks of the
        scaler, with hooks of (norm1, f) and (norm2, g).

        Raises, in the first forward pass that records gradients and is not compiled:
            UsageError: there is not one branch between the two; an identity path lies there, or
                the input is changed in place, or `first` or `last` do not take and return a tensor.
        """
        self.checked = False
        calls = threading.local()  # forward passes may run side by side

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if not args or not isinstance(args[0], Tensor):
                what = type(args[0]).__name__ if args else "keywords alone"
                raise self.error(f"{what} where its first module takes a tensor")
            y = self.enter(args[0])[1]
            if self._unchecked():
                # A copy, because torch would refuse a change in place in its own words.
                y = y.clone()
                calls.open = _Call(self, y)
            return y, *args[1:]

        def after(_: nn.Module, __: tuple[Any, ...], result: Tensor) -> Tensor:
            if not isinstance(result, Tensor):
                raise self.error(f"{type(result).__name__} where its last module returns a tensor")
            if self._unchecked():
                call, calls.open = getattr(calls, "open", None), None
                self._check(result, None if call is None else call.close())
            return self.leave(result)

        return [first.register_forward_pre_hook(before), last.register_forward_hook(after)]


class _Call:
    """A forward pass of a hooked branch that is looked at."""

    def __init__(self, ends: BlockEnds, branch_input: Tensor) -> None:
        self.ends = ends
        self.branch_input: Tensor | None = branch_input
        if branch_input.requires_grad:
            branch_input.register_hook(self._backward)

    def close(self) -> Tensor | None:
        """The branch's input, which is let go: its hook refers to this object."""
        branch_input, self.branch_input = self.branch_input, None
        if branch_input is not None and branch_input._version:
            raise self.ends.error("one that changes its input in place")
        return branch_input

    def _backward(self, _: Tensor) -> None:
        if self.branch_input is not None:
            raise self.ends.error("one whose last module was not called")
