"""The back ends of an op as one fixture: a test of `tests/ops` that takes `device` runs on each.

"emulated" is the CUDA kernels' own source, compiled by g++ and run on CPU tensors
(`docs/emulator.md`). The build is `DALLE_TEST_EMULATED` (plain, address or race; plain if unset).
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

# pytest puts this folder first on the path, where tests/dalle would hide the package of that name.
HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE]
sys.path.insert(0, str(HERE.parent / "python" / "buildtools"))
import emulated  # noqa: E402

import dalle  # noqa: E402, F401  (bound before other files of this folder bring the path back)

KEY = "PrivateUse3"  # the emulated kernels' own: no tensor has it


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
