"""The process that measures for `python -m benchmarks.gpu`, and who asks it.

A kernel that hangs or crashes, or leaves the device unusable, loses one step: the process is ended
and another one starts.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import gpu_checks as checks
import harness

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from harness import Case, Row

FIRST = (
    "card",
    "sparse_attention",
    "gumbel_softmax",
    "formats",
    "grad_scale",
    "adam16",
    "powersgd",
)
LAST = ("decode_step", "prior")  # between them any other op of dalle_ext/ops


def all_cases(scale: str) -> list[Case]:
    """Of every op, most wanted first; one that cannot be imported is a case that says so."""
    ops = sorted(path.stem for path in (checks.ROOT / "dalle_ext/ops").glob("[a-z]*.py"))
    found = []
    for op in (*FIRST, *(name for name in ops if name not in FIRST), *LAST):
        try:
            found += importlib.import_module(f"bench_{op}").cases(scale)
        except Exception as error:
            found.append(missing(op, error))
    return found


def missing(op: str, error: Exception) -> Case:
    """A case that fails with `error`."""

    def ready(device: str) -> NoReturn:
        raise error

    return harness.Case(op=op, what=f"bench_{op}.py", ready=ready, rivals={})


class Bench:
    """Measures in this process. torch is imported when one is made."""

    def __init__(self, *, dry_run: bool) -> None:
        import torch
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # backward alone runs on one graph many times
        self.torch, self.dry_run = torch, dry_run
        self.timer: harness.Timer | None = None
        self.cases = all_cases("tiny" if dry_run else "gpu")
        if dry_run:
            harness.COMPILER["backend"] = "eager"
            self.timer = harness.Timer("cpu", harness.host_clock, rounds=1, budget=0.0)

    def hello(self, limit: float = 0.0) -> dict[str, Any]:
        """card (None: there is none) and capability, machine, the plan of cases, and problem: why
        ours cannot run, or None."""
        import dalle_ext
        from dalle_ext import _native

        found: dict[str, Any] = {"card": "dry run", "problem": _native.CPU_PROBLEM}
        found["plan"] = [(case.op, case.what, dict(case.rivals)) for case in self.cases]
        cuda = self.torch.cuda
        if not self.dry_run:
            if not cuda.is_available():
                return {"card": None}
            found["card"], found["capability"] = (
                cuda.get_device_name(),
                cuda.get_device_capability(),
            )
            found["problem"] = _native.CPU_PROBLEM or _native.CUDA_PROBLEM
            try:
                if found["problem"] is None:
                    dalle_ext.pack(self.torch.ones(8, device="cuda"), "1-6-9")
                    cuda.synchronize()
            except Exception as error:  # machine code for another architecture
                found["problem"] = harness.reason(error)
        return found | {"machine": harness.machine()}

    def measure(
        self, number: int, rivals: Sequence[str], limit: float = 0.0
    ) -> tuple[list[Row], bool]:
        """The rows of a case, and whether the device is of use after it."""
        self.torch.compiler.reset()  # what was compiled for one must not make the next dynamic
        self.timer = self.timer or harness.gpu_timer()
        rows = harness.measure(self.cases[number], self.timer, rivals)
        try:
            if not self.dry_run:
                self.torch.cuda.synchronize()
                self.torch.cuda.empty_cache()
        except Exception:
            return rows, False
        return rows, True

    def end(self) -> None:
        """Nothing to end."""


def serve(pipe: Connection) -> None:
    """A measuring process: says hello, then answers (number, rivals) with rows."""
    os.setsid()  # Ctrl-C is for whoever asks; what is started here ends with this group
    bench = Bench(dry_run=False)
    pipe.send(bench.hello())
    while True:
        try:
            pipe.send(bench.measure(*pipe.recv()))
        except EOFError:
            return


class Worker:
    """A `Bench` in a process of its own."""

    def __init__(self, target: Callable[[Any], None] = serve, method: str = "spawn") -> None:
        context: Any = multiprocessing.get_context(method)
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=target, args=(other,))
        self.process.start()
        other.close()

    def answer(self, limit: float) -> Any:
        """What it sends next.

        Raises:
            RuntimeError: it hangs or has died, in one line.
        """
        try:
            if self.pipe.poll(limit):
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise RuntimeError(f"the process ended with {self.process.exitcode}") from None
        raise RuntimeError(f"not done after {limit:.0f} s")

    def hello(self, limit: float) -> dict[str, Any]:
        """As `Bench.hello`. Raises as `answer`."""
        found: dict[str, Any] = self.answer(limit)
        return found

    def measure(self, number: int, rivals: Sequence[str], limit: float) -> tuple[list[Row], bool]:
        """As `Bench.measure`. Raises as `answer`."""
        with contextlib.suppress(OSError):  # it has died, and `answer` says how
            self.pipe.send((number, rivals))
        found: tuple[list[Row], bool] = self.answer(limit)
        return found

    def end(self) -> None:
        """Ends it and what it started (compilers), whatever they do."""
        for kill in (os.killpg, os.kill):  # it may not lead its group yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.pipe.close()
