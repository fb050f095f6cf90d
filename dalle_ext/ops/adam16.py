"""`AdamW16`: AdamW with a mean in 1-6-9 and a variance in 0-6-10, 4 bytes of state a parameter."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from dalle_ext import _native
from dalle_ext._checks import plain_memory, real, seed_word
from dalle_ext._switch import reference_in_use
from dalle_ext._tensor_table import TensorTable, flat, local_part
from dalle_ext.reference import adam16 as reference

Tensor = torch.Tensor
GROUP_STRIDE = 0xBF58476D1CE4E5B9  # between the seeds of parameter groups, odd and irregular
STATE = ("exp_avg", "exp_avg_sq", "step")
MIN_CODED_NUMEL = 8192  # smaller tensors keep float32 moments (paper, earlier code)


def _step_fake(*_: object) -> None:
    return None


if _native.CPU_PROBLEM is None:
    _adam16_step_ = _native.register("_adam16_step_", _step_fake, public="AdamW16")


def _check_group(group: Mapping[str, Any]) -> None:
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


def _check_grad(param: Tensor) -> Tensor:
    """The parameter's gradient, in the parameter's memory order."""
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise TypeError(f"AdamW16: gradients must be dense, got {grad.layout}")
    _native.require_floating("AdamW16", "gradients", grad.dtype)
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return grad


def _one_float(name: str, value: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A number, flag or 0-d tensor as one float32 on the device, without waiting for it."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"AdamW16: {name} must be one number, got {tuple(value.shape)}")
        return value.detach().to(device, torch.float32)
    return torch.full((), float(value), dtype=torch.float32, device=device)


def _device_scalars(
    index: int,
    group: Mapping[str, Any],
    scales: Tensor | None,
    clip_factor: float | Tensor | None,
    found_nonfinite: bool | Tensor | None,
    device: torch.device,
) -> list[Tensor | None]:
    """Scales, clip factor, nonfinite flag, lr and seed, which the kernel reads on the device."""
    # Not seed + index: the second group of a seed would round as the first group of the next seed.
    word = (operator.index(group["seed"]) + index * GROUP_STRIDE + 2**63) % 2**64 - 2**63
    seed = torch.full((), word, dtype=torch.int64, device=device)
    lr = group["lr"] if isinstance(group["lr"], Tensor) else None
    clip = _one_float("clip_factor", clip_factor, device)
    flag = _one_float("found_nonfinite", found_nonfinite, device)
    return [scales, clip, flag, _one_float("lr", lr, device), seed]


def _host_scalars(group: Mapping[str, Any]) -> list[float]:
    """Whether to round parameters stochastically, lr, betas, eps, weight decay, variance clip."""
    lr = 0.0 if isinstance(group["lr"], Tensor) else group["lr"]
    others = (group["eps"], group["weight_decay"], group["variance_clip"])
    return [bool(group["stochastic_rounding"]), *map(float, (lr, *group["betas"], *others))]


def _moment_dtype(param: Tensor, fp32_moments: bool) -> torch.dtype:
    """int16 codes, or float32 in small tensors and where the parameter group asks for it."""
    fp32 = param.numel() < MIN_CODED_NUMEL or fp32_moments
    return torch.float32 if fp32 else torch.int16


def _moments_like(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The initial state: no update yet, moments zero (code 0 is zero)."""
    dtype = _moment_dtype(param, group["fp32_moments"])
    return {
        "step": torch.zeros((), dtype=torch.int64, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
    }


def _codes_as_bytes(value: Any) -> Any:
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


def _check_state(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError unless a state dict is of parameters like these."""
    saved = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved]
    if sizes != saved_sizes:
        raise ValueError(
            f"AdamW16: state must be of groups of {sizes} parameters, got {saved_sizes}"
        )
    pairs = zip(groups, saved, strict=True)
    params = [(p, group, saved_group) for group, saved_group in pairs for p in group["params"]]
    ids = [i for group in saved for i in group["params"]]
    for index, (param, group, saved_group) in zip(ids, params, strict=True):
        values = state_dict["state"].get(index, {})
        if values and set(values) != set(STATE):
            names = ", ".join(map(str, sorted(values)))
            raise ValueError(
                f"AdamW16: state of parameter {index} must be {', '.join(STATE)}, got {names}"
            )
        fp32_moments = saved_group.get("fp32_moments", group["fp32_moments"])
        for name, value in values.items():
            if name != "step":
                _check_moment(name, index, param, _moment_dtype(param, fp32_moments), value)
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
        what = f"AdamW16: state {name} of parameter {index} must be a full tensor"
        raise ValueError(f"{what}, got a DTensor; gather it with full_tensor()")


def _restore(
    state: Mapping[Tensor, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
) -> None:
    """Copies a checked state dict's tensors into the state, in the dtypes that they have."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [param for group in groups for param in group["params"]]
    for i, param in zip(ids, params, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            state[param][name] = (
                _counter(value, param) if name == "step" else _moment(value, param.detach())
            )


def _counter(value: Any, param: Tensor) -> Tensor:
    """A number of updates as one int64; states of earlier versions have a float32."""
    return torch.full((), int(value), dtype=torch.int64, device=param.device)


def _moment(value: Tensor, param: Tensor) -> Tensor:
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
    if local.dtype == torch.uint8:
        local = local.contiguous().view(torch.int16).squeeze(-1)
    moment = torch.empty_like(param, dtype=local.dtype)
    local_part(moment).copy_(local)
    return moment


class AdamW16(torch.optim.Optimizer):
    """AdamW whose moments take 4 bytes a parameter (paper, sections 2.4, 2.5, appendices B.2, D).

    Equivalent to `torch.optim.AdamW` with the running variance at most `variance_clip`, and the
    moments rounded to the 16-bit formats after each update, up or down at random so that they are
    right on average (to nearest a moment would stay where it is as soon as updates change it by
    less than half a unit in the last place; `docs/precision.md`). Every device and processor draws
    and computes the same bits. Arithmetic is in float32; one launch a parameter group. Moments stay
    float32 in tensors below 8,192 elements and with `fp32_moments`.

    The state holds int16 codes; `state_dict()` gives those of a `DTensor` as bytes with one axis
    more, (..., 2), since no collective takes int16. `load_state_dict` takes both.

    Args:
        params: parameters or groups; float32, float16 or bfloat16, dense.
        lr: step size, a number or (for CUDA graphs) one float32 on the parameters' device.
        betas, eps, weight_decay: as in `torch.optim.AdamW`; the decay is decoupled.
        variance_clip: largest running variance, the paper's 5; at most 15.99 where it is a code.
        stochastic_rounding: round float16 and bfloat16 parameters at random too, so that updates of
            less than half a unit in their last place are not lost.
        seed: of all rounding; with the number of updates it decides every draw.

    Raises:
        TypeError, ValueError: parameters, gradients, numbers or states that do not fit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        variance_clip: float = 5.0,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
        fp32_moments: bool = False,
    ) -> None:
        params = [] if isinstance(params, Tensor) else list(params)
        if not params:
            raise ValueError("AdamW16: params must hold a parameter, got none")
        self._tables: dict[int, TensorTable] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"variance_clip": variance_clip, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, {**defaults, "seed": seed, "fp32_moments": fp32_moments})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises TypeError, ValueError; then the group is not added."""
        count, original = len(self.param_groups), dict(param_group)
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            del self.param_groups[count:]
            param_group.clear()
            param_group.update(original)
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles. The tables hold addresses, so they are not copied."""
        super().__setstate__(state)
        self._tables = {}
        for param, values in self.state.items():
            if "step" in values and values["step"].dtype != torch.int64:
                values["step"] = _counter(values["step"], param)

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler with this module
    @torch.no_grad()
    def step(  # type: ignore[override]  # more keywords than torch's
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        clip_factor: float | Tensor | None = None,
        found_nonfinite: bool | Tensor | None = None,
        scales: Tensor | None = None,
        groups: Mapping[Tensor, int] | None = None,
    ) -> Tensor | None:
        """One update. Parameters without a gradient do not change, as in torch.

        Args:
            closure: computes the loss again and returns it.
            clip_factor: multiplies all gradients; read on the device.
            found_nonfinite: if true, nothing changes, not even the state; read on the device.
            scales: (G,) float32, the loss scale that the gradients of each group carry.
            groups: index into `scales` of each parameter; 0 for those that are missing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                scale_index = [0 if groups is None else groups.get(p, 0) for p in params]
                self._step_group(index, params, scale_index, scales, clip_factor, found_nonfinite)
        return loss

    def _step_group(
        self,
        index: int,
        params: list[Tensor],
        scale_index: list[int],
        scales: Tensor | None,
        clip_factor: float | Tensor | None,
        found_nonfinite: bool | Tensor | None,
    ) -> None:
        group, device = self.param_groups[index], params[0].device
        plain_memory("AdamW16", gradients=[p.grad for p in params], params=params)
        for p in params:
            if not self.state[p]:
                self.state[p] = _moments_like(p, group)
        rows = [[p, _check_grad(p), *map(self.state[p].get, STATE)] for p in params]
        columns = [[flat("AdamW16", "params", t) for t in c] for c in zip(*rows, strict=True)]
        table = self._tables.get(index)
        if table is None or not table.fits(columns, scale_index):
            table = self._tables[index] = TensorTable(columns, scale_index)
            table.columns = []  # else gradients set to None would keep their memory
        columns = table.arranged(columns)
        tensors = _device_scalars(index, group, scales, clip_factor, found_nonfinite, device)
        numbers = _host_scalars(group)
        if reference_in_use():
            reference.step_(columns, table.host, tensors, numbers)
            return
        _native.require("AdamW16", device)
        _adam16_step_(*columns, table.host, table.rows, *tensors, *numbers)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the codes of `DTensor` parameters as bytes (they share memory)."""
        state_dict = super().state_dict()
        for index, values in state_dict["state"].items():
            state_dict["state"][index] = {k: _codes_as_bytes(v) for k, v in values.items()}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments keep the dtypes of the state (torch would make codes floats).

        Raises:
            ValueError: a state of other parameters or of another optimizer; nothing is changed.
        """
        _check_state(self.param_groups, state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            _check_group({**group, **saved, "params": group["params"]})
        empty: dict[int, Any] = {index: {} for index in state_dict["state"]}
        super().load_state_dict({**state_dict, "state": empty})
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # which torch adds to the defaults here
                    group.setdefault(name, value)
        _restore(self.state, self.param_groups, state_dict)
        self._tables.clear()

    def state_bytes(self) -> int:
        """Bytes of the state so far: 4 a parameter, 8 where the moments are float32."""
        return sum(t.nbytes for values in self.state.values() for t in values.values())
