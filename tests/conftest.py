"""The back ends of an op as one fixture: a test of `tests/ops` that takes `device` runs on each.

"emulated" is the CUDA kernels' own source, compiled by g++ and run on CPU tensors
(`docs/emulator.md`). The build is `DALLE_TEST_EMULATED` (plain, address or race; plain if unset).
"""

from __future__ import annotations

import ctypes
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, of torch and of what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

import emulated

KEY = "PrivateUse3"  # the emulated kernels' own: no tensor has it
NIGHT = os.environ.get("DALLE_TEST_NIGHT") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Whole folders are spread over the cores (pytest-xdist); single files stay in one process."""
    folders = all(Path(argument).is_dir() for argument in config.args)
    if hasattr(config, "workerinput") or not config.pluginmanager.hasplugin("xdist"):
        return  # a worker, whose options say nothing of the others, must not start its own
    if config.option.numprocesses is None and folders:
        affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        config.option.numprocesses = min(cores, 8)
        config.option.dist = "loadfile"  # a file's fixtures are made once
        config.option.loadscopereorder = False  # files of few, long tests come early


def _of_the_night(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("night")
    if mark is None or NIGHT:
        return False
    call = getattr(item, "callspec", None)
    return not mark.args or (call is not None and call.params.get("backend") in mark.args)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `night`."""
    night = [item for item in items if _of_the_night(item)]
    if night:
        config.hook.pytest_deselected(items=night)
        items[:] = [item for item in items if not _of_the_night(item)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of all processes by file, the slowest first, where more than a few files ran."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid.split("::")[0]] += report.duration
    if len(seconds) > 5:
        terminalreporter.section("seconds by file")
        for file, spent in sorted(seconds.items(), key=lambda item: -item[1])[:15]:
            terminalreporter.write_line(f"{spent:8.1f}  {file}")
        terminalreporter.write_line(f"{sum(seconds.values()):8.1f}  all {len(seconds)} files")


@cache
def emulated_library() -> Path:
    """The library of emulated ops, built at the first call."""
    return emulated.build(f"_C_emulated_{os.environ.get('DALLE_TEST_EMULATED', 'plain')}")[0]


@contextmanager
def routed_to_emulator() -> Iterator[None]:
    """Inside, the ops of `dalle_ext` run their emulated CUDA kernels on CPU tensors."""
    torch.ops.load_library(emulated_library())
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))
    override = torch.library.Library("dalle_ext", "IMPL")
    try:
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for qualified in torch._C._dispatch_get_registrations_for_dispatch_key(KEY):
            name = qualified.removeprefix("dalle_ext::")
            op = getattr(torch.ops.dalle_ext, name).default
            route = lambda *arguments, op=op: op.redispatch(keys, *arguments)  # noqa: E731
            override.impl(name, route, "CPU", allow_override=True)
        yield
    finally:
        override._destroy()


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("emulated", marks=pytest.mark.emulated),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def backend(request):
    """Name of the back end that the test runs on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device here")
    if request.param != "emulated":
        yield request.param
        return
    with routed_to_emulator():
        yield request.param


@pytest.fixture
def emulator():
    """`routed_to_emulator`, for tests that enter and leave it themselves."""
    return routed_to_emulator


@pytest.fixture
def device(backend):
    """Device of the tensors for `backend`."""
    return "cuda" if backend == "cuda" else "cpu"


@pytest.fixture
def emulated_counts():
    """A function: what emulated kernels have run in this process, as a Counter.

    blocks, barriers, mma (one a warp), ldmatrix (8 x 8 matrices), conflicts (turns that their banks
    cost beyond the first), copied_bytes (by cp.async).
    """
    names = ("blocks", "barriers", "mma", "ldmatrix", "conflicts", "copied_bytes")
    read = ctypes.CDLL(str(emulated_library())).dalle_emulator_counts
    read.restype = ctypes.POINTER(ctypes.c_uint64)
    return lambda: Counter(dict(zip(names, read()[: len(names)], strict=True)))
