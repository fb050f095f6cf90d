"""From measured rows to goal columns, a table and the result file."""

from __future__ import annotations

import re
from typing import Any

from gpu.cases import Case
from gpu.goals import goal_of, judge, judge_ratio

Row = dict[str, Any]


def slug(name: str) -> str:
    """A GPU's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("nvidia", "")).strip("_")


def rates_of(rows: list[Row]) -> dict[str, float]:
    """What the card reaches, from the rows of case "card": pass -> rate in its unit."""
    found = [row for row in rows if row["case"] == "card" and "seconds" in row.get("ours", {})]
    return {row["pass"]: row["work"] / row["ours"]["seconds"] for row in found}


def floor_of(row: Row, dtype: str, rates: dict[str, float]) -> Row:
    """bytes_us and flops_us: the least time at what this card was measured to reach."""
    floor: Row = {}
    if "bytes" in row and rates.get("copy"):
        floor["bytes_us"] = row["bytes"] * 1e-3 / rates["copy"]
    if "flops" in row and rates.get(f"{dtype} GEMM"):
        floor["flops_us"] = row["flops"] * 1e-6 / rates[f"{dtype} GEMM"]
    return floor


def finish(case: Case, row: Row, rates: dict[str, float], card: str) -> Row:
    """Adds rates, ratios, floor and goal columns to a row as a worker measured it.

    Args:
        case: what it is a row of.
        row: case, pass, ours, rivals, work, unit; or case, pass, not_measured.
        rates: of the card, see `rates_of`.
        card: name of the GPU; goals in microseconds count on the one they were made for only.
    """
    goal = goal_of(case, row["pass"])
    ours = row.get("ours", {})
    seconds = ours.get("seconds")
    done = {**row, "rivals": {}}
    if seconds:
        done["ours"] = {**ours, "rate": row["work"] / seconds}
    for rival, found in row.get("rivals", {}).items():
        entry = dict(found)
        if "seconds" in found:
            entry["rate"] = row["work"] / found["seconds"]
            entry |= judge_ratio(goal, rival, found["seconds"] / seconds) if seconds else {}
        done["rivals"][rival] = entry
    if floor := floor_of(row, case.dtype, rates):
        done["floor"] = floor
        if seconds:
            floor["ours_over_floor"] = seconds * 1e6 / max(floor.values())
    if columns := judge(goal, seconds, card):
        done["goal"] = columns
    if not done["rivals"]:
        del done["rivals"]
    return done


def verdict(columns: Row) -> str:
    """ "met", "missed 1.23x", or "" where a goal does not apply or nothing was measured."""
    if columns.get("met") is None:
        return ""
    return "met" if columns["met"] else f"missed {columns['missed_by']:.2f}x"


def lines_of(row: Row) -> list[str]:
    """The row as text: ours first, then a line a rival."""
    head = f"{row['case']} {row['pass']}"
    if "not_measured" in row:
        return [f"{head:60} not measured: {row['not_measured']}"]
    goal = row.get("goal", {})
    target = f"goal {goal['goal_us']:.0f} us {verdict(goal)}".rstrip() if goal else ""
    lines = [f"{head:60} {_time(row['ours'], row['unit'])} {target}".rstrip()]
    for rival, found in row.get("rivals", {}).items():
        ratio = f"{found['ratio']:7.2f}x" if "ratio" in found else ""
        least = f"goal {found['goal']:.1f}x {verdict(found)}" if "goal" in found else ""
        text = f"    {rival:56} {_time(found, row['unit'])} {ratio} {least}"
        lines.append(text.rstrip())
    return lines


def _time(found: Row, unit: str) -> str:
    if "not_measured" in found:
        return f"not measured: {found['not_measured']}"
    peak = found.get("peak_bytes")
    memory = "" if peak is None else f" {peak / 2**20:8.1f} MiB"
    return f"{found['seconds'] * 1e6:10.1f} us {found['rate']:9.1f} {unit}{memory}"


def all_well(result: Row) -> bool:
    """Whether every check passed and ours was right wherever there was time to try it."""
    checks = [result["checks"], *result["sanitizer"].get("tools", {}).values()]
    if any(check.get("passed") is False for check in checks):
        return False
    ours = [row.get("ours", row) for row in result["rows"]]
    reasons = [found["not_measured"] for found in ours if "not_measured" in found]
    return all(why == "out of time" for why in reasons)
