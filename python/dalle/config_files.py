"""Files of options: YAML or TOML for `--config`, and the options of a run written beside it.

A value stays the text that stands in the file until the option's type is known. So a folder named
`1e3`, `no` or `2026-01-01` is a name, while the same text is a number where a number is wanted.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dalle.configs import to_dict
from dalle.errors import UsageError
from dalle.files import make_folder, read_bytes, saving, write_atomic
from dalle.version import __version__

MAX_FILE_BYTES = 1 << 20  # of a file of options
CONFIG_NAME = "config.yaml"  # of the options beside a run
_NULLS = ("", "~", "null", "Null", "NULL")
_TRUE = ("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON")
_FALSE = ("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF")


class Scalar(NamedTuple):
    """A value of a file: its text, and whether it stands there without quotes."""

    text: str
    plain: bool

    def __str__(self) -> str:
        return self.text

    @property
    def is_null(self) -> bool:
        """Whether it is YAML's null."""
        return self.plain and self.text in _NULLS

    @property
    def switch(self) -> bool | None:
        """The value of a switch; None where it is no value of one."""
        if not self.plain or self.text not in _TRUE + _FALSE:
            return None
        return self.text in _TRUE


class _Loader(yaml.SafeLoader):
    """YAML's own safe loader, which leaves scalars as text and refuses a key that comes twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        self.flatten_mapping(node)
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or not isinstance(key, Scalar):
                problem = "found a key that is no plain value"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key.text in mapping:
                problem = f"found the key {key.text} twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            mapping[key.text] = self.construct_object(value_node, deep=True)
        return mapping


def _scalar(loader: _Loader, node: Any) -> Scalar:
    return Scalar(str(loader.construct_scalar(node)), node.style is None)


for _kind in ("str", "int", "float", "bool", "null", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _scalar)


def read_options(path: Path) -> dict[str, Any]:
    """The options in a file, a `Scalar` each, or lists and dicts of them; TOML by its suffix.

    Raises:
        UsageError: the file cannot be read, or is no mapping of options.
    """
    parse = _toml if path.suffix.lower() == ".toml" else _yaml
    try:
        values = parse(read_bytes(path, MAX_FILE_BYTES).decode("utf-8-sig"), path)
    except OSError as problem:
        raise UsageError(f"{path}: must be a readable file, got: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        kind = "TOML" if parse is _toml else "YAML"
        where = f"byte {problem.start} is not UTF-8"
        raise UsageError(f"{path}: must be plain {kind}, got: {where}") from problem
    if values is None or (isinstance(values, Scalar) and values.is_null):
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must be a mapping of options, got {kind_of(values)}")
    return values


def value_of_run(model: Path, option: str) -> str:
    """An option of the training that left RUN/model, from RUN/config.yaml; "" where it is not
    there."""
    try:
        value = read_options(model.parent / CONFIG_NAME).get(option)
    except UsageError:
        return ""
    return value.text if isinstance(value, Scalar) else ""


def kind_of(value: Any) -> str:
    """What a value of a file is, in words for a message."""
    if isinstance(value, Scalar):
        return "nothing" if value.is_null else f"the text {value.text[:80]!r}"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return type(value).__name__


def _yaml(text: str, path: Path) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as problem:
        raise UsageError(f"{path}: must be plain YAML, got: it is nested too deeply") from problem
    except yaml.YAMLError as problem:
        reason = getattr(problem, "problem", None) or getattr(problem, "reason", None)
        reason = str(reason or "no text").split("\n")[0]
        mark = getattr(problem, "problem_mark", None)
        location = f" in line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{path}: must be plain YAML, got: {reason[:200]}{location}") from problem
    except Exception as problem:  # yaml's own tags raise any class
        raise UsageError(f"{path}: must be plain YAML, got a damaged value") from problem


def _toml(text: str, path: Path) -> Any:
    def scalars(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: scalars(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [scalars(inner) for inner in value]
        if isinstance(value, (str, Scalar)):
            return value if isinstance(value, Scalar) else Scalar(value, False)
        if isinstance(value, bool):
            return Scalar(str(value).lower(), True)
        return Scalar(str(value), True)

    number: Callable[[str], Any] = lambda digits: Scalar(digits, True)  # noqa: E731
    try:
        return scalars(tomllib.loads(text, parse_float=number))
    except RecursionError as problem:
        raise UsageError(f"{path}: must be plain TOML, got: it is nested too deeply") from problem
    except ValueError as problem:  # TOMLDecodeError, or a number of thousands of digits
        reason = str(problem).split("\n")[0][:200]
        raise UsageError(f"{path}: must be plain TOML, got: {reason}") from problem


def flat_options(config: Any) -> dict[str, Any]:
    """The options in a config and its nested configs by the names of their flags, as JSON values.

    Raises:
        ValueError: two of them have the same name.
    """
    flat: dict[str, Any] = {}
    values = to_dict(config)
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        option = field.name.replace("_", "-")
        plain = {option: None if value == "" else values[field.name]}  # an empty word is refused
        for name, inner in (flat_options(value) if nested else plain).items():
            if name in flat:
                raise ValueError(f"{type(config).__name__} has two options {name}")
            flat[name] = inner
    return flat


def write_resolved(config: Any, path: Path, *, owner: str = "dalle") -> None:
    """Writes the options of a run as flat YAML with the flags' names; `--config PATH` repeats it.

    Args:
        config: the dataclass of a command with every value that the run has.
        path: file to write, atomically; its folder is made.
        owner: the command's name, e.g. "dvae train"; begins an error's line, stands in the file.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    head = f"# The options of this run. To repeat it: dalle {owner} --config THIS_FILE\n"
    head += f"# dalle {__version__}; options on the command line win over those here.\n"
    options = flat_options(config)
    if isinstance(options.get("data"), str) and "\n" in options["data"]:
        options["data"] = options["data"].split("\n")
    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=1 << 16)
    try:
        data = (head + text).encode()
    except UnicodeEncodeError:  # a file name that is no text in this locale
        data = (head + yaml.safe_dump(options, sort_keys=False, width=1 << 16)).encode()
    with saving(owner, path):
        make_folder(path.parent, owner)
        write_atomic(path, data)
