"""What compressed exchanges cost and what they saved."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dalle.distributed.wire import Traffic


@dataclass
class Account:
    """Kept by one process since its start.

    Attributes:
        traffic: bytes sent, and what 16-bit words could not hold.
        uncompressed_bytes: of all gradients in fp32, ring all-reduce.
        seconds: in all; exchange_seconds: of them in collectives, waiting for the other processes
            included; waited_seconds: of them after the backward pass, on the CPU; the others
            were hidden behind it.
    """

    traffic: Traffic = field(default_factory=Traffic)
    uncompressed_bytes: int = 0
    seconds: float = 0.0
    exchange_seconds: float = 0.0
    waited_seconds: float = 0.0
    _pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)

    def __getstate__(self) -> dict[str, Any]:
        self._collect(wait=True)  # events are of this process
        return self.__dict__

    @contextmanager
    def timed(self, what: str, device: torch.device) -> Iterator[None]:
        """Adds what the block takes on its device to the attribute `what`; never waits for it."""
        if device.type != "cuda":
            begun = time.perf_counter()
            yield
            self._add(what, time.perf_counter() - begun)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending.append((what, begin, end))
        self._collect(wait=False)

    def _collect(self, *, wait: bool) -> None:
        """Adds the times of what the device has done, in order; `wait`: of all."""
        while self._pending and (wait or self._pending[0][2].query()):
            what, begin, end = self._pending.popleft()
            end.synchronize()
            self._add(what, begin.elapsed_time(end) / 1e3)

    def _add(self, what: str, seconds: float) -> None:
        setattr(self, what, getattr(self, what) + seconds)

    def report(self) -> dict[str, Any]:
        """See `PowerSGD.report`."""
        self._collect(wait=True)
        sent, whole = self.traffic.sent, self.uncompressed_bytes
        saturated, flushed = self.traffic.shares()
        return {
            "bytes_sent": sent,
            "bytes_uncompressed": whole,
            "compression": whole / sent if sent else math.nan,
            "seconds": self.seconds,
            "waited_seconds": self.waited_seconds,
            "exchange_seconds": self.exchange_seconds,
            "saturated": saturated,
            "flushed": flushed,
            "advice": self._advice(),
        }

    def _advice(self) -> str:
        own, sent = f"{1e3 * self.seconds:.0f} ms so far", self.traffic.sent
        if not sent or self.exchange_seconds <= 0:  # nothing to reduce yet, or nobody to send to
            return f"nothing was sent: {own}"
        rate = sent / self.exchange_seconds
        plain = self.uncompressed_bytes / rate
        pays = "compression pays" if self.seconds < plain else "compression does not pay"
        return (
            f"{pays} at {8e-6 * rate:.0f} Mbit/s: {own}; fp32 gradients would take "
            f"{1e3 * plain:.0f} ms"
        )
