"""Which of two models people prefer (paper F, Figure 7): pairs for the same captions, shown blind.

Votes come from a page on this machine (`polling`), from a CSV file (`ballots`), or from a judge
that is no person: a ranker, a CLIP, or the checker of `shapes`. Every output says which.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dalle.configs import integer
from dalle.data.augment import center_crop
from dalle.data.shapes_check import MIN_SIDE, check_batch
from dalle.data.split import Subset
from dalle.errors import DataError, UsageError
from dalle.evaluate import paper
from dalle.evaluate.ballots import (
    MODELS,
    QUESTIONS,
    Ballot,
    Rule,
    read_ballots,
    tally,
    workers_of,
)
from dalle.evaluate.blind import Tasks, make_tasks
from dalle.evaluate.facts import facts_of
from dalle.evaluate.plots import votes_png
from dalle.evaluate.polling import Poll, drop_cut_line, serve
from dalle.evaluate.results import as_path, finish, table
from dalle.evaluate.scores import Set, start
from dalle.evaluate.session import Session
from dalle.evaluate.sets import describe
from dalle.evaluate.sweeps import checker_side, for_checker, scenes_of, side_of
from dalle.files import check_regular, check_targets, make_folder, read_bytes, saving
from dalle.pictures import save_bytes

EACH = 5  # votes of a task, as in the paper
PORT = 8765
JUDGES = ("ranker", "clip", "checker")
ANSWERS, TASKS, PICTURES = "votes.csv", "votes-tasks.csv", "votes-pictures"


def votes(
    ours: Set,
    theirs: Set,
    *,
    out: Path | str | None = None,
    votes: Path | str | None = None,
    judge: str | None = None,
    serving: bool = False,
    port: int = PORT,
    each: int = EACH,
    rule: Rule | None = None,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Majorities of five votes on two questions: which is more realistic, which matches better.

    Args:
        ours, theirs: sets with captions; the first picture of each caption that both have. A
            pipeline draws the captions of the options, or those of the other set.
        out: folder of votes.json, votes.md, votes.png and votes-tasks.csv.
        votes: CSV of answers (`ballots.read_ballots`); OUT/votes.csv if left out.
        judge: "ranker", "clip" or "checker" instead of people: one vote a task, on the match only.
        serving: asks on a page at 127.0.0.1 until all votes are there, or Ctrl-C.
        port: of that page; 0 takes a free one.
        each: votes a task.
        rule: which workers are dropped.
        ready: called with the address of the page.
        options: of `session.Setup`; `count` tasks at most.

    Returns:
        "questions": realistic and match, each with "majority", "split", "agreement", "kappa";
        "workers"; "judge". Without votes so far, "questions" is empty, and the folder holds the
        pictures to show.

    Raises:
        DalleError: in one line, for sets, answers or options that do not fit.
    """
    owner, rule = "eval votes", rule or Rule()
    _check_options(owner, votes, judge, serving, out, rule)
    port = integer(owner, "port", port, 0, 65535)
    each = integer(owner, "each", each, 1, 1000)
    session, folder = start("votes", out, options)
    if judge in ("ranker", "clip"):
        session.setup = replace(session.setup, extractor=judge)
    tasks = make_tasks(session, ours, theirs)
    given = None if votes is None else as_path(owner, "votes", votes)
    path = given or (folder / ANSWERS if folder is not None else None)
    record = {
        "command": owner,
        "n": {"tasks": len(tasks)},
        "seed": session.seed,
        "each": each,
        "sets": {
            "ours": describe(tasks.ours, len(tasks)),
            "theirs": describe(tasks.theirs, len(tasks)),
        },
        "tasks": [
            {"task": i + 1, "caption": caption, "image_1": MODELS[tasks.swapped[i]]}
            for i, caption in enumerate(tasks.captions)
        ],
        "paper": {"majority": dict(paper.FIGURE_7_MAJORITY), "split": dict(paper.FIGURE_7_SPLIT)},
    }
    if judge is not None:
        ballots, warnings, about = _judged(session, tasks, judge)
        record |= {"judge": judge, "automatic": True, **about}
        return _finish(record, ballots, {}, 1, warnings, folder)
    there = path is not None and path.exists()
    if folder is not None:
        _keep_tasks(owner, folder, tasks, there)
    ballots = []
    if there and path is not None and (given is not None or path.stat().st_size):
        ballots = _ballots_so_far(owner, path, tasks, serving, own=given is None)
    if serving and path is not None:
        poll = Poll(tasks.captions, tasks.shown, tasks.swapped, each, session.seed, path, ballots)
        serve(owner, poll, port, ready)
        ballots = _ballots_so_far(owner, path, tasks, True, own=given is None)
    elif not there and given is not None:
        ballots = read_ballots(owner, given, tasks.swapped)  # says that there is none
    record |= {"judge": "people", "automatic": False, "answers": str(path)}
    if not ballots and folder is not None and not serving:
        _write_pictures(owner, folder, tasks)
    workers = workers_of(ballots, rule)
    kept = [ballot for ballot in ballots if not workers[ballot.worker]["dropped"]]
    record["rule"] = {"disagreement": rule.disagreement, "fast": rule.fast,
                      "seconds": rule.seconds, "answers": rule.answers}  # fmt: skip
    return _finish(record, kept, workers, each, [], folder)


def _check_options(owner: str, votes: Any, judge: Any, serving: bool, out: Any, rule: Rule) -> None:
    if judge is not None and judge not in JUDGES:
        raise UsageError(f"{owner}: judge must be one of {', '.join(JUDGES)}, got {judge!r}")
    if judge is not None and (serving or votes is not None):
        raise UsageError(f"{owner}: votes must be of people or of a judge, got judge {judge} too")
    if serving and out is None and votes is None:
        raise UsageError(f"{owner}: out must be given to serve, got none")
    if not isinstance(rule, Rule):
        raise UsageError(f"{owner}: rule must be a ballots.Rule, got {type(rule).__name__}")
    for name in ("disagreement", "fast", "seconds"):
        number = getattr(rule, name)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise UsageError(f"{owner}: {name} must be a number, got {number!r}")
    for name in ("disagreement", "fast"):
        if not 0 <= getattr(rule, name) <= 1:
            raise UsageError(f"{owner}: {name} must be 0 to 1, got {getattr(rule, name):g}")
    if not 0 <= rule.seconds < float("inf"):
        raise UsageError(f"{owner}: seconds must be 0 or more, got {rule.seconds:g}")
    integer(owner, "answers", rule.answers, 1)


def _keep_tasks(owner: str, folder: Path, tasks: Tasks, voted: bool) -> None:
    """Writes votes-tasks.csv; where there are votes, it must be the same as before.

    Raises:
        UsageError: the answers that are there are of other tasks.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "caption", "image_1", "image_2"])
    for i, caption in enumerate(tasks.captions):
        prints = [
            hashlib.blake2b(tasks.pixels(i, place).tobytes(), digest_size=8).hexdigest()
            for place in (1, 2)
        ]
        writer.writerow([i + 1, caption, *prints])
    content, path = text.getvalue().encode("utf-8", "surrogateescape"), folder / TASKS
    check_targets(owner, path)
    if voted and path.exists():
        with saving(owner, path):
            if read_bytes(path) != content:
                raise UsageError(
                    f"{owner}: sets, count and seed must be those of the votes so far, got others "
                    f"than in {path}; take another --out"
                )
    save_bytes(path, content)


def _ballots_so_far(
    owner: str, path: Path, tasks: Tasks, serving: bool, *, own: bool
) -> list[Ballot]:
    try:
        check_regular(path)
        if serving:
            drop_cut_line(owner, path, tasks.swapped)
        lines = len(read_bytes(path).splitlines())
    except OSError as problem:
        raise DataError(
            f"{owner}: votes must be a readable CSV file, got {path}: {problem.strerror}"
        ) from problem
    if serving and lines <= 1:
        return []
    return read_ballots(owner, path, tasks.swapped, own=own)


def _write_pictures(owner: str, folder: Path, tasks: Tasks) -> None:
    """The pictures as they are to be shown, for votes that are gathered elsewhere."""
    target = make_folder(folder / PICTURES, owner)
    for task in range(len(tasks)):
        for place in (1, 2):
            save_bytes(target / f"{task + 1:04}-{place}.png", tasks.shown(task, place))


def _judged(
    session: Session, tasks: Tasks, judge: str
) -> tuple[list[Ballot], list[str], dict[str, Any]]:
    """One vote a task by a judge that is no person, warnings, and what the judge is."""
    warnings = [
        f"the judge is the {judge}, not people: one vote a task, and none on what is more realistic"
    ]
    about: dict[str, Any] = {}
    if judge == "checker":
        values = [_facts_right(session.owner, tasks, model) for model in (0, 1)]
    else:
        values = []
        for model, source in enumerate((tasks.ours, tasks.theirs)):
            chosen = sorted({items[model] for items in tasks.items})
            subset = replace(source, pairs=Subset(source.pairs, chosen))
            found = session.features(MODELS[model], subset, minimum=1)
            warnings += [line for line in session.own_judge(found) if line not in warnings]
            network: Any = session.extractor
            text = network.text_features(tasks.captions).double()
            row = {chosen[int(i)]: k for k, i in enumerate(found.items)}
            rows = [row[items[model]] for items in tasks.items]
            values.append((found.values.double()[rows] * text).sum(1).tolist())
        about["extractor"] = {"name": judge, "fingerprint": session.extractor.fingerprint}
    ballots = []
    for task, (a, b) in enumerate(zip(*values, strict=True)):
        match = "ours" if a > b else "theirs" if b > a else "tie"
        if judge == "checker" and a == b == 0:
            match = "neither"
        ballots.append(Ballot(task + 1, judge, None, match, None))
    about["judge_scores"] = {
        name: list(map(float, v)) for name, v in zip(MODELS, values, strict=True)
    }
    return ballots, warnings, about


def _facts_right(owner: str, tasks: Tasks, model: int) -> list[float]:
    """The share of a caption's facts that each picture of a model shows."""
    scenes = scenes_of(tasks.captions)
    source = (tasks.ours, tasks.theirs)[model]
    if scenes is None:
        raise DataError(f"{owner}: captions must be of the set shapes for the checker, got others")
    side = side_of(owner, MODELS[model], source.pairs)
    if side < MIN_SIDE:
        raise DataError(
            f"{owner}: {MODELS[model]} must have a side of {MIN_SIDE} or more for the checker, "
            f"got {side}"
        )
    side = checker_side(side)
    images = np.stack([center_crop(source.pairs.load(items[model]), side) for items in tasks.items])
    shares = []
    for report, scene in zip(check_batch(for_checker(images), scenes), scenes, strict=True):
        facts = [right for name, right in facts_of(report, scene).items() if "object" not in name]
        shares.append(sum(facts) / len(facts))
    return shares


def _finish(
    record: dict[str, Any],
    ballots: Sequence[Ballot],
    workers: dict[str, dict[str, Any]],
    each: int,
    warnings: list[str],
    folder: Path | None,
) -> dict[str, Any]:
    """The result of the votes that count, written where there is a folder."""
    found = {name: tally(ballots, name, each) for name in QUESTIONS}
    found = {name: counted for name, counted in found.items() if counted["tasks"]}
    by = f"judged by the {record['judge']}, not by people" if record["automatic"] else "by people"
    dropped = [name for name, worker in workers.items() if worker["dropped"]]
    fewest = max((counted["incomplete"] for counted in found.values()), default=0)
    if fewest:
        warnings = [*warnings, f"{fewest} tasks have fewer than {each} votes"]
    if dropped:
        warnings = [*warnings, f"dropped: {', '.join(dropped)} (much disagreement, fast answers)"]
    rows = []
    for name, counted in found.items():
        published = paper.FIGURE_7_MAJORITY[QUESTIONS[name]]
        for answer, one in counted["majority"].items():
            of_paper = dict(zip(MODELS, published, strict=True)).get(answer)
            split = ", ".join(
                f"{share:.1%} by {k}" for k, share in counted["split"].get(answer, {}).items()
            )
            rows.append([counted["question"], answer, one["count"], one["share"], one["interval"],
                         split, None if of_paper is None else of_paper / 100])  # fmt: skip
    heads = ["question", "majority", "tasks", "share", "95 % interval (Wilson)", "votes for it",
             "paper"]  # fmt: skip
    tables = [table(heads, rows, f"Majority of {_votes(each)}, {by}")] if rows else []
    if found and not record["automatic"]:
        cells = [[c["question"], c["agreement"], c["kappa"]] for c in found.values()]
        tables.append(table(["question", "equal pairs of votes", "Fleiss' kappa"], cells,
                            "Agreement"))  # fmt: skip
        cells = [[w, x["answers"], x["disagreement"], x["fast"], "dropped" if x["dropped"] else ""]
                 for w, x in workers.items()]  # fmt: skip
        heads = ["worker", "answers", "disagree with the majority", "share of fast answers", ""]
        tables.append(table(heads, cells, "Workers"))
    result = {
        "title": _title(found, by),
        "text": f"{record['n']['tasks']} captions, a picture of each model, shown blind and with "
        f"the sides drawn by the seed; {by}. Grey: the paper's Figure 7, DALL-E against DF-GAN.",
        **record,
        "questions": found,
        "workers": workers,
        "dropped": dropped,
        "warnings": warnings,
        "tables": tables,
    }
    if folder is None or not found:
        return finish("votes", result, folder)
    return finish("votes", result, folder, votes_png(found, by))


def _votes(number: int) -> str:
    return "1 vote" if number == 1 else f"{number} votes"


def _title(found: dict[str, Any], by: str) -> str:
    if not found:
        return "Votes: none so far"
    shares = [f"{c['majority']['ours']['share']:.1%} {c['question']}" for c in found.values()]
    return f"Votes for ours: {', '.join(shares)} ({by})"
