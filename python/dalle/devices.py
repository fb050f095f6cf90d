"""Choosing where to compute."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from dalle.errors import EnvironmentProblem, UsageError

CUBLAS_WORKSPACE = ":4096:8"
Precision = Literal["fp32", "bf16", "fp16-scaled"]


def default_precision(device: torch.device, *, scaled: bool = False) -> Precision:
    """The precision of what asks for none: fp32, but on a GPU 16 bits, for its tensor cores.

    Not measured on a GPU yet.

    Args:
        device: where it is computed.
        scaled: whether gradients get a scale for each block, as fp16 needs (`ResblockScaler`).

    Returns:
        "fp32", "fp16-scaled" or, without scales, "bf16"; on a GPU without bf16, "fp32" for that.
    """
    if device.type != "cuda":
        return "fp32"
    if scaled:
        return "fp16-scaled"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Around a forward pass: bf16 products with fp32 weights, or nothing for "fp32"."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """Around what stays in fp32 inside `autocast`; `x` is on its device."""
    kind = x.device.type
    on = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def prepare_cublas() -> None:
    """Has cuBLAS give the same bits on every run; it reads this once, before its first product.

    Raises:
        EnvironmentProblem: a GPU is in use already, without it.
    """
    name = "CUBLAS_WORKSPACE_CONFIG"
    if name not in os.environ and torch.cuda.is_initialized():
        raise EnvironmentProblem(
            f"train: {name} must be set to {CUBLAS_WORKSPACE} before a GPU is used, for "
            "deterministic, got none"
        )
    os.environ.setdefault(name, CUBLAS_WORKSPACE)


def pick_device(name: str, *, deterministic: bool = False) -> torch.device:
    """A device by name; "auto" is the first GPU where there is one, else the CPU.

    Args:
        name: of a device, or "auto".
        deterministic: whether a training on it shall give the same bits on every run.

    Raises:
        UsageError: the device is unknown or not there.
    """
    if deterministic:
        prepare_cublas()
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
