"""Nested state (dicts, lists, tensors, numbers) as JSON plus named tensors, and back exactly."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch


def pack_tree(value: Any, tensors: dict[str, torch.Tensor], prefix: str) -> Any:
    """JSON for `value`; its tensors go into `tensors` under names that begin with `prefix`.

    A dict becomes {"dict": [[key, value], ...]} (keys may be integers, as in an optimizer's state),
    a list {"list": [...]}, a tuple {"tuple": [...]}, a tensor {"tensor": name}.

    Raises:
        TypeError: for anything but those, numbers, strings, booleans and None.
    """
    if isinstance(value, torch.Tensor):
        tensors[prefix] = value
        return {"tensor": prefix}
    if isinstance(value, dict):
        items = [[k, pack_tree(v, tensors, f"{prefix}.{k}")] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [pack_tree(v, tensors, f"{prefix}.{i}") for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"checkpoint: {prefix} must be JSON values or tensors, got {type(value)}")


def unpack_tree(packed: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `pack_tree`.

    Raises:
        KeyError: if a tensor is missing.
    """
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack_tree(item, tensors) for key, item in content}
    items = [unpack_tree(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch (CPU and every CUDA device in use), numpy, random."""
    name, keys, position, has_gauss, gauss = cast(tuple, np.random.get_state(legacy=True))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [
            name,
            torch.tensor(keys.astype(np.int64), dtype=torch.int64, device="cpu"),
            position,
            has_gauss,
            gauss,
        ],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores `rng_state()`; CUDA generators only where as many devices are there."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
