"""Calls CMake for the native objects; everything static is in pyproject.toml.

`_C_cpu.so` and `_C_cuda.so` are libraries for the dispatcher (libtorch stable ABI, no Python
symbol); `_host` is the one pybind11 module. All three land in `dalle_ext/`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "python" / "buildtools"))
import torch_dir  # noqa: E402


def num_jobs() -> int:
    """MAX_JOBS or CMAKE_BUILD_PARALLEL_LEVEL, else one job per core and 2 GiB of memory."""
    wish = os.environ.get("MAX_JOBS") or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
    if wish:
        return int(wish)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // (2 << 30)))


def source_version() -> str:
    run = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(run, capture_output=True, text=True, check=False)
    except OSError:  # a machine without git
        return "unknown"
    return done.stdout.strip() or "unknown"


class CMakeBuild(build_ext):
    """One CMake tree per Python, torch and $CXX, so that builds for different ones do not clash."""

    def built_files(self) -> list[Path]:
        folder = Path(self.get_ext_fullpath("dalle_ext._host")).parent
        return [folder / name for name in self.native_names]

    def run(self) -> None:
        torch_dir.check_variables()
        folder = torch_dir.find_torch()
        if folder is None:
            raise SystemExit(
                "build: torch must be installed where the build isolation is off, got none; type: "
                f"pip install '{torch_dir.pinned_torch(ROOT)}'"
            )
        version, torch_cuda = torch_dir.torch_version(folder)
        nvcc = torch_dir.find_nvcc()
        with_cuda = torch_dir.want_cuda(torch_cuda, nvcc)
        print(f"-- torch {version} in {folder}; CUDA kernels: {'on' if with_cuda else 'off'}")
        name = f"{sys.implementation.cache_tag}-torch{version}"
        if compiler := os.environ.get("CXX"):  # CMake cannot change it in a tree
            name += "-" + re.sub(r"\W+", "_", Path(compiler).name)
        tree = ROOT / "build" / name
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        arguments = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if os.environ.get('DEBUG') == '1' else 'Release'}",
            f"-DDALLE_TORCH_DIR={folder}",
            f"-DDALLE_TORCH_VERSION={version}",
            f"-DDALLE_PYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DDALLE_PYBIND11_INCLUDE={self.pybind11_include()}",
            f"-DDALLE_EXT_SUFFIX={suffix}",
            f"-DDALLE_CUDA={'ON' if with_cuda else 'OFF'}",
            f"-DDALLE_SOURCE_VERSION={source_version()}",
            "-DDALLE_GENERIC=OFF",  # said again, since the tree would remember CMAKE_ARGS
            "-DDALLE_KERNEL_TESTS=OFF",
        ]
        if with_cuda:
            arguments += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            arguments += [f"-DCMAKE_CUDA_ARCHITECTURES={torch_dir.cuda_architectures()}"]
        if ninja := shutil.which("ninja"):  # an isolated build has its ninja elsewhere each time
            arguments.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        arguments += os.environ.get("CMAKE_ARGS", "").split()
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("build: cmake must be on PATH, got none; type: pip install cmake")
        subprocess.check_call([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(tree), *arguments])
        subprocess.check_call([cmake, "--build", str(tree), "-j", str(num_jobs())])
        self.native_names = ["_C_cpu.so", f"_host{suffix}", *(["_C_cuda.so"] if with_cuda else [])]
        for target in self.built_files():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / target.name, target)

    @staticmethod
    def pybind11_include() -> str:
        import pybind11

        return pybind11.get_include()

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.built_files()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("dalle_ext._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
