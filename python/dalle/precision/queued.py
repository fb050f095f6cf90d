"""Work on the device that the host does not wait for: copies, and updates that may be skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import dalle_ext

Values = Mapping[str, float | Tensor]


class HostCopy:
    """Numbers and tensors on their way to the host, as they are now, whatever changes them later.

    On a GPU the copies go to pinned memory behind what is queued, and nothing waits until `read`.

    Args:
        values: by name; tensors of any dtype that float64 holds exactly.
    """

    def __init__(self, values: Values) -> None:
        self._numbers = dict(values)
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                by_device.setdefault(value.device, {})[name] = value.detach()
        self._copies: list[tuple[dict[str, torch.Size], Tensor, Any]] = []
        for device, tensors in by_device.items():
            flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])
            event = None
            if device.type == "cuda":
                pinned = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
                flat = pinned.copy_(flat, non_blocking=True)
                event = torch.cuda.Event(blocking=True)
                event.record(torch.cuda.current_stream(device))
            self._copies.append(({name: t.shape for name, t in tensors.items()}, flat, event))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which no event can be in."""
        return {"_numbers": self.read(), "_copies": []}

    def ready(self) -> bool:
        """Whether `read` would not wait."""
        return all(event is None or event.query() for _, _, event in self._copies)

    def read(self) -> dict[str, float | Tensor]:
        """The values, tensors in float64 on the CPU. Waits for those that are not there yet."""
        for shapes, flat, event in self._copies:
            if event is not None:
                event.synchronize()
            parts = flat.split([shape.numel() for shape in shapes.values()])
            for (name, shape), part in zip(shapes.items(), parts, strict=True):
                self._numbers[name] = part.view(shape)
        return self._numbers


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer can leave everything as it is by a flag that the host does not read:
    `dalle_ext.AdamW16`, and those of torch with `fused=True`."""
    if isinstance(optimizer, dalle_ext.AdamW16):
        return True
    takes_flag = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    # A state that was loaded may have other options.
    return takes_flag and all(group.get("fused") for group in optimizer.param_groups)


def step_unless(optimizer: torch.optim.Optimizer, flag: Tensor) -> None:
    """`optimizer.step()`, of which nothing remains where the flag (0-d bool) is set.

    Args:
        optimizer: one that `skips_on_device`.
    """
    if isinstance(optimizer, dalle_ext.AdamW16):
        optimizer.step(found_nonfinite=flag)
        return
    fused: Any = optimizer  # as torch.amp.GradScaler does
    fused.grad_scale, fused.found_inf = None, flag.float()
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf
