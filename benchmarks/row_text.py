"""The rows of `harness.py` as text."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def line(row: Row) -> str:
    """One row as text: ours, how far off it is and over its floor, the rival, ratio and goal."""
    text = f"{row['what']:62} "
    if row["seconds"] is None:
        text += f"not measured: {row.get('not_measured')}"
    else:
        text += f"{_time(row['seconds'])} {row['rate']:9.4g} {row['unit']:8}"
    text += _held(row, "")
    if row.get("over_floor"):
        text += f" {row['over_floor']:.2f}x floor"
    if row["rival"] is None:
        return text
    rival = f"not measured: {row.get('rival_not_measured')}"
    if row["rival_seconds"] is not None:
        rival = _time(row["rival_seconds"]) + _held(row, "rival_")
    text += f" | {row['rival']:24} {rival}"
    if row["ratio"] is not None:
        goal = "" if row["goal"] is None else f", goal {row['goal']:.1f}x"
        text += f" {row['ratio']:6.2f}x{goal}"
    return text


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:8.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:8.1f} us"


def _held(row: Row, who: str) -> str:
    """Error, its limit where it is missed, and memory of one candidate."""
    text = ""
    if f"{who}error" in row:
        error, most = row[f"{who}error"], row[f"{who}error_limit"]
        text += f" error {error:.1e}" + ("" if error <= most else f", WRONG, limit {most:.1e}")
    for key, label in (("wrong", "WRONG"), ("unchecked", "not checked")):
        if f"{who}{key}" in row:
            text += f" {label}: {row[f'{who}{key}']}"
    if row.get(f"{who}peak_bytes") is not None:
        text += f" {row[f'{who}peak_bytes'] / 2**20:.0f} MiB"
    return text


def table(rows: list[Row]) -> str:
    """The rows as text, one line each."""
    return "\n".join(map(line, rows))
