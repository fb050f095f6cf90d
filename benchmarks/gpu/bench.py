"""Times candidates that take turns: CUDA events on a GPU, the host's clock in a dry run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import harness

WARM_UP, ROUNDS, SECONDS = 3, 25, 8.0
FLUSH_BYTES = 2**31
HOW = {
    "clock": "CUDA events around one call; median of rounds in which the candidates take turns",
    "rounds": f"{ROUNDS}, at least 3 where {SECONDS:.0f} s run out",
    "warm-up": f"the call that is checked and {WARM_UP + 2} more",
    "before each call": "a buffer of 2 GiB (a sixteenth of smaller cards) is written: no input is "
    "in the L2 cache, and the host has queued the call before the card comes to it",
    "forward": "without gradients",
    "backward": "torch.autograd.grad alone, on the graph of one forward",
    "peak_bytes": "most memory allocated during a call, beyond what was there before it",
    "rate": "the pattern's own work (AttentionPattern.flops) or least traffic, for rivals too",
}


def reason(error: BaseException) -> str:
    """An error as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:240]


def event_clock(flush: Callable[[], Any], event: Callable[..., Any]) -> harness.Clock:
    """A clock of a pair of events, `event(enable_timing=True)`; `flush` is queued before them."""

    def clock(run: Callable[[], Any]) -> float:
        start, end = event(enable_timing=True), event(enable_timing=True)
        flush()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return clock


def peak_bytes(run: Callable[[], Any], memory: Any) -> int:
    """Bytes that `run` allocates at its peak; `memory` is `torch.cuda` or what answers like it."""
    memory.synchronize()
    memory.reset_peak_memory_stats()
    before = memory.memory_allocated()
    kept = run()
    memory.synchronize()
    del kept
    return memory.max_memory_allocated() - before


@dataclass(frozen=True)
class Bench:
    """Where and how to time.

    Attributes:
        device: of the tensors.
        clock: what times one call.
        memory: `torch.cuda`, or None where nobody counts memory.
        compiler: back end of `torch.compile`.
        rounds: see `harness.medians`.
    """

    device: str
    clock: harness.Clock
    memory: Any
    compiler: str
    rounds: int

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.compile` for exactly these shapes."""
        return torch.compile(function, dynamic=False, backend=self.compiler)

    def times(self, candidates: dict[str, Callable[[], Callable[[], Any]]]) -> dict[str, Any]:
        """Prepares each candidate and times those that run.

        Args:
            candidates: name -> a function that checks the candidate and returns the call to time.

        Returns:
            name -> seconds and peak_bytes, or not_measured (why, in one line).
        """
        found: dict[str, Any] = {}
        calls = {}
        for name, prepare in candidates.items():
            try:
                call = prepare()
                for _ in range(WARM_UP):
                    call()
                peak = None if self.memory is None else peak_bytes(call, self.memory)
            except Exception as error:  # a rival that is missing or refuses is a result, too
                found[name] = {"not_measured": reason(error)}
                self.assert_alive()
                continue
            calls[name], found[name] = call, {"peak_bytes": peak}
        medians = harness.medians(calls, rounds=self.rounds, budget=SECONDS, clock=self.clock)
        for name, seconds in medians.items():
            found[name] = {"seconds": seconds, **found[name]}
        return found

    def assert_alive(self) -> None:
        """Raises where an error has left the device unusable: nothing after it would be true."""
        if self.memory is not None:
            self.memory.synchronize()


def cuda_bench() -> Bench:
    """On the current CUDA device."""
    free = min(FLUSH_BYTES, torch.cuda.get_device_properties().total_memory // 16)
    buffer = torch.empty(free, dtype=torch.int8, device="cuda")
    clock = event_clock(buffer.zero_, torch.cuda.Event)
    return Bench("cuda", clock, torch.cuda, "inductor", ROUNDS)


def dry_bench() -> Bench:
    """The same calls on the CPU, in no time worth reporting."""
    return Bench("cpu", harness.host_clock, None, "eager", 1)
