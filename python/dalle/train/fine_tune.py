"""Fine-tuning: a training that starts from the weights of a saved model (`--init-from`).

The sizes of the model are those of the saved one. What may differ are the grid and the text length
of a prior, whose position tables are then interpolated, cut or lengthened, in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.configs import Named, did_you_mean
from dalle.console import say
from dalle.errors import UsageError
from dalle.pretrained import Pretrained, fingerprint

M = TypeVar("M", bound=Pretrained[Any])
LR_SHARE = 0.25  # of the recipe's step size, where none is given: the weights are good already
# Of a model that a preset gives; vocabularies and grids follow from data and other parts.
SIZES_THAT_STAY = (
    *("stem", "n_hid", "n_blk_per_group"),
    *("d_model", "num_heads", "num_layers"),
    *("width", "depth", "embed_dim"),
)
INIT_FROM = "init_from"  # key of `Pretrained.trained_on`


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(Named):
    """What a training starts from.

    Attributes:
        init_from: a model folder to start from in place of random weights. Sizes are that model's,
            the step size is a quarter of the recipe's where none is given.
        freeze: patterns of parameters that stay as they are, such as "layers.0.*" or
            "*embedding*"; each must fit a parameter.
    """

    init_from: Path | None = None
    freeze: tuple[str, ...] = ()


def check_trained_on(
    owner: str, directory: Path, saved: Mapping[str, str], now: Mapping[str, str]
) -> Iterator[str]:
    """Whether a saved model was trained with the parts of this training.

    Args:
        owner: begins the error's line.
        directory: of the saved model.
        saved: its `trained_on`.
        now: name -> hash of the parts of this training.

    Yields:
        A line for each part that the model does not name.

    Raises:
        UsageError: a part is another one.
    """
    for name, digest in now.items():
        if name not in saved:
            yield f"{directory} does not say which {name} it was trained with"
        elif saved[name] != digest:
            raise UsageError(
                f"{owner}: {name} must be the one that {directory} was trained with "
                f"({saved[name]}), got another ({digest})"
            )


def load_start(kind: type[M], directory: Path) -> M:
    """The saved model, in fp32 or as it was saved; `trained_on` has its hash as "init_from".

    Raises:
        CheckpointError: the folder is damaged or holds something else.
    """
    model = kind.from_pretrained(directory)
    model.trained_on = {**model.trained_on, INIT_FROM: fingerprint(model)}
    return model


def say_sizes_stay(owner: str, preset: str, wanted: Any, saved: Any) -> None:
    """A line where a preset has other sizes than the saved model, whose sizes stay.

    Args:
        owner: begins the line.
        preset: its name.
        wanted, saved: configs of one class.
    """
    other = [
        f"{name} {getattr(saved, name)}, not {getattr(wanted, name)}"
        for name in SIZES_THAT_STAY
        if hasattr(saved, name) and getattr(saved, name) != getattr(wanted, name)
    ]
    if other:
        kept = f"sizes are those of init-from, not of preset {preset}"
        say(f"{owner}: note: {kept}: {'; '.join(other)}")


@torch.no_grad()
def fill_from(owner: str, model: nn.Module, saved: nn.Module) -> list[str]:
    """Copies the weights of a saved model; position tables of a prior are fitted to new sizes.

    Args:
        owner: begins the error's line.
        model: changed in place.
        saved: where the weights come from.

    Returns:
        A line for each table that was fitted.

    Raises:
        UsageError: weights of another name or shape; the model is then unchanged.
    """
    old, new = saved.state_dict(), model.state_dict()
    fitted: dict[str, Tensor] = {}
    lines = []
    for name in [*new, *(name for name in old if name not in new)]:
        if name not in old or name not in new:
            where = "init-from" if name not in old else "this training"
            raise UsageError(f"{owner}: {name} must be in both models, got none in {where}")
        value, wanted = old[name], tuple(new[name].shape)
        if tuple(value.shape) != wanted:
            fit = POSITION_TABLES.get(name)
            if fit is None or tuple(value.shape[1:]) != wanted[1:]:
                got = tuple(value.shape)
                raise UsageError(f"{owner}: {name} of init-from must be {wanted}, got {got}")
            value, words = fit(value.float(), wanted[0])
            lines.append(f"{name}: {words}")
        fitted[name] = value
    for name, tensor in new.items():
        tensor.copy_(fitted[name])
    return lines


def interpolated(table: Tensor, length: int) -> tuple[Tensor, str]:
    """(n, d) -> (length, d), linear between the middles of the n cells; and what was done."""
    new = F.interpolate(table.T[None], length, mode="linear", align_corners=False)[0].T
    return new, f"{length} positions interpolated from {len(table)}"


def cut_or_lengthened(table: Tensor, length: int) -> tuple[Tensor, str]:
    """(n, d) -> (length, d): the first ones, or all and copies of the last; and what was done."""
    if length <= len(table):
        return table[:length], f"the first {length} of {len(table)} positions"
    more = table[-1:].expand(length - len(table), -1)
    words = f"{len(table)} positions, and {length - len(table)} that start as copies of the last"
    return torch.cat([table, more]), words


POSITION_TABLES = {
    "text_position": cut_or_lengthened,
    "text_padding": cut_or_lengthened,
    "image_row": interpolated,
    "image_column": interpolated,
}


def start_from(
    owner: str,
    model: M,
    saved: M,
    config: FineTuneConfig,
    now: Mapping[str, str] | None = None,
) -> list[str]:
    """Starts a new model from a saved one; the lines that say what was done.

    Args:
        owner: begins an error's line.
        model: changed in place.
        saved: of `load_start`.
        config: names the folder.
        now: name -> hash of the parts of this training that must be those of the saved model's.

    Raises:
        UsageError: a part is another one, or the weights do not fit.
    """
    assert config.init_from is not None
    lines = [f"starts from {config.init_from}"]
    lines += check_trained_on(owner, config.init_from, saved.trained_on, now or {})
    lines += fill_from(owner, model, saved)
    model.trained_on = started_from(saved)
    return lines


def started_from(model: Pretrained[Any]) -> dict[str, str]:
    """The hash of the model that this one started from, as `Task.describe` keeps it; or nothing."""
    return {k: v for k, v in model.trained_on.items() if k == INIT_FROM}


def frozen(model: nn.Module) -> dict[str, list[str]]:
    """The names of the frozen parameters, as `Task.describe` keeps them; or nothing."""
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    return {"frozen": names} if names else {}


def freeze(owner: str, model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Parameters whose names fit one of `patterns` (as file names do) are trained no more.

    Returns:
        A line on how many stay as they are; none without patterns.

    Raises:
        UsageError: a pattern that fits no parameter, or nothing left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        if not names:
            hint = did_you_mean(pattern, parameters)
            raise UsageError(
                f"{owner}: freeze must be patterns of parameters, got {pattern!r}, which fits "
                f"none{hint}"
            )
        for name in names:
            parameters[name].requires_grad_(False)
    if not patterns:
        return []
    frozen = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    total = sum(p.numel() for p in parameters.values())
    if frozen == total:
        raise UsageError(f"{owner}: freeze must leave a parameter to train, got all frozen")
    return [f"{frozen:,} of {total:,} parameters are frozen"]
