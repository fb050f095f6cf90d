"""The definitions of the ops in plain PyTorch."""

import torch


def without_autocast(x: torch.Tensor) -> torch.autocast:
    """Around products: a definition computes in the dtypes it is given, as its native op does."""
    kind = x.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)
