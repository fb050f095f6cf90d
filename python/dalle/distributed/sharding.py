"""The parameters of a model shared out over the processes of a machine, and gathered again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from dalle.pretrained import Pretrained
from dalle.sharded import fill_, gather


def shard(
    model: nn.Module, units: Sequence[nn.Module], mesh: DeviceMesh, forwards: Iterable[str] = ()
) -> None:
    """`fully_shard` over a mesh, one unit after the other; the root takes what is left.

    A process gathers the parameters of a unit before the unit runs, and of the next one meanwhile.
    A matrix wider than tall is shared out along its columns (paper E.1: the second matrix of the
    MLP), so that the factors of its part stay small.

    Args:
        model: of equal weights on all processes; changed in place.
        units: modules that run as a whole: resblocks.
        mesh: its last axis has the processes of a machine.
        forwards: methods of the model that run it, besides `forward`.
    """
    shards = mesh.size(-1)

    def place(param: nn.Parameter) -> Shard:
        wide = param.dim() == 2 and param.shape[1] > param.shape[0]
        return Shard(1 if wide and param.shape[1] % shards == 0 else 0)

    # Keys and values that a block returns are views; nothing works on them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in (*units, model):
        fully_shard(part, mesh=mesh, shard_placement_fn=place)
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
        values: by name in place of the model's own parameters, as of `IterateAverage.average`.
    """
    given = dict(model.named_parameters()) if values is None else values
    state = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    for name, tensor in given.items():
        found = gather(tensor)  # one at a time: only process 0 keeps them
        if rank == 0:
            state[name] = found.cpu()
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
    given = {} if plain is None else dict(plain.named_parameters())
    for name, param in model.named_parameters():
        found = (
            torch.empty(param.shape, dtype=param.dtype, device="cpu")
            if plain is None
            else given[name].detach().cpu()
        )
        dist.broadcast(found, src=0, group=group)
        fill_(param, found)
