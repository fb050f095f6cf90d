"""Fills a config dataclass from command-line words and YAML files, with tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from dalle.configs import check_numbers, did_you_mean, field_types
from dalle.errors import UsageError
from dalle.files import read_bytes

MAX_FILE_BYTES = 1 << 20  # of a file of options
WIDE = 40_000  # columns
T = TypeVar("T")
_REWRITES = [  # Python's own and tyro's -> ours
    (r"invalid literal for int\(\) with base 10: ", "must be an integer, got "),
    (r"could not convert string to float: ", "must be a number, got "),
    (r"Exceeds the limit \((\d+) digits\).*", r"must be an integer of at most \1 digits"),
    (r"(Unrecognized options: .*) Perhaps you meant:.*", r"\1"),
    (r"Unrecognized options: (?!-)", "arguments must be those that --help lists, got also "),
]
_FRAME = " │╭╮╰╯─|"  # what tyro draws around a message


def parse_options(config_type: type[T], words: list[str], *, prog: str) -> T:
    """Fills `config_type` from the command line; fields of nested dataclasses are options as well.

    Args:
        config_type: a dataclass whose fields are the options, `--batch-size 8` for `batch_size`.
        words: what follows the command's name; `--config FILE.yaml` among them gives options that
            the others override.
        prog: the command's name, begins every line.

    Raises:
        UsageError: for unknown options (with the nearest known one), missing ones, or values
            that the dataclass refuses.
        SystemExit: code 0, after `--help`.
    """
    words, file = _take_config(words, prog)
    names = option_names(config_type)
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name[2:].replace("_", "-") not in names | {"help", ""}:
            hint = did_you_mean(name, {f"--{k}" for k in names})
            raise UsageError(f"{prog}: {name} is not an option{hint}")
    if file is not None:
        words = _file_words(config_type, file) + words
    for word, before in zip(words, ["", *words], strict=False):
        if not word and before.startswith("--"):  # e.g. from an unset variable
            raise UsageError(f"{prog}: {before} must have a value, got an empty one")
        if word.startswith("--") and word.find("=") == len(word) - 1:
            raise UsageError(f"{prog}: {word[:-1]} must have a value, got an empty one")
        if "\0" in word:
            raise UsageError(f"{prog}: options must hold no NUL character, got {word!r}")
    output = io.StringIO()
    try:
        config = _parse(config_type, words, prog, output)
        check_numbers(prog.removeprefix("dalle "), config)
        return config
    except SystemExit as stop:
        if stop.code in (0, None):
            sys.stdout.write(re.sub(r"\x1b\[[\d;]*m", "", output.getvalue()))  # FORCE_COLOR
            raise
        lines = [line.strip(_FRAME) for line in _message(config_type, words, prog)]
        missing = _missing(lines)
        if missing:
            raise UsageError(f"{prog}: {', '.join(missing)} must be given, got nothing") from None
        message = _condense(lines)
        refused = re.match(r"Error parsing (?!-)\S+: (.*)", message)  # by the dataclass itself
        raise UsageError(refused[1] if refused else f"{prog}: {message}") from None


def _parse(config_type: type[T], words: list[str], prog: str, output: io.StringIO) -> T:
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        return tyro.cli(config_type, args=words, prog=prog, config=(tyro.conf.OmitArgPrefixes,))


def _message(config_type: type, words: list[str], prog: str) -> list[str]:
    """The lines in which tyro refuses `words`, on a screen so wide that no value is broken."""
    output, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDE)
    try:
        with contextlib.suppress(SystemExit):
            _parse(config_type, words, prog, output)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return output.getvalue().splitlines()


def option_names(config_type: type) -> set[str]:
    """Names of all options, without the dashes in front; a switch also has its `no-` form."""
    names: set[str] = set()
    for name, annotation in field_types(config_type).items():
        inner = _nested(annotation)
        if inner is not None:
            names |= option_names(inner)
            continue
        option = name.replace("_", "-")
        names |= {option, f"no-{option}"} if _plain(annotation) is bool else {option}
    return names


def _plain(annotation: Any) -> Any:
    """An annotation without `Annotated`."""
    return (
        typing.get_args(annotation)[0]
        if typing.get_origin(annotation) is typing.Annotated
        else annotation
    )


def _takes_list(annotation: Any) -> bool:
    """Whether an annotation is of a list or a tuple, or may be."""
    plain = _plain(annotation)
    kinds = [plain, *typing.get_args(plain)]
    return any((typing.get_origin(kind) or kind) in (list, tuple) for kind in kinds)


def _positional(annotation: Any) -> bool:
    """Whether an annotation makes its field an argument without a name."""
    return tyro.conf.Positional in getattr(annotation, "__metadata__", ())


def _nested(annotation: Any) -> type | None:
    """The dataclass in an annotation, if it is one."""
    plain = _plain(annotation)
    if typing.get_origin(plain) in (typing.Union, types.UnionType):
        plain = next((a for a in typing.get_args(plain) if dataclasses.is_dataclass(a)), None)
    return plain if isinstance(plain, type) and dataclasses.is_dataclass(plain) else None


def _take_config(words: list[str], prog: str) -> tuple[list[str], Path | None]:
    """Takes `--config FILE` out of `words`."""
    for i, word in enumerate(words):
        if word == "--config":
            if i + 1 == len(words):
                raise UsageError(f"{prog}: --config must be followed by a file, got nothing")
            return words[:i] + words[i + 2 :], Path(words[i + 1])
        if word.startswith("--config="):
            return words[:i] + words[i + 1 :], Path(word.split("=", 1)[1])
    return words, None


def _file_words(config_type: type, path: Path) -> list[str]:
    """The options in a YAML file, as command-line words."""
    try:
        text = read_bytes(path, MAX_FILE_BYTES).decode("utf-8-sig")
        values = yaml.safe_load(text)
    except OSError as problem:
        raise UsageError(f"{path}: must be a readable file, got: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        where = f"byte {problem.start} is not UTF-8"
        raise UsageError(f"{path}: must be plain YAML, got: {where}") from problem
    except RecursionError as problem:
        raise UsageError(f"{path}: must be plain YAML, got: it is nested too deeply") from problem
    except yaml.YAMLError as problem:
        reason = getattr(problem, "problem", None) or getattr(problem, "reason", None)
        reason = str(reason or "no text").split("\n")[0]
        mark = getattr(problem, "problem_mark", None)
        location = f" in line {mark.line + 1}" if mark is not None else ""
        if "unhashable" in reason:
            reason = "found a key that is no plain value"
        raise UsageError(f"{path}: must be plain YAML, got: {reason[:200]}{location}") from problem
    except Exception as problem:  # yaml's numbers and dates raise any class
        raise UsageError(f"{path}: must be plain YAML, got a damaged number or date") from problem
    return [] if values is None else _mapping_words(config_type, values, str(path))


def _mapping_words(config_type: type, values: Any, where: str) -> list[str]:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: must be a mapping of options, got {type(values).__name__}")
    fields = _file_fields(config_type)
    words: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise UsageError(f"{where}: {key} is not an option{did_you_mean(name, fields)}")
        inner, option = _nested(fields[name]), name.replace("_", "-")
        if _positional(fields[name]):
            raise UsageError(f"{where}: {key} must be given on the command line, not in a file")
        if inner is not None:
            if not isinstance(value, dict):
                kind = "nothing" if value is None else type(value).__name__
                raise UsageError(f"{where}: {key} must be a mapping of options, got {kind}")
            words += _mapping_words(inner, value, f"{where}: {key}")
        elif _plain(fields[name]) is bool:
            if not isinstance(value, bool):
                raise UsageError(f"{where}: {key} must be true or false, got {value!r}")
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, (list, tuple)):
            if not _takes_list(fields[name]):
                raise UsageError(f"{where}: {key} must be one value, got a list")
            items = [_plain_value(item, f"{where}: {key}") for item in value]
            if any(item.startswith("--") for item in items):
                raise UsageError(f"{where}: {key} must hold no value that begins with --")
            words += [f"--{option}", *items]
        else:
            words.append(f"--{option}={_plain_value(value, f'{where}: {key}')}")
    return words


def _file_fields(config_type: type) -> dict[str, Any]:
    """Field name -> annotation; options of nested dataclasses may stand beside the others."""
    fields: dict[str, Any] = {}
    annotations = typing.get_type_hints(config_type, include_extras=True)
    for name in field_types(config_type):
        inner = _nested(annotations[name])
        if inner is not None:
            fields = {**_file_fields(inner), **fields}
    return {**fields, **{name: annotations[name] for name in field_types(config_type)}}


def _plain_value(value: Any, where: str) -> str:
    """A value of a file as a word. Nested lists are refused: aliases could make them huge."""
    if isinstance(value, (dict, list, tuple, set, bytes)):
        kind = type(value).__name__
        raise UsageError(f"{where} must be a plain value or a list of them, got {kind}")
    return str(value)


def _missing(lines: list[str]) -> list[str]:
    """Names in tyro's list of required options; empty where the message is about others."""
    if not any(line.startswith("Missing from") for line in lines):
        return []
    matches = (re.fullmatch(r"(--[a-z][\w-]*|[A-Z]+)( [A-Z].*)?", line) for line in lines)
    return [match[1] for match in matches if match]


def _condense(lines: list[str]) -> str:
    """The substance of tyro's message, as one line."""
    content = []
    for line in lines:
        if line.startswith(("Argument helptext", "For full helptext", "Similar")):
            break
        if line and set(line) - set("-─ "):
            content.append(line)
    message = " ".join(content[1:] or content) or "options must be complete"
    # For an optional value tyro prints the message of each of its two types.
    union = re.match(r"(.*): no type matching .*?could be instantiated from \['(.*?)'\]", message)
    if union:
        return f"{union[1]}: must be of its type or None, got {union[2][:200]!r}"
    for pattern, replacement in _REWRITES:
        message = re.sub(pattern, replacement, message)
    return re.sub(r"'([^']{200})[^']*'", r"'\1...'", message)
