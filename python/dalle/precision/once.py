"""First-order gradients: a second derivative raises an error instead of being silently zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "dalle: gradients of this model must be differentiated once, got a derivative of a "
            "gradient; use precision fp32 and parts 1"
        )


def once(grads: tuple[Tensor, ...], *sources: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradients; differentiating them by any of `sources` raises an error.

    Torch's `once_differentiable` lets it be zero where the incoming gradient is a constant.

    Raises, when a second derivative is computed:
        NotImplementedError: in one line.
    """
    if not torch.is_grad_enabled():  # no create_graph
        return grads
    return tuple(_Once.apply(grad, *sources) for grad in grads)  # type: ignore[no-untyped-call]  # of torch
