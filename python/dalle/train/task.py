"""The protocol of a task, and access to its full model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dalle.configs import to_dict
from dalle.distributed.world import World
from dalle.errors import DataError, EnvironmentProblem, UsageError
from dalle.train.averaging import IterateAverage

T = TypeVar("T")


class Task(Protocol):
    """The protocol of what is trained. Plain attributes may stand for the properties."""

    @property
    def name(self) -> str:
        """Shown in front of every line, e.g. "dvae"; a checkpoint of another is refused."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def average(self) -> IterateAverage | None:
        """The averaged weights, or None."""

    @property
    def world(self) -> World:
        """The processes that train together, each its own task."""

    def describe(self) -> dict[str, Any]:
        """JSON values that fix the training; a checkpoint with others is refused."""

    def train_step(self, step: int) -> Mapping[str, float | Tensor]:
        """One update (see `train.update`) on a batch that is a pure function of `step` (from 0).

        Returns scalars by name: "loss" always, "images" where images are counted; on many
        processes the same on all.
        """

    def pictures(self, step: int) -> dict[str, Tensor]:
        """Name -> (3, H, W) in [0, 1]; written as out/pictures/NAME-STEP.png.

        Called on all processes; all but process 0 return none.
        """

    def state(self) -> dict[str, Any]:
        """JSON values needed to go on besides model, optimizer, average and global generators."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores `state()`."""


def with_precision(config: Any, model: nn.Module) -> dict[str, Any]:
    """A recipe's JSON values and, where it is not fp32, the precision that `model` trains in."""
    precision = getattr(model, "train_precision", "fp32")
    return to_dict(config) | ({} if precision == "fp32" else {"precision": precision})


def described(model: Any, config: Any) -> dict[str, Any]:
    """JSON values of a model and its recipe, for `Task.describe`."""
    return {"model": to_dict(model.config), "train": with_precision(config, model)}


def require_one_part(command: str, parts: int, world: World) -> None:
    """Raises UsageError for several parts on many processes, which share a batch out already."""
    if parts > 1 and world.size > 1:
        raise UsageError(f"{command}: parts must be 1 on many processes, got {parts}")


def local_batch(world: World, batch: Callable[[], T], empty: Callable[[], T]) -> T:
    """`batch()`; of several processes one without data goes on with `empty()` until `update` has
    told the others."""
    try:
        return batch()
    except DataError as problem:
        world.postpone(problem)
        return empty()


@contextmanager
def averaged_model(task: Task, averaged: bool = True) -> Iterator[nn.Module | None]:
    """`World.full_model` of a task, by default with the averaged weights where it has any.

    Raises:
        EnvironmentProblem: a GPU's memory does not suffice for what is done inside.
    """
    values = task.average.average if averaged and task.average is not None else None
    with task.world.full_model(task.model, values) as model:
        try:
            yield model
        except torch.OutOfMemoryError as problem:
            reason = str(problem).splitlines()[0]
            raise EnvironmentProblem(
                f"{task.name}: memory must suffice, got: {reason}"
            ) from problem


@contextmanager
def full_model(task: Task) -> Iterator[nn.Module | None]:
    """The full model of a task, to be changed inside the block on process 0 (None elsewhere).

    Afterwards all processes have its weights. Collective.
    """
    with averaged_model(task, False) as model:
        yield model
    task.world.load_full_model(task.model, model)
