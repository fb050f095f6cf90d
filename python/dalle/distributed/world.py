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
    """All processes of a training. What is called collective, all of them call in the same order.

    A batch is shared out over them, and a mean over this process's part of it, times `weight`, has
    the mean over the whole batch as its mean over the processes.
    """

    @property
    def rank(self) -> int:
        """Number of this process. Process 0 writes what is written once."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    @property
    def device(self) -> torch.device:
        """Of this process."""

    @property
    def control(self) -> dist.ProcessGroup | None:
        """The group for what is not a gradient, on the CPU; None in a world of one."""

    def part(self, count: int) -> slice:
        """This process's part of `count` things; parts differ by one at most.

        Raises:
            UsageError: fewer than there are processes.
        """

    def weight(self, count: int) -> float:
        """Of a mean over this process's part of `count` things in the mean of all processes."""

    def share(self, count: int) -> Callable[[], float]:
        """As `weight`, where this process has `count` things, others other numbers.

        Collective. What is returned waits for the others; work in between hides them.
        """

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all processes, on the CPU, in float64. Collective."""

    def mean(self, values: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
        """A step's values over all processes: means, of counts the sums. Collective."""

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

    def agreed(self) -> AbstractContextManager[None]:
        """What fails inside on one process fails on all, in its words. Collective.

        Process 0 may take longer inside than an exchange is waited for.
        """

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Raises UsageError on all unless they have the same JSON values. Collective."""

    def postpone(self, problem: DalleError) -> None:
        """Keeps what keeps this process from its part of a step until `agreed_loss` tells the
        others, before anything has changed; with nobody to tell, raises it at once."""

    def agreed_loss(self, loss: Tensor) -> Tensor:
        """The mean loss, the same on all, so that all stop or none. Collective.

        Raises:
            DalleError: what a process has postponed, on all of them.
        """

    def explained(self, step: Callable[[], int] | None = None) -> AbstractContextManager[None]:
        """Turns an exchange that fails inside into the line that names who did not answer."""

    def whole_model(
        self, model: nn.Module, values: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[nn.Module | None]:
        """The whole model. Collective, but not what is done with it inside.

        One process gets the model itself; of several, process 0 a copy on the CPU in evaluation
        mode, and the others None.

        Args:
            model: of this process, which may hold a part of each parameter.
            values: by name in place of the parameters' own inside the block: averaged weights.
        """

    def take_over(self, model: nn.Module, whole: nn.Module | None) -> None:
        """Gives the model the weights of what `whole_model` gave. Collective."""

    def gradient_norm(self, gradients: Sequence[Tensor]) -> float:
        """Norm of the whole gradient, the same on all; collective.

        Args:
            gradients: those that this process's parameters hold.
        """

    def agree_norm_(self, norm: Tensor) -> None:
        """Makes a norm (0-d float64) of equal gradients one number on all, in place. Collective."""

    def use_scaler(self, scaler: ResblockScaler) -> None:
        """Tells what compresses gradients whose scales they carry."""

    def replica_drift(self, model: nn.Module) -> str | None:
        """In words, the first process whose weights are not those of its replica; collective."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the exchanges: PowerSGD's error buffers. Collective."""

    def load_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        """Takes `state_dict()` back; says so, after `where`, where it is missing."""

    def summary(self) -> list[str]:
        """Lines to be said after a training."""


class Solo:
    """A world of one process: every question is answered at once.

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

    def share(self, count: int) -> Callable[[], float]:
        return lambda: 1.0

    def sum(self, values: Tensor) -> Tensor:
        return values.detach().to("cpu", torch.float64, copy=True)

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

    def agreed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def require_same(self, values: Mapping[str, Any]) -> None:
        pass

    def postpone(self, problem: DalleError) -> None:
        raise problem

    def agreed_loss(self, loss: Tensor) -> Tensor:
        return loss

    def explained(self, step: Callable[[], int] | None = None) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def whole_model(
        self, model: nn.Module, values: Mapping[str, Tensor] | None = None
    ) -> Iterator[nn.Module | None]:
        with nullcontext() if values is None else swapped(dict(model.named_parameters()), values):
            yield model

    def take_over(self, model: nn.Module, whole: nn.Module | None) -> None:
        pass  # it is the model itself

    def gradient_norm(self, gradients: Sequence[Tensor]) -> float:
        return float(nn.utils.get_total_norm(gradients))

    def agree_norm_(self, norm: Tensor) -> None:
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
    config: ClusterConfig, device: torch.device, asked: Mapping[str, Any] | None = None
) -> Iterator[World]:
    """The world that `torchrun` started this process in; a `Solo` where it is alone.

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
        yield Solo(device)
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UsageError(
                f"cluster: {name} must be set where WORLD_SIZE is, as torchrun does, got none"
            )
    for name in ("RANK", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        _number(name, 0)
    from dalle.distributed.cluster import Cluster  # half a second of FSDP2, of no use to one

    cluster = Cluster(config, device, asked)
    with cluster.explained():
        yield cluster
    with suppress(RuntimeError):  # the work is done: nothing hangs on a clean farewell
        cluster.close()


def _number(name: str, default: int) -> int:
    """A variable of torchrun's, at least 0."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"cluster: {name} must be a number, as torchrun sets it, got {text!r}")
    return int(text)


def shared_options(config: Any) -> dict[str, Any]:
    """What of a command's options all processes must have alike: all but its paths and device."""
    values = to_dict(config)
    values |= values.pop("loop", {})
    own = ("data", "tokenizer", "vae", "out", "device")
    return {key: value for key, value in values.items() if key not in own}
