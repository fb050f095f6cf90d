"""Which module was the first to compute something that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _tensors(value: Any) -> list[Tensor]:
    """All floating tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _bad(value: Any) -> bool:
    return any(not bool(t.isfinite().all()) for t in _tensors(value))


@torch.no_grad()
def first_nonfinite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Runs `forward()` again and says where its first nonfinite value came from.

    Args:
        model: whose modules are watched, in the order in which they run.
        forward: the same forward pass as before; it must call `model`.

    Returns:
        "input of NAME", "parameter NAME" or "output of NAME" (the innermost module), NAME as in
        `model.named_modules()`; None where everything is finite.
    """
    culprits: list[str] = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if culprits:
                return
            if _bad((args, kwargs)):
                culprits.append(f"input of {name}")
                return
            for key, value in module.named_parameters(recurse=False):
                if _bad(value):
                    culprits.append(f"parameter {name}.{key}")
                    return

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, result: Any) -> None:
            if not culprits and _bad(result):
                culprits.append(f"output of {name}")

        return hook

    handles = []
    for key, module in model.named_modules():
        name = key or "model"
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return culprits[0] if culprits else None
