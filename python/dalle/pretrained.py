"""Model folders: `config.json` and `model.safetensors`, read only if intact and of the class."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from dalle.configs import did_you_mean, field_types, from_dict, to_dict
from dalle.errors import CheckpointError, UsageError
from dalle.files import check_regular, read_bytes, read_json, read_object, to_json, write_atomic
from dalle.memory import require_memory
from dalle.version import __version__

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MAX_HEADER_BYTES = 16 << 20  # of names, shapes and dtypes

T = TypeVar("T")


def from_presets(owner: str, presets: Mapping[str, T], name: str, **overrides: Any) -> T:
    """The config `name` of `presets` with the fields in `overrides` replaced.

    Args:
        owner: begins the error's line, e.g. "Prior".
        presets: name -> config, a dataclass.
        name: one of them.
        overrides: fields of the config.

    Raises:
        UsageError: unknown preset or field, or a value out of range.
    """
    if name not in presets:
        choices, hint = ", ".join(presets), did_you_mean(name, presets)
        raise UsageError(f"{owner}: preset must be one of {choices}, got {name!r}{hint}")
    preset: Any = presets[name]
    fields = field_types(type(preset))
    for key in overrides:
        if key not in fields:
            hint = did_you_mean(key, fields)
            raise UsageError(f"{owner}: option must be one of {', '.join(fields)}, got {key}{hint}")
    changed: T = dataclasses.replace(preset, **overrides)
    return changed


def tensors_to_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """A safetensors file of `tensors`; tensors that share memory are written once each."""
    pointers: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in pointers:
            tensor = tensor.clone()
        pointers.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return save(result)


def fingerprint(module: nn.Module) -> str:
    """A hash of a module's weights and buffers: of their names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"SHA-256 {digest.hexdigest()[:16]}"


def read_tensors(path: Path, expected: int) -> bytes:
    """The bytes of a safetensors file whose tensors should have `expected` bytes.

    Raises:
        CheckpointError: it cannot be read, or is larger than that and any header there could be.
    """
    try:
        return read_bytes(path, expected + MAX_HEADER_BYTES)
    except OSError as problem:
        raise CheckpointError(
            f"{path}: must be a readable file, got: {problem.strerror}"
        ) from problem


def tensors_from_bytes(data: bytes, where: Path) -> dict[str, torch.Tensor]:
    """The inverse of `tensors_to_bytes`.

    Raises:
        CheckpointError: if `data` is not a whole safetensors file.
    """
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as problem:
        reason = str(problem).splitlines()[0]
        raise CheckpointError(f"{where}: must be a safetensors file, got: {reason}") from problem


def save_pretrained(
    module: nn.Module,
    directory: Path | str,
    config: Any,
    trained_on: Mapping[str, str] | None = None,
) -> None:
    """Writes `module` into `directory`, which is made if missing.

    Args:
        module: its `state_dict()` is written, in the dtypes it has.
        directory: the model folder; other files in it stay.
        config: the dataclass that `load_config` returns.
        trained_on: see `Pretrained`.

    Raises:
        OSError: if the folder cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = tensors_to_bytes(module.state_dict())
    write_atomic(directory / WEIGHTS_FILE, weights)
    head = {
        "format_version": FORMAT_VERSION,
        "class": type(module).__name__,
        "dalle_version": __version__,
        "config": to_dict(config),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    if trained_on:
        head["trained_on"] = dict(trained_on)
    write_atomic(directory / CONFIG_FILE, to_json(head))


def load_config(directory: Path | str, cls_name: str, config_type: type[T]) -> T:
    """The config of the model folder `directory`.

    Args:
        directory: a folder that `save_pretrained` wrote.
        cls_name: name of the class that must have been saved, e.g. "Prior".
        config_type: the dataclass to fill.

    Raises:
        CheckpointError: if the folder is missing, foreign, of another class or format.
    """
    path = Path(directory) / CONFIG_FILE
    head = read_json(path, CheckpointError)
    class_name = head.get("class", cls_name) if isinstance(head, dict) else cls_name
    if class_name != cls_name:  # checked first, since other classes have other keys
        raise CheckpointError(f"{path}: class must be {cls_name}, got {class_name}")
    head = _checked(head, path)
    return from_dict(config_type, head["config"], where=str(path), error=CheckpointError)


def load_weights(module: nn.Module, directory: Path | str) -> None:
    """Fills `module` with the weights in `directory`, bit for bit.

    Raises:
        CheckpointError: if the file is missing, truncated, altered, or its tensors have other
            names, shapes or dtypes than the module's.
    """
    directory = Path(directory)
    path = directory / WEIGHTS_FILE
    head = _checked(read_json(directory / CONFIG_FILE, CheckpointError), directory / CONFIG_FILE)
    data = read_tensors(path, sum(t.nbytes for t in module.state_dict().values()))
    tensors, digest = tensors_from_bytes(data, path), hashlib.sha256(data).hexdigest()
    if digest != head["weights_sha256"]:
        raise CheckpointError(
            f"{path}: SHA-256 must be {head['weights_sha256'][:12]}... as {CONFIG_FILE} says, "
            f"got {digest[:12]}..."
        )
    load_tensors(module, tensors, str(path))


@torch.no_grad()
def load_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copies `tensors` into `module`. Raises as `check_tensors`, before it changes any."""
    check_tensors(module, tensors, where)
    for name, tensor in module.state_dict().items():
        tensor.copy_(tensors[name])


def check_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Whether every name, shape and dtype agrees with a module's.

    Raises:
        CheckpointError: naming the first that does not.
    """
    state = module.state_dict()
    for name in [*state, *tensors]:
        if name not in tensors:
            raise CheckpointError(f"{where}: {name} must be there, got no such tensor")
        if name not in state:
            raise CheckpointError(f"{where}: {name} is unknown to {type(module).__name__}")
        expected, actual = state[name], tensors[name]
        if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
            raise CheckpointError(
                f"{where}: {name} must be {tuple(expected.shape)} {expected.dtype}, "
                f"got {tuple(actual.shape)} {actual.dtype}"
            )


def load_trained_on(directory: Path | str) -> dict[str, str]:
    """`trained_on` of the model in a folder; empty where it was not saved.

    Raises:
        CheckpointError: config.json is damaged.
    """
    path = Path(directory) / CONFIG_FILE
    hashes = _checked(read_json(path, CheckpointError), path).get("trained_on", {})
    if not isinstance(hashes, dict) or not all(isinstance(v, str) for v in hashes.values()):
        raise CheckpointError(f"{path}: trained_on must be hashes by name, got something else")
    return hashes


def read_head(directory: Path, class_name: str) -> dict[str, Any]:
    """config.json of a folder of `class_name`, which is no module with weights.

    Raises:
        CheckpointError: it is damaged, of another class or of another version.
    """
    head = read_object(directory / CONFIG_FILE, CheckpointError)
    if head.get("class") != class_name:
        got = head.get("class") or "none"
        raise CheckpointError(f"{directory}: class must be {class_name}, got {got}")
    if head.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory}: format_version must be {FORMAT_VERSION}, "
            f"got {head.get('format_version', 'none')}"
        )
    return head


def _checked(head: Any, path: Path) -> dict[str, Any]:
    """The content of config.json if it has the keys that this version writes."""
    keys = {"format_version", "class", "config", "weights_sha256"}
    if not isinstance(head, dict) or not keys <= set(head):
        raise CheckpointError(f"{path}: must be written by dalle, got keys of something else")
    if head["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {head['format_version']}"
        )
    if not isinstance(head["weights_sha256"], str):
        raise CheckpointError(f"{path}: weights_sha256 must be a string, got something else")
    return head


def _check_size(directory: Path, num_parameters: int) -> None:
    """Refuses a model before it is built if its file is too small, or the memory.

    Raises:
        CheckpointError: there is no file of weights, or it cannot be this model's.
        EnvironmentProblem: too little memory.
    """
    path = directory / WEIGHTS_FILE
    try:
        check_regular(path)
        size = path.stat().st_size
    except OSError as problem:
        raise CheckpointError(
            f"{path}: must be a readable file, got: {problem.strerror}"
        ) from problem
    if size < 2 * num_parameters:  # no weight has less than 16 bits
        raise CheckpointError(
            f"{path}: must have at least {2 * num_parameters} bytes for the sizes in "
            f"{CONFIG_FILE}, "
            f"got {size}"
        )
    if num_parameters:  # the bytes of the file, and the model
        require_memory(str(directory), 4 * num_parameters, "its weights", "take a smaller model")


def _check_finite(model: nn.Module, path: Path) -> None:
    """Raises CheckpointError where a weight is NaN or infinite: all it draws would be noise."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            count = int(tensor.isfinite().logical_not().sum())
            raise CheckpointError(
                f"{path}: {name} must hold finite numbers, got {count} NaN or infinite of "
                f"{tensor.numel()}"
            )


class Pretrained(nn.Module, Generic[T]):
    """A module that a config describes and a folder keeps.

    Attributes:
        config_type: class of the config, to read config.json with.
        config: the sizes this model has.
        trained_on: name -> `fingerprint` of the fixed parts that it was trained with and is used
            with, e.g. "vae" and "tokenizer" of a prior; of a dVAE "image_size", the side of its
            pictures. Empty where they are not known.
    """

    config_type: type[T]

    def __init__(self, config: T) -> None:
        super().__init__()
        self.config = config
        self.trained_on: dict[str, str] = {}

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> Self:
        """The model that `save_pretrained` wrote, in evaluation mode.

        Raises:
            CheckpointError: the folder is damaged or holds something else.
        """
        config = load_config(directory, cls.__name__, cls.config_type)
        _check_size(Path(directory), cls.min_parameters(config))
        with torch.random.fork_rng(devices=[]):  # loading must not move the caller's generator
            model = cls._with_parts(config, Path(directory))
        load_weights(model, directory)
        _check_finite(model, Path(directory) / WEIGHTS_FILE)
        model.trained_on = load_trained_on(directory)
        return model.eval()

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes config.json and model.safetensors into a folder, which is made if missing."""
        save_pretrained(self, directory, self.config, self.trained_on)

    @classmethod
    def min_parameters(cls, config: T) -> int:
        """A lower bound of the parameters of a model of `config`, without building it."""
        return 0

    @classmethod
    def _with_parts(cls, config: T, directory: Path) -> Self:
        """A model of `config`; a class that keeps more than weights reads the rest here."""
        return cls(config)
