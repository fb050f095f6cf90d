"""`pytest benchmarks/ --record` also writes what was measured to a dated result file."""

from __future__ import annotations

import pytest

import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write benchmarks/results/<date>_*.json")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not harness.ROWS:
        return
    terminalreporter.section("ours beside the rivals (medians of one run)")
    terminalreporter.write_line(harness.table(harness.ROWS))
    if terminalreporter.config.getoption("--record"):
        device = "cuda" if harness.machine()["gpu"] else "cpu"
        path = harness.record(device, harness.ROWS)
        terminalreporter.write_line(f"recorded in {path}")
