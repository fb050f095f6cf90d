"""The least sizes of `dalle reproduce` that go through all of its code."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from dalle.reproduce.exchange_worker import CLUSTER, MACHINE
from dalle.reproduce.sizes import (
    ExchangeSizes,
    QuantizerSizes,
    ScaleSizes,
    ScoreSizes,
    Sizes,
)

TINY = Sizes(
    name="test",
    captions=3,
    candidates=2,
    shown=2,
    best_captions=1,
    best_candidates=8,
    shapes_minutes=0,
    shapes_preset="smoke",
    scales=ScaleSizes(updates=12, width=16, layers=2, deep_updates=2, deep_width=16, deep_layers=3),
    exchange=ExchangeSizes(
        width=64, layers=2, rank=4, rank_width=64, ranks=(0, 4), updates=2, pairs=16
    ),
    scores=ScoreSizes(real=8, zero=2, zero_candidates=2, seen=8, steps=2, batch=4, bootstrap=2),
)
TRAINED = QuantizerSizes(seeds=(0,), preset="smoke", scale=0.5)


def event(name, start, end, elements=0, thread=1):
    return {"name": name, "start": 1e3 * start, "end": 1e3 * end, "thread": thread,
            "elements": elements}  # fmt: skip


def step(gathered):
    """One block: gathered, forward, gathered, backward, then its gradients are exchanged."""
    events = [event("FSDP::root_pre_forward", 0, 1)]
    if gathered:
        events += [event("FSDP::all_gather (layers.0)", 1, 3),
                   event("gloo:all_gather", 1, 3, 50, 2),
                   event("FSDP::pre_forward (layers.0)", 1, 4)]  # fmt: skip
    else:
        events += [event("FSDP::pre_forward (layers.0)", 3, 4)]
    events += [
        event("FSDP::post_forward (layers.0)", 10, 10.5),
        event("FSDP::pre_backward (layers.0)", 11, 12),
        event("FSDP::post_backward_accumulate (layers.0)", 20, 21),
        event("FSDP::post_backward_reduce (layers.0)", 21, 25),
    ]
    if gathered:
        return [*events, event("gloo:all_reduce", 22, 24, 100, 3)]
    return [
        *events,
        event("gloo:all_to_all", 14, 18, 640, 5),
        event("gloo:all_to_all", 22, 26, 320, 5),
    ]


def two_processes(folder: Path) -> None:
    """In place of `exchange._run`: what two processes would have measured of its job."""
    sent = {"bytes_sent": 100, "bytes_uncompressed": 400, "seconds": 1.0}
    job = json.loads((folder / "job.json").read_text())
    assert job["timeline"]["rank"] == 4 and (folder / "batches.safetensors").is_file()
    losses = [{"rank": rank, "losses": [3.0, 2.0 + rank / 200], "report": sent if rank else None}
              for rank in job["ranks"]["ranks"]]  # fmt: skip
    found: dict[str, Any] = {
        MACHINE: {"events": step(True), "rank": 0},
        CLUSTER: {"events": step(False), "rank": 4, "report": sent},
    }
    (folder / "result.json").write_text(json.dumps({**found, "ranks": losses}))


class PageParts(HTMLParser):
    """Ids and sources of an HTML page."""

    def __init__(self):
        super().__init__()
        self.ids, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []
        self.sources += [named["src"]] if "src" in named else []
