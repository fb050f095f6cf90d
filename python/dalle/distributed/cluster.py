"""A training over the processes of `torchrun`: who they are, and what they tell each other."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import init_device_mesh

from dalle.configs import to_dict
from dalle.console import say
from dalle.distributed.agreement import require_same
from dalle.distributed.config import ClusterConfig
from dalle.distributed.heartbeat import Heartbeat
from dalle.distributed.hooks import PowerSGD
from dalle.distributed.replicas import drifted
from dalle.distributed.shard import gather_model, scatter_model
from dalle.dtensor import gather
from dalle.errors import DalleError, EnvironmentProblem, UsageError
from dalle.precision import ResblockScaler

SUMMED = ("images",)  # counts among a step's values; the others are means


class Cluster:
    """The processes of this run: `machines` times as many as share the parameters.

    Attributes:
        rank, size: number of this process, and of all.
        machines: see `ClusterConfig`.
        device: of this process.
        mesh: axes "replicate" (machines) and "shard" (processes of one).
        control: the group for what is not a gradient: numbers, flags, checkpoints; on the CPU.
        psgd: what compresses the gradients between machines, or None.

    Raises:
        UsageError: machines that do not divide the processes, or have fewer GPUs than processes.
        EnvironmentProblem: the processes do not reach each other.
    """

    def __init__(
        self, config: ClusterConfig, device: torch.device, asked: Mapping[str, Any] | None = None
    ) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.config = config
        self.psgd: PowerSGD | None = None
        self._postponed: DalleError | None = None
        self._received: Sequence[object] = ()
        self._stop: bool | None = None  # whether any asked, when the last mean was taken
        limit = timedelta(seconds=config.timeout)
        try:
            backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=limit)
            self.control = dist.new_group(backend="gloo", timeout=limit)
            run = self.first(secrets.token_hex(4))
            self.heartbeat = Heartbeat(self.rank, self.size, limit, run)
            # Before anything that other options would make another exchange.
            own = {"device": device.type, **(asked or {"cluster": to_dict(config)})}
            require_same("cluster", own, self.control)
            self.machines = config.machines or self._machines(local)
            if self.size % self.machines:
                raise UsageError(
                    f"cluster: machines must divide the {self.size} processes, got {self.machines}"
                )
            self.device = self._own_device(device, local)
            shape = (self.machines, self.size // self.machines)
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
            say(
                "cluster: torchrun restarts hang without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; "
                "see docs/operations.md"
            )

    def _machines(self, local: int) -> int:
        """As torchrun knows them: all with as many processes."""
        every = self.gather(local)
        if len(set(every)) > 1 or self.size % local:
            raise UsageError(
                "cluster: processes of a machine must be as many on each, or machines given, got "
                f"LOCAL_WORLD_SIZE {', '.join(map(str, sorted(set(every))))} of {self.size}"
            )
        return self.size // local

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
        self.raise_first(problem)
        device = torch.device("cuda", own)
        torch.cuda.set_device(device)
        return device

    @property
    def shards(self) -> int:
        """Processes of one machine."""
        return self.size // self.machines

    def part(self, count: int) -> slice:
        """This process's part of `count` things; parts differ by one at most.

        Raises:
            UsageError: fewer than there are processes.
        """
        if count < self.size:
            raise UsageError(
                f"cluster: batch_size must be at least the {self.size} processes, got {count}"
            )
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def weight(self, count: int) -> float:
        """Of a mean over this process's part of `count` things in the mean of all processes."""
        part = self.part(count)
        size: int = part.stop - part.start
        return size * self.size / count

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, on the CPU, in float64."""
        found = values.detach().to("cpu", torch.float64, copy=True)
        dist.all_reduce(found, group=self.control)
        return found

    def share(self, count: int) -> Callable[[], float]:
        total = torch.tensor(count, dtype=torch.float64, device="cpu")
        work = dist.all_reduce(total, group=self.control, async_op=True)

        def wait() -> float:
            assert work is not None  # of a process that is in the group
            work.wait()
            return count * self.size / max(float(total), 1.0)

        return wait

    def mean(self, values: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
        """A step's values over all processes, in one exchange: means, of counts the sums."""
        shaped = {
            k: torch.as_tensor(v, dtype=torch.float64, device="cpu").detach()
            for k, v in values.items()
        }
        flag = torch.tensor([bool(self._received)], dtype=torch.float64, device="cpu")
        total = self.sum(torch.cat([flag, *(v.reshape(-1) for v in shaped.values())]))
        self._stop = float(total[0]) > 0
        parts = total[1:].split([v.numel() for v in shaped.values()])
        return {
            key: part.view(shaped[key].shape) / (1 if key in SUMMED else self.size)
            for key, part in zip(shaped, parts, strict=True)
        }

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.sum(torch.tensor([float(flag)], dtype=torch.float32, device="cpu")) > 0)

    def watch(self, received: Sequence[object]) -> None:
        self._received = received

    def stop_requested(self) -> bool:
        told, self._stop = self._stop, None
        return self.any(bool(self._received)) if told is None else told

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in their order."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def first(self, value: Any) -> Any:
        """Process 0's value."""
        found = [value]
        dist.broadcast_object_list(found, src=0, group=self.control)
        return found[0]

    def barrier(self) -> None:
        self.raise_first(None)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        problem: Exception | None = None
        try:
            yield
        except (DalleError, OSError, torch.OutOfMemoryError) as found:
            problem = found
        self.raise_first(problem)

    def raise_first(self, problem: Exception | None) -> None:
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

    def require_same(self, values: Mapping[str, Any]) -> None:
        require_same("cluster", values, self.control)

    def postpone(self, problem: DalleError) -> None:
        self._postponed = problem

    def agreed_loss(self, loss: Tensor) -> Tensor:
        own = loss if self._postponed is None else torch.full_like(loss, math.nan)
        mean = self.mean({"loss": own})["loss"]
        if not math.isfinite(float(mean)):  # on all, so they have time to ask whose fault it is
            problem, self._postponed = self._postponed, None
            self.raise_first(problem)
        return torch.as_tensor(mean, dtype=torch.float64, device="cpu")

    @contextmanager
    def explained(self, step: Callable[[], int] | None = None) -> Iterator[None]:
        try:
            yield
        except RuntimeError as problem:
            found = self.explain(problem, None if step is None else step())
            if found is None:
                raise
            raise found from problem

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
            f"cluster: every process must answer, got none from process {who} of {self.size}: "
            f"exchange {kind} {when} on process {self.rank}; the same command goes on from "
            "the last checkpoint"
        )

    @contextmanager
    def whole_model(
        self, model: nn.Module, values: Mapping[str, Tensor] | None = None
    ) -> Iterator[nn.Module | None]:
        # Of its exchanges none may be left while process 0 works with it.
        yield gather_model(model, self.rank, values)

    def take_over(self, model: nn.Module, whole: nn.Module | None) -> None:
        scatter_model(model, whole, self.control)

    def gradient_norm(self, gradients: Sequence[Tensor]) -> float:
        psgd = self.psgd
        norm = gather(nn.utils.get_total_norm(gradients)) if psgd is None else psgd.gradient_norm()
        self.agree_norm_(norm)
        return float(norm)

    def agree_norm_(self, norm: Tensor) -> None:
        # Processors add squares in different orders, and replicas must clip by the same bits.
        dist.broadcast(norm, src=0)

    def use_scaler(self, scaler: ResblockScaler) -> None:
        if self.psgd is not None:
            self.psgd.compressor.scaler = scaler

    def replica_drift(self, model: nn.Module) -> str | None:
        return drifted(model, self.gather, self.shards)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.psgd is None else {"powersgd": self.psgd.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        if self.psgd is not None and "powersgd" in state:
            self.psgd.load_state_dict(state["powersgd"])
        elif self.psgd is not None:
            say(f"{where}: no error buffers: those of PowerSGD begin at zero")

    def summary(self) -> list[str]:
        return [] if self.psgd is None else [f"PowerSGD: {self.psgd.report()['advice']}"]

    def close(self) -> None:
        """Leaves the others, when all are done. Collective."""
        dist.barrier(group=self.control)
        self.heartbeat.stop()
        dist.destroy_process_group()


def _plain(problem: Exception) -> type[DalleError]:
    """Its class of `dalle.errors`, which all are made of a line alone."""
    kinds = (c for c in type(problem).__mro__ if c.__module__ == DalleError.__module__)
    return next(kinds, EnvironmentProblem)


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
