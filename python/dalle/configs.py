"""Dataclasses to and from plain dicts: config.json of a model folder, `--config FILE.yaml`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from dalle.errors import DalleError, UnknownOption, UsageError

T = TypeVar("T")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The words " (did you mean x?)" for the nearest of `choices`, or "" where none is near."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if not close:  # a word of it, or its first letters: lr for lr_start or learning_rate
        plain = name.lstrip("-")
        words = {choice: re.split(r"[_-]", choice.lstrip("-")) for choice in choices}
        close = [
            choice
            for choice, parts in words.items()
            if plain in parts or (len(parts) > 1 and plain == "".join(part[:1] for part in parts))
        ]
    return f" (did you mean {min(close)}?)" if close else ""


def check_options(owner: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Checks the names of keywords.

    Raises:
        UnknownOption: naming the first that is not `known`, and what is near.
    """
    known = list(known)
    for name in options:
        if name not in known:
            raise UnknownOption(f"{owner}: {name} is not an option{did_you_mean(name, known)}")


class Named:
    """Base of dataclasses whose constructor says what is near a keyword that it does not have.

    Raises:
        UnknownOption: there is no such field.
    """

    def __new__(cls, *values: Any, **options: Any) -> Self:
        check_options(cls.__name__, options, field_names(cls))
        return super().__new__(cls)


def require(
    owner: str, config: object, requirement: str, holds: Callable[[Any], bool], *names: str
) -> None:
    """Checks fields of a config.

    Raises:
        UsageError: naming the first of `names` whose value does not hold.
    """
    for name in names:
        value = getattr(config, name)
        try:
            fits = holds(value)
        except TypeError:  # compared a value that is no number
            fits = False
        if not fits:
            raise UsageError(f"{owner}: {name} must be {requirement}, got {value!r}")


def require_adamw(owner: str, config: object) -> None:
    """Checks the fields beta1, beta2, eps and weight_decay of a recipe. Raises UsageError."""
    require(owner, config, "in [0, 1)", lambda x: 0 <= x < 1, "beta1", "beta2")
    require(owner, config, "positive", lambda x: x > 0, "eps")
    # A smaller eps would come near the end of float32's range.
    require(owner, config, "at least 1e-30", lambda x: x >= 1e-30, "eps")
    require(owner, config, "0 or more", lambda x: x >= 0, "weight_decay")


# The largest value of an option by its name. A larger one is a typing error: it would run for days,
# or ask for more memory than machines have, before any message.
UPPER_LIMITS: dict[str, float] = {
    "batch_size": 2**20,
    "batch": 2**20,
    "accumulate": 2**20,
    "steps": 10**9,
    "log_every": 10**9,
    "checkpoint_every": 10**9,
    "picture_every": 10**9,
    "validate_every": 10**9,
    "keep": 10**6,
    "workers": 256,
    "count": 10**7,
    "image_size": 2**14,
    "codes": 2**20,
    "dvae_width": 2**15,
    "dvae_steps": 10**9,
    "ranker_steps": 10**9,
    "prior_width": 2**17,
    "prior_layers": 2**12,
    "prior_steps": 10**9,
    "num_samples": 2**12,
    "canvas": 2**14,
    "scale": 64,
    "columns": 4096,
    "limit": 10**6,
    "top": 10**6,
    "show": 10**6,
    "num_candidates": 2**20,
    "top_k": 2**24,
    "text_len": 2**16,
    "grid": 2**12,
    "parts": 64,
    "muon_scale": 1e3,
    "d_model": 2**17,
    "num_heads": 2**12,
    "num_layers": 2**12,
    "kernel_size": 2**12,
    "text_vocab": 2**24,
    "image_vocab": 2**24,
    "image_rank": 2**17,
    "group_count": 12,
    "n_hid": 2**15,
    "n_blk_per_group": 2**10,
    "n_init": 2**15,
    "patch": 2**10,
    "width": 2**15,
    "depth": 2**10,
    "embed_dim": 2**15,
    "gpus": 10**7,
    "per_machine": 10**5,
    "rank": 2**17,
    "powersgd_rank": 2**17,
    "machines": 10**6,
    "timeout": 10**7,
    "lr": 1e3,
    "lr_start": 1e3,
    "lr_end": 1e3,
    "warm_start_lr": 1e3,
    "learning_rate": 1e3,
    "eps": 1e3,
    "weight_decay": 1e3,
    "init_gain": 1e3,
    "embedding_scale": 1e3,
    "head_scale": 1e3,
    "mse_weight": 1e6,
    "kl_weight": 1e6,
    "codebook_sharpness": 1e4,
    "commitment_weight": 1e6,
    "codebook_iterations": 10**4,
    "codebook_points": 10**7,
    "codebook_images": 10**7,
    "cond_scale": 1e4,
    "temperature": 1e6,
    "tflops": 1e9,
    "link_gbit": 1e9,
    "peer_gbyte": 1e9,
}


def check_numbers(owner: str, config: Any, limits: Mapping[str, float] = UPPER_LIMITS) -> None:
    """Checks every number in a config and its nested configs: finite, and at most its limit.

    Fields that are annotated as integers must hold integers, of any kind, those annotated as floats
    numbers; they, and numbers of numpy, become Python's (which JSON can hold).

    Raises:
        UsageError: naming the first that is not, and its limit.
    """
    for field in dataclasses.fields(config):
        original = getattr(config, field.name)
        value = _plain_numbers(owner, field, original)
        if value is not original:
            object.__setattr__(config, field.name, value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_numbers(owner, value, limits)
        for number in value if isinstance(value, (tuple, list)) else (value,):
            counts = isinstance(number, int) and not isinstance(number, bool)
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"{owner}: {field.name} must be a finite number, got {number}")
            if field.name == "seed" and isinstance(number, int) and number >= 2**63:
                raise UsageError(f"{owner}: seed must be 0 .. 2^63 - 1, got {number}")
            limit = limits.get(field.name, 2**63 - 1 if counts else None)
            if limit is not None and isinstance(number, (int, float)) and abs(number) > limit:
                raise UsageError(
                    f"{owner}: {field.name} must be at most {limit} in size, got {number}"
                )


def _plain_numbers(owner: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` with the numbers that a field is annotated to hold as Python's own."""
    kind = str(field.type)
    if isinstance(value, (tuple, list)) and kind.startswith("tuple[int"):
        return tuple(integer(owner, field.name, number) for number in value)
    if kind == "int" or (kind == "int | None" and value is not None):
        return integer(owner, field.name, value)
    if kind == "float" or (kind == "float | None" and value is not None):
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise UsageError(f"{owner}: {field.name} must be a number, got {value!r}")
        if isinstance(value, int) and abs(value) >= 2**1000:  # beyond all floats
            raise UsageError(f"{owner}: {field.name} must be finite, got an integer of 1000 bits")
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def integer(
    owner: str, name: str, value: Any, minimum: int | None = None, maximum: int | None = None
) -> int:
    """`value` as an int, if it is an integer of any kind in minimum .. maximum.

    Raises:
        UsageError: it is not.
    """
    if type(value) is int:  # the command line's case, without importing torch
        result = value
    else:
        from dalle_ext import _checks

        result = _checks.integer(owner, name, value, requirement="a whole number", error=UsageError)
    if minimum is not None and result < minimum:
        raise UsageError(f"{owner}: {name} must be {minimum} or more, got {value}")
    if maximum is not None and result > maximum:
        raise UsageError(f"{owner}: {name} must be at most {maximum}, got {value}")
    return result


def integers(owner: str, name: str, values: Any, minimum: int | None = None) -> list[int]:
    """A list, tuple, array or tensor of integers of any kind as ints. Raises as `integer`."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise UsageError(f"{owner}: {name} must be a list of whole numbers, got {values!r}")
    values = values.tolist() if hasattr(values, "tolist") else values
    return [integer(owner, name, value, minimum) for value in values]


def seed_number(owner: str, seed: Any) -> int:
    """A seed as an int of 0 to 2^63 - 1. Raises UsageError."""
    number = integer(owner, "seed", seed)
    if not 0 <= number < 2**63:
        raise UsageError(f"{owner}: seed must be 0 .. 2^63 - 1, got {number}")
    return number


def field_names(config_type: type) -> list[str]:
    """The fields that `config_type` takes."""
    return [f.name for f in dataclasses.fields(config_type) if f.init]


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


def differences(mine: Any, theirs: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The differences (dotted key, my value, their value) of two JSON values."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name in [*mine, *(k for k in theirs if k not in mine)]:
            inner = f"{key}.{name}" if key else name
            yield from differences(mine.get(name), theirs.get(name), inner)
    elif mine != theirs:
        yield key or "description", mine, theirs


def first_difference(mine: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """The first of `differences`, or None."""
    return next(differences(mine, theirs), None)


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
    fields = field_types(config_type)
    for key in values:
        if key not in fields:
            hint = did_you_mean(str(key), fields)
            raise error(f"{where}: {config_type.__name__} has no option {key!r}{hint}")
    filled = {
        key: _rebuild(fields[key], value, f"{where}: {key}", error) for key, value in values.items()
    }
    try:
        config = config_type(**filled)
        check_numbers(config_type.__name__, config, {**UPPER_LIMITS, "vocab_size": 2**24})
        return config
    except DalleError as refused:
        raise error(f"{where}: {refused}") from refused
    except (TypeError, ValueError, AttributeError) as refused:
        raise error(
            f"{where}: must be a {config_type.__name__}, got: {str(refused).splitlines()[0]}"
        ) from refused


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def _rebuild(annotation: Any, value: Any, where: str, error: type[DalleError]) -> Any:
    """`value` converted to the annotated type; JSON has no tuples, paths and dataclasses.

    Raises:
        DalleError: (of class `error`) it is of another type.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _rebuild(arguments[0], value, where, error)
    if origin in (typing.Union, types.UnionType):
        return _rebuild_one_of(arguments, value, where, error)
    if dataclasses.is_dataclass(annotation):
        return from_dict(typing.cast(type, annotation), value, where=where, error=error)
    if (origin or annotation) is tuple:
        return _rebuild_tuple(arguments, value, where, error)
    if annotation is Path and isinstance(value, str):
        return Path(value)
    if origin is typing.Literal:
        fits, name = value in arguments, f"one of {', '.join(map(str, arguments))}"
    elif annotation in (int, float):
        number = numbers.Integral if annotation is int else numbers.Real
        fits, name = isinstance(value, number) and not isinstance(value, bool), _NAMES[annotation]
    elif annotation in (bool, str, Path):
        fits, name = isinstance(value, annotation), _NAMES.get(annotation, "a path")
    else:
        fits, name = annotation is not types.NoneType or value is None, "null"
    if not fits:
        raise error(f"{where} must be {name}, got {value!r}")
    return value


def _rebuild_one_of(
    annotations: tuple[Any, ...], value: Any, where: str, error: type[DalleError]
) -> Any:
    """As `_rebuild` for a union: the first of its types that takes `value`."""
    refused: DalleError | None = None
    for candidate in annotations:
        if (value is None) != (candidate is types.NoneType):
            continue
        try:
            return _rebuild(candidate, value, where, error)
        except DalleError as problem:
            refused = refused or problem
    raise refused or error(f"{where} must not be null")


def _rebuild_tuple(
    inner: tuple[Any, ...], value: Any, where: str, error: type[DalleError]
) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise error(f"{where} must be a list, got {value!r}")
    if not inner or inner[-1] is Ellipsis:
        inner = (inner[0] if inner else Any,) * len(value)
    if len(inner) != len(value):
        raise error(f"{where} must have {len(inner)} items, got {len(value)}")
    pairs = zip(inner, value, strict=True)
    return tuple(_rebuild(kind, item, where, error) for kind, item in pairs)
