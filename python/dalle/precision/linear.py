"""A linear layer in 16 bits whose bias and bias gradient are fp32 (paper appendix D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.errors import SECOND_DERIVATIVE
from dalle_ext._checks import once_differentiable


class _Linear(torch.autograd.Function):
    """x W^T + b with x, W and the gradients of both in x's 16-bit dtype, sums in fp32.

    No CPU has a fast fp16 product in torch, so there the fp16 values are multiplied in fp32 and
    the result rounded once: what a GPU's matrix units do, up to the order of the sums.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        if widened(x):
            return F.linear(x.float(), weight.to(x.dtype).float(), bias.float()).to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        with torch.no_grad():
            gradients = _Linear.gradients(x, weight, grad, ctx.bias_dtype)
        return once_differentiable(gradients, (grad, x, weight), SECOND_DERIVATIVE)

    @staticmethod
    def gradients(
        x: Tensor, weight: Tensor, grad: Tensor, bias_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, rows = x.dtype, grad.reshape(-1, grad.shape[-1])
        grad_rows, x_rows, w = rows, x.reshape(-1, x.shape[-1]), weight.to(dtype)
        if widened(x):
            grad_rows, x_rows, w = grad_rows.float(), x_rows.float(), w.float()
        grad_x = (grad_rows @ w).to(dtype).view(x.shape)
        grad_weight = (grad_rows.t() @ x_rows).to(dtype).to(weight.dtype)
        return grad_x, grad_weight, rows.sum(0, dtype=torch.float32).to(bias_dtype)


def widened(x: Tensor) -> bool:
    """Whether products of x are made in fp32."""
    return x.dtype == torch.float16 and x.device.type == "cpu"


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer` in x's dtype; the parameters stay as they are stored.

    Equivalent to `F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))`, with the bias
    gradient summed in fp32 and, where x is fp16 on the CPU, the products made in fp32.
    """
    y: Tensor
    if layer.weight.dtype == x.dtype == layer.bias.dtype:
        y = layer(x)
    else:
        y = _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]  # of torch
    return y
