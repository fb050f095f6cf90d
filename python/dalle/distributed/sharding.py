"""The parameters of a model shared out over the processes of a machine, and gathered again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dalle.distributed.cluster import Cluster
from dalle.distributed.hooks import PowerSGD
from dalle.precision import ResblockScaler
from dalle.pretrained import Pretrained
from dalle.sharded import gather
from dalle.train.metrics import say


def shard(
    model: nn.Module, units: Iterable[nn.Module], cluster: Cluster, forwards: Iterable[str] = (),
    *, compressed: bool = False,
) -> None:  # fmt: skip
    """`fully_shard` over each machine, one unit after the other; the root takes what is left.

    Gradients come out averaged over all processes; with `compressed` over a machine's only, and
    `compress` has to be called. A process gathers the parameters of a unit before the unit runs,
    and of the next one meanwhile. A matrix wider than tall is shared out along its columns (paper
    E.1: the second matrix of the MLP), so that the factors of its part stay small.

    Args:
        model: of equal weights on all processes; changed in place.
        units: modules that run as a whole: resblocks.
        cluster: over which.
        forwards: methods of the model that run it, besides `forward`.
        compressed: whether `compress` sums the gradients between machines.
    """
    mesh = cluster.mesh["shard"] if compressed or cluster.machines == 1 else cluster.mesh

    def place(param: nn.Parameter) -> Shard:
        wide = param.dim() == 2 and param.shape[1] > param.shape[0]
        return Shard(1 if wide and param.shape[1] % cluster.shards == 0 else 0)

    # Keys and values that a block returns are views; nothing works on them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    units = list(units)
    for part in (*units, model):
        fully_shard(part, mesh=mesh, shard_placement_fn=place)
    for method in forwards:
        register_fsdp_forward_method(model, method)
    for part, following in zip(units, units[1:], strict=False):
        assert isinstance(part, FSDPModule) and isinstance(following, FSDPModule)
        part.set_modules_to_forward_prefetch([following])


def compress(
    model: nn.Module, cluster: Cluster, scaler: ResblockScaler | None, blocks: Iterable[nn.Module]
) -> None:
    """Attaches `PowerSGD` to a model from `shard`, where the cluster's configuration asks for it.

    Args:
        model, cluster: as given to `shard`.
        scaler: whose scales the gradients carry.
        blocks: whose matrices are compressed; all else is embeddings, unembeddings and tables
            (paper E.2).
    """
    rank = cluster.config.powersgd_rank
    if not rank:
        return
    if cluster.machines == 1:
        say("cluster: powersgd_rank has no effect on one machine")
        return
    inside = {p for block in blocks for p in block.parameters()}
    cluster.psgd = PowerSGD(
        rank, cluster.mesh["replicate"].get_group(), wire=cluster.config.powersgd_wire,
        exclude=[p for p in model.parameters() if p not in inside], scaler=scaler,
    )  # fmt: skip
    cluster.psgd.attach(model)
    sent, matrices = cluster.psgd.compressed()
    say(f"cluster: PowerSGD sends {sent} of {matrices} matrices as factors of rank {rank}")


@torch.no_grad()
def whole_model(
    model: nn.Module, cluster: Cluster, values: Mapping[str, Tensor] | None = None
) -> nn.Module | None:
    """A plain copy of the model on process 0's CPU, in evaluation mode; None elsewhere. Collective.

    Args:
        model: with a `config` from which its class makes another one.
        cluster: of the model.
        values: by name in place of the model's own parameters, as of `IterateAverage.average`.
    """
    given = dict(model.named_parameters()) if values is None else values
    state = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    for name, tensor in given.items():
        found = gather(tensor)  # one at a time: only process 0 keeps them
        if cluster.leads:
            state[name] = found.cpu()
    if not cluster.leads:
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
def take_over(model: nn.Module, plain: nn.Module | None, cluster: Cluster) -> None:
    """Gives the model the weights of a plain one of its class, which process 0 has. Collective."""
    given = {} if plain is None else dict(plain.named_parameters())
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        found = (
            torch.empty(param.shape, dtype=param.dtype, device="cpu")
            if plain is None
            else given[name].detach().cpu()
        )
        dist.broadcast(found, src=0, group=cluster.control)
        mesh, placements = param.device_mesh, param.placements
        param.copy_(distribute_tensor(found.to(param.device), mesh, placements, src_data_rank=None))
