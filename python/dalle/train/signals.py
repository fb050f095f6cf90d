"""SIGINT, SIGTERM and SIGHUP while a training runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dalle.console import say


@contextmanager
def signals() -> Iterator[list[str]]:
    """A list that gets the name of the first SIGINT, SIGTERM or SIGHUP.

    After it, SIGINT and SIGTERM end the process, and SIGHUP, of which a terminal that is closed
    sends several, does nothing. SIGHUP that is ignored (nohup) stays so. Outside the main thread,
    where Python allows no handlers, the list stays empty.
    """
    received: list[str] = []
    watched = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        watched.append(signal.SIGHUP)

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        for signum in watched:
            signal.signal(signum, signal.SIG_IGN if signum is signal.SIGHUP else signal.SIG_DFL)
        say(f"{received[0]}: finishing the step and saving; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {signum: signal.signal(signum, note) for signum in watched}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
