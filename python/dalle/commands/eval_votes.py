"""`dalle eval votes`: which of two models people prefer, on a page or from a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dalle.commands.eval import OUT, SetupConfig, goes_on, options_of
from dalle.evaluate import preference
from dalle.evaluate.ballots import Rule
from dalle.evaluate.results import cell


@dataclass(frozen=True, kw_only=True)
class VotesConfig:
    """Counts votes on pairs of two models' pictures for the same captions (the paper's Figure 7).

    Votes come from a page of this machine (--serve), from a CSV file with the columns task, worker,
    realistic, match and seconds, or from --judge, which is no person. With none of them, the
    pictures to show are written for a vote elsewhere.

    Args:
        ours: SOURCE with captions, such as the output of dalle sample, or a pipeline.
        theirs: SOURCE of the other model.
        votes: CSV file of answers; left out, votes.csv in --out.
        serve: ask on a page at 127.0.0.1 until all votes are there, or Ctrl-C.
        port: of that page; 0 takes a free one.
        judge: ranker, clip or checker (captions of shapes) instead of people.
        each: votes of a task.
        max_disagreement: a worker who differs from the majority of the others in a larger share of
            answers, and is fast, is dropped.
        max_fast: share of fast answers that a worker may have before that.
        fast_seconds: an answer under so many seconds is fast.
        out: folder of votes.json, votes.md, votes.png, votes-tasks.csv and votes.csv.
        setup: options of every measure; --count tasks at most.
    """

    ours: str
    theirs: str
    votes: Path | None = None
    serve: bool = False
    port: int = preference.PORT
    judge: str | None = None
    each: int = preference.EACH
    max_disagreement: float = Rule.disagreement
    max_fast: float = Rule.fast
    fast_seconds: float = Rule.seconds
    out: Path = OUT
    setup: SetupConfig = field(default_factory=SetupConfig)


@goes_on
def votes(config: VotesConfig) -> None:
    """Asks or reads, counts, writes, and says the majorities."""
    result = preference.votes(
        config.ours,
        config.theirs,
        out=config.out,
        votes=config.votes,
        judge=config.judge,
        serving=config.serve,
        port=config.port,
        each=config.each,
        rule=Rule(config.max_disagreement, config.max_fast, config.fast_seconds),
        **options_of(config.setup),
    )
    for line in result["warnings"]:
        print(f"eval votes: warning: {line}")
    for found in result["questions"].values():
        for name, one in found["majority"].items():
            print(
                f"eval votes: {found['question']}: {name} {one['share']:.1%}, 95 % between "
                f"{cell(one['interval'][0])} and {cell(one['interval'][1])} ({one['count']} of "
                f"{found['tasks']})"
            )
    print(f"eval votes: {result['title']}; votes.json in {config.out}")
    if not result["questions"] and not config.serve:
        print(
            f"eval votes: {result['n']['tasks']} pairs to show are in "
            f"{config.out / preference.PICTURES}, their captions in "
            f"{config.out / preference.TASKS}; put the answers into "
            f"{config.out / preference.ANSWERS}, or ask with --serve"
        )
