"""Nested state (dicts, lists, tensors, numbers) as JSON plus named tensors, and back exactly."""

from __future__ import annotations

from typing import Any

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


def unpack_names(packed: Any) -> Any:
    """As `unpack_tree`, with the name of each tensor in its place."""
    return unpack_tree(packed, _Names())


class _Names(dict[str, Any]):
    def __missing__(self, name: str) -> str:
        return name
