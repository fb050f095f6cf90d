"""Choosing where to compute."""

from __future__ import annotations

import torch

from dalle.errors import UsageError


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" is the first GPU where there is one, else the CPU.

    Raises:
        UsageError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # The device "meta" fails here: it holds no numbers.
        torch.empty(1, device=device, dtype=torch.float32).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0][:200]
        raise UsageError(
            f"device: must be auto, cpu or a device that is there, got {name[:200]!r} ({reason})"
        ) from error
    return device
