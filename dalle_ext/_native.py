"""Loads the native objects beside this file and says what they are.

`_C_cpu.so` registers the schemas and the CPU kernels, `_C_cuda.so` the CUDA kernels; both are plain
libraries over libtorch's stable ABI. A missing object is no error at import, so that
`dalle_ext.use_reference()` works anywhere; the first call of an op that needs it says what to type.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
FOLDER = Path(__file__).parent
HOW_TO_BUILD = "pip install -c constraints.txt -e ."
SECOND_DERIVATIVE = (
    "dalle_ext: native ops must be differentiated once, got a derivative of a gradient; "
    "use dalle_ext.use_reference()"
)
FLOATING = {torch.float32, torch.float16, torch.bfloat16}  # of ops that store in 16 bits


def _load(name: str) -> str | None:
    """Loads `name` into torch; returns None, or why it is not there in one line."""
    path = FOLDER / name
    if not path.exists():
        return f"{name} must be built, got no such file; type: {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        return (
            f"{name} must load under torch {torch.__version__}, got: {reason}; type: {HOW_TO_BUILD}"
        )
    return None


def _load_host() -> ModuleType | None:
    try:
        return importlib.import_module("dalle_ext._host")
    except ImportError:
        return None


CPU_PROBLEM = _load("_C_cpu.so")
CUDA_PROBLEM = (
    "this torch has no CUDA" if torch.version.cuda is None else CPU_PROBLEM or _load("_C_cuda.so")
)
HOST = _load_host()
_GUARDS = torch.library.Library("dalle_ext", "IMPL")


def register(
    name: str,
    fake: Callable[Parameters, Result],
    *,
    public: str | None = None,
    differentiable: bool = False,
) -> Callable[Parameters, Result]:
    """The raw op `dalle_ext::name`, with its fake kernel and a guard at the autograd keys.

    The fake kernel's signature is that of the op. `public` is the function that users call.

    A gradient passes a raw op only inside an `autograd.Function` (`differentiable`; gradients are
    not recorded in there). Without the guard torch would drop tangents of forward mode
    (`torch.func.jvp`, `jacfwd`) in silence, in any nesting of function transforms.

    Raises, when the op is called:
        NotImplementedError: a tensor with a tangent, or one that requires a gradient.
    """
    op = getattr(torch.ops.dalle_ext, name).default
    torch.library.register_fake(f"dalle_ext::{name}", fake)
    advice, other = ("detach it",) * 2
    if differentiable:
        advice = "use reverse mode, or dalle_ext.use_reference()"
        other = "call it outside of torch.func.vmap, or use dalle_ext.use_reference()"
    public = public or name.strip("_")

    def guard(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        recording = torch.is_grad_enabled()
        tensors = _tensors(arguments) if recording or forward_ad._current_level >= 0 else ()
        for tensor in tensors:
            tangent = forward_ad.unpack_dual(tensor).tangent is not None
            if tangent or (recording and tensor.requires_grad):
                what = "a forward-mode tangent" if tangent else "one that requires a gradient"
                raise NotImplementedError(
                    f"{public}: tensors must be without a derivative that the native op does not "
                    f"carry on, got {what}; {advice if tangent else other}"
                )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    _GUARDS.impl(name, guard, "Autograd", with_keyset=True)
    raw: Callable[Parameters, Result] = op
    return raw


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def require(op: str, device: torch.device) -> None:
    """Raises RuntimeError in one line where the native object for `device` is not loaded."""
    problem = CUDA_PROBLEM if device.type == "cuda" else CPU_PROBLEM
    if problem is not None:
        raise RuntimeError(f"{op}: {problem}")


def require_floating(op: str, name: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless `dtype` is one of `FLOATING`."""
    if dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16, got {dtype}")


def host(function: str) -> ModuleType:
    """The pybind11 module `_host`.

    Raises:
        RuntimeError: where it was not built for this Python.
    """
    if HOST is None:
        raise RuntimeError(f"{function}: _host must be built, got none; type: {HOW_TO_BUILD}")
    return HOST


def build_info() -> dict[str, Any]:
    """What was built and what is loaded.

    Returns:
        A dict of JSON values: `torch` (running), `built_for_torch`, `source` (git description),
        `compiler`, `cuda_architectures`, `cpu` and `cuda` ("loaded", or why not), `machine` (the
        processor's kind, as "x86_64" or "aarch64"), `cpu_isa` (what the CPU kernels were compiled
        for: "v2", "v3", "v4" or "v4_bf16" of x86-64, "generic" elsewhere, or None), `host`
        (whether the pybind11 module is there).
    """
    built = HOST.build_info() if HOST is not None else {}
    isa = torch.ops.dalle_ext._cpu_isa() if CPU_PROBLEM is None else None
    return {
        "torch": torch.__version__,
        "built_for_torch": built.get("torch"),
        "source": built.get("source"),
        "compiler": built.get("compiler"),
        "cuda_architectures": built.get("cuda_architectures") or None,
        "cpu": CPU_PROBLEM or "loaded",
        "cuda": CUDA_PROBLEM or "loaded",
        "machine": platform.machine(),
        "cpu_isa": isa,
        "host": HOST is not None,
    }
