"""`Cluster`: the world of the processes that `torchrun` starts."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from dalle.configs import to_dict
from dalle.console import printable, say
from dalle.distributed.agreement import require_same
from dalle.distributed.config import ClusterConfig
from dalle.distributed.heartbeat import Heartbeat
from dalle.distributed.hooks import PowerSGD
from dalle.distributed.replicas import find_drift
from dalle.distributed.shard import gather_model, scatter_model
from dalle.dtensor import gather
from dalle.errors import DalleError, EnvironmentProblem, UsageError
from dalle.precision import ResblockScaler

LAST_WORDS = 5.0  # seconds
LATER = 60.0  # seconds after our own time-out, NCCL's
SUMMED = ("images",)  # counts among a step's values; the others are means


class Cluster:
    """The processes of a `torchrun`: each machine holds the model once, sharded over its processes.

    Attributes:
        rank, size: number of this process, number of processes.
        machines: see `ClusterConfig`.
        device: of this process.
        mesh: axes "replicate" (machines) and "shard" (processes of one).
        control: the group on the CPU for everything but gradients: numbers, flags, checkpoints.
        psgd: compresses the gradients between machines, or None.

    Raises:
        UsageError: machines that do not divide the processes, or have fewer GPUs than processes.
        EnvironmentProblem: the processes do not reach each other.
    """

    def __init__(
        self, config: ClusterConfig, device: torch.device, options: Mapping[str, Any] | None = None
    ) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.config = config
        self.psgd: PowerSGD | None = None
        self._postponed: DalleError | None = None
        self._any_postponed: bool | None = None  # on any process; None where nobody has asked
        self._step: Callable[[], int] | None = None  # the number of the training's
        self._received: Sequence[object] = ()
        self._stop: bool | None = None  # of the last mean; None once read
        limit = timedelta(seconds=config.timeout)
        try:
            backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            store, _, _ = next(dist.rendezvous("env://", timeout=limit))
            self.device = self._pick_device(device, local_size, store)
            # NCCL then connects at once, on this process's own GPU, and splits groups off.
            bound = self.device if device.type == "cuda" else None
            device_limit = limit
            if bound is not None:  # else NCCL ends the process before a line says which one is gone
                os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
                device_limit += timedelta(seconds=LATER)
            dist.init_process_group(
                backend,
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=device_limit,
                device_id=bound,
            )
            self.control = dist.new_group(backend="gloo", timeout=limit)
            run = self.first(secrets.token_hex(4))
            self.heartbeat = Heartbeat(self.rank, self.size, limit, run)
            if bound is not None:
                self.heartbeat.watch(self._end)
            # First of all, since the later collectives depend on the options.
            shared = {"device": device.type, **(options or {"cluster": to_dict(config)})}
            require_same("cluster", shared, self.control)
            self.machines = config.machines or self._machines(local_size)
            if self.size % self.machines:
                raise UsageError(
                    f"cluster: machines must divide the {self.size} processes, got {self.machines}"
                )
            shape = (self.machines, self.size // self.machines)
            self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        except DalleError:
            raise
        except (RuntimeError, ValueError) as problem:
            raise EnvironmentProblem(
                f"cluster: processes must reach each other, got on process {self.rank}: "
                f"{_first_line(problem)}"
            ) from problem
        for name in ("replicate", "shard"):  # groups of a mesh do not inherit the time-out
            c10d._set_pg_timeout(device_limit, self.mesh[name].get_group())
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if agent and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            say(
                "cluster: torchrun restarts hang without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; "
                "see docs/operations.md"
            )

    def _machines(self, local_size: int) -> int:
        """The number of machines torchrun knows, each with the same number of processes."""
        local_sizes = self.gather(local_size)
        if len(set(local_sizes)) > 1 or self.size % local_size:
            raise UsageError(
                "cluster: processes of a machine must be as many on each, or machines given, got "
                f"LOCAL_WORLD_SIZE {', '.join(map(str, sorted(set(local_sizes))))} of {self.size}"
            )
        return self.size // local_size

    def _pick_device(
        self, device: torch.device, local_size: int, store: dist.Store
    ) -> torch.device:
        """The device of this process: of several GPUs that of its local rank. Collective.

        Through the store, since no group can be made before all have a GPU.
        """
        if device.type != "cuda":
            return device
        num_gpus = torch.cuda.device_count()
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        line = ""
        if local_rank >= num_gpus:
            line = (
                f"cluster: processes of a machine must be at most its {num_gpus} GPUs, "
                f"got {local_size}"
            )
            line += f" (on process {self.rank})" if self.rank else ""
        store.set(f"dalle/gpu/{self.rank}", line or "ok")
        if self.rank == 0:
            lines = [store.get(f"dalle/gpu/{rank}").decode() for rank in range(self.size)]
            store.set("dalle/gpus", next((text for text in lines if text != "ok"), "ok"))
        first = store.get("dalle/gpus").decode()
        if first != "ok":
            if self.rank == 0:  # it may hold the store
                self._until_read(store)
            else:
                store.add("dalle/gpus/read", 1)
            raise UsageError(first)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device

    def _until_read(self, store: dist.Store) -> None:
        """Waits some seconds until the others have read why all of them end."""
        end = time.monotonic() + LAST_WORDS
        while store.add("dalle/gpus/read", 0) < self.size - 1 and time.monotonic() < end:
            time.sleep(0.05)

    @property
    def shards(self) -> int:
        """Processes of one machine."""
        return self.size // self.machines

    def part(self, count: int) -> slice:
        """This process's part of `count` items; parts differ by one at most.

        Raises:
            UsageError: `count` is below the number of processes.
        """
        if count < self.size:
            raise UsageError(
                f"cluster: batch_size must be at least the {self.size} processes, got {count}"
            )
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def weight(self, count: int) -> float:
        """Factor on the mean over this process's part of `count` items: size of part / average."""
        part = self.part(count)
        size: int = part.stop - part.start
        return size * self.size / count

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, on the CPU, in float64."""
        total = values.detach().to("cpu", torch.float64, copy=True)
        dist.all_reduce(total, group=self.control)
        return total

    def weight_async(self, count: int) -> Callable[[], float]:
        flag = self._postponed is not None
        total = torch.tensor([count, flag], dtype=torch.float64, device="cpu")
        work = dist.all_reduce(total, group=self.control, async_op=True)

        def wait() -> float:
            assert work is not None  # None only outside the group
            work.wait()
            self._any_postponed = float(total[1]) > 0
            return count * self.size / max(float(total[0]), 1.0)

        return wait

    def mean(self, values: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
        """A step's values over all processes, in one exchange: counts summed, others averaged."""
        tensors = {
            k: torch.as_tensor(v, dtype=torch.float64, device="cpu").detach()
            for k, v in values.items()
        }
        flag = torch.tensor([bool(self._received)], dtype=torch.float64, device="cpu")
        total = self.sum(torch.cat([flag, *(v.reshape(-1) for v in tensors.values())]))
        self._stop = float(total[0]) > 0
        parts = total[1:].split([v.numel() for v in tensors.values()])
        return {
            key: part.view(tensors[key].shape) / (1 if key in SUMMED else self.size)
            for key, part in zip(tensors, parts, strict=True)
        }

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.sum(torch.tensor([float(flag)], dtype=torch.float32, device="cpu")) > 0)

    def watch(self, received: Sequence[object]) -> None:
        self._received, self._stop = received, None

    def stop_requested(self) -> bool:
        requested, self._stop = self._stop, None
        return self.any(bool(self._received)) if requested is None else requested

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in their order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def first(self, value: Any) -> Any:
        """Process 0's value."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        self.raise_first(None)

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        problem: Exception | None = None
        try:
            yield
        except (DalleError, OSError, torch.OutOfMemoryError) as error:
            problem = error
        self.raise_first(problem)

    def raise_first(self, problem: Exception | None) -> None:
        """Raises the problem of the first process that has one on all of them. Collective.

        The others wait for process 0 as long as it is alive.
        """
        self.heartbeat.wait_for_rank0()
        lines = [None if problem is None else (_dalle_class(problem), _first_line(problem))]
        for process, (failure,) in enumerate(self.gather(lines)):
            if failure is not None:
                kind, text = failure
                error = kind(text if process == 0 else f"{text} (on process {process})")
                error.raised_on_all = True
                raise error from problem

    def require_same(self, values: Mapping[str, Any]) -> None:
        require_same("cluster", values, self.control)

    def postpone(self, problem: DalleError) -> None:
        self._postponed = problem

    def raise_postponed(self) -> None:
        postponed, self._any_postponed = self._any_postponed, None
        if postponed is None:
            postponed = self.any(self._postponed is not None)
        if postponed:
            problem, self._postponed = self._postponed, None
            self.raise_first(problem)

    def mean_loss(self, loss: Tensor) -> Tensor:
        with self.device_exchange():
            local = loss.cpu()
        mean = self.mean({"loss": local})["loss"]
        return torch.as_tensor(mean, dtype=torch.float64, device="cpu")

    def queue_mean_loss(self, loss: Tensor) -> Tensor:
        total = loss.detach().double()
        dist.all_reduce(total)
        return total / self.size

    def queue_sum_(self, values: Tensor) -> None:
        dist.all_reduce(values)

    @contextmanager
    def explained(self, step: Callable[[], int] | None = None) -> Iterator[None]:
        self._step = step or self._step
        try:
            yield
        except RuntimeError as problem:
            explanation = self.explain(problem, None if step is None else step())
            if explanation is None:
                raise
            raise explanation from problem

    def explain(self, problem: Exception, step: int | None = None) -> DalleError | None:
        """The error for a collective that failed, naming the processes that did not answer.

        None where the problem is another one.
        """
        if not (isinstance(problem, dist.DistError) or "gloo" in str(problem).lower()):
            return None
        kind = "timed out" if "imed out" in str(problem) else "closed"
        return self._unanswered(kind, step)

    def _unanswered(self, kind: str, step: int | None) -> DalleError:
        """The error for an exchange that "timed out" or "closed"."""
        when = "outside the training" if step is None else f"in step {step}"
        who = ", ".join(map(str, self.heartbeat.dead_ranks()))
        who = who or "none (the link failed, or not all are in the same exchange)"
        return EnvironmentProblem(
            f"cluster: every process must answer, got none from process {who} of {self.size}: "
            f"exchange {kind} {when} on process {self.rank}; the same command goes on from "
            "the last checkpoint"
        )

    def _end(self, kind: str) -> None:
        """Ends this process with a line, while its main thread waits for an exchange on the GPU."""
        problem = self._unanswered(kind, None if self._step is None else self._step())
        if sys.stderr is not None:
            with suppress(OSError, ValueError):  # nobody reads it
                print(printable(str(problem)), file=sys.stderr, flush=True)
        os._exit(problem.exit_code)

    def device_exchange(self) -> AbstractContextManager[None]:
        return self.heartbeat.waiting()

    @contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        if isinstance(model, FSDPModule):  # not where `parallelize` was not asked
            model.set_requires_gradient_sync(last)
        yield

    @contextmanager
    def full_model(
        self, model: nn.Module, values: Mapping[str, Tensor] | None = None
    ) -> Iterator[nn.Module | None]:
        with self.device_exchange():  # all end before process 0 works with the copy
            gathered = gather_model(model, self.rank, values)
        yield gathered

    def load_full_model(self, model: nn.Module, full: nn.Module | None) -> None:
        scatter_model(model, full, self.control)

    def gradient_norm(self, gradients: Sequence[Tensor]) -> float:
        norm = self.queue_gradient_norm(gradients)
        with self.device_exchange():
            return float(norm)

    def queue_gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        psgd = self.psgd
        norm = gather(nn.utils.get_total_norm(gradients)) if psgd is None else psgd.gradient_norm()
        self.broadcast_norm_(norm)
        return norm

    def broadcast_norm_(self, norm: Tensor) -> None:
        # The order of a sum depends on the processor, but replicas must clip by the same bits.
        dist.broadcast(norm, src=0)

    def use_scaler(self, scaler: ResblockScaler) -> None:
        if self.psgd is not None:
            self.psgd.compressor.scaler = scaler

    def replica_drift(self, model: nn.Module) -> str | None:
        return find_drift(model, self.gather, self.shards)

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
        """Shuts down when all processes are done. Collective."""
        dist.barrier(group=self.control)
        self.heartbeat.stop()
        dist.destroy_process_group()


def _dalle_class(problem: Exception) -> type[DalleError]:
    """The nearest class of `dalle.errors`; all of those take a message alone."""
    kinds = (c for c in type(problem).__mro__ if c.__module__ == DalleError.__module__)
    return next(kinds, EnvironmentProblem)


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
