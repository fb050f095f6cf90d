"""Tables 1 and 2: compression from shapes of shards, beside the two processes' measured bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dalle.evaluate.results import pyplot, table
from dalle.plan import PAPER_RANKS, WORD, compression, factor_elements, shards
from dalle.prior.config import PriorConfig
from dalle.reproduce.context import OWNER, Context
from dalle.reproduce.exchange import GPUS, measure
from dalle.reproduce.exchange_worker import BATCH, CLUSTER, PROCESSES
from dalle.reproduce.figure import Figure

MATRICES = ("q, k, v and post-attention", "first MLP", "second MLP")
PAPER_SHARE = {1920: 0.83, 2688: 0.85, 3968: 0.86}  # of the gradient that is not sent
PARAMETERS = {1920: 2.8e9, 2688: 5.6e9, 3968: 12.0e9}
GAP = 0.02  # of the losses of one seed that counts as none


def table_1(context: Context) -> Figure:
    """Compression of the paper's ranks from shard shapes, and the least rank without a loss gap."""
    found = measure(context)
    runs, shape = found["ranks"], context.sizes.exchange
    width = shape.rank_width
    tail = max(1, shape.updates // 10)
    ends = {run["rank"]: sum(run["losses"][-tail:]) / tail for run in runs}
    plain = ends[0]
    rows = [
        [PARAMETERS[d], d, rank, compression(d, GPUS, rank), PAPER_SHARE[d]]
        for d, rank in PAPER_RANKS.items()
    ]
    small = []
    for run in runs:
        rank, sent = run["rank"], run["report"]
        gap = ends[rank] / plain - 1
        # PowerSGD counts fp32 gradients; 16-bit words of all of them would be half as many bytes.
        saved = None if sent is None else 1 - 2 * sent["bytes_sent"] / sent["bytes_uncompressed"]
        share = None if not rank else compression(width, 1, rank)
        small.append([rank or "uncompressed", ends[rank], gap, share, saved])
    close = [rank for rank in ends if rank and abs(ends[rank] / plain - 1) <= GAP]
    plt = pyplot(OWNER)
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for run in runs:
        label = f"rank {run['rank']}" if run["rank"] else "uncompressed"
        colour = {} if run["rank"] else {"color": "black"}
        axis.plot(_smooth(run["losses"], tail), label=label, lw=1, **colour)
    axis.set(xlabel="updates", ylabel=f"training loss, mean of {tail}", title=f"width {width}")
    axis.set_yscale("log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    return Figure(
        text="The paper's rank is the least multiple of 128 without a gap in the loss over the "
        "first tenth of the training. Its compression follows from the shapes of the shards "
        "(1 - 5 r / 8 d for 8 GPUs a machine). Below it the same search in two processes here"
        + (f": from rank {min(close)} up the last loss is within {GAP:.0%}." if close else
           f": no rank that was tried is within {GAP:.0%} of the uncompressed loss so early."),
        ours={
            "compression": {str(d): compression(d, GPUS, r) for d, r in PAPER_RANKS.items()},
            "last_loss": {str(rank): loss for rank, loss in ends.items()},
            "least_rank": min(close) if close else None,
        },
        paper={
            "rank": {str(d): r for d, r in PAPER_RANKS.items()},
            "compression": {str(d): share for d, share in PAPER_SHARE.items()},
        },
        tables=[
            table(
                ["effective parameters", "d_model", "rank", "compression, from shard shapes",
                 "paper"],
                rows,
                "The paper's models",
            ),
            table(
                ["rank", "last loss", "against uncompressed", "compression of the matrices",
                 "of all gradients, measured"],
                small,
                f"Two processes here, width {width}",
            ),
        ],
        pictures=[context.plot("table_1.png", figure)],
        command=context.own_command("table_1"),
        differs="The models of the paper are not trained here. The search is over a prior of width "
        f"{width} with two layers, {shape.updates} updates of {PROCESSES * BATCH} pairs, one seed, "
        "ranks that are no multiples of 128, AdamW, fp32. The measured share counts everything "
        "that is sent, embeddings and heads in fp32 included, against 16-bit gradients.",
    )  # fmt: skip


def _smooth(values: Sequence[float], over: int) -> list[float]:
    return [
        sum(values[max(0, i + 1 - over) : i + 1]) / len(values[max(0, i + 1 - over) : i + 1])
        for i in range(len(values))
    ]


def table_2(context: Context) -> Figure:
    """Shapes of shards and factors, their bytes in the paper, and the bytes that a step sent."""
    found = measure(context)
    shape, rank = PriorConfig(**found["timeline"]["prior"]), found[CLUSTER]["rank"]
    d = shape.d_model
    rows = _rows(3968, GPUS, PAPER_RANKS[3968]) + _rows(d, 1, rank)
    p, q = factor_elements(d, 1, rank)
    expected = [p * WORD * shape.num_layers, q * WORD * shape.num_layers]
    measured = measured_factors(found[CLUSTER]["events"])
    total = sum(a * b for a, b in shards(d, 1)) * WORD * shape.num_layers
    exact = [
        ["P", expected[0], measured["P"]],
        ["Q", expected[1], measured["Q"]],
        ["share sent of 16-bit gradients", sum(expected) / total, sum(measured.values()) / total],
    ]
    paper_total = factor_elements(3968, GPUS, 896)
    return Figure(
        text="Each GPU compresses its shards of a layer's matrices with rank r / m. Between "
        "machines the factors P and Q travel in place of the gradients. The lower table has the "
        "bytes of all layers' factors in one step of the two processes, from the shapes that "
        "torch's profiler saw, beside the formula.",
        ours={
            "elements_of_a_layer": {"P": paper_total[0], "Q": paper_total[1]},
            "compression": compression(3968, GPUS, 896),
            "measured_bytes": measured,
            "formula_bytes": {"P": expected[0], "Q": expected[1]},
            "powersgd": found[CLUSTER]["report"],
        },
        paper={
            "shard_gradient": "12 d^2 / m",
            "P": "(5 d r m + 4 d r) / m^2",
            "Q": "(d r m + 8 d r) / m^2",
            "compression": PAPER_SHARE[3968],
        },
        tables=[
            table(
                ["matrices of a layer", "shard of the gradient", "P", "Q^t", "bytes of the shards",
                 "bytes of P and Q"],
                rows,
                f"Above: d = 3968, r = 896, m = 8, as in the paper. Below: d = {d}, r = {rank}, "
                "m = 1, as in the run here",
            ),
            table(["bytes in one step", "formula of Table 2", "measured"], exact),
        ],
        command=context.own_command("table_2"),
        differs="Bytes are of 16-bit words. Here m = 1: the two processes are two machines of one "
        "GPU. Query, key and value are one stacked matrix here: of its gradient Q is sent once and "
        "not three times, so that the measured Q is smaller than the paper's formula.",
    )  # fmt: skip


def _rows(d: int, m: int, rank: int) -> list[list[Any]]:
    """A row for each kind of matrix in Table 2."""
    local, rows = rank // m, []
    four, first, second = shards(d, m)[0], shards(d, m)[4], shards(d, m)[5]
    for name, (a, b), count in zip(MATRICES, (four, first, second), (4, 1, 1), strict=True):
        times = f"{count} of " if count > 1 else ""
        rows.append([
            f"{name}, d = {d}", f"{times}{a} x {b}", f"{times}{a} x {local}",
            f"{times}{local} x {b}", count * a * b * WORD, count * (a + b) * local * WORD,
        ])  # fmt: skip
    return rows


def measured_factors(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of P and of Q in one step: 1-6-9 words are exchanged by all-to-all, P first."""
    sizes = [
        event["elements"]
        for event in sorted(events, key=lambda e: e["start"])
        if event["name"] == "gloo:all_to_all"
    ]
    return {"P": sum(sizes[::2]), "Q": sum(sizes[1::2])}
