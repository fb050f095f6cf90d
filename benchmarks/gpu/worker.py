"""The process that measures: a number of a case in, its rows out, a line of JSON each.

    python -m gpu.worker [--dry-run]

Says {"ready": true} once, then for each number read {"row": ...} as often as there are rows and
{"end": number}. Whatever else prints goes to the standard error stream. A device that no longer
answers after an error ends the process with a traceback; whoever asked starts another.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config

from gpu import attention, block, card, gumbel, powersgd, sixteen
from gpu.bench import Bench, cuda_bench, dry_bench, reason
from gpu.cases import SIXTEEN, Case, all_cases

MEASURE: dict[str, Callable[[Case, Bench], Iterator[dict[str, Any]]]] = {
    "card": card.measure,
    "sparse_attention": attention.measure,
    "gumbel_softmax": gumbel.measure,
    **dict.fromkeys(SIXTEEN, sixteen.measure),
    "powersgd": powersgd.measure,
    "block": block.measure,
}


def measured(case: Case, bench: Bench) -> Iterator[dict[str, Any]]:
    """The rows of `case`; where it cannot be set up, what is left of them with the reason."""
    done = 0
    torch.compiler.reset()  # a compiled rival of one case must not make that of the next dynamic
    try:
        for row in MEASURE[case.op](case, bench):
            yield row
            done += 1
    except Exception as error:
        bench.assert_alive()
        for which in case.passes[done:]:
            yield {"case": case.name, "pass": which, "not_measured": reason(error)}


def serve(lines: Iterator[str], write: Callable[[str], Any], *, dry_run: bool) -> None:
    """Answers each of `lines` until there are no more."""
    # Backward alone is timed on one graph many times over; its buffers must stay.
    torch._functorch.config.donated_buffer = False
    bench = dry_bench() if dry_run else cuda_bench()
    cases = all_cases(dry_run=dry_run)
    write(json.dumps({"ready": True}) + "\n")
    for line in lines:
        for row in measured(cases[int(line)], bench):
            write(json.dumps({"row": row}) + "\n")
        write(json.dumps({"end": int(line)}) + "\n")


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve(iter(sys.stdin.readline, ""), answers.write, dry_run="--dry-run" in sys.argv)
