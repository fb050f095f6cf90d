"""Free memory, the size of a failed request, and the message about both."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dalle.errors import EnvironmentProblem

if TYPE_CHECKING:
    import torch

UNITS = {
    "bytes": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
    "EiB": 2**60,
}
_ASKED = re.compile(r"(?:allocate|allocation of) ([\d.]+) (bytes|[KMGTPE]iB)")
_REFUSED = re.compile(
    r"alloc_cpu|can't allocate memory|not enough memory|bad_alloc|out of memory|"
    r"Cannot allocate memory|Storage size calculation overflowed|failed to map segment",
)
ADVICE = "ask for less: a smaller batch, preset or image size, or fewer candidates"


def format_bytes(size: float) -> str:
    """A number of bytes, e.g. "1.5 GiB"."""
    fitting = [unit for unit, factor in UNITS.items() if size >= factor]
    unit = fitting[-1] if fitting else "bytes"
    return f"{size / UNITS[unit]:.1f} {unit}" if unit != "bytes" else f"{size:.0f} bytes"


def is_refusal(error: BaseException) -> bool:
    """Whether an error of Python, torch, CUDA or the system says that memory did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError, ImportError)) and bool(
        _REFUSED.search(str(error))
    )


def refusal_line(error: BaseException) -> str:
    """The message about a refusal (`is_refusal`): memory requested and memory free."""
    request = _ASKED.search(str(error))
    amount = (
        f"another {format_bytes(float(request[1]) * UNITS[request[2]])}"
        if request
        else "what this takes"
    )
    on_gpu = "CUDA" in str(error) or "GPU" in str(error)
    available = None if on_gpu else free_memory()
    reported = re.search(r"([\d.]+ [KMGT]iB) is free", str(error))
    free = "too little" if available is None else format_bytes(available)
    free = reported[1] if reported else free
    where = "the GPU's memory" if on_gpu else "memory"
    return f"{where} must hold {amount}, got {free} free; {ADVICE}"


def free_memory(device: torch.device | None = None) -> int | None:
    """Bytes that this process can still get on `device` (None and the CPU: of the machine).

    The minimum over the machine, the limits of the process and its control group; None where it is
    not known.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    sizes = [_of_machine(), _of_limits(), _of_group()]
    return min((size for size in sizes if size is not None), default=None)


def require_memory(
    owner: str, needed: float, what: str, advice: str, device: torch.device | None = None
) -> None:
    """Refuses work that cannot fit, before it begins.

    Args:
        owner: begins the line.
        needed: lower bound in bytes.
        what: the work, in words.
        advice: how to need less.
        device: whose memory; the machine's if left out.

    Raises:
        EnvironmentProblem: `needed` is more than there is.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        where = "memory" if device is None or device.type == "cpu" else f"memory of {device}"
        raise EnvironmentProblem(
            f"{owner}: {where} must hold {format_bytes(needed)} for {what}, "
            f"got {format_bytes(free)} free; "
            f"{advice}"
        )


def _number(path: str, pattern: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        match = re.search(pattern, Path(path).read_text(encoding="ascii", errors="replace"))
        return int(match[1]) if match else None
    return None


def _of_machine() -> int | None:
    available = _number("/proc/meminfo", r"MemAvailable: +(\d+) kB")
    swap = _number("/proc/meminfo", r"SwapFree: +(\d+) kB") or 0
    return None if available is None else (available + swap) * 1024


def _of_limits() -> int | None:
    try:
        import resource
    except ImportError:  # not on this system
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _number("/proc/self/status", r"VmSize:\s+(\d+) kB")
    if limit == resource.RLIM_INFINITY or used is None:
        return None
    return max(0, limit - used * 1024)


def _of_group() -> int | None:
    """Bytes left in the control group (of a container); its file cache counts as free."""
    group = "/sys/fs/cgroup"
    limit = _number(f"{group}/memory.max", r"^(\d+)")
    used = _number(f"{group}/memory.current", r"^(\d+)")
    if limit is None or used is None:
        return None
    cached = _number(f"{group}/memory.stat", r"(?m)^inactive_file (\d+)") or 0
    return max(0, limit - used + cached)
