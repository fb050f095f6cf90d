"""Finds the torch to build against, and reads what the environment asks of the build.

pip's build isolation hides site-packages from `sys.path`, not from `sysconfig`: `purelib` still
names the folder of the environment that the package is being installed into. torch is never
imported here; its headers, libraries and `version.py` are all a build needs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MINIMUM = (2, 11)
ARCHITECTURES = ("80", "90a")  # of the GPUs that a build holds machine code for
KNOWN_VARIABLES = {
    "DALLE_EXT_CUDA",
    "DALLE_EXT_TORCH_DIR",
    "DALLE_EXT_CPU_ISA",
    "DALLE_EXT_CUDA_FP32",
}


def check_variables() -> None:
    """Stops on a `DALLE_EXT_*` variable that nothing reads: a misspelt switch must not be ignored.

    Raises:
        SystemExit: with one line naming the variable and the known ones.
    """
    unknown = sorted(
        n for n in os.environ if n.startswith("DALLE_EXT_") and n not in KNOWN_VARIABLES
    )
    if unknown:
        known = ", ".join(sorted(KNOWN_VARIABLES))
        raise SystemExit(f"build: {unknown[0]} must be one of {known}, got an unknown variable")


def _candidates() -> Iterator[Path]:
    if os.environ.get("DALLE_EXT_TORCH_DIR"):
        yield Path(os.environ["DALLE_EXT_TORCH_DIR"])
        return
    spec = importlib.util.find_spec("torch")  # no build isolation, or torch as build requirement
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    for name in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(name)) / "torch"
    config = Path(sys.prefix) / "pyvenv.cfg"
    text = config.read_text() if config.exists() else ""
    if re.search(r"include-system-site-packages\s*=\s*true", text):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        for name in ("purelib", "platlib"):
            yield Path(sysconfig.get_path(name, vars=base)) / "torch"


def find_torch() -> Path | None:
    """The folder of the environment's torch, or None where there is none."""
    for folder in _candidates():
        if (folder / "version.py").exists() and (folder / "include/torch/csrc/stable").is_dir():
            return folder
    return None


def torch_version(folder: Path) -> tuple[str, str | None]:
    """(version, CUDA version or None) of the torch in `folder`, read from its `version.py`.

    Raises:
        SystemExit: where that torch is older than the stable ABI this package is built on.
    """
    text = (folder / "version.py").read_text()
    version = re.search(r"__version__ = ['\"]([^'\"]+)", text)
    cuda = re.search(r"^cuda[^=]*= ['\"]([^'\"]+)", text, re.MULTILINE)
    found = version.group(1) if version else "unknown"
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if numbers < MINIMUM:
        minimum = ".".join(map(str, MINIMUM))
        raise SystemExit(
            f"build: torch must be >= {minimum}, got {found}; type: pip install 'torch>={minimum}'"
        )
    return found, cuda.group(1) if cuda else None


def pinned_torch(root: Path) -> str:
    """The torch requirement of `constraints.txt`, so that build and run time agree."""
    for line in (root / "constraints.txt").read_text().splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise SystemExit("build: constraints.txt must pin torch, got no line 'torch=='")


def find_nvcc() -> str | None:
    """The path of nvcc: CUDACXX, CUDA_HOME or CUDA_PATH, PATH, the usual folder; None without."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc"]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def want_cuda(torch_cuda: str | None, nvcc: str | None) -> bool:
    """Whether to build `_C_cuda`: `DALLE_EXT_CUDA` = auto (default), 1 or 0; `FORCE_CUDA=1` = 1.

    auto builds it where nvcc is found and the torch to build for has CUDA, GPU visible or not.
    """
    default = "1" if os.environ.get("FORCE_CUDA") == "1" else "auto"
    wish = os.environ.get("DALLE_EXT_CUDA", default)
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"build: DALLE_EXT_CUDA must be auto, 1 or 0, got {wish}")
    if wish == "1" and nvcc is None:
        raise SystemExit(
            "build: nvcc must be on PATH or under CUDA_HOME when DALLE_EXT_CUDA=1, got none; "
            "type: export CUDA_HOME=/usr/local/cuda"
        )
    return wish == "1" or (wish == "auto" and nvcc is not None and torch_cuda is not None)


def cuda_architectures() -> str:
    """CMake's architecture list from `TORCH_CUDA_ARCH_LIST` ("8.0;9.0a+PTX"), or our default."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not wish.strip():
        machine_code = ";".join(f"{architecture}-real" for architecture in ARCHITECTURES)
        return machine_code + ";90-virtual"  # what later GPUs compile when they load it
    architectures = []
    for item in re.split(r"[;,\s]+", wish.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", item)
        if item == "native":
            architectures.append("native")
        elif match is None:
            raise SystemExit(
                f"build: TORCH_CUDA_ARCH_LIST must be like '8.0;9.0a+PTX' or 'native', got {wish}"
            )
        else:
            architectures.append(match[1] + match[2] + ("" if match[3] else "-real"))
    return ";".join(architectures)
