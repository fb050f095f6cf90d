"""Checks that public functions share: integers, and gradients that would be lost in silence."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterator, Sequence
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
        got = f"{value!r:.100}"
        if "\n" in got:  # an array, or a tensor
            got = tensor_text(value) if isinstance(value, torch.Tensor) else type(value).__name__
        raise error(f"{owner}: {argument} must be {requirement}, got {got}")
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


def finite(op: str, name: str, value: Any, least: float = -math.inf) -> float:
    """`value`, a number of any kind (see `real`), as a float.

    Raises:
        TypeError: a tensor that requires a gradient while gradients are recorded.
        ValueError: no number, not finite, or below `least`.
    """
    if type(value) is float and least <= value and -math.inf < value < math.inf:
        return value  # of every step
    numbers_only(op, **{name: value})
    number = real(value)
    if not (math.isfinite(number) and number >= least):
        want = "a finite number" + (f" of at least {least:g}" if least > -math.inf else "")
        if isinstance(value, torch.Tensor):
            single = value.numel() == 1 and not value.is_complex()
            got = f"{number}" if single else tensor_text(value)
        elif isinstance(value, numbers.Real):
            got = f"{number}"
        else:  # an array has a text of several lines
            got = f"{value!r:.100}" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{op}: {name} must be {want}, got {got}")
    return number


def tensor_text(x: torch.Tensor) -> str:
    """Shape, dtype, and strides where not contiguous, as in a message of a native op."""
    text = f"{shape_text(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
    return text if x.is_contiguous() else f"{text} with strides {shape_text(x.stride())}"


def shape_text(numbers: Sequence[int]) -> str:
    """(3), not (3,)."""
    return f"({', '.join(map(str, numbers))})"


def _layers(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor and, inside transforms of `torch.func`, the tensors that it wraps, from outside."""
    yield tensor
    if torch.compiler.is_compiling():  # the compiler sees through them
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def _tensors(values: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in values.items():
        listed = value if isinstance(value, (list, tuple)) else (value,)
        yield from ((name, x) for x in listed if isinstance(x, torch.Tensor))


def _has_tangent(tensor: torch.Tensor) -> bool:
    return any(forward_ad.unpack_dual(x).tangent is not None for x in _layers(tensor))


def numbers_only(op: str, **arguments: Any) -> None:
    """Raises where an argument that no gradient flows to is a tensor that wants one, or holds one.

    Raises:
        TypeError: a tensor that requires a gradient while gradients are recorded, or that carries
            a forward-mode tangent.
    """
    recording = torch.is_grad_enabled()
    for name, tensor in _tensors(arguments):
        wanted = recording and any(x.requires_grad for x in _layers(tensor))
        if wanted or _has_tangent(tensor):
            raise TypeError(
                f"{op}: {name} must not require a gradient, got a tensor that does; none flows to "
                "it: pass it detached"
            )


def no_tangent(op: str, **arguments: Any) -> None:
    """Raises TypeError where an argument is or holds a tensor with a forward-mode tangent."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in _tensors(arguments):
        if _has_tangent(tensor):
            raise TypeError(
                f"{op}: {name} must be without a forward-mode tangent, got one; no derivative "
                "flows: pass it detached"
            )


def plain_memory(op: str, **arguments: Any) -> None:
    """Raises where an argument of an op that works on memory in place is not a plain tensor.

    Raises:
        TypeError: a tensor with a forward-mode tangent, or one inside a transform of `torch.func`,
            which has no memory of its own.
    """
    no_tangent(op, **arguments)
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return
    for name, tensor in _tensors(arguments):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise TypeError(
                f"{op}: {name} must be plain tensors, got one of a transform of torch.func (grad, "
                "vmap, jvp)"
            )


def untracked(op: str, **arguments: torch.Tensor) -> None:
    """`numbers_only` and `plain_memory`, in a microsecond where nothing is tracked.

    Raises:
        TypeError: as those do, and for what is no tensor or is sparse.
    """
    wanted = False
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got {value.layout}")
        wanted = wanted or value.requires_grad
    transformed = (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )
    if transformed or forward_ad._current_level >= 0 or (wanted and torch.is_grad_enabled()):
        numbers_only(op, **arguments)
        plain_memory(op, **arguments)


def autograd_only(op: str) -> None:
    """Raises NotImplementedError inside a transform of `torch.func`, for an `autograd.Function`."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{op}: gradients must be those of torch.autograd, got a transform of torch.func; use "
            "torch.autograd.grad, or dalle_ext.use_reference()"
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
