"""The benchmarks that docs print as modules to be run find what lies beside them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def imported(path: Path) -> set[str]:
    """First parts of the names of the modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_a_module_that_is_run_puts_its_own_folder_on_the_path():
    """`python -m` has the folder above there, in which pytest's path hides what is missing."""
    modules = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    printed = {
        name
        for page in pages
        for name in re.findall(r"python -m benchmarks\.(\w+)", page.read_text())
        if page.name != "log.md"
    }
    assert {"gpu", "record_demo", "own_pictures"} <= printed <= set(modules)
    lost = [
        name
        for name in sorted(printed)
        if imported(modules[name]) & {*modules, "benchmarks"}
        and "insert(0, str(Path(__file__).resolve().parent))" not in modules[name].read_text()
    ]
    assert lost == []
