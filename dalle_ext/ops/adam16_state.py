"""The state of `AdamW16`: made, checked and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

Tensor = torch.Tensor
CODED_FROM = 8192  # elements; smaller tensors keep float32 moments (paper, earlier code)


def moment_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """int16 codes, or float32 in small tensors and where the parameter group asks for it."""
    fp32 = param.numel() < CODED_FROM or group["fp32_moments"]
    return torch.float32 if fp32 else torch.int16


def moments_like(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """A fresh state: no update yet, moments zero (code 0 is zero)."""
    dtype = moment_dtype(param, group)
    return {
        "step": torch.zeros((), device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
    }


def check_state(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Raises unless a state dict is of parameters like these."""
    saved = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    found = [len(group["params"]) for group in saved]
    if sizes != found:
        raise ValueError(f"AdamW16: state must be of groups of {sizes} parameters, got {found}")
    params = [(param, group) for group in groups for param in group["params"]]
    ids = [i for group in saved for i in group["params"]]
    for index, (param, group) in zip(ids, params, strict=True):
        for name, value in state_dict["state"].get(index, {}).items():
            shape = () if name == "step" else tuple(param.shape)
            wanted = torch.float32 if name == "step" else moment_dtype(param, group)
            if tuple(value.shape) != shape or value.dtype != wanted:
                what = f"AdamW16: state {name} of parameter {index} must be {shape} {wanted}"
                raise ValueError(f"{what}, got {tuple(value.shape)} {value.dtype}")


def restore(
    state: Mapping[Tensor, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
) -> None:
    """Puts a checked state dict's tensors into the state with their own dtypes."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [param for group in groups for param in group["params"]]
    for i, param in zip(ids, params, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            like = value if name == "step" else param
            fresh = torch.empty_like(like, dtype=value.dtype, device=param.device)
            state[param][name] = fresh.copy_(value)
