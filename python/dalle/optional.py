"""Packages of the extras, imported when they are needed."""

from __future__ import annotations

import importlib
import re
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch

from dalle.errors import EnvironmentProblem

_kept: list[object] = []  # definitions of operators live as long as their Library object


def load_module(name: str, owner: str, extra: str) -> Any:
    """Imports a module of a package of an extra, also where it needs torchvision.

    torchvision's compiled operators do not load beside another build of torch, such as a CPU torch
    beside the wheel for GPUs. Its Python part then fails, as it describes operators that are not
    there. Nothing here calls them, so they are declared, without a body.

    Args:
        name: of the module.
        owner: begins the line of an error.
        extra: that brings the package.

    Raises:
        EnvironmentProblem: it is not installed or does not load.
    """
    for _ in range(20):
        try:
            return importlib.import_module(name)
        except ImportError as missing:
            raise EnvironmentProblem(
                f"{owner}: {name.partition('.')[0]} must be installed, got: "
                f"{str(missing).splitlines()[0]}; type: pip install 'dalle-ext[{extra}]'"
            ) from missing
        except RuntimeError as problem:
            operator = re.search(r"operator torchvision::(\w+) does not exist", str(problem))
            if operator is None:
                reason = str(problem).splitlines()[0]
                raise EnvironmentProblem(f"{owner}: {name} must load, got: {reason}") from problem
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{operator[1]}(Tensor dets, Tensor scores, float iou) -> Tensor")
            _kept.append(library)
    raise EnvironmentProblem(f"{owner}: {name} must load, got operators missing again and again")


def prepare_torchvision() -> None:
    """Lets packages import torchvision where it is installed; see `load_module`."""
    if find_spec("torchvision") is not None:
        with suppress(EnvironmentProblem):  # whoever needs it says so
            load_module("torchvision", "torchvision", "eval")
