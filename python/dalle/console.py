"""Text for terminals, in characters that they can show, on streams that may fail."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import TextIO, cast

from tqdm import tqdm

MAX_LENGTH = 2000  # characters of a message
SECONDS = 5.0  # between two lines of progress
_JOINERS = "\u200c\u200d"  # of scripts and emoji: they change the look of letters, not their order
# ASCII in place of the characters of frames and messages, for terminals with no others.
_PLAIN = str.maketrans("─│╭╮╰╯┌┐└┘├┤•…’‘“”–—→×", "-|++++++++||*.''\"\"-->x")


def printable(text: str) -> str:
    """`text` as one line that moves no cursor: control characters, line ends, lone surrogates and
    marks that reverse the direction of writing become escapes; a very long text loses its middle.
    """
    if len(text) > MAX_LENGTH:
        text = f"{text[: MAX_LENGTH // 2]} ... {text[-MAX_LENGTH // 2 :]}"
    if text.isprintable():
        return text
    return "".join(_escaped(char) if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    kind = unicodedata.category(char)
    return kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and char not in _JOINERS)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def say(text: str) -> None:
    """Prints a line to stderr, above a progress bar if there is one; only on the main process.

    Control characters, which file names and captions may hold, become escapes. Where nobody reads
    the line any more (`... 2>&1 | head`, a terminal that was closed) the work goes on without it.
    """
    if is_main_process() and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            tqdm.write(printable(text), file=sys.stderr)
            sys.stderr.flush()


def is_main_process() -> bool:
    """Whether this process prints and writes files: the only one, or rank 0 of `torchrun`'s."""
    single = os.environ.get("WORLD_SIZE", "") in ("", "1")
    return single or os.environ.get("RANK", "0") == "0"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, remainder = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{remainder:02d}" if hours else f"{minutes}:{remainder:02d}"


@contextlib.contextmanager
def progress_shown(name: str) -> Iterator[Callable[[int, int], None]]:
    """What shows how far a piece of work is: called as show(done, in all) inside.

    A bar on a terminal; elsewhere a line every `SECONDS` with the time that is left.
    """
    terminal = False
    with contextlib.suppress(AttributeError, ValueError):  # stderr is None or closed
        terminal = is_main_process() and sys.stderr.isatty()
    bar = tqdm(desc=name, disable=not terminal, leave=False)
    begin = reported = time.monotonic()
    first: tuple[float, int] | None = None  # a resumed piece of work begins with much of it done

    def show(done: int, total: int) -> None:
        nonlocal reported, first
        with contextlib.suppress(OSError, ValueError):  # as in `say`
            bar.total = total
            bar.update(done - bar.n)
        now = time.monotonic()
        if bar.disable and done and now - reported > SECONDS:
            reported = now
            since, before = first if first is not None and done > first[1] else (begin, 0)
            left = duration((now - since) / (done - before) * (total - done))
            say(f"{name}: {100 * done // total} % | ETA {left}")
        first = first or (now, done)

    try:
        yield show
    finally:
        with contextlib.suppress(OSError, ValueError):
            bar.close()


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


class Stream:
    """A text stream that any text can be written to, and whose failures raise nothing.

    Characters that its encoding lacks are written as escapes; so are control characters where it
    takes `lines` only (a progress bar needs some). From the first failure on (a full disk, a closed
    pipe) everything is dropped, so that the work still reaches its end.

    Attributes:
        problem: the first failure, or None.
    """

    def __init__(self, inner: TextIO | None, *, lines: bool = False) -> None:
        self.inner, self.lines = inner, lines
        self.problem: OSError | None = None

    def write(self, text: str) -> int:
        size = len(text)
        if self.inner is not None and self.problem is None:
            if self.lines and not text.isprintable():
                text = "".join(char if char in "\n\t" else printable(char) for char in text)
            with self._record_failure():
                self.inner.write(fitted(text, self.inner.encoding))
        return size

    def flush(self) -> None:
        if self.inner is not None and self.problem is None:
            with self._record_failure():
                self.inner.flush()

    def isatty(self) -> bool:
        try:
            return self.inner is not None and self.inner.isatty()
        except ValueError:  # closed
            return False

    @contextlib.contextmanager
    def _record_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            self.problem = problem
        except ValueError as problem:  # Python closed it
            self.problem = OSError(str(problem))

    def drop(self) -> None:
        """Discards the stream's buffer, on which Python would fail at exit."""
        if self.problem is None or self.inner is None:
            return
        with contextlib.suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self.inner.fileno())
            os.close(devnull)

    def __getattr__(self, name: str) -> object:  # encoding, fileno, buffer, ...
        return getattr(self.inner, name)


def argument_text(word: str) -> str:
    """An argument as text: UTF-8 whatever the locale says; other bytes stay surrogates.

    File names keep the locale's form, which is the one that opens them.
    """
    try:
        return os.fsencode(word).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # of a file of options, not of the command line
        return word


def fitted(text: str, encoding: str | None) -> str:
    """`text` in characters that `encoding` has: frames and quotes in ASCII, the rest as escapes."""
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def guarded_streams() -> Iterator[tuple[Stream, Stream]]:
    """Inside, `sys.stdout` and `sys.stderr` are `Stream`s, also where the process has none."""
    before = sys.stdout, sys.stderr
    out, err = Stream(before[0], lines=True), Stream(before[1])
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out, err
    finally:
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            stream.flush()
            stream.drop()


def keep_standard_files() -> None:
    """Gives the process the three standard files it was started without.

    The next file to be opened would get the free number, and what libraries write to stdout or
    stderr would end up inside it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
