"""Who is still alive: each process leaves a sign in the store that all of them can read."""

from __future__ import annotations

import atexit
import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist

BEAT = 0.5  # seconds
GRACE = 3.0  # seconds without a sign from who is gone
SILENCE = 60.0  # of process 0 at most while it works alone, perhaps too busy for signs


class Heartbeat:
    """Signs of life of `world` processes, beside their collectives.

    An exchange fails on whoever talks to the process that is gone, and on the rest only when those
    have left; so nobody can tell from its own failure whose fault it was.

    Args:
        rank, world: number of this process, and of all.
        limit: in which the store must answer at first; without a sign for as long, or for
            `SILENCE` where that is less, process 0 is not waited for any more.
        run: the same on all, and another after each restart, which the store may outlive.
    """

    def __init__(self, rank: int, world: int, limit: timedelta, run: str) -> None:
        self.rank, self.world, self._limit = rank, world, min(limit.total_seconds(), SILENCE)
        self._verdict, self._turn = "", 0
        # A connection of its own: the collectives' may be waiting for something.
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=limit,
            wait_for_workers=False,
        )
        self._store.set_timeout(timedelta(seconds=GRACE))
        self._prefix = f"dalle/alive/{run}"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="Heartbeat")
        self._thread.start()
        # A thread that comes back from C++ while the interpreter ends takes the process down.
        atexit.register(self.stop)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._store.add(f"{self._prefix}/{self.rank}", 1)
                if self._store.check([f"{self._prefix}/verdict"]):
                    self._verdict = self._store.get(f"{self._prefix}/verdict").decode()
            except RuntimeError:
                pass  # the process that keeps the store is busy, or has gone
            self._stopped.wait(BEAT)

    def follow(self) -> None:
        """Returns when process 0 has called it as often, however long that takes while it lives.

        What process 0 does alone may take longer than any exchange is waited for.

        Raises:
            DistError: it gave no sign of life for too long, or an exchange of another failed.
        """
        self._turn += 1
        if self.rank == 0:
            self._store.set(f"{self._prefix}/turn", str(self._turn))
            return
        seen: list[float] = [time.monotonic()]  # when process 0 last gave a sign
        come = threading.Event()
        # A dead link lets whoever asks the store wait for minutes, hence the thread.
        threading.Thread(target=self._watch, args=(self._turn, seen, come), daemon=True).start()
        while not come.wait(BEAT):
            if self._verdict or time.monotonic() - seen[0] > self._limit:
                raise dist.DistError("timed out waiting for process 0")

    def _watch(self, turn: int, seen: list[float], come: threading.Event) -> None:
        key, beats, pause = f"{self._prefix}/turn", -1, 1e-3
        while not self._verdict and time.monotonic() - seen[0] <= self._limit:
            try:
                if self._store.check([key]) and int(self._store.get(key)) >= turn:
                    come.set()
                    return
                now = self._store.add(f"{self._prefix}/0", 0)
            except RuntimeError:  # the store is busy, or has gone: no sign
                now = beats
            if now != beats:
                beats, seen[0] = now, time.monotonic()
            time.sleep(pause)
            pause = min(2 * pause, BEAT)

    def stop(self) -> None:
        """Ends the signs of life."""
        self._stopped.set()
        self._thread.join(GRACE)

    def gone(self) -> list[int]:
        """Called by a process whose exchange failed: the processes that are the reason.

        Those that give no sign in `GRACE` seconds; if all do, those whose exchange did not fail.
        All processes get what the first of them found. Process 0, which may keep the store, where
        it does not answer: a dead link lets whoever reads it wait for minutes, hence the thread.
        """
        asking = threading.Thread(target=self._ask, daemon=True)
        asking.start()
        asking.join(3 * GRACE)
        verdict = self._verdict or "0"
        return [] if verdict == "none" else [int(r) for r in verdict.split(",")]

    def _ask(self) -> None:
        try:
            self._store.set(f"{self._prefix}/failed/{self.rank}", "1")
            if not self._judges():  # one of them looks; the others read what it says
                end = time.monotonic() + 2 * GRACE
                while not self._store.check([f"{self._prefix}/verdict"]) and time.monotonic() < end:
                    time.sleep(BEAT / 2)
            if not self._store.check([f"{self._prefix}/verdict"]):
                verdict = ",".join(map(str, self._silent())) or "none"
                self._store.compare_set(f"{self._prefix}/verdict", "", verdict)
            self._verdict = self._store.get(f"{self._prefix}/verdict").decode()
            if self.rank == 0:
                time.sleep(2 * BEAT)  # it may keep the store, which the others still read
        except RuntimeError:
            return

    def _judges(self) -> bool:
        """Whether this process is the first to ask."""
        first = self._store.compare_set(f"{self._prefix}/judge", "", str(self.rank))
        return first.decode() == str(self.rank)

    def _silent(self) -> list[int]:
        """The processes without a beat in `GRACE`; if all beat, those whose exchange went well."""
        before = self._beats()
        time.sleep(GRACE)
        beats = zip(before, self._beats(), strict=True)
        silent = [r for r, (then, now) in enumerate(beats) if then == now]
        return silent or [
            r for r in range(self.world) if not self._store.check([f"{self._prefix}/failed/{r}"])
        ]

    def _beats(self) -> list[int]:
        return [self._store.add(f"{self._prefix}/{r}", 0) for r in range(self.world)]
