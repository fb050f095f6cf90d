"""Which processes are alive: each one counts up a key in a store that all of them read."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

BEAT = 0.5  # seconds between two signs of life
GRACE = 3.0  # seconds without a sign after which a process counts as dead
SILENCE = 60.0  # the same for process 0 while it works alone, perhaps too busy for signs


class Heartbeat:
    """Signs of life of `world_size` processes, beside their collectives.

    A collective fails first on the processes that talk to the dead one, and on the rest only when
    those have left. So no process can tell from its own failure which one died.

    Args:
        rank, world_size: number of this process, number of processes.
        limit: time-out of the first connection to the store. Process 0 counts as dead without a
            sign for as long, or for `SILENCE` where that is shorter.
        run: a name, equal on all processes and new after a restart, which the store may outlive.
    """

    def __init__(self, rank: int, world_size: int, limit: timedelta, run: str) -> None:
        self.rank, self.world_size, self._limit = (
            rank,
            world_size,
            min(limit.total_seconds(), SILENCE),
        )
        self._dead = ""  # ranks, or "none"; empty while nobody has asked
        self._timeout = limit.total_seconds()
        self._waiting_since: float | None = None  # for the device, on the main thread
        self._next_beats, self._last_beat = -1, time.monotonic()  # of the next process
        self._round = 0  # calls of `wait_for_rank0`
        # A separate connection, since that of the collectives may be blocked.
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
        # A thread that returns from C++ while the interpreter exits crashes the process.
        atexit.register(self.stop)

    def _run(self) -> None:
        following = (self.rank + 1) % self.world_size
        while not self._stopped.is_set():
            try:
                self._store.add(f"{self._prefix}/{self.rank}", 1)
                beats = self._store.add(f"{self._prefix}/{following}", 0)
                if beats != self._next_beats:
                    self._next_beats, self._last_beat = beats, time.monotonic()
                if self._store.check([f"{self._prefix}/dead"]):
                    self._dead = self._store.get(f"{self._prefix}/dead").decode()
            except RuntimeError:
                pass  # the process that hosts the store is busy or dead
            self._stopped.wait(BEAT)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for exchanges on a GPU, which no error ends: see `watch`."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def watch(self, lost: Callable[[str], object]) -> None:
        """Calls `lost` from a thread where `waiting` will not come to an end.

        NCCL's exchanges run on the GPU. Where another process is gone the main thread waits for the
        GPU, and no Python runs there; NCCL's own watchdog knows no ranks.

        Args:
            lost: takes how the exchange ended: "closed", as a process has no heartbeat or another
                has said which one is dead, or "timed out". It should end this process.
        """
        self._watch_thread = threading.Thread(
            target=self._watch, args=(lost,), daemon=True, name="Watch"
        )
        self._watch_thread.start()

    def _watch(self, lost: Callable[[str], object]) -> None:
        # Looks at memory alone: reading the store over a dead link blocks for minutes.
        while not self._stopped.wait(BEAT):
            since, now = self._waiting_since, time.monotonic()
            if since is None:
                continue
            if self._dead or now - self._last_beat > self._limit:
                lost("closed")
                return
            if now - since > self._timeout:
                lost("timed out")
                return

    def wait_for_rank0(self) -> None:
        """Waits, as long as process 0 is alive, until it has called this as many times.

        Work of process 0 alone may take longer than the time-out of a collective.

        Raises:
            DistError: no sign of life from it for too long, or a collective of another failed.
        """
        self._round += 1
        if self.rank == 0:
            self._store.set(f"{self._prefix}/round", str(self._round))
            return
        last_seen: list[float] = [time.monotonic()]  # when process 0 last gave a sign
        arrived = threading.Event()
        # Reading the store over a dead link blocks for minutes, hence the thread.
        threading.Thread(
            target=self._poll_rank0, args=(self._round, last_seen, arrived), daemon=True
        ).start()
        while not arrived.wait(BEAT):
            if self._dead or time.monotonic() - last_seen[0] > self._limit:
                raise dist.DistError("timed out waiting for process 0")

    def _poll_rank0(
        self, round_number: int, last_seen: list[float], arrived: threading.Event
    ) -> None:
        key, beats, pause = f"{self._prefix}/round", -1, 1e-3
        while not self._dead and time.monotonic() - last_seen[0] <= self._limit:
            try:
                if self._store.check([key]) and int(self._store.get(key)) >= round_number:
                    arrived.set()
                    return
                now = self._store.add(f"{self._prefix}/0", 0)
            except RuntimeError:  # the process that hosts the store is busy or dead: no sign
                now = beats
            if now != beats:
                beats, last_seen[0] = now, time.monotonic()
            time.sleep(pause)
            pause = min(2 * pause, BEAT)

    def stop(self) -> None:
        """Ends the signs of life."""
        self._stopped.set()
        self._thread.join(GRACE)

    def dead_ranks(self) -> list[int]:
        """The processes that made a collective of this process fail.

        Those without a sign of life in `GRACE` seconds; if all give one, those whose collective did
        not fail. All processes get the answer of the first that asks. Where the store does not
        answer, process 0, which may host it: reading it over a dead link blocks for minutes, hence
        the thread.
        """
        thread = threading.Thread(target=self._find_dead, daemon=True)
        thread.start()
        thread.join(3 * GRACE)
        dead = self._dead or "0"
        return [] if dead == "none" else [int(r) for r in dead.split(",")]

    def _find_dead(self) -> None:
        try:
            self._store.set(f"{self._prefix}/failed/{self.rank}", "1")
            if not self._asks_first():  # the others read its answer
                end = time.monotonic() + 2 * GRACE
                while not self._store.check([f"{self._prefix}/dead"]) and time.monotonic() < end:
                    time.sleep(BEAT / 2)
            if not self._store.check([f"{self._prefix}/dead"]):
                dead = ",".join(map(str, self._silent_ranks())) or "none"
                self._store.compare_set(f"{self._prefix}/dead", "", dead)
            self._dead = self._store.get(f"{self._prefix}/dead").decode()
            if self.rank == 0:
                time.sleep(2 * BEAT)  # it may host the store, which the others still read
        except RuntimeError:
            return

    def _asks_first(self) -> bool:
        """Whether this process is the first to ask."""
        first = self._store.compare_set(f"{self._prefix}/first", "", str(self.rank))
        return first.decode() == str(self.rank)

    def _silent_ranks(self) -> list[int]:
        """Ranks without a beat in `GRACE`; if all beat, those whose collective did not fail."""
        before = self._beats()
        time.sleep(GRACE)
        beats = zip(before, self._beats(), strict=True)
        silent = [r for r, (then, now) in enumerate(beats) if then == now]
        return silent or [
            r
            for r in range(self.world_size)
            if not self._store.check([f"{self._prefix}/failed/{r}"])
        ]

    def _beats(self) -> list[int]:
        return [self._store.add(f"{self._prefix}/{r}", 0) for r in range(self.world_size)]
