"""Time: what is left, what a case will take, whether it still fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from gpu.cases import Case

RESERVE = 5.0  # seconds kept back, for the result file


class Budget:
    """Counts down from `seconds`; learns from each case what those like it take."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.begin = now()
        self.seconds = seconds
        self.spent: dict[str, list[float]] = {}

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.now() - self.begin

    def remaining(self) -> float:
        """Seconds that work may still take."""
        return max(0.0, self.seconds - RESERVE - self.elapsed())

    def estimate(self, case: Case) -> float:
        """The mean of what cases of the same op took; before there is one, the case's own guess."""
        known = self.spent.get(case.op)
        return sum(known) / len(known) if known else case.seconds

    def took(self, case: Case, seconds: float) -> None:
        """Remembers what `case` took."""
        self.spent.setdefault(case.op, []).append(seconds)

    def fits(self, case: Case) -> bool:
        """Whether `case` is likely to end in time."""
        return self.estimate(case) <= self.remaining()

    def to_go(self, cases: Iterable[Case]) -> float:
        """Seconds until `cases` are done or the time is up."""
        return min(self.remaining(), sum(self.estimate(case) for case in cases))
