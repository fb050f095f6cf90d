"""`pytest benchmarks/` measures each bench file's `cases("cpu")`; `--record` writes them down.

The rows go to `benchmarks/results/<date>_cpu.json`.
"""

from __future__ import annotations

import pytest

import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write benchmarks/results/<date>_*.json")


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
        path = harness.record("cpu", harness.ROWS)
        terminalreporter.write_line(f"recorded in {path}")
