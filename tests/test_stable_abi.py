"""R9: the binaries import from torch only the stable ABI's C functions, and only those of 2.11.

The list is of the lowest torch we support, so an op that needs a newer function fails here before
it fails on somebody's machine. `DALLE_TEST_OBJECTS` names a folder with further binaries.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import dalle_ext

HERE = Path(__file__).parent
SHIMS = {
    line
    for line in (HERE / "stable_abi_2.11.txt").read_text().splitlines()
    if not line.startswith("#")
}
FOLDERS = [Path(dalle_ext.__file__).parent, Path(os.environ.get("DALLE_TEST_OBJECTS", os.devnull))]
OBJECTS = sorted(path for folder in FOLDERS for path in folder.glob("_C_*.so"))


def imported_names(path):
    """Names, without versions, that an object takes from other libraries."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    run = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    )
    return {line.split()[-1].partition("@")[0] for line in run.stdout.splitlines()}


def test_there_are_binaries():
    assert any(path.name == "_C_cpu.so" for path in OBJECTS)


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_only_shims_of_the_lowest_torch(path):
    names = imported_names(path)
    shims = {name for name in names if re.match(r"(aoti_)?torch_", name)}
    assert shims and shims - SHIMS == set()


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_no_cpp_symbol_of_torch_and_no_python(path):
    foreign = [
        name
        for name in imported_names(path)
        if re.match(r"_ZT?[A-Z]?[NVKR]*(2at|3c10|5torch)", name) or re.match(r"_?Py[A-Z_]", name)
    ]
    assert foreign == []
