"""The `dalle` command: a static table of verbs, filled dataclasses, one line for every error.

`dalle --help` reads only this table, so it imports neither torch nor numpy. A verb's target is
`def f(config: SomeFrozenDataclass) -> None`; the options are the dataclass's fields.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from dalle.configs import did_you_mean
from dalle.console import guarded_streams, printable
from dalle.errors import DalleError, EnvironmentProblem, UsageError
from dalle.files import folders_of_failure_removed
from dalle.version import __version__

COMMANDS: dict[tuple[str, ...], tuple[str, str]] = {
    ("data", "check"): (
        "dalle.commands.data_check:check",
        "what a set holds and lacks",
    ),
    ("data", "encode"): ("dalle.commands.encode:encode", "image tokens and captions on the disk"),
    ("data", "filter"): ("dalle.commands.data_filter:filter_pairs", "keep what the paper would"),
    ("data", "dedup"): ("dalle.commands.data_dedup:dedup", "keep one of pictures that are alike"),
    ("data", "stats"): ("dalle.commands.data_stats:stats", "sizes, caption lengths, tokens"),
    ("data", "index"): ("dalle.commands.data_index:index", "where pairs are in tar shards"),
    ("data", "pack"): ("dalle.commands.data_pack:pack", "any set into tar shards"),
    ("data", "make-shapes"): ("dalle.commands.data:make_shapes", "draw the procedural set"),
    ("train",): ("dalle.commands.train:train", "a folder of pictures to a model that draws"),
    ("demo",): ("dalle.commands.demo:demo", "train everything on a small set, draw captions"),
    ("reproduce",): ("dalle.commands.reproduce:reproduce", "the paper's figures, made here"),
    ("sample",): ("dalle.commands.sample:sample", "draw pictures for captions"),
    ("edit",): ("dalle.commands.edit:edit", "draw parts of a picture anew for a caption"),
    ("rerank",): ("dalle.commands.rerank:rerank", "which pictures of a folder fit a caption best"),
    ("prior", "train"): ("dalle.commands.prior:train_command", "learn captions and image tokens"),
    ("dvae", "train"): ("dalle.commands.dvae:train", "learn to turn pictures into tokens"),
    ("dvae", "reconstruct"): ("dalle.commands.dvae:reconstruct", "pictures to tokens and back"),
    ("dvae", "import-openai"): (
        "dalle.commands.dvae_import:import_openai",
        "take the weights that the paper's authors released",
    ),
    ("ranker", "train"): ("dalle.commands.ranker:train_command", "learn which sample is best"),
    ("pipeline", "make"): ("dalle.commands.pipeline:make", "trained parts into what sample takes"),
    ("eval", "features"): ("dalle.commands.eval:features", "features of a set, kept on the disk"),
    ("eval", "fid"): ("dalle.commands.eval:fid", "Frechet distance of two sets of pictures"),
    ("eval", "kid"): ("dalle.commands.eval:kid", "kernel distance of two sets of pictures"),
    ("eval", "is"): ("dalle.commands.eval:inception_score", "Inception Score of a set"),
    ("eval", "prc"): ("dalle.commands.eval:prc", "precision and recall of generated pictures"),
    ("eval", "clip-score"): ("dalle.commands.eval:clip_score", "do pictures fit their captions"),
    ("eval", "recon"): (
        "dalle.commands.eval_figures:recon",
        "pictures through a dVAE and back, measured",
    ),
    ("eval", "blur"): (
        "dalle.commands.eval_figures:blur",
        "distance and score against blur, Figure 9 a",
    ),
    ("eval", "rerank"): (
        "dalle.commands.eval_figures:rerank",
        "best of 1 to 512 candidates, Figure 9 c",
    ),
    ("eval", "words"): (
        "dalle.commands.eval_figures:words",
        "which facts of captions pictures show",
    ),
    ("eval", "overlap"): (
        "dalle.commands.eval_overlap:overlap",
        "pictures that a model has seen, and the distance without",
    ),
    ("eval", "votes"): (
        "dalle.commands.eval_votes:votes",
        "which of two models people prefer, Figure 7",
    ),
    ("eval", "report"): (
        "dalle.commands.eval_figures:report",
        "one HTML page of all results in a folder",
    ),
    ("plot", "scales"): ("dalle.commands.plot:scales", "the gradient scales of a training"),
    ("tokenizer", "train"): ("dalle.commands.tokenizer:train", "learn a byte-level BPE"),
    ("env",): ("dalle.commands.env:env", "versions, devices, native objects and extras found"),
    ("plan",): ("dalle.commands.plan:plan", "parameters, memory and FLOPs of a prior preset"),
}

# What begins the lines of Python's functions; those of a command begin with its own name.
FUNCTIONS = ("generate", "Decoder", "Prior", "pipeline", "picture", "train")

GLOBAL_OPTIONS = """\
options of every command:
  --config FILE        take options from a YAML or TOML file; the command line wins
  --debug              show the traceback of an error
  -h, --help           explain the command's options
exit codes: 0 done, 2 usage, 3 data, 4 surroundings, 5 numbers, 6 interrupted and saved, 1 other
"""


def help_text(prefix: tuple[str, ...] = ()) -> str:
    """The table of the verbs that begin with `prefix`."""
    rows = [
        (" ".join(verb), summary)
        for verb, (_, summary) in sorted(COMMANDS.items())
        if verb[: len(prefix)] == prefix
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}   {summary}" for name, summary in rows]
    usage = " ".join(["dalle", *prefix, "COMMAND" if not prefix else "..."])
    return f"usage: {usage} [OPTIONS]\n\ncommands:\n" + "\n".join(lines) + f"\n\n{GLOBAL_OPTIONS}"


def find_command(words: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Splits `words` into the longest verb of the table and the rest.

    Raises:
        UsageError: naming the unknown word and the nearest verb.
    """
    for length in (2, 1):
        verb = tuple(words[:length])
        if verb in COMMANDS:
            return verb, list(words[length:])
    first = words[0]
    groups = sorted({verb[0] for verb in COMMANDS})
    if first not in groups:
        raise UsageError(
            f"dalle: command must be one of {', '.join(groups)}, got {first}"
            + did_you_mean(first, groups)
        )
    second = words[1] if len(words) > 1 else ""
    inner = sorted(verb[1] for verb in COMMANDS if verb[0] == first and len(verb) > 1)
    raise UsageError(
        f"dalle {first}: command must be one of {', '.join(inner)}, got {second or 'none'}"
        + did_you_mean(second, inner)
    )


def load_target(verb: tuple[str, ...]) -> tuple[Callable[[Any], None], type]:
    """The function behind a verb and the dataclass it takes."""
    module_name, _, function_name = COMMANDS[verb][0].partition(":")
    function = getattr(import_module(module_name), function_name)
    hints = typing.get_type_hints(function)
    (config_type,) = (hint for name, hint in hints.items() if name != "return")
    return function, config_type


def run(words: list[str]) -> None:
    """Runs one command line (without `--debug`).

    Raises:
        DalleError: for everything that a user can fix.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    if words[0] in ("-V", "--version"):
        print(f"dalle {__version__}")
        return
    asks_help = len(words) == 2 and words[1] in ("-h", "--help")
    if (len(words) == 1 or asks_help) and (words[0],) not in COMMANDS:
        if any(verb[0] == words[0] for verb in COMMANDS):
            print(help_text((words[0],)))
            return
    verb, arguments = find_command(words)
    try:
        os.getcwd()
    except FileNotFoundError as problem:
        raise EnvironmentProblem(
            "dalle: the folder you are in must be there, got one that was removed"
        ) from problem
    function, config_type = load_target(verb)
    from dalle.options import parse_options

    try:
        config: Any = parse_options(config_type, arguments, prog=" ".join(["dalle", *verb]))
        function(_with_data_here(config, folders=verb != ("demo",)))
    except DalleError as error:
        error.rename(FUNCTIONS, " ".join(verb))
        raise


def _with_data_here(config: Any, *, folders: bool) -> Any:
    """The options with `--data`, where there is one, as it stands in the current directory."""
    if not isinstance(getattr(config, "data", None), str):
        return config
    from dalle.data.sources import data_here

    return replace(config, data=data_here(config.data, folders=folders))


def describe_error(error: BaseException) -> tuple[str, int]:
    """The line to print and the exit code for an error that reached the top."""
    if isinstance(error, DalleError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        line = "dalle: stopped by the keyboard; nothing saved since the last message"
        return str(error) or line, 130
    from dalle.memory import is_refusal, refusal_line

    if is_refusal(error):
        return f"dalle: out of memory: {refusal_line(error)}", 4
    text = next(iter(str(error).strip().splitlines()), "") or "no reason given"
    if isinstance(error, ImportError):
        name = (error.name or "of dalle-ext").partition(".")[0]
        last = str(error).strip().splitlines()[-1:]  # numpy begins with advice, the reason is last
        reason = " ".join(last).removeprefix("Original error was: ") or text
        return f"dalle: package {name} must load, got: {reason}; type: pip install dalle-ext", 4
    setting = re.search(r"DALLE_EXT_\w+ must .*", text)  # the kernels read it at their first call
    if setting:
        return f"dalle: {setting[0]}", 4
    if "can't start new thread" in text:
        return "dalle: the system must allow another thread, got none: a limit of processes", 4
    if isinstance(error, OSError):
        reason = error.strerror or text
        code = 3 if isinstance(error, FileNotFoundError) else 4
        return f"dalle: {error.filename}: {reason}" if error.filename else f"dalle: {reason}", code
    return f"dalle: a fault of dalle itself{_location(error)}: {text} (--debug shows where)", 1


def _location(error: BaseException) -> str:
    """Where in this package an unforeseen error came from, e.g. " (pipeline.py, line 3)"."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if f"{os.sep}dalle{os.sep}" in frame.filename
    ]
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `dalle`; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    # OpenMP threads that spin while they wait starve each other on a machine with other work: two
    # of them trained several times slower than two that sleep (docs/log.md). Torch reads the
    # variable when it loads, so it is set here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = [word for word in words if word != "--debug"]
    code = 0
    with guarded_streams() as (out, _):
        try:
            with folders_of_failure_removed():
                run(words)
        except SystemExit:  # after the help of a command
            out.flush()
            if not out.problem:
                raise
        except BaseException as error:  # Rust's panics are no Exception
            line, code = describe_error(error)
            if debug:
                traceback.print_exc()
            print(printable(" ".join(line.split("\n"))), file=sys.stderr)
        out.flush()
        if code == 0 and out.problem and not isinstance(out.problem, BrokenPipeError):
            # A closed pipe is no error: in `dalle plan | head`, head has read enough.
            reason = out.problem.strerror or out.problem
            print(f"dalle: stdout must be writable, got {reason}", file=sys.stderr)
            code = 4
    return code
