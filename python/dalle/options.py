"""Fills a config dataclass from command-line words and files of options, with tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import tyro

from dalle.config_files import Scalar, kind_of, read_options
from dalle.configs import check_numbers, did_you_mean, field_types
from dalle.errors import UsageError

WIDE = 40_000  # columns
REPEATED = "repeated"  # in the annotation of a list whose option may be given once for each value
SOURCES = "data"  # the option that may be given several times where it is a text
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
        words: what follows the command's name; `--config FILE` (YAML, or TOML by its
            suffix) among them gives options that the others override.
        prog: the command's name, begins every line.

    Raises:
        UsageError: for unknown options (with the nearest known one), missing ones, or values
            that the dataclass refuses.
        SystemExit: code 0, after `--help`.
    """
    words, file = _take_config(words, prog)
    words = [_of_today(word, getattr(config_type, "OLD_NAMES", {})) for word in words]
    names = option_names(config_type)
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name[2:].replace("_", "-") not in names | {"help", ""}:
            hint = did_you_mean(name, {f"--{k}" for k in names})
            raise UsageError(f"{prog}: {name} is not an option{hint}")
    options = None if file is None else _FileOptions(config_type, file)
    if _plain(field_types(config_type).get(SOURCES)) is str:
        words = _joined_sources(words)
    _require_values(words, config_type, prog)
    words = _gathered(words, config_type)
    if options is not None:
        words = options.words + words
    words = _spelled(words, config_type)
    for word, before in zip(words, ["", *words], strict=False):
        if not word and before.startswith("--"):  # e.g. from an unset variable
            raise UsageError(f"{prog}: {before} must have a value, got an empty one")
        if word.startswith("--") and word.find("=") == len(word) - 1:
            raise UsageError(f"{prog}: {word[:-1]} must have a value, got an empty one")
        if "\0" in word:
            raise UsageError(f"{prog}: options must hold no NUL character, got {word!r}")
    output = io.StringIO()
    try:
        try:
            config = _parse(config_type, words, prog, output)
        except SystemExit as stop:
            required = _required(config_type, options)
            if not stop.code or not required:
                raise
            words = required + words  # the command line has no such argument of its own
            config = _parse(config_type, words, prog, output)
        config = _with_positional(config, options)
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


def _require_values(words: list[str], config_type: type, prog: str) -> None:
    """Raises UsageError for an option of a list without a value: `--only` would mean all."""
    fields = _file_fields(config_type)
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        annotation = fields.get(word[2:].replace("-", "_")) if word.startswith("--") else None
        if after.startswith("--") and _takes_list(annotation):
            raise UsageError(f"{prog}: {word} must have a value, got none")


def _gathered(words: list[str], config_type: type) -> list[str]:
    """`words` with the values of an option of `REPEATED` that is given several times as a list."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    for field, annotation in hints.items():
        if REPEATED not in getattr(annotation, "__metadata__", ()):
            continue
        option = f"--{field.replace('_', '-')}"
        values: list[str] = []
        rest: list[str] = []
        inside = False
        for word in words:
            name, equals, value = word.partition("=")
            if name.replace("_", "-") == option:
                inside = not equals
                values += [value] if equals else []
            elif inside and not word.startswith("--"):
                values.append(word)
            else:
                inside = False
                rest.append(word)
        if len(values) > 1 and "" not in values:
            words = [*rest, option, *values]
    return words


def _joined_sources(words: list[str]) -> list[str]:
    """`words` with the values of several `--data` as one, a line each, where one has a weight.

    Without weights the last counts, as of every option.
    """
    values: list[str] = []
    rest, i = [], 0
    while i < len(words):
        name, equals, value = words[i].partition("=")
        if name == f"--{SOURCES}" and (equals or i + 1 < len(words)):
            i, value = (i, value) if equals else (i + 1, words[i + 1])
            values.append(value)
        else:
            rest.append(words[i])
        i += 1
    if len(values) < 2 or "" in values or not any(map(_has_weight, values)):
        return words
    return [*rest, f"--{SOURCES}=" + "\n".join(values)]


def _has_weight(source: str) -> bool:
    """Whether a source ends in =NUMBER, and is no path with such a name."""
    name, _, text = source.rpartition("=")
    try:
        float(text)
    except ValueError:
        return False
    return bool(name) and not os.path.exists(source)


def _of_today(word: str, old_names: Mapping[str, str]) -> str:
    """An option with its name of today where `word` has one of before."""
    name, equals, value = word.partition("=")
    today = old_names.get(name.removeprefix("--")) if name.startswith("--") else None
    return word if today is None else f"--{today}{equals}{value}"


def _parse(config_type: type[T], words: list[str], prog: str, output: io.StringIO) -> T:
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        return tyro.cli(config_type, args=words, prog=prog, config=(tyro.conf.OmitArgPrefixes,))


def _required(config_type: type, options: _FileOptions | None) -> list[str]:
    """The file's values of arguments that have no name and no default."""
    given = {} if options is None else options.positional
    return [
        value
        for field in dataclasses.fields(config_type)
        if field.name in given and field.default is dataclasses.MISSING
        for value in given[field.name]
    ]


def _with_positional(config: T, options: _FileOptions | None) -> T:
    """`config` with the file's arguments without a name where the command line gives none."""
    given = {} if options is None else options.positional
    empty = {name: values for name, values in given.items() if getattr(config, name) == ()}
    # A T is a dataclass, which its bound cannot say (typeshed keeps that type to itself).
    return dataclasses.replace(config, **empty) if empty else config  # type: ignore[type-var]


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
        if word == "--config" and i + 1 == len(words):
            raise UsageError(f"{prog}: --config must be followed by a file, got nothing")
        if word == "--config" or word.startswith("--config="):
            name, used = (words[i + 1], 2) if word == "--config" else (word[9:], 1)
            rest = words[:i] + words[i + used :]
            if any(other.split("=")[0] == "--config" for other in rest):
                raise UsageError(f"{prog}: --config must be given once, got it twice")
            return rest, Path(name)
    return words, None


class _FileOptions:
    """The options of a file: words as on the command line, and values of positional arguments."""

    def __init__(self, config_type: type, path: Path) -> None:
        self.words: list[str] = []
        self.positional: dict[str, tuple[str, ...]] = {}
        self._given_as: dict[str, str] = {}
        self._take(config_type, read_options(path), str(path))

    def _take(self, config_type: type, values: dict[str, Any], where: str) -> None:
        fields, old_names = _file_fields(config_type), getattr(config_type, "OLD_NAMES", {})
        for key, value in values.items():
            name = key.replace("-", "_")
            name = old_names.get(name, name)
            if name not in fields:
                choices = {n.replace("_", "-") if "-" in key else n for n in fields}
                raise UsageError(f"{where}: {key} is not an option{did_you_mean(key, choices)}")
            inner, here = _nested(fields[name]), f"{where}: {key}"
            if inner is not None:
                if not isinstance(value, dict):
                    raise UsageError(f"{here} must be a mapping of options, got {kind_of(value)}")
                self._take(inner, value, here)
                continue
            if name in self._given_as:
                raise UsageError(f"{here} must be given once, got also {self._given_as[name]}")
            self._given_as[name] = here
            self._add(name, fields[name], value, here)

    def _add(self, name: str, annotation: Any, value: Any, where: str) -> None:
        option, plain = name.replace("_", "-"), _plain(annotation)
        if isinstance(value, Scalar) and value.is_null:  # the default, where None is no value
            if type(None) in typing.get_args(plain):
                self.words.append(f"--{option}=None")
        elif _positional(annotation):
            items = value if isinstance(value, list) else [value]
            if plain is str and len(items) != 1:
                raise UsageError(f"{where} must be one value, got {len(items)}")
            self.positional[name] = tuple(_text(item, where) for item in items)
        elif bool in (plain, *typing.get_args(plain)):
            switch = value.switch if isinstance(value, Scalar) else None
            if switch is None:
                got = value.text if isinstance(value, Scalar) else kind_of(value)
                quoted = isinstance(value, Scalar) and not value.plain
                raise UsageError(
                    f"{where} must be true or false, got {repr(got) if quoted else got}"
                )
            self.words.append(f"--{option}" if switch else f"--no-{option}")
        elif isinstance(value, list) and name == SOURCES and plain is str and value:
            joined = "\n".join(_text(item, where) for item in value)
            self.words.append(f"--{option}={joined}")
        elif isinstance(value, list):
            if not _takes_list(annotation):
                raise UsageError(f"{where} must be one value, got a list")
            items = [_text(item, where) for item in value]
            if any(re.match(r"-(?![\d.])", item) for item in items):
                raise UsageError(f"{where} must hold no value that begins with -")
            self.words += [f"--{option}", *items]
        else:
            self.words.append(f"--{option}={_text(value, where)}")


def _file_fields(config_type: type) -> dict[str, Any]:
    """Field name -> annotation; options of nested dataclasses may stand beside the others."""
    fields: dict[str, Any] = {}
    annotations = typing.get_type_hints(config_type, include_extras=True)
    for name in field_types(config_type):
        inner = _nested(annotations[name])
        if inner is not None:
            fields = {**_file_fields(inner), **fields}
    return {**fields, **{name: annotations[name] for name in field_types(config_type)}}


def _text(value: Any, where: str) -> str:
    """A value of a file as a word. Nested lists are refused: aliases could make them huge."""
    if not isinstance(value, Scalar):
        raise UsageError(f"{where} must be a plain value or a list of them, got {kind_of(value)}")
    return value.text


def _kinds(annotation: Any) -> set[Any]:
    """The plain types in an annotation: {int} of `tuple[int, int] | None`."""
    plain = _plain(annotation)
    inner = [kind for part in typing.get_args(plain) for kind in _kinds(part)]
    return set(inner) if inner else {plain} - {type(None), Ellipsis}


def _spelled(words: list[str], config_type: type) -> list[str]:
    """`words` with numbers as Python spells them, and switches of `bool | None` as tyro does.

    `1e3` is an integer, as are `0x10` and `1_000`; `.inf` and `.nan` are YAML's.
    """
    annotations = {n.replace("_", "-"): a for n, a in _file_fields(config_type).items()}
    result, kinds, left = [], set[Any](), 0.0  # words that still belong to an option
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if not word.startswith("--"):
            result.append(_number(word, kinds) if left else word)
            left = max(0.0, left - 1)
            continue
        name, equals, _ = word[2:].partition("=")
        value, name = word[len(name) + 3 :], name.replace("_", "-")
        negated = name.removeprefix("no-")
        annotation = annotations.get(name, str)
        kinds, left = _kinds(annotation), math.inf if _takes_list(annotation) else 1.0
        if equals:
            result.append(f"--{name}={_number(value, kinds)}")
            left = 0.0
        elif _optional_switch(annotation):
            result.append(word if after in ("True", "False", "None") else f"--{name}=True")
        elif negated != name and _optional_switch(annotations.get(negated)):
            result.append(f"--{negated}=False")
        else:
            result.append(word)
    return result


def _optional_switch(annotation: Any) -> bool:
    plain = _plain(annotation)
    return bool in typing.get_args(plain) and type(None) in typing.get_args(plain)


def _number(text: str, kinds: set[Any]) -> str:
    if kinds == {float} and re.fullmatch(r"[-+]?\.(inf|nan)", text.lower()):
        return text.lower().replace(".", "")
    if kinds == {int} and re.fullmatch(r"[-+]?0[xXoObB][0-9a-fA-F_]+", text):
        with contextlib.suppress(ValueError):
            return str(int(text, 0))
    if kinds == {int} and re.fullmatch(r"[-+]?[\d_.]+[eE][-+]?\d{1,2}", text):
        with contextlib.suppress(ArithmeticError, ValueError):
            value = Decimal(text)
            return str(int(value)) if value == value.to_integral_value() else text
    return text


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
