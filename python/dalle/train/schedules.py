"""Step-size, temperature and weight schedules as pure functions of the step (paper A.2, B.2).

`step` counts finished updates, so the first update asks with `step=0`.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

from dalle.configs import check_numbers, integer
from dalle.errors import UsageError


def cosine_ramp(step: int, start: float, end: float, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `steps`, then held at `end`.

    v(t) = end + (start - end) * (1 + cos(pi * min(t / steps, 1))) / 2. The paper's ramps: KL weight
    0 to 6.6 in 5,000 updates, temperature 1 to 1/16 in 150,000, step size 1e-4 to 1.25e-6 in
    1,200,000.

    Args:
        step: finished updates, 0 or more.
        start: value at step 0.
        end: value at and after `steps`.
        steps: length of the ramp in updates; 0 gives `end` at once.

    Raises:
        UsageError: for a negative `step` or `steps`.
    """
    step, steps = _check_steps("cosine_ramp", step, steps)
    if step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def linear_warmup(step: int, peak: float, steps: int) -> float:
    """Grows linearly to `peak`, which update number `steps` is the first to use; then `peak`.

    Update number n (from 1) uses peak * min(n / steps, 1), so no update is made with step size 0.
    The paper's transformer: peak 4.5e-4, 5,000 updates.

    Args:
        step: finished updates, 0 or more.
        peak: value reached.
        steps: length in updates; 0 gives `peak` at once.

    Raises:
        UsageError: for a negative `step` or `steps`.
    """
    step, steps = _check_steps("linear_warmup", step, steps)
    if step + 1 >= steps:
        return peak
    return peak * (step + 1) / steps


def _check_steps(name: str, step: int, steps: int) -> tuple[int, int]:
    for argument, value in (("step", step), ("steps", steps)):
        if integer(name, argument, value) < 0:
            raise UsageError(f"{name}: {argument} must be 0 or more, got {value}")
    return int(step), int(steps)


@dataclass(kw_only=True)
class PlateauHalving:
    """Halves a factor each time the training loss stops falling (paper B.2: five times, by hand).

    The paper gives no criterion. Ours: the losses of `window` consecutive updates are averaged; a
    window counts as progress if its mean lies below the best mean so far by more than `min_delta`
    (in units of the loss). After `patience` windows in a row without progress the factor halves,
    and counting starts again. A window with a nonfinite mean is no progress.

    Args:
        window: updates averaged, at least 1.
        patience: windows without progress before a halving, at least 1.
        min_delta: smallest fall of the loss that counts, 0 or more.
        max_halvings: halvings after which the factor stays, 0 or more.
    """

    window: int = 1000
    patience: int = 5
    min_delta: float = 1e-3
    max_halvings: int = 5

    def __post_init__(self) -> None:
        check_numbers("PlateauHalving", self)
        for name, least in (("window", 1), ("patience", 1), ("min_delta", 0), ("max_halvings", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise UsageError(f"PlateauHalving: {name} must be {least} or more, got {value}")
        self.halvings = 0
        self._sum, self._count, self._best, self._bad = 0.0, 0, math.inf, 0

    @property
    def factor(self) -> float:
        """2 ** -halvings; multiply the step size with it."""
        return 0.5**self.halvings

    def update(self, loss: float) -> float:
        """Counts the loss of one update and returns the factor for the next."""
        self._sum += loss
        self._count += 1
        if self._count < self.window:
            return self.factor
        mean = self._sum / self._count
        self._sum, self._count = 0.0, 0
        if mean < self._best - self.min_delta:
            self._best, self._bad = mean, 0
        else:
            self._bad += 1
            if self._bad >= self.patience:
                self._bad = 0
                self.halvings = min(self.halvings + 1, self.max_halvings)
        return self.factor

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`, in JSON values; part of the task's state."""
        return {
            "halvings": self.halvings,
            "sum": self._sum,
            "count": self._count,
            "best": None if math.isinf(self._best) else self._best,
            "bad": self._bad,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state_dict` was taken. Raises UsageError for no such numbers."""
        counts = [
            integer("PlateauHalving", key, state[key], 0) for key in ("halvings", "count", "bad")
        ]
        best = math.inf if state["best"] is None else state["best"]
        for key, value in (("sum", state["sum"]), ("best", best)):
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise UsageError(f"PlateauHalving: {key} must be a number, got {value!r}")
        self.halvings, self._count, self._bad = counts
        self._sum, self._best = float(state["sum"]), float(best)
