"""What we mean to reach: time against the floor of an H200, and ratios to the rivals.

A floor is the least time of the bytes that must move (4.3 TB/s copied), or of the instructions. The
times are goals on an H200 only; the ratios hold wherever the rival runs. None of this is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpu import names
from gpu.cases import Case

CARD = "H200"
SIZE = (8, 62, 64, 256, 32, 32)  # of the attention goals; other numbers of heads scale the times
LOGITS, ELEMENTS = (8192, 8192), (2**28,)


@dataclass(frozen=True)
class Goal:
    """Microseconds on an H200 and least ratios (rival's time / ours) by rival."""

    number: str
    floor_us: float
    goal_us: float
    ratios: dict[str, float] = field(default_factory=dict)


_FORWARD = {names.FLEX: 2.3, names.CUDNN: 3.2, names.FLASH: 4.0, names.MASK: 6.0}
_BACKWARD = {names.FLEX: 2.7, names.CUDNN: 3.3, names.FLASH: 4.3}
for _ratios in (_FORWARD, _BACKWARD):  # the stronger form of the same rival, for columns
    _ratios[names.FLEX_COLUMNS] = _ratios[names.FLEX]
_GUMBEL = {names.BY_HAND: 8.0}
_COPY = {names.COPY: 1 / 1.07}  # within 7 % of a copy of the same bytes


def _stream(number: str, bytes_each: int, ratios: dict[str, float]) -> Goal:
    """Of an op that moves so many bytes an element of ELEMENTS."""
    floor = ELEMENTS[0] * bytes_each / 4.3e6
    return Goal(number, floor, 1.07 * floor, ratios)


GOALS = {  # (op, kind or dtype, pass)
    ("sparse_attention", "row", "forward"): Goal("1f", 76, 105, _FORWARD),
    ("sparse_attention", "row", "backward"): Goal("1b", 152, 300, _BACKWARD),
    ("sparse_attention", "column", "forward"): Goal("1f", 76, 105, _FORWARD),
    ("sparse_attention", "column", "backward"): Goal("1b", 152, 300, _BACKWARD),
    ("sparse_attention", "conv", "forward"): Goal("1c", 76, 135, {names.FLEX: 2.0}),
    ("sparse_attention", "conv", "backward"): Goal("1c", 160, 400, {names.FLEX: 2.0}),
    ("gumbel_softmax", "float32", "forward"): Goal(
        "2f", 125, 140, {names.BY_HAND: 10.0, names.BY_HAND_COMPILED: 1.6}
    ),
    ("gumbel_softmax", "float16", "forward"): Goal("2f'", 80, 95, _GUMBEL),
    ("gumbel_softmax", "bfloat16", "forward"): Goal("2f'", 80, 95, _GUMBEL),
    ("gumbel_softmax", "float32", "backward"): Goal("2b", 250, 280, {names.BY_HAND: 3.0}),
    **{
        ("formats", kind, which): _stream("4", 6, _COPY)
        for kind in ("1-6-9", "0-6-10")
        for which in ("pack", "unpack")
    },
    ("grad_scale", "float32", "enter"): _stream("3", 6, _COPY),
    ("grad_scale", "float32", "leave"): _stream("3", 10, _COPY),
    ("grad_scale", "float32", "unscale"): _stream("3", 8, _COPY),
    ("grad_scale", "float16", "unscale"): _stream("3", 4, _COPY),
    ("adam16", "float32", "step"): _stream("4a", 20, {names.ADAMW: 1.6, names.ADAMW8: 1.2}),
}


POWERSGD = {  # (size, pass); compress also reads fp32 gradients and writes E: 8 bytes, not 2
    ((3968, 3968, 112, 1), "compress"): Goal("5a", 29.3, 35),
    ((3968, 3968, 112, 1), "project"): Goal(
        "5a", 7.3, 12, {names.MATMUL: 5.0, names.MATMUL_TF32: 1.8}
    ),
    ((3968, 112, 1), "orthogonalize"): Goal("5b", 112, 120, {names.QR: 8.0}),
    ((3968, 112, 16), "orthogonalize"): Goal("5b", 112, 240, {names.QR: 40.0}),
    ((3968, 896, 1), "orthogonalize"): Goal("5c", 896, 1500, {names.QR: 4.0}),
    ((3968, 15872, 112, 1), "round"): Goal("5d", 176, 320, {names.HOOK: 8.0}),
}


def goal_of(case: Case, which: str) -> Goal | None:
    """The goal of pass `which` of `case`, for its number of heads; None where there is none."""
    if case.op == "powersgd":
        return POWERSGD.get((case.size, which))
    goal = GOALS.get((case.op, case.kind or case.dtype, which))
    if goal is None or case.op != "sparse_attention":
        return goal if case.size in (LOGITS, ELEMENTS) else None
    batch, heads, *rest = case.size
    if (batch, *rest) != (SIZE[0], *SIZE[2:]):
        return None
    scale = heads / SIZE[1]
    return Goal(goal.number, goal.floor_us * scale, goal.goal_us * scale, goal.ratios)


def judge(goal: Goal | None, seconds: float | None, card: str) -> dict[str, Any] | None:
    """The goal columns of one row.

    Args:
        goal: of that row.
        seconds: our time; None where it was not measured.
        card: name of the GPU.

    Returns:
        number, floor_us, goal_us, and, where our time says so, over_floor (time / floor), met and
        missed_by (time / goal, where it is missed); None where there is no goal.
    """
    if goal is None:
        return None
    columns: dict[str, Any] = {"number": goal.number, "floor_us": round(goal.floor_us, 1)}
    columns["goal_us"] = round(goal.goal_us, 1)
    if seconds is None:
        return columns | {"met": None}
    if CARD not in card:
        return columns | {"met": None, "why": f"the times are goals on an {CARD}"}
    us = seconds * 1e6
    columns |= {"over_floor": us / goal.floor_us, "met": us <= goal.goal_us}
    return columns if columns["met"] else columns | {"missed_by": us / goal.goal_us}


def judge_ratio(goal: Goal | None, rival: str, ratio: float) -> dict[str, Any]:
    """ratio, and where a goal names the rival: goal, met, missed_by (goal / ratio)."""
    columns: dict[str, Any] = {"ratio": ratio}
    least = goal.ratios.get(rival) if goal else None
    if least is None:
        return columns
    columns |= {"goal": least, "met": ratio >= least}
    return columns if columns["met"] else columns | {"missed_by": least / ratio}
