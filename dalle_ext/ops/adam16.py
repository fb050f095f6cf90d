"""`AdamW16`: AdamW with a mean in 1-6-9 and a variance in 0-6-10, 4 bytes of state a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dalle_ext import _native
from dalle_ext._switch import reference_in_use
from dalle_ext._tensor_table import TensorTable, flat
from dalle_ext.ops import adam16_native as native
from dalle_ext.ops.adam16_state import (
    STATE,
    check_state,
    counter,
    moments_like,
    portable,
    restore,
)
from dalle_ext.reference import adam16 as reference

Tensor = torch.Tensor


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
        self, params: Iterable[Any], lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2,
        variance_clip: float = 5.0, *, stochastic_rounding: bool = False, seed: int = 0,
        fp32_moments: bool = False,
    ) -> None:  # fmt: skip
        params = [] if isinstance(params, Tensor) else list(params)
        if not params:
            raise ValueError("AdamW16: params must hold a parameter, got none")
        self._tables: dict[int, TensorTable] = {}
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        more = {"variance_clip": variance_clip, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, {**numbers, **more, "seed": seed, "fp32_moments": fp32_moments})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises TypeError, ValueError; a group that is refused is not added."""
        count, given = len(self.param_groups), dict(param_group)
        super().add_param_group(param_group)
        try:
            native.check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            del self.param_groups[count:]
            param_group.clear()
            param_group.update(given)
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copies and pickles. The tables say where tensors are, and are made anew."""
        super().__setstate__(state)
        self._tables = {}
        for param, kept in self.state.items():
            if "step" in kept and kept["step"].dtype != torch.int64:
                kept["step"] = counter(kept["step"], param)

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler with this module
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None, *,
        clip_factor: float | Tensor | None = None, found_nonfinite: bool | Tensor | None = None,
        scales: Tensor | None = None, groups: Mapping[Tensor, int] | None = None,
    ) -> Tensor | None:  # fmt: skip
        """One update. Parameters without a gradient are left alone, as in torch.

        Args:
            closure: computes the loss again and returns it.
            clip_factor: multiplies all gradients; read on the device.
            found_nonfinite: where it is true nothing changes, not a bit; read on the device.
            scales: (G,) float32, what the gradients are multiplied with by group.
            groups: group of each parameter; those that are missing have group 0.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                of = [0 if groups is None else groups.get(p, 0) for p in params]
                self._step_group(index, params, of, scales, clip_factor, found_nonfinite)
        return loss

    def _step_group(
        self, index: int, params: list[Tensor], groups: list[int], scales: Tensor | None,
        clip_factor: float | Tensor | None, found: bool | Tensor | None,
    ) -> None:  # fmt: skip
        group, device = self.param_groups[index], params[0].device
        for p in params:
            if not self.state[p]:
                self.state[p] = moments_like(p, group)
        rows = [[p, native.check_grad(p), *map(self.state[p].get, STATE)] for p in params]
        columns = [[flat("AdamW16", "params", t) for t in c] for c in zip(*rows, strict=True)]
        table = self._tables.get(index)
        if table is None or not table.fits(columns, groups):
            table = self._tables[index] = TensorTable(columns, groups)
            table.columns = []  # else gradients set to None would keep their memory
        columns = table.arranged(columns)
        on_device = native.tensors_of(index, group, scales, clip_factor, found, device)
        numbers = native.numbers_of(group)
        if reference_in_use():
            reference.step_(columns, table.host, on_device, numbers)
            return
        _native.require("AdamW16", device)
        native.step_(*columns, table.host, table.rows, *on_device, *numbers)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the codes of `DTensor` parameters as bytes (they share memory)."""
        found = super().state_dict()
        for index, kept in found["state"].items():
            found["state"][index] = {name: portable(value) for name, value in kept.items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, and with the moments' own dtypes (torch would turn codes into floats).

        Raises:
            ValueError: a state of other parameters or of another optimizer; nothing is changed.
        """
        check_state(self.param_groups, state_dict)
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            native.check_group({**own, **saved, "params": own["params"]})
        empty: dict[int, Any] = {index: {} for index in state_dict["state"]}
        super().load_state_dict({**state_dict, "state": empty})
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch's own, which it adds here to the defaults
                    group.setdefault(name, value)
        restore(self.state, self.param_groups, state_dict)
        self._tables.clear()

    def state_bytes(self) -> int:
        """Bytes of the state so far: 4 a parameter, 8 where the moments are float32."""
        return sum(t.nbytes for found in self.state.values() for t in found.values())
