"""Exponential averaging of the iterates (paper A.2: 0.999 each update; B.2: 0.99 every 25)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dalle.configs import integer
from dalle.dtensor import swapped
from dalle.errors import CheckpointError, UsageError
from dalle_ext._checks import real

FIRST_SHARE = 0.1  # of the initial weights in an average; above it a line says so


def decay_of_copy(decay: float, copy: int, warmup: bool) -> float:
    """Weight of the past at copy number `copy`, from 0."""
    return min(decay, (1 + copy) / (10 + copy)) if warmup else decay


def first_share(decay: float, copies: int, warmup: bool) -> float:
    """Share of the initial weights in an average after `copies` copies: 1 before the first."""
    share = 1.0
    for copy in range(copies):
        current = decay_of_copy(decay, copy, warmup)
        if current == decay:  # constant from here on
            return float(share * decay ** (copies - copy))
        share *= current
    return share


class IterateAverage:
    """A second set of weights, in fp32, that follows the model's slowly.

    average <- decay * average + (1 - decay) * weights, on every `every`-th update. Starts as a copy
    of the weights. Equivalent to the exponential moving average of the paper; `warmup=True` (not in
    the paper, for runs too short to forget the initial weights) uses min(decay, (1 + n) / (10 + n))
    at the n-th copy.

    Args:
        model: the module whose parameters are averaged; buffers stay the model's own.
        decay: weight of the past at each copy, in [0, 1).
        every: updates between copies, at least 1.
        warmup: whether the decay grows from 0.1 in the first copies.
        as_is: names of parameters that are in the average as they are now, such as a codebook that
            is a moving average itself.

    Raises:
        UsageError: for a decay or interval out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        every: int = 1,
        *,
        warmup: bool = False,
        as_is: Collection[str] = (),
    ) -> None:
        if not 0 <= real(decay) < 1:
            raise UsageError(f"IterateAverage: decay must be in [0, 1), got {decay}")
        every = integer("IterateAverage", "every", every)
        if every < 1:
            raise UsageError(f"IterateAverage: every must be 1 or more, got {every}")
        self.decay, self.every, self.warmup = decay, every, warmup
        self.copies = 0
        self._parameters = dict(model.named_parameters())
        self.average = {
            # A parameter as it is shares its memory, so that it never is that of an earlier update.
            name: p.detach() if name in as_is else p.detach().to(torch.float32, copy=True)
            for name, p in self._parameters.items()
        }
        self._as_is = frozenset(as_is)

    def _decay(self, copy: int) -> float:
        return decay_of_copy(self.decay, copy, self.warmup)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes a copy if update number `step + 1` is due; call after the optimizer's update."""
        if (step + 1) % self.every:
            return
        decay = self._decay(self.copies)
        self.copies += 1
        for name, parameter in self._parameters.items():
            if name not in self._as_is:
                self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    @property
    def first_share(self) -> float:
        """Share of the initial weights in the average: 1 before the first copy."""
        return first_share(self.decay, self.copies, self.warmup)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside the block, its own again afterwards."""
        with swapped(self._parameters, self.average):
            yield

    def state_dict(self) -> dict[str, Any]:
        """The averaged tensors and the number of copies taken."""
        return {"copies": self.copies, "average": dict(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()` exactly. Raises as `check_state_dict`, before it changes any."""
        self.check_state_dict(state)
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])
        self.copies = state["copies"]

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Whether `load_state_dict` takes a state.

        Raises:
            CheckpointError: if a tensor is missing, unknown or of another shape.
            UsageError: if the number of copies is no integer of 0 or more.
        """
        saved = state["average"]
        integer("IterateAverage", "copies", state["copies"], 0)
        for name in sorted(set(self.average) ^ set(saved)):
            where = "model" if name in saved else "checkpoint"
            raise CheckpointError(f"IterateAverage: {name} is missing in the {where}")
        for name, tensor in self.average.items():
            if tensor.shape != saved[name].shape:
                raise CheckpointError(
                    f"IterateAverage: {name} must have shape {tuple(tensor.shape)}, "
                    f"got {tuple(saved[name].shape)}"
                )
