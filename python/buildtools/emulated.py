"""Builds the CUDA kernels for the CPU, for tests: `python python/buildtools/emulated.py [target]`.

Targets are those of `csrc/emulator/CMakeLists.txt`; without one, all of them. Prints their paths.
Nothing of this goes into a wheel; `docs/emulator.md` says what it is for.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch_dir  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_TOOLKIT = "/usr/local/cuda"
HOW_TO_GET = "type: pip install -c constraints.txt -e '.[test]'"
SOURCES = ("CMakeLists.txt", "csrc/**/*", "tests/emulator/*.cu", "tests/emulator/*.h")
KEPT = 8  # builds of other sources that stay in the cache


def _toolkits() -> Iterator[list[Path]]:
    """Include folders that may hold CUDA's type headers, a toolkit's before the wheels'."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for toolkit in (home, SYSTEM_TOOLKIT):
        if toolkit:
            yield [Path(toolkit) / "include"]
    for name in ("purelib", "platlib"):
        wheels = Path(sysconfig.get_path(name)) / "nvidia/cu13/include"
        yield [wheels, wheels / "cccl"]


def cuda_include() -> list[Path]:
    """The include folders with `cuda_fp16.h` and what it includes.

    Raises:
        RuntimeError: where there are none.
    """
    for folders in _toolkits():
        have = all((folders[0] / name).exists() for name in ("cuda_fp16.h", "vector_types.h"))
        if have and any((folder / "nv/target").exists() for folder in folders):
            return folders
    raise RuntimeError(
        f"emulator: CUDA's headers must be under CUDA_HOME or installed, got none; {HOW_TO_GET}"
    )


def cache_folder() -> Path:
    """Where builds are kept between checkouts: `DALLE_TEST_CACHE`, else the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DALLE_TEST_CACHE") or Path(user) / "dalle-ext") / "emulated"


def source_hash(torch: Path, include: list[Path]) -> str:
    """Names a build: everything that is compiled, and the compiler, torch and CUDA headers."""
    compiler = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(compiler + torch_dir.torch_version(torch)[0].encode())
    digest.update((include[0] / "cuda_fp16.h").read_bytes())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:24]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: the workers of a parallel test run all ask for the same build."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(*targets: str) -> list[Path]:
    """Builds `targets` unless the cache has them as these sources make them.

    Returns:
        The path of each.

    Raises:
        RuntimeError: a tool or a header is missing, or a source does not compile.
    """
    torch = torch_dir.find_torch()
    for name in ("cmake", "ninja", "g++"):
        if shutil.which(name) is None:
            raise RuntimeError(f"emulator: {name} must be on PATH, got none; {HOW_TO_GET}")
    if torch is None:
        raise RuntimeError(f"emulator: torch must be installed, got none; {HOW_TO_GET}")
    include = cuda_include()
    cache = cache_folder()
    kept = cache / source_hash(torch, include)
    with _locked(cache / "lock"):
        if not targets or not all((kept / target).exists() for target in targets):
            for path in _compile(torch, include, targets):
                kept.mkdir(exist_ok=True)
                part = kept / f"{path.stem}.part"
                shutil.copy2(path, part)
                part.rename(kept / path.stem)
        kept.touch()
        others = sorted(cache.glob("*/"), key=lambda path: path.stat().st_mtime)
        for old in others[: -KEPT - 1]:
            shutil.rmtree(old)
    return [kept / target for target in targets or sorted(path.name for path in kept.iterdir())]


def _compile(torch: Path, include: list[Path], targets: tuple[str, ...]) -> list[Path]:
    """Runs CMake in the checkout's own tree; ninja leaves alone what is newer than its sources."""
    tree = ROOT / "build" / f"emulated-torch{torch_dir.torch_version(torch)[0]}"
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tree), "-DDALLE_EMULATED=ON"]
    configure += [
        f"-DDALLE_TORCH_DIR={torch}",
        f"-DDALLE_CUDA_INCLUDE={';'.join(map(str, include))}",
    ]
    configure += [f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}", "-DCMAKE_CXX_COMPILER=g++"]
    jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 4))
    compile_all = ["cmake", "--build", str(tree), "-j", jobs]
    if targets:
        compile_all += ["--target", *targets]
    for command in (configure, compile_all):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            raise RuntimeError(f"emulator: {' '.join(command)} must succeed, got\n{tail}")
    folder = tree / "csrc/emulator"
    if targets:
        return [next(p for p in (folder / f"{t}.so", folder / t) if p.exists()) for t in targets]
    return [
        *folder.glob("_C_emulated_*.so"),
        *(p for p in folder.glob("emulator_*") if p.is_file()),
    ]


if __name__ == "__main__":
    try:
        for path in build(*sys.argv[1:]):
            print(path)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
