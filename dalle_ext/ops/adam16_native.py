"""The raw op of `adam16`: its fake kernel, and what `AdamW16` checks before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dalle_ext import _native

Tensor = torch.Tensor


def _step_fake(*_: object) -> None:
    return None


if _native.CPU_PROBLEM is None:
    step_ = torch.ops.dalle_ext._adam16_step_.default
    torch.library.register_fake("dalle_ext::_adam16_step_", _step_fake)


def check_group(group: Mapping[str, Any]) -> None:
    """Raises unless a parameter group's numbers make sense and its parameters can be updated."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.dtype != torch.float32:
            raise TypeError(
                f"AdamW16: lr must be a number or one float32, got {tuple(lr.shape)} {lr.dtype}"
            )
        lr = 0.0  # not looked at: it may live on a GPU
    rules = {
        "lr": (lr, 0 <= lr < math.inf, "0 or more and finite"),
        "betas[0]": (beta1, 0 <= beta1 < 1, "0 or more and below 1"),
        "betas[1]": (beta2, 0 <= beta2 < 1, "0 or more and below 1"),
        "eps": (group["eps"], 0 <= group["eps"] < math.inf, "0 or more and finite"),
        "weight_decay": (group["weight_decay"], 0 <= group["weight_decay"] < math.inf,
                         "0 or more and finite"),
        "variance_clip": (group["variance_clip"], group["variance_clip"] > 0, "above 0"),
    }  # fmt: skip
    for name, (value, holds, requirement) in rules.items():
        if not holds:
            raise ValueError(f"AdamW16: {name} must be {requirement}, got {value}")
    for param in group["params"]:
        _native.require_floating("AdamW16", "params", param.dtype)
    devices = sorted({str(param.device) for param in group["params"]})
    if len(devices) > 1:
        raise ValueError(
            f"AdamW16: params of a group must be on one device, got {' and '.join(devices)}"
        )


def check_grad(param: Tensor) -> Tensor:
    """The parameter's gradient, in the parameter's memory order."""
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise TypeError(f"AdamW16: gradients must be dense, got {grad.layout}")
    _native.require_floating("AdamW16", "gradients", grad.dtype)
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return grad


def one_float(name: str, value: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A number, flag or 0-d tensor as one float32 on the device, without waiting for it."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"AdamW16: {name} must be one number, got {tuple(value.shape)}")
        return value.detach().to(device, torch.float32)
    return torch.full((), float(value), device=device)


def tensors_of(
    index: int, group: Mapping[str, Any], scales: Tensor | None,
    clip_factor: float | Tensor | None, found: bool | Tensor | None, device: torch.device,
) -> list[Tensor | None]:  # fmt: skip
    """What the kernel reads on the device: scales, clip factor, flag, step size, seed."""
    seed = None
    if group["stochastic_rounding"]:
        seed = torch.full((), group["seed"] + index, dtype=torch.int64, device=device)
    lr = group["lr"] if isinstance(group["lr"], Tensor) else None
    clip = one_float("clip_factor", clip_factor, device)
    flag = one_float("found_nonfinite", found, device)
    return [scales, clip, flag, one_float("lr", lr, device), seed]


def numbers_of(group: Mapping[str, Any]) -> list[float]:
    """Step size, betas, eps, weight decay, variance clip."""
    lr = 0.0 if isinstance(group["lr"], Tensor) else group["lr"]
    return [lr, *group["betas"], group["eps"], group["weight_decay"], group["variance_clip"]]
