"""Restores what a checkpoint holds besides weights and averages: all of it, or nothing."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dalle.errors import CheckpointError, UsageError
from dalle.memory import is_refusal
from dalle.train.seeds import rng_state, set_rng_state
from dalle.train.task import Task
from dalle.train.tree import unpack_tree

# Options of torch's optimizers that choose how an update is computed, not what it is.
IMPL_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


@contextlib.contextmanager
def checked_form(path: Path) -> Iterator[None]:
    """Inside, state that has another form than `task_state` gives is a CheckpointError."""
    try:
        yield
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as problem:
        if isinstance(problem, CheckpointError) or is_refusal(problem):
            raise
        if isinstance(problem, UsageError):  # about a number in the state
            raise CheckpointError(f"checkpoint {path}: {problem}") from problem
        raise CheckpointError(
            f"checkpoint {path}: its state must have the form that dalle writes, got another"
        ) from problem


@contextlib.contextmanager
def rollback_on_error(task: Task, always: bool = False) -> Iterator[None]:
    """Undoes changes of optimizer, task and generators after an error, or `always` at the end.

    An optimizer that loads a state makes new dicts, so the old ones are still intact.
    """
    optimizer, task_state, generators = task.optimizer, task.state(), rng_state()
    before = optimizer.state, optimizer.param_groups
    committed = False
    try:
        yield
        committed = not always
    finally:
        if not committed:
            optimizer.__setstate__({"state": before[0], "param_groups": before[1]})
            task.load_state(task_state)
            set_rng_state(generators)


def restore(
    task: Task,
    state: dict[str, Any],
    tensors: dict[str, Any],
    path: Path,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Puts the packed state of optimizer and task in, and returns that of the average, checked.

    Raises:
        CheckpointError: it does not fit; in `rollback_on_error` nothing has then changed.
    """
    where = f"checkpoint {path}"
    groups = task.optimizer.param_groups
    run_options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    with checked_form(path):
        packed = unpack_tree(state["optimizer"], tensors)
        try:
            task.optimizer.load_state_dict(packed)
        except (KeyError, ValueError) as problem:
            reason = str(problem).splitlines()[0]
            raise CheckpointError(
                f"{where}: optimizer must fit this run's, got: {reason}"
            ) from problem
        for group, options in zip(task.optimizer.param_groups, run_options, strict=True):
            # IMPL_OPTIONS stay this run's; with changes accepted all options do.
            group.update((k, v) for k, v in options.items() if accept_changes or k in IMPL_OPTIONS)
        _check_optimizer(task.optimizer, run_options, where)
    with checked_form(path):
        average: dict[str, Any] = unpack_tree(state["average"], tensors)
        if task.average is not None:
            task.average.check_state_dict(average)
        task.load_state(unpack_tree(state["task"], {}))
    return average


def _check_optimizer(
    optimizer: torch.optim.Optimizer, run_options: list[dict[str, Any]], where: str
) -> None:
    """Checks what was loaded (torch takes any): options by kind, tensors by their parameters."""
    for group, options in zip(optimizer.param_groups, run_options, strict=True):
        for name, value in options.items():
            matches = name in group and _kind(group[name]) == _kind(value)
            if not matches or (isinstance(value, bool) and group[name] != value):
                got = group.get(name, "none")
                raise CheckpointError(f"{where}: optimizer's {name} must be {value}, got {got}")
        if isinstance(optimizer, torch.optim.AdamW):  # others check themselves
            for name, below in (("lr", 1e6), ("betas", 1), ("eps", 1e6), ("weight_decay", 1e6)):
                values = torch.as_tensor(group[name], dtype=torch.float64, device="cpu")
                if not bool(((values >= 0) & (values < below)).all()):
                    limits = f"0 or more and below {below:g}, got {group[name]}"
                    raise CheckpointError(f"{where}: optimizer's {name} must be {limits}")
            _check_moments(optimizer, group["params"], where)


def _check_moments(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], where: str
) -> None:
    entries = [(p, optimizer.state[p]) for p in params if p in optimizer.state]
    if not all(isinstance(state, dict) for _, state in entries):
        raise CheckpointError(f"{where}: optimizer must hold tensors by name, got something else")
    filled = [(p, state) for p, state in entries if state]
    for parameter, state in filled:
        if state.keys() != filled[0][1].keys():
            raise CheckpointError(f"{where}: optimizer must hold all tensors, got some")
        for name, value in state.items():
            expected = () if name == "step" else tuple(parameter.shape)
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else "no tensor"
            if shape == () and not 0 <= float(value) < 2**63:
                raise CheckpointError(f"{where}: optimizer's step must be 0 or more, got {value}")
            if shape != expected:
                raise CheckpointError(
                    f"{where}: optimizer's {name} must be of shape {expected}, got {shape}"
                )


def _kind(value: Any) -> object:
    """Two options fit each other where this is equal: numbers, equally many numbers, or a type."""
    if isinstance(value, (tuple, list)):
        return [_kind(item) for item in value]
    number = isinstance(value, (numbers.Real, torch.Tensor)) and not isinstance(value, bool)
    return numbers.Real if number else bool if value is None else type(value)
