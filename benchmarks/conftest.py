"""`pytest benchmarks/` measures each bench file's `cases("cpu")`; `--record` writes them down.

The rows go to `benchmarks/results/<date>_cpu.json`, with `--name avx2` to `<date>_cpu_avx2.json`.
"""

from __future__ import annotations

import os

import pytest

import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write benchmarks/results/<date>_*.json")
    parser.addoption("--name", default="", help="ends the name of the file that --record writes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = list(metafunc.module.cases("cpu"))
        metafunc.parametrize("case", cases, ids=[case.what for case in cases])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not harness.ROWS:
        return
    terminalreporter.section("ours beside the rivals (medians of one run)")
    terminalreporter.write_line(harness.table(harness.ROWS))
    if terminalreporter.config.getoption("--record"):
        name = terminalreporter.config.getoption("--name")
        held = {key: os.environ[key] for key in harness.HELD if key in os.environ}
        path = harness.record(f"cpu_{name}" if name else "cpu", harness.ROWS, environment=held)
        terminalreporter.write_line(f"recorded in {path}")
