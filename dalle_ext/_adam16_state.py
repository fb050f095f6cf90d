"""The state of `AdamW16`: how it is saved, checked, loaded, and converted from and to AdamW's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dalle_ext._tensor_table import local_part
from dalle_ext.ops.formats import pack, unpack

Tensor = torch.Tensor
FORMATS = {"exp_avg": "1-6-9", "exp_avg_sq": "0-6-10"}
MAX_CODED = 15.984375  # of 1-6-9
STATE = (*FORMATS, "step")
MIN_CODED_NUMEL = 8192  # smaller tensors keep float32 moments (paper, earlier code)
# Options of AdamW16 alone.
ADAMW16_OPTIONS = ("variance_clip", "stochastic_rounding", "seed", "fp32_moments")
TORCH_OPTIONS = {  # of `torch.optim.AdamW` alone, with its defaults
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def moment_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """int16 codes, or float32 in small tensors and where the parameter group asks for it."""
    fp32 = param.numel() < MIN_CODED_NUMEL or group["fp32_moments"]
    return torch.float32 if fp32 else torch.int16


def initial_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The initial state: no update yet, moments zero (code 0 is zero)."""
    dtype = moment_dtype(param, group)
    return {
        "step": torch.zeros((), dtype=torch.int64, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
    }


def codes_as_bytes(value: Any) -> Any:
    """Codes of a `DTensor` as (..., 2) bytes that share its memory; anything else unchanged.

    No collective of gloo or NCCL takes int16, so codes could not be gathered.
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


def of_adamw(group: Mapping[str, Any]) -> bool:
    """Whether a group of a state dict was saved by `torch.optim.AdamW`."""
    return ADAMW16_OPTIONS[0] not in group


def as_adamw(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of `AdamW16` as `torch.optim.AdamW` takes it, with float32 moments."""
    groups = [
        TORCH_OPTIONS
        | {
            name: value
            for name, value in group.items()
            if name not in (*ADAMW16_OPTIONS, *TORCH_OPTIONS)
        }
        for group in state_dict["param_groups"]
    ]
    state = {
        index: {
            name: value.to(torch.float32, copy=True) if name == "step" else _widened(name, value)
            for name, value in values.items()
        }
        for index, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state, "param_groups": groups}


def _widened(name: str, value: Tensor) -> Tensor:
    """A moment in float32, in memory of its own."""
    if value.dtype == torch.float32:
        return value.clone()
    if not hasattr(value, "to_local"):
        return torch.empty_like(value, dtype=torch.float32).copy_(unpack(value, FORMATS[name]))
    from torch.distributed.tensor import DTensor

    assert isinstance(value, DTensor)
    return DTensor.from_local(
        unpack(value.to_local(), FORMATS[name]),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def adamw16_options(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The groups of a state dict with AdamW16's options alone; missing ones stay what they are.

    Raises:
        ValueError: other numbers of parameters, groups of another optimizer, AMSGrad, ascent, or a
            weight decay that is added to the gradient.
    """
    sizes = [len(group["params"]) for group in groups]
    got = [len(group["params"]) for group in saved]
    if sizes != got:
        raise ValueError(f"AdamW16: state must be of groups of {sizes} parameters, got {got}")
    for group in saved:
        names = ("lr", "betas", "eps", "weight_decay")
        missing = [name for name in names if name not in group]
        if missing:
            known = ", ".join(map(str, sorted(group.keys() - {"params"})))
            raise ValueError(
                "AdamW16: state must be of AdamW16 or torch.optim.AdamW, got groups without "
                f"{' and '.join(missing)} ({known})"
            )
        if of_adamw(group):
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"AdamW16: {name} of the state must be False, got True")
            if not group.get("decoupled_weight_decay", True) and group["weight_decay"] != 0:
                raise ValueError(
                    "AdamW16: weight_decay of the state must be decoupled or 0, got "
                    f"{group['weight_decay']} of an Adam that adds it to the gradient"
                )
    return [
        {name: value for name, value in loaded.items() if name not in TORCH_OPTIONS}
        | {name: group[name] for name in ADAMW16_OPTIONS if name not in loaded}
        for group, loaded in zip(groups, saved, strict=True)
    ]


def check_state(
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
    options: Sequence[Mapping[str, Any]],
) -> None:
    """Raises ValueError unless a state dict is of parameters like these.

    Args:
        groups: of the optimizer.
        state_dict: as it was given.
        options: its groups, from `adamw16_options`.
    """
    saved = state_dict["param_groups"]
    ids = [(i, of_adamw(group)) for group in saved for i in group["params"]]
    params = [(p, o) for group, o in zip(groups, options, strict=True) for p in group["params"]]
    for (index, foreign), (param, group) in zip(ids, params, strict=True):
        values = state_dict["state"].get(index, {})
        if values and set(values) != set(STATE):
            names = ", ".join(map(str, sorted(values)))
            raise ValueError(
                f"AdamW16: state of parameter {index} must be {', '.join(STATE)}, got {names}"
            )
        for name, value in values.items():
            if name != "step":
                _check_moment(name, index, param, moment_dtype(param, group), value, foreign)
            elif not _is_count(value):
                got = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(
                    f"AdamW16: state step of parameter {index} must be a number, got {got}"
                )


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(torch.isfinite(value).all())
    return isinstance(value, (int, float)) and value == value // 1


def _check_moment(
    name: str, index: int, param: Tensor, dtype: torch.dtype, value: Any, foreign: bool
) -> None:
    shape = tuple(param.shape)
    got = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (type(value), None)
    what = f"AdamW16: state {name} of parameter {index} must be"
    allowed = [(shape, dtype)]
    if dtype == torch.int16:
        allowed.append(((*shape, 2), torch.uint8))
    foreign = foreign and isinstance(value, Tensor) and value.is_floating_point()
    if got not in allowed and not (foreign and got[0] == shape):
        raise ValueError(f"{what} {shape} {dtype}, got {got[0]} {got[1]}")
    if hasattr(value, "to_local") and not hasattr(param, "to_local"):
        raise ValueError(f"{what} a full tensor, got a DTensor; gather it with full_tensor()")
    if foreign and value.numel() and local_part(value).numel():
        low, high = (float(bound) for bound in _float(value).aminmax())
        if name == "exp_avg_sq" and not 0 <= low <= high < math.inf:
            raise ValueError(f"{what} 0 or more and finite, got {low:g} to {high:g}")
        if name == "exp_avg" and not -math.inf < low <= high < math.inf:
            raise ValueError(f"{what} finite, got {low:g} to {high:g}")
        if dtype == torch.int16 and name == "exp_avg" and max(-low, high) > MAX_CODED:
            raise ValueError(
                f"{what} at most {MAX_CODED} to fit 16 bits, got {max(-low, high):g}; "
                "AdamW16(fp32_moments=True) takes it"
            )


def _float(value: Tensor) -> Tensor:
    """This process's part of a moment, in float32."""
    return local_part(value).detach().to(torch.float32)


def restore(
    state: Mapping[Tensor, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
) -> None:
    """Copies a checked state dict's tensors into the state, with codes where it has codes."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [(param, group) for group in groups for param in group["params"]]
    for i, (param, group) in zip(ids, params, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            state[param][name] = (
                counter(value, param)
                if name == "step"
                else _moment(name, value, param.detach(), group)
            )


def counter(value: Any, param: Tensor) -> Tensor:
    """A number of updates as one int64; states of earlier versions have a float32."""
    return torch.full((), int(value), dtype=torch.int64, device=param.device)


def _moment(name: str, value: Tensor, param: Tensor, group: Mapping[str, Any]) -> Tensor:
    if hasattr(param, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(param, DTensor)
        mesh, placements = param.device_mesh, param.placements
        if isinstance(value, DTensor):
            value = value.redistribute(mesh, placements)
        else:
            value = value.to(param.device)
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    local = local_part(value)
    dtype = moment_dtype(param, group)
    if local.dtype == torch.uint8:
        local = local.contiguous().view(torch.int16).squeeze(-1)
    elif local.is_floating_point() and dtype == torch.int16:  # of torch.optim.AdamW
        local = _float(local).to(param.device)
        if name == "exp_avg_sq":
            local = local.clamp(max=float(group["variance_clip"]))
        local = pack(local, FORMATS[name])
    moment = torch.empty_like(param, dtype=dtype)
    local_part(moment).copy_(local)
    return moment
