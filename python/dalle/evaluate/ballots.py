"""Answers about pairs of pictures, and what they add up to (paper F).

A task is a caption with two pictures. A worker says which is more realistic (1 or 2), and which
matches the caption better (1, 2 or neither). Answers stand in a CSV file, a line each.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from dalle.console import say
from dalle.errors import DataError
from dalle.evaluate.intervals import wilson
from dalle.files import read_bytes

COLUMNS = ("task", "worker", "realistic", "match", "seconds")
QUESTIONS = {"realistic": "more realistic", "match": "better match"}
MODELS = ("ours", "theirs")
LONGEST_NAME = 100  # letters of a worker


@dataclass(frozen=True)
class Ballot:
    """One worker's answers to one task.

    Attributes:
        task: number of the task, from 1.
        worker: a name.
        realistic: "ours" or "theirs"; None where it was not asked (automatic judges).
        match: "ours", "theirs" or "neither"; of automatic judges also "tie".
        seconds: it took, None where that is not known.
    """

    task: int
    worker: str
    realistic: str | None
    match: str
    seconds: float | None


@dataclass(frozen=True)
class Rule:
    """When a worker is dropped: much disagreement, and many fast answers (both, as in the paper).

    Attributes:
        disagreement: share of answers that differ from the majority of the other workers.
        fast: share of answers under `seconds`.
        seconds: 4 in the paper, which names no shares.
        answers: workers with fewer that can be compared are kept.
    """

    disagreement: float = 0.4
    fast: float = 0.3
    seconds: float = 4.0
    answers: int = 5


def without_cut_line(owner: str, path: Path, content: bytes, swapped: Sequence[bool]) -> bytes:
    """A file of answers without a last line that was cut off while it was written; a line says so.

    A last line that holds a whole answer stays, also where no newline ends it.

    Args:
        owner: begins the line that is said.
        path: of the file, for that line.
        content: of the file.
        swapped: as of `read_ballots`.
    """
    whole, _, last = content.rpartition(b"\n")
    if not whole or not last.strip():
        return content
    try:
        head = whole.decode("utf-8-sig").splitlines()[0]
        names = [name.strip() for name in next(csv.reader([head]))]
        rows = csv.DictReader([last.decode()], names, restkey="more", restval=None)
        _ballot(owner, next(rows), swapped)
    except (DataError, UnicodeDecodeError, csv.Error, KeyError, IndexError, StopIteration):
        shown = last.decode("utf-8", "replace")[:100]
        say(f"{owner}: the last line of {path} was cut off and is dropped: {shown}")
        return whole + b"\n"
    return content


def read_ballots(
    owner: str, path: Path, swapped: Sequence[bool], *, own: bool = False
) -> list[Ballot]:
    """The answers in a CSV file with the columns task, worker, realistic, match, seconds.

    Pictures are "1" and "2" as they were shown, or "ours" and "theirs". Seconds may be left out.

    Args:
        owner: begins the line of an error.
        path: the file.
        swapped: of each task, whether picture 1 was theirs.
        own: whether the page wrote it, so that a last line which was cut off is left out.

    Raises:
        DataError: it cannot be read, or a line does not hold what it must, with its number.
    """
    try:
        content = read_bytes(path)
        text = (without_cut_line(owner, path, content, swapped) if own else content).decode(
            "utf-8-sig"
        )
    except OSError as problem:
        raise DataError(
            f"{owner}: votes must be a readable CSV file, got {path}: {problem.strerror}"
        ) from problem
    except UnicodeDecodeError as problem:
        raise DataError(
            f"{owner}: votes must be UTF-8, got {path}: byte {problem.start} is not"
        ) from problem
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="more", restval=None)
    ballots: list[Ballot] = []
    seen: dict[tuple[int, str], int] = {}
    try:
        header = [str(name).strip() for name in reader.fieldnames or []]
        missing = [name for name in COLUMNS[:4] if name not in header]
        if missing or len(set(header)) != len(header):
            got = ", ".join(header) or "none"
            raise DataError(
                f"{owner}: votes must have the columns {', '.join(COLUMNS)}, once each, got {got} "
                f"in {path}"
            )
        reader.fieldnames = header
        for row in reader:
            where = f"{owner}: votes: {path} line {reader.line_num}"
            ballot = _ballot(where, row, swapped)
            key = (ballot.task, ballot.worker)
            if key in seen:
                raise DataError(
                    f"{where}: a worker must answer a task once, got {ballot.worker!r} on task "
                    f"{ballot.task} also in line {seen[key]}"
                )
            seen[key] = reader.line_num
            ballots.append(ballot)
    except csv.Error as problem:
        raise DataError(f"{owner}: votes must be CSV, got {path}: {problem}") from problem
    if not ballots:
        raise DataError(f"{owner}: votes must hold an answer, got none in {path}")
    return ballots


def _ballot(where: str, row: dict[Any, Any], swapped: Sequence[bool]) -> Ballot:
    if "more" in row or None in (row[name] for name in COLUMNS[:4]):
        raise DataError(f"{where}: must have as many fields as the head, got another number")
    cells = {name: (row.get(name) or "").strip() for name in COLUMNS}
    word = cells["task"]
    task = int(word) if word.isascii() and word.isdecimal() and len(word) < 10 else 0
    if not 1 <= task <= len(swapped):
        raise DataError(f"{where}: task must be 1 to {len(swapped)}, got {word!r}")
    if not 1 <= len(cells["worker"]) <= LONGEST_NAME:
        raise DataError(
            f"{where}: worker must be a name of 1 to {LONGEST_NAME} letters, got "
            f"{cells['worker'][:20]!r}"
        )
    realistic = chosen(where, "realistic", cells["realistic"], swapped[task - 1])
    match = chosen(where, "match", cells["match"], swapped[task - 1])
    seconds = None
    if cells["seconds"]:
        try:
            seconds = float(cells["seconds"])
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise DataError(f"{where}: seconds must be 0 or more, got {cells['seconds']!r}")
    return Ballot(task, cells["worker"], realistic, match, seconds)


def chosen(where: str, question: str, word: str, swapped: bool) -> str:
    """ "ours", "theirs" or "neither" for an answer in words or by the place of the picture.

    Raises:
        DataError: another word, or "neither" to what is more realistic.
    """
    word = word.strip().lower()
    if word in ("1", "2"):
        return MODELS[(word == "2") != swapped]
    if word in MODELS or (word == "neither" and question == "match"):
        return word
    more = ", ours, theirs or neither" if question == "match" else ", ours or theirs"
    raise DataError(f"{where}: {question} must be 1, 2{more}, got {word!r}")


def _majority(answers: Sequence[str]) -> str:
    """What more than any other says, else "tie"."""
    counted = Counter(answers).most_common(2)
    if len(counted) > 1 and counted[0][1] == counted[1][1]:
        return "tie"
    return counted[0][0]


def workers_of(ballots: Sequence[Ballot], rule: Rule) -> dict[str, dict[str, Any]]:
    """Of each worker: answers, disagreement, share of fast ones, and whether they are dropped."""
    by_task: dict[int, list[Ballot]] = defaultdict(list)
    for ballot in ballots:
        by_task[ballot.task].append(ballot)
    differs: Counter[str] = Counter()
    compared: Counter[str] = Counter()
    for group in by_task.values():
        for ballot in group:
            others = [other for other in group if other is not ballot]
            for question in QUESTIONS:
                said = [getattr(other, question) for other in others if getattr(other, question)]
                answer = getattr(ballot, question)
                most = _majority(said) if said else "tie"
                if answer is not None and most != "tie":
                    compared[ballot.worker] += 1
                    differs[ballot.worker] += answer != most
    found: dict[str, dict[str, Any]] = {}
    for worker in sorted({ballot.worker for ballot in ballots}):
        times = [b.seconds for b in ballots if b.worker == worker]
        known = [t for t in times if t is not None]
        fast = sum(t < rule.seconds for t in known) / len(known) if known else None
        count = compared[worker]
        share = differs[worker] / count if count else None
        dropped = (
            share is not None
            and fast is not None
            and len(times) >= rule.answers
            and share > rule.disagreement
            and fast > rule.fast
        )
        found[worker] = {
            "answers": len(times),
            "disagreement": share,
            "fast": fast,
            "dropped": dropped,
        }
    return found


def tally(ballots: Sequence[Ballot], question: str, each: int) -> dict[str, Any]:
    """Majorities of a question, how they were split, and how far workers agree.

    Args:
        ballots: those that count.
        question: "realistic" or "match".
        each: votes of a task; the first so many count.

    Returns:
        "tasks", "incomplete" (with fewer votes), "majority" (answer -> "count", "share",
        "interval"), "split" (model -> {votes for it: share of tasks}), "agreement" (share of pairs
        of votes that are the same), "kappa" (Fleiss; None where it is not defined).
    """
    by_task: dict[int, list[str]] = defaultdict(list)
    for ballot in ballots:
        answer = getattr(ballot, question)
        if answer is not None and len(by_task[ballot.task]) < each:
            by_task[ballot.task].append(answer)
    groups = [answers for _, answers in sorted(by_task.items()) if answers]
    total = len(groups)
    won = [(_majority(answers), answers) for answers in groups]
    names = ["ours", "theirs", *(["neither"] if question == "match" else []), "tie"]
    counts = Counter(name for name, _ in won)
    split: dict[str, dict[str, float]] = {}
    for model in MODELS:
        votes = Counter(answers.count(model) for name, answers in won if name == model)
        split[model] = {str(k): votes[k] / total for k in sorted(votes, reverse=True)}
    agreement, kappa = _agreement(groups)
    return {
        "question": QUESTIONS[question],
        "tasks": total,
        "incomplete": sum(len(answers) < each for answers in groups),
        "majority": {
            name: {
                "count": counts[name],
                "share": counts[name] / total,
                "interval": wilson(counts[name], total),
            }
            for name in names
            if total
        },
        "split": split,
        "votes": dict(Counter(answer for answers in groups for answer in answers)),
        "agreement": agreement,
        "kappa": kappa,
    }


def _agreement(groups: Sequence[Sequence[str]]) -> tuple[float | None, float | None]:
    """The mean share of equal pairs of votes of a task, and Fleiss' kappa."""
    several = [answers for answers in groups if len(answers) > 1]
    if not several:
        return None, None
    observed = sum(
        sum(a == b for a, b in combinations(answers, 2)) / math.comb(len(answers), 2)
        for answers in several
    ) / len(several)
    votes = Counter(answer for answers in several for answer in answers)
    expected = sum((count / votes.total()) ** 2 for count in votes.values())
    return observed, None if expected == 1 else (observed - expected) / (1 - expected)
