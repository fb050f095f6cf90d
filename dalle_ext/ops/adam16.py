"""`AdamW16`: AdamW with a mean in 1-6-9 and a variance in 0-6-10, 4 bytes of state a parameter."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from dalle_ext import _adam16_state, _native
from dalle_ext._adam16_state import STATE
from dalle_ext._checks import plain_memory, real, seed_word
from dalle_ext._switch import reference_in_use
from dalle_ext._tensor_table import TensorTable, in_memory
from dalle_ext.reference import adam16 as reference

Tensor = torch.Tensor
GROUP_STRIDE = 0xBF58476D1CE4E5B9  # between the seeds of parameter groups, odd and irregular


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


def _check_grads(params: Sequence[Tensor]) -> list[Tensor]:
    """The parameters' gradients, each in its parameter's memory order."""
    grads: list[Any] = [param.grad for param in params]
    for layout in {grad.layout for grad in grads} - {torch.strided}:
        raise TypeError(f"AdamW16: gradients must be dense, got {layout}")
    for dtype in {grad.dtype for grad in grads}:
        _native.require_floating("AdamW16", "gradients", dtype)
    return [
        grad
        if grad.stride() == param.stride()
        else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        for param, grad in zip(params, grads, strict=True)
    ]


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


class AdamW16(torch.optim.Optimizer):
    """AdamW whose moments take 4 bytes a parameter (paper, sections 2.4, 2.5, appendices B.2, D).

    Equivalent to `torch.optim.AdamW` with the running variance at most `variance_clip`, and the
    moments rounded to the 16-bit formats after each update, up or down at random so that they are
    right on average (to nearest a moment would stay where it is as soon as updates change it by
    less than half a unit in the last place; `docs/precision.md`). Every device and processor draws
    and computes the same bits. Arithmetic is in float32; one launch a parameter group. Moments stay
    float32 in tensors below 8,192 elements and with `fp32_moments`.

    The state holds int16 codes; `state_dict()` gives those of a `DTensor` as bytes with one axis
    more, (..., 2), since no collective takes int16. `load_state_dict` takes both, and the state of
    a `torch.optim.AdamW`; `adamw_state_dict()` is for the other way.

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
                values["step"] = _adam16_state.counter(values["step"], param)

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
                scale_index = [0] * len(params)
                if groups is not None:
                    scale_index = [groups.get(p, 0) for p in params]
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
        states = [self.state[p] for p in params]
        for p, values in zip(params, states, strict=True):
            if not values:
                values.update(_adam16_state.initial_state(p, group))
        moments = [[values[name] for values in states] for name in STATE]
        columns = [in_memory("AdamW16", c) for c in (params, _check_grads(params), *moments)]
        table = self._tables.get(index)
        if table is None or not table.fits(columns, scale_index):
            table = self._tables[index] = TensorTable(columns, scale_index)
            table.columns = []  # else gradients set to None would keep their memory
        columns = table.arranged(columns)
        tensors = _device_scalars(index, group, scales, clip_factor, found_nonfinite, device)
        numbers = _host_scalars(group)
        if reference_in_use():
            one_axis = [[t.detach().reshape(-1) for t in column] for column in columns]
            reference.step_(one_axis, table.host, tensors, numbers)
            return
        _native.require("AdamW16", device)
        with torch._C._AutoDispatchBelowAutograd():  # `plain_memory` has looked for derivatives
            _adam16_step_(*columns, table.host, table.rows, *tensors, *numbers)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the codes of `DTensor` parameters as bytes (they share memory).

        The groups say `amsgrad`, so that a `torch.optim.AdamW` that loads this state stops at its
        first step and does not take codes for numbers. It takes `adamw_state_dict()`.
        """
        state_dict = super().state_dict()
        as_bytes = _adam16_state.codes_as_bytes
        for index, values in state_dict["state"].items():
            state_dict["state"][index] = {name: as_bytes(value) for name, value in values.items()}
        for group in state_dict["param_groups"]:
            group["amsgrad"] = True
        return state_dict

    def adamw_state_dict(self) -> dict[str, Any]:
        """The state for `torch.optim.AdamW.load_state_dict`: moments in float32, copied."""
        return _adam16_state.as_adamw(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments keep the dtypes of the state (torch would make codes floats).

        A state of `torch.optim.AdamW` is converted: its moments are rounded to nearest, and
        `variance_clip`, `stochastic_rounding`, `seed` and `fp32_moments` stay what they are.

        Raises:
            ValueError: a state of other parameters or of another optimizer, AMSGrad, or a mean that
                16 bits do not hold; nothing is changed.
        """
        saved = _adam16_state.adamw16_options(self.param_groups, state_dict["param_groups"])
        for group, options in zip(self.param_groups, saved, strict=True):
            _check_group({**group, **options, "params": group["params"]})
        _adam16_state.check_state(self.param_groups, state_dict, saved)
        empty: dict[int, Any] = {index: {} for index in state_dict["state"]}
        super().load_state_dict({**state_dict, "state": empty, "param_groups": saved})
        _adam16_state.restore(self.state, self.param_groups, state_dict)
        self._tables.clear()

    def state_bytes(self) -> int:
        """Bytes of the state so far: 4 a parameter, 8 where the moments are float32."""
        return sum(t.nbytes for values in self.state.values() for t in values.values())
