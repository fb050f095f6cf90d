"""The processes that train together: one alone, or those of `torchrun`, behind one protocol."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.configs import to_dict
from dalle.distributed.config import ClusterConfig
from dalle.dtensor import swapped
from dalle.errors import DalleError, UsageError
from dalle.precision import ResblockScaler


class World(Protocol):
    """The processes of a training. All of them call collective methods, in the same order.

    A batch is split over the processes. The mean over this process's part times `weight`, averaged
    over all processes, is the mean over the batch.
    """

    @property
    def rank(self) -> int:
        """Number of this process. Process 0 writes the files of the run."""

    @property
    def size(self) -> int:
        """Number of processes."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""

    @property
    def control(self) -> dist.ProcessGroup | None:
        """The group for what is not a gradient, on the CPU; None in a world of one."""

    def part(self, count: int) -> slice:
        """This process's part of `count` items; parts differ by one at most.

        Raises:
            UsageError: `count` is below the number of processes.
        """

    def weight(self, count: int) -> float:
        """Factor on the mean over this process's part of `count` items: size of part / average."""

    def weight_async(self, count: int) -> Callable[[], float]:
        """As `weight`, where this process has `count` items and others have other counts.

        Collective. Starts an all-reduce; the returned function waits for it and gives the factor.
        Says along with it whether a process has postponed a problem.
        """

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, on the CPU, in float64. Collective."""

    def queue_sum_(self, values: Tensor) -> None:
        """Sums in place over all processes, on the device, which the host does not wait for; the
        same bits on all. Collective."""

    def mean(self, values: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
        """A step's values over all processes: counts are summed, others averaged. Collective."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process. Collective."""

    def watch(self, received: Sequence[object]) -> None:
        """From now on this process asks all to stop once the list is not empty."""

    def stop_requested(self) -> bool:
        """Whether any process had asked when the step's last `mean` was taken. Collective."""

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in their order. Collective."""

    def first(self, value: Any) -> Any:
        """Process 0's value. Collective."""

    def barrier(self) -> None:
        """Waits for all processes, however long process 0 takes while it lives. Collective."""

    def raise_on_all(self) -> AbstractContextManager[None]:
        """An error inside on one process is raised on all, with the same message. Collective.

        Process 0 may take longer inside than the time-out of a collective.
        """

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Raises UsageError on all unless they have the same JSON values. Collective."""

    def postpone(self, problem: DalleError) -> None:
        """Stores the problem that keeps this process from its part of a step; `raise_postponed`
        raises it on all, before anything has changed. A world of one raises it at once."""

    def raise_postponed(self) -> None:
        """Raises the problem that a process has postponed, on all of them. Collective.

        Reads nothing from a device, so that the backward pass is queued behind the forward pass.
        """

    def mean_loss(self, loss: Tensor) -> Tensor:
        """The mean loss, the same on all, so that all stop or none. Waits for it. Collective."""

    def queue_mean_loss(self, loss: Tensor) -> Tensor:
        """As `mean_loss`, 0-d on the device, which the host does not wait for. Collective."""

    def explained(self, step: Callable[[], int] | None = None) -> AbstractContextManager[None]:
        """Turns a failed collective into an error that names the processes that did not answer."""

    def device_exchange(self) -> AbstractContextManager[None]:
        """Around what waits for exchanges on a GPU: where one never ends, a line says who is gone,
        and this process ends."""

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a part of a batch: gradients stay with this
        process until the `last`, where those of all parts travel together."""

    def full_model(
        self, model: nn.Module, values: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[nn.Module | None]:
        """The full model. Collective, except for the work inside.

        In a world of one it is the model itself. Of several processes, process 0 gets a copy on
        the CPU in evaluation mode, and the others None.

        Args:
            model: of this process, which may hold a part of each parameter.
            values: by name, weights to use in place of the model's, such as averaged ones.
        """

    def load_full_model(self, model: nn.Module, full: nn.Module | None) -> None:
        """Gives the model the weights of `full`, which `full_model` gave. Collective."""

    def gradient_norm(self, gradients: Sequence[Tensor]) -> float:
        """Norm of the full gradient, the same on all processes. Collective.

        Args:
            gradients: those that this process's parameters hold.
        """

    def queue_gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """As `gradient_norm`, 0-d on the device, which the host does not wait for. Collective."""

    def broadcast_norm_(self, norm: Tensor) -> None:
        """Replaces a norm (0-d float64) by process 0's, which may round otherwise. Collective."""

    def use_scaler(self, scaler: ResblockScaler) -> None:
        """Tells PowerSGD by which scaler the gradients are scaled."""

    def replica_drift(self, model: nn.Module) -> str | None:
        """Names the first process whose weights differ from its replica's, or None. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """PowerSGD's error buffers, for a checkpoint. Collective."""

    def load_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        """Restores `state_dict()`; if it is missing, prints a line that begins with `where`."""

    def summary(self) -> list[str]:
        """Lines to print after a training."""


class Solo:
    """A world of one process, in which no method waits.

    Args:
        device: of this process.
    """

    rank, size, control = 0, 1, None

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = torch.device("cpu") if device is None else device
        self._received: Sequence[object] = ()

    def part(self, count: int) -> slice:
        return slice(0, count)

    def weight(self, count: int) -> float:
        return 1.0

    def weight_async(self, count: int) -> Callable[[], float]:
        return lambda: 1.0

    def sum(self, values: Tensor) -> Tensor:
        return values.detach().to("cpu", torch.float64, copy=True)

    def queue_sum_(self, values: Tensor) -> None:
        pass

    def mean(self, values: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
        return dict(values)

    def any(self, flag: bool) -> bool:
        return flag

    def watch(self, received: Sequence[object]) -> None:
        self._received = received

    def stop_requested(self) -> bool:
        return bool(self._received)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def first(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass

    def raise_on_all(self) -> AbstractContextManager[None]:
        return nullcontext()

    def require_same(self, values: Mapping[str, Any]) -> None:
        pass

    def postpone(self, problem: DalleError) -> None:
        raise problem

    def raise_postponed(self) -> None:
        pass

    def mean_loss(self, loss: Tensor) -> Tensor:
        return loss

    def queue_mean_loss(self, loss: Tensor) -> Tensor:
        return loss

    def explained(self, step: Callable[[], int] | None = None) -> AbstractContextManager[None]:
        return nullcontext()

    def device_exchange(self) -> AbstractContextManager[None]:
        return nullcontext()

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def full_model(
        self, model: nn.Module, values: Mapping[str, Tensor] | None = None
    ) -> Iterator[nn.Module | None]:
        with nullcontext() if values is None else swapped(dict(model.named_parameters()), values):
            yield model

    def load_full_model(self, model: nn.Module, full: nn.Module | None) -> None:
        pass  # it is the model itself

    def gradient_norm(self, gradients: Sequence[Tensor]) -> float:
        return float(self.queue_gradient_norm(gradients))

    def queue_gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients)

    def broadcast_norm_(self, norm: Tensor) -> None:
        pass

    def use_scaler(self, scaler: ResblockScaler) -> None:
        pass

    def replica_drift(self, model: nn.Module) -> str | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        pass

    def summary(self) -> list[str]:
        return []


@contextmanager
def join(
    config: ClusterConfig, device: torch.device, options: Mapping[str, Any] | None = None
) -> Iterator[World]:
    """The world that `torchrun` started this process in; a `Solo` where it is alone.

    A collective that fails inside becomes an error that names the processes that did not answer.

    Args:
        config: how the processes work together.
        device: of this process; "cuda" becomes the GPU of its local rank.
        options: JSON values that must be equal on all processes, the configuration among them.

    Raises: as `Cluster`; UsageError where `options` differs, or the environment is not torchrun's.
    """
    if _number("WORLD_SIZE", 1) == 1:
        if _number("RANK", 0):
            world = os.environ.get("WORLD_SIZE", "none")
            raise UsageError(
                "cluster: RANK must come with the WORLD_SIZE of several processes, as torchrun "
                f"sets them, got RANK {os.environ['RANK']} and WORLD_SIZE {world}; "
                "unset RANK to train on one process"
            )
        yield Solo(device)
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UsageError(
                f"cluster: {name} must be set where WORLD_SIZE is, as torchrun does, got none"
            )
    for name in ("RANK", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        _number(name, 0)
    from dalle.distributed.cluster import Cluster  # imports FSDP2: half a second

    cluster = Cluster(config, device, options)
    with cluster.explained():
        yield cluster
    with suppress(RuntimeError):  # the work is done; a failed shutdown loses nothing
        cluster.close()


def _number(name: str, default: int) -> int:
    """An environment variable of torchrun as an integer of at least 0."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"cluster: {name} must be a number, as torchrun sets it, got {text!r}")
    return int(text)


def shared_options(config: Any) -> dict[str, Any]:
    """The options of a command that must be equal on all processes: not its paths and device."""
    values = to_dict(config)
    values |= values.pop("loop", {})
    local = ("data", "tokenizer", "vae", "out", "device")
    return {key: value for key, value in values.items() if key not in local}
