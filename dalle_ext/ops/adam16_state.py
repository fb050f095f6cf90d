"""The state of `AdamW16`: made, checked, given away and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dalle_ext._tensor_table import local_part

Tensor = torch.Tensor
STATE = ("exp_avg", "exp_avg_sq", "step")
CODED_FROM = 8192  # elements; smaller tensors keep float32 moments (paper, earlier code)


def moment_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """int16 codes, or float32 in small tensors and where the parameter group asks for it."""
    fp32 = param.numel() < CODED_FROM or group["fp32_moments"]
    return torch.float32 if fp32 else torch.int16


def moments_like(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """A fresh state: no update yet, moments zero (code 0 is zero)."""
    dtype = moment_dtype(param, group)
    return {
        "step": torch.zeros((), dtype=torch.int64, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
    }


def portable(value: Any) -> Any:
    """Codes of a `DTensor` as (..., 2) bytes that share its memory; anything else as it is.

    No collective of gloo or NCCL takes int16, so that codes could not be gathered.
    """
    if not hasattr(value, "to_local") or value.dtype != torch.int16:
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value.to_local().unsqueeze(-1).view(torch.uint8),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=torch.Size((*value.shape, 2)),
        stride=(*(2 * stride for stride in value.stride()), 1),
    )


def check_state(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError unless a state dict is of parameters like these."""
    saved = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    found = [len(group["params"]) for group in saved]
    if sizes != found:
        raise ValueError(f"AdamW16: state must be of groups of {sizes} parameters, got {found}")
    params = [(p, own, s) for own, s in zip(groups, saved, strict=True) for p in own["params"]]
    ids = [i for group in saved for i in group["params"]]
    for index, (param, own, group) in zip(ids, params, strict=True):
        values = state_dict["state"].get(index, {})
        if values and set(values) != set(STATE):
            names = ", ".join(map(str, sorted(values)))
            raise ValueError(
                f"AdamW16: state of parameter {index} must be {', '.join(STATE)}, got {names}"
            )
        kept = {"fp32_moments": group.get("fp32_moments", own["fp32_moments"])}
        for name, value in values.items():
            if name != "step":
                _check_moment(name, index, param, moment_dtype(param, kept), value)
            elif not isinstance(value, (int, float)) and value.numel() != 1:
                got = tuple(value.shape)
                raise ValueError(
                    f"AdamW16: state step of parameter {index} must be a number, got {got}"
                )


def _check_moment(name: str, index: int, param: Tensor, dtype: torch.dtype, value: Any) -> None:
    shape = tuple(param.shape)
    got = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (type(value), None)
    allowed = [(shape, dtype)]
    if dtype == torch.int16:
        allowed.append(((*shape, 2), torch.uint8))
    if got not in allowed:
        what = f"AdamW16: state {name} of parameter {index} must be {shape} {dtype}"
        raise ValueError(f"{what}, got {got[0]} {got[1]}")
    if hasattr(value, "to_local") and not hasattr(param, "to_local"):
        what = f"AdamW16: state {name} of parameter {index} must be a whole tensor"
        raise ValueError(f"{what}, got a DTensor; gather it with full_tensor()")


def restore(
    state: Mapping[Tensor, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
) -> None:
    """Puts copies of a checked state dict's tensors into the state with their own dtypes."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [param for group in groups for param in group["params"]]
    for i, param in zip(ids, params, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            state[param][name] = (
                counter(value, param) if name == "step" else _moment(value, param.detach())
            )


def counter(value: Any, param: Tensor) -> Tensor:
    """A number of updates as one int64; states of earlier versions have a float32."""
    return torch.full((), int(value), dtype=torch.int64, device=param.device)


def _moment(value: Tensor, param: Tensor) -> Tensor:
    mesh = getattr(param, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        placements = param.placements  # type: ignore[attr-defined]
        if isinstance(value, DTensor):
            value = value.redistribute(mesh, placements)
        else:
            value = value.to(param.device)
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    own = local_part(value)
    if own.dtype == torch.uint8:
        own = own.contiguous().view(torch.int16).squeeze(-1)
    fresh = torch.empty_like(param, dtype=own.dtype)
    local_part(fresh).copy_(own)
    return fresh
