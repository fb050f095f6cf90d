"""Training over many machines (paper section 2.5, appendix E)."""

from typing import Any

__all__ = ["PowerSGD"]


def __getattr__(name: str) -> Any:  # imports FSDP2 on first use only
    if name == "PowerSGD":
        from dalle.distributed.hooks import PowerSGD

        return PowerSGD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
