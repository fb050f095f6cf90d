"""Shards the parameters of a model over the processes of a machine, and gathers them again.

Also the one place that knows the private layout of FSDP2's reduce-scattered gradients:
`FSDPModule.set_all_reduce_hook` hands over one flat buffer for each group of parameters, their
shards in order, each padded along the sharded axis. Names are those of torch 2.11 to 2.13.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from dalle.dtensor import fill_, gather
from dalle.errors import UsageError
from dalle.pretrained import Pretrained


def shard(
    model: nn.Module, units: Sequence[nn.Module], mesh: DeviceMesh, forwards: Iterable[str] = ()
) -> None:
    """`fully_shard` over a mesh, one unit after the other; the root takes what is left.

    A process gathers the parameters of a unit before the unit runs, and of the next one meanwhile.
    A matrix wider than tall is sharded along its columns (paper E.1: the second matrix of the
    MLP), so that the factors of its part stay small.

    Args:
        model: of equal weights on all processes; changed in place.
        units: modules whose parameters are gathered together: resblocks.
        mesh: its last axis has the processes of a machine.
        forwards: methods of the model that run it, besides `forward`.
    """
    shards = mesh.size(-1)

    def placement(param: nn.Parameter) -> Shard:
        wide = param.dim() == 2 and param.shape[1] > param.shape[0]
        return Shard(1 if wide and param.shape[1] % shards == 0 else 0)

    # Keys and values that a block returns are views; nothing works on them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in (*units, model):
        fully_shard(part, mesh=mesh, shard_placement_fn=placement)
    for method in forwards:
        register_fsdp_forward_method(model, method)
    for part, following in zip(units, units[1:], strict=False):
        assert isinstance(part, FSDPModule) and isinstance(following, FSDPModule)
        part.set_modules_to_forward_prefetch([following])


@torch.no_grad()
def gather_model(
    model: nn.Module, rank: int, values: Mapping[str, Tensor] | None = None
) -> nn.Module | None:
    """A plain copy of the model on process 0's CPU, in evaluation mode; None elsewhere. Collective.

    Args:
        model: with a `config` from which its class makes another one.
        rank: of this process.
        values: by name, weights to copy in place of the model's, as `IterateAverage.average`.
    """
    parameters = dict(model.named_parameters()) if values is None else values
    state = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    for name, tensor in parameters.items():
        full = gather(tensor)  # one at a time: the other processes drop it
        if rank == 0:
            state[name] = full.cpu()
    if rank:
        return None
    plain_class: Any = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    with torch.random.fork_rng(devices=[]):
        plain: nn.Module = plain_class(model.config)
    if isinstance(plain, Pretrained):
        assert isinstance(model, Pretrained)
        plain.trained_on = dict(model.trained_on)
    plain.load_state_dict(state)
    return plain.eval()


@torch.no_grad()
def scatter_model(
    model: nn.Module, plain: nn.Module | None, group: dist.ProcessGroup | None
) -> None:
    """Gives the model the weights of a plain one of its class, which process 0 has. Collective."""
    parameters = {} if plain is None else dict(plain.named_parameters())
    for name, param in model.named_parameters():
        full = (
            torch.empty(param.shape, dtype=param.dtype, device="cpu")
            if plain is None
            else parameters[name].detach().cpu()
        )
        dist.broadcast(full, src=0, group=group)
        fill_(param, full)


def _groups(part: FSDPModule) -> list[Any]:
    state = part._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        group = state._fsdp_param_group
        groups = [] if group is None else [group]
    return list(groups)


def _parameters(part: FSDPModule) -> list[Any]:
    params = [p for group in _groups(part) for p in group.fsdp_params]
    return [p for p in params if p.sharded_param.requires_grad]


def sharded_parameters(part: FSDPModule) -> list[Tensor]:
    """The sharded parameters of one fully_shard module, without those of modules inside it."""
    return [p.sharded_param for p in _parameters(part)]


def parameter_gradients(part: FSDPModule, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of the group, and the view of its shard's gradient inside the buffer."""
    params = _parameters(part)
    size = sum(p.padded_sharded_param_size.numel() for p in params)
    if size != flat.numel():
        raise UsageError(
            "PowerSGD: every parameter of a fully_shard module must get a gradient, got "
            f"{flat.numel()} elements of {size} in the module that holds "
            f"{params[0]._param_fqn or 'them'}"
        )
    views, start = [], 0
    for p in params:
        grad = flat.as_strided(p.sharded_size, p.contiguous_sharded_stride, start)
        views.append((p.sharded_param, grad))
        start += p.padded_sharded_param_size.numel()
    if flat.device.type == "cuda":  # until torch 2.15 nothing else keeps it for this stream
        flat.record_stream(torch.cuda.current_stream())
    return views


def check_replicas(parts: Sequence[FSDPModule], ranks: list[int]) -> None:
    """Raises unless `ranks` and the mesh of the shards have this process alone in common."""
    for mesh in {p.device_mesh for part in parts for p in _sharded(part)}:
        shared = set(ranks) & set(mesh.mesh.flatten().tolist())
        if shared != {dist.get_rank()}:
            raise UsageError(
                "PowerSGD: group must meet the mesh of the shards in this process alone, as "
                'mesh["replicate"].get_group() and a model over mesh["shard"] do, got processes '
                f"{sorted(shared)} in both"
            )


def replicas(parts: Sequence[FSDPModule]) -> dist.ProcessGroup:
    """The group of the processes with the same shards: the other axis of the model's mesh."""
    group = None
    for mesh in {p.device_mesh for part in parts for p in _sharded(part)}:
        root: DeviceMesh = mesh._get_root_mesh()
        others = [n for n in root.mesh_dim_names or () if n not in (mesh.mesh_dim_names or ())]
        if len(others) == 1 and others[0].endswith("replicate"):
            group = root.get_group(others[0])
            continue
        raise UsageError(
            'PowerSGD: group must be given where the model\'s mesh has no axis "replicate" beside '
            f"its own, got axes {root.mesh_dim_names}"
        )
    if group is None:
        raise UsageError("PowerSGD: model must hold sharded parameters, got none")
    return group


def _sharded(part: FSDPModule) -> list[DTensor]:
    return [p for p in sharded_parameters(part) if isinstance(p, DTensor)]


def can_reduce_async(part: FSDPModule, flat: Tensor) -> bool:
    """Whether the buffer may be reduced after the hook returns, as the gradients will be its views.

    They will be copies where FSDP2 casts them, adds them to existing gradients, or divides once
    more (in fp16, and with a custom divisor). False on a GPU, whose stream is asynchronous anyway.
    """
    if flat.device.type != "cpu" or flat.dtype not in (torch.float32, torch.bfloat16):
        return False
    custom_division = any(
        g.gradient_divide_factor is not None or g.force_sum_reduction_for_comms
        for g in _groups(part)
    )
    params = sharded_parameters(part)
    return not custom_division and all(p.dtype == flat.dtype and p.grad is None for p in params)


def min_shard_shape(param: Tensor) -> torch.Size:
    """Shape of the smallest part that a process holds of a parameter, the same on all of them."""
    if not isinstance(param, DTensor):
        return param.shape
    sizes = [{size} for size in param.shape]  # by dimension: lengths of all parts
    for axis, placement in enumerate(param.placements):
        if isinstance(placement, Shard):
            count = param.device_mesh.size(axis)
            sizes[placement.dim] = {
                part for size in sizes[placement.dim] for part in _part_sizes(size, count)
            }
    return torch.Size(min(lengths) for lengths in sizes)


@lru_cache(maxsize=4096)
def _part_sizes(size: int, count: int) -> frozenset[int]:
    """Lengths of `torch.chunk`'s parts, with 0 where there are fewer than `count`."""
    first = -(-size // count)
    return frozenset(max(0, min(first, size - i * first)) for i in range(count))


def as_shard(param: Tensor | None, part: Tensor) -> Tensor:
    """`part`, this process's part of a tensor, as a `DTensor` where the parameter is one."""
    if not isinstance(param, DTensor):
        return part
    return DTensor.from_local(
        part.view(param.to_local().shape),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
