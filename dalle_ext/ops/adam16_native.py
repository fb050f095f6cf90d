"""The raw op of `adam16`: its fake kernel, and what `AdamW16` checks before it."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch

from dalle_ext import _native
from dalle_ext._checks import real, seed_word

Tensor = torch.Tensor
GROUP_STRIDE = 0xBF58476D1CE4E5B9  # between the seeds of parameter groups, odd and irregular


def _step_fake(*_: object) -> None:
    return None


if _native.CPU_PROBLEM is None:
    step_ = _native.register("_adam16_step_", _step_fake)


def check_group(group: Mapping[str, Any]) -> None:
    """Raises unless a parameter group's numbers make sense and its parameters can be updated."""
    lr, betas = group["lr"], group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"AdamW16: betas must be two numbers, got {betas!r}")
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.dtype != torch.float32:
            raise TypeError(
                f"AdamW16: lr must be a number or one float32, got {tuple(lr.shape)} {lr.dtype}"
            )
        lr = 0.0  # not looked at: it may live on a GPU
    values = {"lr": lr, "betas[0]": betas[0], "betas[1]": betas[1], "eps": group["eps"]}
    values |= {name: group[name] for name in ("weight_decay", "variance_clip")}
    for name, value in values.items():
        number, holds, requirement = real(value), False, "0 or more and finite"
        if name.startswith("betas"):
            holds, requirement = 0 <= number < 1, "0 or more and below 1"
        elif name == "variance_clip":
            holds, requirement = number > 0, "above 0"
        else:
            holds = 0 <= number < math.inf
        if not holds:
            raise ValueError(f"AdamW16: {name} must be {requirement}, got {value}")
    seed_word("AdamW16", group["seed"])
    for param in group["params"]:
        _native.require_floating("AdamW16", "params", param.dtype)
    if len({id(param) for param in group["params"]}) < len(group["params"]):
        raise ValueError("AdamW16: params must be different tensors, got one of them twice")
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
    return torch.full((), float(value), dtype=torch.float32, device=device)


def tensors_of(
    index: int, group: Mapping[str, Any], scales: Tensor | None,
    clip_factor: float | Tensor | None, found: bool | Tensor | None, device: torch.device,
) -> list[Tensor | None]:  # fmt: skip
    """What the kernel reads on the device: scales, clip factor, flag, step size, seed."""
    # Not seed + index: the second group of a seed would round as the first of the next one.
    word = (operator.index(group["seed"]) + index * GROUP_STRIDE + 2**63) % 2**64 - 2**63
    seed = torch.full((), word, dtype=torch.int64, device=device)
    lr = group["lr"] if isinstance(group["lr"], Tensor) else None
    clip = one_float("clip_factor", clip_factor, device)
    flag = one_float("found_nonfinite", found, device)
    return [scales, clip, flag, one_float("lr", lr, device), seed]


def numbers_of(group: Mapping[str, Any]) -> list[float]:
    """Whether to round parameters at random, lr, betas, eps, weight decay, variance clip."""
    lr = 0.0 if isinstance(group["lr"], Tensor) else group["lr"]
    others = (group["eps"], group["weight_decay"], group["variance_clip"])
    return [bool(group["stochastic_rounding"]), *map(float, (lr, *group["betas"], *others))]
