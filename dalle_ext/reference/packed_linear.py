"""The definition of the packed linear layer: panels of a weight, and what is computed with them."""

from __future__ import annotations

from typing import Any

import torch

from . import without_autocast


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) -> panels of 16 outputs, (P, K, 16), of bfloat16 in pairs, (P, K / 2, 16, 2)."""
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    outputs, inputs = weight.shape
    whole = torch.nn.functional.pad(weight, (0, -inputs % pair, 0, -outputs % 16))
    panels = whole.view(-1, 16, whole.shape[1] // pair, pair).transpose(1, 2)
    return panels.contiguous()


def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, outputs: int, bias: Any, gain: Any, shift: Any,
    eps: float, slope: float, add: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """add + act(norm(x) W^T + b) with a packed weight; see `dalle_ext.PackedLinear`."""
    if gain is not None:
        x = torch.nn.functional.layer_norm(x, x.shape[1:], gain, shift, eps)
    rows = weight.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, : x.shape[1]].float()
    with without_autocast(x):
        y = torch.nn.functional.linear(x.to(weight.dtype).float(), rows, bias)
    y = y * torch.sigmoid(slope * y) if slope else y
    return y if add is None else y + add
