"""Dataclasses to and from plain dicts: config.json of a model folder, `--config FILE.yaml`."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from dalle.errors import DalleError, UsageError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The words " (did you mean x?)" for the nearest of `known`, or "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def require(
    owner: str, config: object, requirement: str, holds: Callable[[Any], bool], *names: str
) -> None:
    """Checks fields of a config.

    Raises:
        UsageError: naming the first of `names` whose value does not hold.
    """
    for name in names:
        value = getattr(config, name)
        if not holds(value):
            raise UsageError(f"{owner}: {name} must be {requirement}, got {value!r}")


def require_adamw(owner: str, config: object) -> None:
    """Checks the fields beta1, beta2, eps and weight_decay of a recipe. Raises UsageError."""
    require(owner, config, "in [0, 1)", lambda x: 0 <= x < 1, "beta1", "beta2")
    require(owner, config, "positive", lambda x: x > 0, "eps")
    require(owner, config, "0 or more", lambda x: x >= 0, "weight_decay")


def field_types(config_type: type) -> dict[str, Any]:
    """Field name -> type of the fields that `config_type` takes."""
    hints = typing.get_type_hints(config_type)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_type) if f.init}


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON values: nested ones as dicts, tuples as lists, paths as strings."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return to_dict(value)
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}


def from_dict(
    config_type: type[T],
    values: Any,
    *,
    where: str,
    error: type[DalleError] = UsageError,
) -> T:
    """Fills `config_type` from JSON values; the inverse of `to_dict`.

    Args:
        config_type: a dataclass; nested dataclasses, tuples and paths are rebuilt by annotation.
        values: a dict with a value for each field that has no default.
        where: begins the error's line, e.g. a file's name.
        error: the class raised.

    Raises:
        DalleError: (of class `error`) for anything but a dict, unknown or missing keys, or values
            that the dataclass refuses.
    """
    if not isinstance(values, dict):
        raise error(f"{where}: config must be a mapping, got {type(values).__name__}")
    known = field_types(config_type)
    for key in values:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise error(f"{where}: {config_type.__name__} has no option {key!r}{hint}")
    filled = {
        key: _rebuild(known[key], value, f"{where}: {key}", error) for key, value in values.items()
    }
    try:
        return config_type(**filled)
    except DalleError as refused:
        raise error(f"{where}: {refused}") from refused
    except (TypeError, ValueError, AttributeError) as refused:
        raise error(
            f"{where}: must be a {config_type.__name__}, got: {str(refused).splitlines()[0]}"
        ) from refused


def _rebuild(wanted: Any, value: Any, where: str, error: type[DalleError]) -> Any:
    """`value` as the annotation `wanted` has it, where JSON knows no such type."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Annotated:
        return _rebuild(arguments[0], value, where, error)
    if origin in (typing.Union, types.UnionType):
        for candidate in arguments:
            rebuilt = _rebuild(candidate, value, where, error)
            if type(rebuilt) is not type(value):
                return rebuilt
        return value
    if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
        return from_dict(typing.cast(type, wanted), value, where=where, error=error)
    if (origin or wanted) is tuple and isinstance(value, list):
        inner = arguments[0] if arguments else Any
        return tuple(_rebuild(inner, item, where, error) for item in value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    return value
