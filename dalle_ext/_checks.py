"""Checks that public functions share: integers, and gradients that would be lost in silence."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad


def integer(
    owner: str,
    argument: str,
    value: Any,
    minimum: int | None = None,
    below: int | None = None,
    *,
    requirement: str | None = None,
    error: type[Exception] = ValueError,
) -> int:
    """`value` as an int: any type with `__index__`, as numpy's integers and 0-d integer tensors.

    Args:
        owner, argument: what the message names.
        minimum, below: bounds, the second exclusive.
        requirement: in the message, in place of one made of the bounds.
        error: class that is raised.

    Raises:
        error: not an integer (a bool is none), or out of bounds.
    """
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # torch's tensors raise either
        number = None
    boolean = isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool
    low, high = minimum is None or minimum <= (number or 0), below is None or (number or 0) < below
    if number is None or boolean or not (low and high):
        if requirement is None:
            requirement = "an integer" if minimum is None else f"an integer of at least {minimum}"
            requirement += "" if below is None else f" and below {below}"
        raise error(f"{owner}: {argument} must be {requirement}, got {value!r}")
    return number


def seed_word(owner: str, seed: Any, requirement: str = "an integer") -> int:
    """A seed as an int of 64 bits with sign. Raises TypeError for no integer, else ValueError."""
    number = integer(owner, "seed", seed, requirement=requirement, error=TypeError)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{owner}: seed must fit 64 bits, got {number}")
    return number


def real(value: Any) -> float:
    """A number of any kind (Python's, numpy's, one-element tensors) as a float; NaN for others."""
    if isinstance(value, torch.Tensor):
        return float(value.detach()) if value.numel() == 1 and not value.is_complex() else math.nan
    try:
        return float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:  # of an integer beyond them
        return math.inf if value > 0 else -math.inf


def numbers_only(op: str, **arguments: Any) -> None:
    """Raises where an argument that no gradient flows to is a tensor that wants one.

    Raises:
        TypeError: a tensor that requires a gradient while gradients are recorded, or that carries
            a forward-mode tangent.
    """
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        wanted = value.requires_grad and torch.is_grad_enabled()
        if wanted or forward_ad.unpack_dual(value).tangent is not None:
            raise TypeError(
                f"{op}: {name} must not require a gradient, got a tensor that does; none flows to "
                "it: pass it detached"
            )


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, message: str, *sources: torch.Tensor) -> torch.Tensor:
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(ctx.message)


def once_differentiable(
    grads: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], message: str
) -> tuple[torch.Tensor, ...]:
    """The gradients a backward pass returns, so that differentiating them is an error.

    torch's decorator of this name lets a second derivative be zero in silence where the incoming
    gradient is a constant, and where only derivatives by the op's inputs are asked for.

    Args:
        grads: the gradients to return.
        sources: the tensors they were computed from.
        message: one line of the error.

    Raises, when a second derivative is computed:
        NotImplementedError: `message`.
    """
    if not torch.is_grad_enabled():  # no create_graph
        return tuple(grads)
    return tuple(_FirstOrder.apply(grad, message, *sources) for grad in grads)  # type: ignore[no-untyped-call]  # of torch
