"""What gradient compression sends, what it costs and what it saves."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dalle_ext


@dataclass
class Traffic:
    """What a process sent.

    Attributes:
        sent: bytes.
        packed: elements that were packed into 16-bit words.
        counts: (3,) int64 on the device: how many of them these words could not hold, as
            `dalle_ext.pack_counted` counts; None before the first.
    """

    sent: int = 0
    packed: int = 0
    counts: Tensor | None = field(default=None, repr=False)

    def count(self, *packed: dalle_ext.Packed) -> None:
        """Adds what packing counted; the host does not wait for the device."""
        self.packed += sum(result.codes.numel() for result in packed)
        for result in packed:
            self.counts = result.counts if self.counts is None else self.counts + result.counts

    def loss_fractions(self) -> tuple[float, float]:
        """Fractions of the packed elements that saturated, and that were flushed to zero."""
        if self.counts is None or not self.packed:
            return 0.0, 0.0
        saturated, flushed, _ = self.counts.tolist()
        return saturated / self.packed, flushed / self.packed


@dataclass
class CommStats:
    """Communication statistics of one process since its start.

    Attributes:
        traffic: bytes sent, and what 16-bit words could not hold.
        uncompressed_bytes: of all gradients in fp32, by a ring all-reduce.
        seconds: of compression and communication together.
        exchange_seconds: of them in collectives, including the wait for other processes.
        waited_seconds: of them after the backward pass, on the CPU; the rest overlaps with it.
    """

    traffic: Traffic = field(default_factory=Traffic)
    uncompressed_bytes: int = 0
    seconds: float = 0.0
    exchange_seconds: float = 0.0
    waited_seconds: float = 0.0
    _pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)

    def __getstate__(self) -> dict[str, Any]:
        self._collect(wait=True)  # CUDA events cannot be pickled
        return self.__dict__

    @contextmanager
    def timed(self, counter: str, device: torch.device) -> Iterator[None]:
        """Adds the block's time on its device to an attribute; the host does not wait for it."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._add(counter, time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending.append((counter, begin, end))
        self._collect(wait=False)

    def _collect(self, *, wait: bool) -> None:
        """Adds the times of blocks that the device has finished, or with `wait` of all blocks."""
        while self._pending and (wait or self._pending[0][2].query()):
            counter, begin, end = self._pending.popleft()
            end.synchronize()
            self._add(counter, begin.elapsed_time(end) / 1e3)

    def _add(self, counter: str, seconds: float) -> None:
        setattr(self, counter, getattr(self, counter) + seconds)

    def report(self) -> dict[str, Any]:
        """See `PowerSGD.report`."""
        self._collect(wait=True)
        sent, uncompressed = self.traffic.sent, self.uncompressed_bytes
        saturated, flushed = self.traffic.loss_fractions()
        return {
            "bytes_sent": sent,
            "bytes_uncompressed": uncompressed,
            "compression": uncompressed / sent if sent else math.nan,
            "seconds": self.seconds,
            "waited_seconds": self.waited_seconds,
            "exchange_seconds": self.exchange_seconds,
            "saturated": saturated,
            "flushed": flushed,
            "advice": self._advice(),
        }

    def _advice(self) -> str:
        spent, sent = f"{1e3 * self.seconds:.0f} ms so far", self.traffic.sent
        if not sent or self.exchange_seconds <= 0:  # no reduction yet, or only one process
            return f"nothing was sent: {spent}"
        rate = sent / self.exchange_seconds
        fp32_seconds = self.uncompressed_bytes / rate
        pays = "compression pays" if self.seconds < fp32_seconds else "compression does not pay"
        return (
            f"{pays} at {8e-6 * rate:.0f} Mbit/s: {spent}; fp32 gradients would take "
            f"{1e3 * fp32_seconds:.0f} ms"
        )
