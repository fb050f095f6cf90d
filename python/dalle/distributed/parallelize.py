"""How a model is spread over the processes of a world: the one place that decides it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dalle.console import say
from dalle.distributed.world import World
from dalle.errors import UsageError


def parallelize(
    model: nn.Module,
    world: World,
    units: Iterable[nn.Module],
    *,
    owner: str,
    forwards: Iterable[str] = (),
    compressible: bool = False,
) -> None:
    """Puts a model where it is trained, before its optimizer is made.

    In a world of one that is the device. With several processes, those of a machine shard the
    parameters (`fully_shard`, FSDP2). Between machines gradients are averaged as they are, or with
    `ClusterConfig.powersgd_rank` as low-rank factors: those of the matrices in `units`, but not of
    embeddings, unembeddings and tables (paper E.2).

    Args:
        model: on the CPU, of equal weights on all processes; changed in place.
        world: the processes that train it.
        units: modules whose parameters are gathered together: resblocks, in their order.
        owner: begins the line of an error, e.g. "prior train".
        forwards: methods of the model that run it, besides `forward`.
        compressible: whether every parameter gets a gradient at each step, as PowerSGD needs.

    Raises:
        UsageError: PowerSGD for a model it does not fit, or with nothing to compress.
    """
    if world.size == 1:
        model.to(world.device)
        return
    from dalle.distributed.cluster import Cluster  # imports FSDP2: half a second
    from dalle.distributed.hooks import PowerSGD
    from dalle.distributed.shard import shard

    assert isinstance(world, Cluster)
    units = list(units)
    rank = world.config.powersgd_rank
    if rank and not compressible:
        raise UsageError(f"{owner}: powersgd_rank must be 0, got {rank}")
    one_machine = world.machines == 1
    # With PowerSGD the gradients are averaged over a machine's processes only.
    shard(model, units, world.mesh["shard"] if rank or one_machine else world.mesh, forwards)
    if rank and one_machine:
        say("cluster: powersgd_rank has no effect on one machine")
    elif rank:
        compressed = {p for unit in units for p in unit.parameters()}
        world.psgd = PowerSGD(
            rank,
            world.mesh["replicate"].get_group(),
            wire=world.config.powersgd_wire,
            exclude=[p for p in model.parameters() if p not in compressed],
        )
        world.psgd.attach(model)
        sent, matrices = world.psgd.compressed()
        say(f"cluster: PowerSGD sends {sent} of {matrices} matrices as factors of rank {rank}")
