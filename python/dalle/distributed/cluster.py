"""A training over the processes of `torchrun`: who they are, and what they tell each other."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import init_device_mesh

from dalle.configs import check_numbers, require, to_dict
from dalle.distributed.agreement import require_same
from dalle.distributed.heartbeat import Heartbeat
from dalle.errors import DalleError, EnvironmentProblem, UsageError
from dalle.train.metrics import say

if TYPE_CHECKING:
    from dalle.distributed.hooks import PowerSGD

SUMMED = ("images",)  # counts among a step's values; the others are means


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How the processes of `torchrun` work together; of no effect on one process.

    Attributes:
        machines: groups of processes; the parameters are shared out inside each, and gradients are
            summed between them. 0: the machines torchrun knows of.
        powersgd_rank: columns of the factors in which gradients travel between machines (paper
            2.5); 0 sends them whole.
        powersgd_wire: words of the factors.
        timeout: seconds after which a process that does not answer ends the run.
    """

    machines: int = 0
    powersgd_rank: int = 0
    powersgd_wire: Literal["1-6-9", "fp32"] = "1-6-9"
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_numbers("cluster", self)
        require("cluster", self, "0 or more", lambda x: x >= 0, "machines", "powersgd_rank")
        require("cluster", self, "positive", lambda x: x > 0, "timeout")


class Cluster:
    """The processes of this run: `machines` times as many as share the parameters.

    Attributes:
        rank, world: number of this process, and of all.
        machines: see `ClusterConfig`.
        device: of this process.
        mesh: axes "replicate" (machines) and "shard" (processes of one).
        control: the group for what is not a gradient: numbers, flags, checkpoints; on the CPU.
        psgd: what compresses the gradients between machines, or None.
        problem: what keeps this process from its part of a step, or None. It takes part with
            something else, and `update` tells the others before anything changes.

    Raises:
        UsageError: machines that do not divide the processes, or have fewer GPUs than processes.
        EnvironmentProblem: the processes do not reach each other.
    """

    def __init__(
        self, config: ClusterConfig, device: torch.device, asked: Mapping[str, Any] | None = None
    ) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self.config = config
        self.psgd: PowerSGD | None = None
        self.problem: DalleError | None = None
        limit = timedelta(seconds=config.timeout)
        try:
            backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=limit)
            self.control = dist.new_group(backend="gloo", timeout=limit)
            run = self.first(secrets.token_hex(4))
            self.heartbeat = Heartbeat(self.rank, self.world, limit, run)
            # Before anything that other options would make another exchange.
            own = {"device": device.type, **(asked or {"cluster": to_dict(config)})}
            require_same("cluster", own, self.control)
            self.machines = config.machines or self._machines(local)
            if self.world % self.machines:
                raise UsageError(
                    f"cluster: machines must divide the {self.world} processes, got {self.machines}"
                )
            self.device = self._own_device(device, local)
            shape = (self.machines, self.world // self.machines)
            self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        except DalleError:
            raise
        except (RuntimeError, ValueError) as problem:
            raise EnvironmentProblem(
                f"cluster: processes must reach each other, got on process {self.rank}: "
                f"{_first_line(problem)}"
            ) from problem
        for name in ("replicate", "shard"):  # groups of a mesh do not take the limit from the world
            c10d._set_pg_timeout(limit, self.mesh[name].get_group())
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if agent and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            say("cluster: torchrun restarts hang without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; "
                "see docs/operations.md")  # fmt: skip

    def _machines(self, local: int) -> int:
        """As torchrun knows them: all with as many processes."""
        every = self.gather(local)
        if len(set(every)) > 1 or self.world % local:
            raise UsageError(
                "cluster: processes of a machine must be as many on each, or machines given, got "
                f"LOCAL_WORLD_SIZE {', '.join(map(str, sorted(set(every))))} of {self.world}"
            )
        return self.world // local

    def _own_device(self, device: torch.device, local: int) -> torch.device:
        """Of several GPUs the one of this process."""
        if device.type != "cuda":
            return device
        problem, there = None, torch.cuda.device_count()
        own = int(os.environ.get("LOCAL_RANK", 0))
        if own >= there:
            problem = UsageError(
                f"cluster: processes of a machine must be at most its {there} GPUs, got {local}"
            )
        self.together(problem)
        device = torch.device("cuda", own)
        torch.cuda.set_device(device)
        return device

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which writes what is written once."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """Processes of one machine."""
        return self.world // self.machines

    def part(self, count: int) -> slice:
        """This process's part of `count` things; parts differ by one at most.

        Raises:
            UsageError: fewer than there are processes.
        """
        if count < self.world:
            raise UsageError(
                f"cluster: batch_size must be at least the {self.world} processes, got {count}"
            )
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def weight(self, count: int) -> float:
        """Of a mean over this process's part of `count` things in the mean of all processes."""
        part = self.part(count)
        return (part.stop - part.start) * self.world / count

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, on the CPU, in float64."""
        found = values.detach().to("cpu", torch.float64, copy=True)
        dist.all_reduce(found, group=self.control)
        return found

    def share(self, count: int) -> float:
        """As `weight`, of as many things as each process has: `count` is this one's."""
        own = torch.tensor(count, dtype=torch.float64, device="cpu")
        return count * self.world / max(float(self.sum(own)), 1.0)

    def mean(self, values: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
        """A step's values over all processes, in one exchange: means, of counts the sums."""
        shaped = {k: torch.as_tensor(v, dtype=torch.float64, device="cpu").detach()
                  for k, v in values.items()}  # fmt: skip
        total = self.sum(torch.cat([v.reshape(-1) for v in shaped.values()]))
        parts = total.split([v.numel() for v in shaped.values()])
        return {
            key: part.view(shaped[key].shape) / (1 if key in SUMMED else self.world)
            for key, part in zip(shaped, parts, strict=True)
        }

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.sum(torch.tensor([float(flag)], dtype=torch.float32, device="cpu")) > 0)

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in their order."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.control)
        return found

    def first(self, value: Any) -> Any:
        """Process 0's value."""
        found = [value]
        dist.broadcast_object_list(found, src=0, group=self.control)
        return found[0]

    def together(self, problem: Exception | None) -> None:
        """Raises on every process if any has a problem: the first, with the process it is of.

        However long process 0 takes to come here: the others wait while it lives.
        """
        self.heartbeat.follow()
        lines = [None if problem is None else (_plain(problem), _first_line(problem))]
        for process, (found,) in enumerate(self.gather(lines)):
            if found is not None:
                kind, text = found
                error = kind(text if process == 0 else f"{text} (on process {process})")
                error.agreed = True
                raise error from problem

    def agree(self, own: Mapping[str, Any]) -> None:
        """Raises UsageError on every process unless all have the same JSON values and versions."""
        require_same("cluster", own, self.control)

    def explain(self, problem: Exception, step: int | None = None) -> DalleError | None:
        """An exchange that failed, in one line that names the processes that did not answer.

        None where the problem is not an exchange's.
        """
        if not (isinstance(problem, dist.DistError) or "gloo" in str(problem).lower()):
            return None
        kind = "timed out" if "imed out" in str(problem) else "closed"
        when = "outside the training" if step is None else f"in step {step}"
        who = ", ".join(map(str, self.heartbeat.gone()))
        who = who or "none (the link failed, or not all are in the same exchange)"
        return EnvironmentProblem(
            f"cluster: every process must answer, got none from process {who} of {self.world}: "
            f"exchange {kind} {when} on process {self.rank}; the same command goes on from "
            "the last checkpoint"
        )


@contextmanager
def join(
    config: ClusterConfig, device: torch.device, asked: Mapping[str, Any] | None = None
) -> Iterator[Cluster | None]:
    """The cluster that `torchrun` started this process in; None where it is alone.

    An exchange that fails inside becomes the line that names who did not answer.

    Args:
        config: how they work together.
        device: of this process; of several GPUs its own is chosen.
        asked: JSON values that all processes must have alike, the configuration among them.

    Raises: as `Cluster`; UsageError where `asked` differs, or the environment is not torchrun's.
    """
    if _number("WORLD_SIZE", 1) == 1:
        if _number("RANK", 0):
            world = os.environ.get("WORLD_SIZE", "none")
            raise UsageError(
                "cluster: RANK must come with the WORLD_SIZE of several processes, as torchrun "
                f"sets them, got RANK {os.environ['RANK']} and WORLD_SIZE {world}; "
                "unset RANK to train on one process"
            )
        yield None
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UsageError(
                f"cluster: {name} must be set where WORLD_SIZE is, as torchrun does, got none"
            )
    for name in ("RANK", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        _number(name, 0)
    cluster = Cluster(config, device, asked)
    try:
        yield cluster
    except RuntimeError as problem:
        found = cluster.explain(problem)
        if found is None:
            raise
        raise found from problem
    with suppress(RuntimeError):  # the work is done: nothing hangs on a clean farewell
        dist.barrier(group=cluster.control)
        cluster.heartbeat.stop()
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    """A variable of torchrun's, at least 0."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"cluster: {name} must be a number, as torchrun sets it, got {text!r}")
    return int(text)


def alike(config: Any) -> dict[str, Any]:
    """What of a command's configuration all processes must share: all but its paths and device."""
    own = ("data", "tokenizer", "vae", "out", "device")
    return {key: value for key, value in to_dict(config).items() if key not in own}


def _plain(problem: Exception) -> type[DalleError]:
    """Its class of `dalle.errors`, which all are made of a line alone."""
    kinds = (c for c in type(problem).__mro__ if c.__module__ == DalleError.__module__)
    return next(kinds, EnvironmentProblem)


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
