"""The one file that knows the private layout of FSDP2's reduce-scattered gradients.

`FSDPModule.set_all_reduce_hook` hands over one flat buffer for each group of parameters: their
shards in order, each padded along the sharded axis. Names are those of torch 2.11 to 2.13.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dalle.errors import UsageError


def _parameters(part: FSDPModule) -> list[Any]:
    state = part._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        group = state._fsdp_param_group
        groups = [] if group is None else [group]
    return [p for group in groups for p in group.fsdp_params if p.sharded_param.requires_grad]


def sharded_parameters(part: FSDPModule) -> list[Tensor]:
    """The sharded parameters of one fully_shard module's own group."""
    return [p.sharded_param for p in _parameters(part)]


def parameter_gradients(part: FSDPModule, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of the group, and the view of its shard's gradient inside the buffer."""
    found, start = [], 0
    for p in _parameters(part):
        grad = flat.as_strided(p.sharded_size, p.contiguous_sharded_stride, start)
        found.append((p.sharded_param, grad))
        start += p.padded_sharded_param_size.numel()
    if start != flat.numel():
        raise UsageError(
            "PowerSGD: every parameter of a fully_shard module must get a gradient, got "
            f"{flat.numel()} elements of {start}"
        )
    if flat.device.type == "cuda":  # until torch 2.15 nothing else keeps it for this stream
        flat.record_stream(torch.cuda.current_stream())
    return found
