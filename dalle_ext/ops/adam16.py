"""`AdamW16`: AdamW with a mean in 1-6-9 and a variance in 0-6-10, 4 bytes of state a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dalle_ext import _native
from dalle_ext._switch import reference_in_use
from dalle_ext._tensor_table import TensorTable, flat
from dalle_ext.ops import adam16_native as native
from dalle_ext.ops import adam16_state as state
from dalle_ext.reference import adam16 as reference

Tensor = torch.Tensor
STATE = ("exp_avg", "exp_avg_sq", "step")


class AdamW16(torch.optim.Optimizer):
    """AdamW whose moments take 4 bytes a parameter (paper, sections 2.4, 2.5, appendices B.2, D).

    Equivalent to `torch.optim.AdamW` with the running variance at most `variance_clip`, and the
    moments rounded to the 16-bit formats after each update. Arithmetic is in float32; one launch a
    parameter group. Moments stay float32 in tensors below 8,192 elements and with `fp32_moments`.

    Args:
        params: parameters or groups; float32, float16 or bfloat16, dense.
        lr: step size, a number or (for CUDA graphs) one float32 on the parameters' device.
        betas, eps, weight_decay: as in `torch.optim.AdamW`; the decay is decoupled.
        variance_clip: largest running variance, the paper's 5; the format holds up to 15.99.
        stochastic_rounding: round what is kept in 16 bits (moments, float16 and bfloat16
            parameters) up or down at random, so that small updates are not lost.
        seed: of that; with the number of updates it decides every draw.

    Raises:
        TypeError, ValueError: parameters, gradients, numbers or states that do not fit.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2,
        variance_clip: float = 5.0, *, stochastic_rounding: bool = False, seed: int = 0,
        fp32_moments: bool = False,
    ) -> None:  # fmt: skip
        params = list(params)
        if not params:
            raise ValueError("AdamW16: params must hold a parameter, got none")
        self._tables: dict[int, TensorTable] = {}
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        more = {"variance_clip": variance_clip, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, {**numbers, **more, "seed": seed, "fp32_moments": fp32_moments})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        native.check_group(self.param_groups[-1])

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler with this module
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None, *,
        clip_factor: float | Tensor | None = None, found_nonfinite: bool | Tensor | None = None,
        scales: Tensor | None = None, groups: Mapping[Tensor, int] | None = None,
    ) -> Tensor | None:  # fmt: skip
        """One update. Parameters without a gradient are left alone.

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
        begun = False
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            begun = begun or bool(params)
            if params:
                of = [0 if groups is None else groups.get(p, 0) for p in params]
                self._step_group(index, params, of, scales, clip_factor, found_nonfinite)
        if not begun:
            raise ValueError("AdamW16: parameters must have a gradient, got none that has one")
        return loss

    def _step_group(
        self, index: int, params: list[Tensor], groups: list[int], scales: Tensor | None,
        clip_factor: float | Tensor | None, found: bool | Tensor | None,
    ) -> None:  # fmt: skip
        group, device = self.param_groups[index], params[0].device
        for p in params:
            if not self.state[p]:
                self.state[p] = state.moments_like(p, group)
        rows = [[p, native.check_grad(p), *map(self.state[p].get, STATE)] for p in params]
        columns = [[flat("AdamW16", "params", t) for t in c] for c in zip(*rows, strict=True)]
        table = self._tables.get(index)
        if table is None or not table.fits(columns, groups):
            table = self._tables[index] = TensorTable(columns, groups)
        on_device = native.tensors_of(index, group, scales, clip_factor, found, device)
        numbers = native.numbers_of(group)
        if reference_in_use():
            reference.step_(table.columns, table.host, on_device, numbers)
            return
        _native.require("AdamW16", device)
        native.step_(*table.columns, table.host, table.rows, *on_device, *numbers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, and with the moments' own dtypes (torch would turn codes into floats)."""
        state.check_state(self.param_groups, state_dict)
        super().load_state_dict(state_dict)
        state.restore(self.state, self.param_groups, state_dict)
        self._tables.clear()

    def state_bytes(self) -> int:
        """Bytes of the state so far: 4 a parameter, 8 where the moments are float32."""
        return sum(t.nbytes for found in self.state.values() for t in found.values())
