"""Figure 5: what is exchanged, and when, in a run of two processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import dalle
from dalle.console import say
from dalle.data.augment import load_cropped, to_tensor
from dalle.data.pairs import evenly_spaced
from dalle.errors import EnvironmentProblem
from dalle.evaluate.results import pyplot, table
from dalle.files import (
    json_sha256,
    make_folder,
    read_bytes,
    read_object,
    regular_opener,
    to_json,
)
from dalle.pictures import save_bytes
from dalle.plan import WIDE, cluster_plan
from dalle.prior.config import PRESETS, PriorConfig
from dalle.reproduce.context import OWNER, Context
from dalle.reproduce.exchange_worker import BATCH, CLUSTER, MACHINE, PROCESSES
from dalle.reproduce.figure import Figure

GPUS = 8  # a machine of the paper
HARDWARE = {"tflops": 50.0, "link_gbit": 100.0, "peer_gbyte": 100.0}  # the defaults of dalle plan


def measure(context: Context) -> dict[str, Any]:
    """Runs the two processes, or reads what an earlier run has measured.

    Raises:
        EnvironmentProblem: the processes cannot be started, or fail.
    """
    runs = context.sizes.exchange
    job = {
        "timeline": {"prior": _shape(context, runs.width, runs.layers), "rank": runs.rank},
        "ranks": {
            "prior": _shape(context, runs.rank_width, 2),
            "ranks": list(runs.ranks),
            "updates": runs.updates,
        },
    }
    key = json_sha256({**job, "model": context.pipeline_hash, "runs": asdict(runs)})[:16]
    file = make_folder(context.cache / "exchange", OWNER) / f"{key}.json"
    if file.is_file():
        return {**job, **read_object(file, EnvironmentProblem)}
    with tempfile.TemporaryDirectory(prefix="dalle-exchange-") as name:
        folder = Path(name)
        (folder / "job.json").write_bytes(to_json(job))
        save_file(_batches(context, runs.pairs), folder / "batches.safetensors")
        say(f"{OWNER}: two processes over gloo: {len(runs.ranks)} trainings, two timelines")
        _run(folder)
        found = read_object(folder / "result.json", EnvironmentProblem)
    save_bytes(file, to_json(found))
    return {**job, **found}


def _run(folder: Path) -> None:
    """Starts the two processes and waits for them; on an error or Ctrl-C both are ended.

    Raises:
        EnvironmentProblem: one cannot be started, or fails.
    """
    library = str(Path(dalle.__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, (library, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dalle.reproduce.exchange_worker", str(folder)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for process in range(PROCESSES):
            with open(folder / f"{process}.log", "wb", opener=regular_opener) as log:
                started.append(
                    subprocess.Popen(
                        [*command, str(process)],
                        env=environment,
                        stdin=subprocess.PIPE,  # closed with this process, however it ends
                        stderr=log,
                    )
                )
        while any(each.poll() is None for each in started):
            if any(each.poll() for each in started):
                break
            time.sleep(0.1)
        for process, each in enumerate(started):
            if each.poll():
                lines = read_bytes(folder / f"{process}.log").decode(errors="replace").splitlines()
                raise EnvironmentProblem(
                    f"{OWNER}: two processes must run beside each other, got of process {process}: "
                    f"{lines[-1] if lines else f'exit status {each.returncode}'}"
                )
    except OSError as problem:
        raise EnvironmentProblem(
            f"{OWNER}: two processes must run beside each other, got {problem.strerror}"
        ) from problem
    finally:
        for each in started:
            if each.poll() is None:
                each.kill()
            each.wait()
            if each.stdin is not None:
                each.stdin.close()


def _shape(context: Context, width: int, layers: int) -> dict[str, Any]:
    pipeline = context.pipeline
    return {
        "text_vocab": pipeline.tokenizer.vocab_size,
        "image_vocab": pipeline.vae.num_tokens,
        "text_len": pipeline.prior.config.text_len,
        "grid": list(pipeline.vae.grid(context.side)),
        "d_model": width,
        "num_heads": max(1, width // 64),
        "num_layers": layers,
        "kernel_size": 5,
        "init_gain": 0.5,
    }


def _batches(context: Context, pairs: int) -> dict[str, torch.Tensor]:
    """Text and codes of some training pairs."""
    items = evenly_spaced(len(context.train), pairs)
    images, used = load_cropped(context.train, items.tolist(), context.side)
    pipeline = context.pipeline
    tokens = [
        pipeline.vae.encode(to_tensor(images[i : i + 64]).to(context.device)).flatten(1).cpu()
        for i in range(0, len(images), 64)
    ]
    captions = [context.train.captions[i] for i in used]
    text = pipeline.tokenizer.encode(captions, pipeline.prior.config.text_len - 1)
    return {"text": text.contiguous(), "tokens": torch.cat(tokens).contiguous()}


def spans(
    events: Sequence[Mapping[str, Any]], *, sharded: bool
) -> dict[str, list[tuple[float, float]]]:
    """When a step computes and when it exchanges, in milliseconds since its begin.

    Args:
        events: of `exchange_worker.timeline`.
        sharded: whether FSDP2 gathers and scatters; else all exchanges are PowerSGD's.

    Returns:
        Spans of time: "forward" and "backward" of blocks; "gather" and "scatter" of FSDP2,
        "factors" of PowerSGD.
    """
    main = next((e["thread"] for e in events if e["name"].startswith("FSDP::root")), None)
    begin = min(e["start"] for e in events)
    found: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("forward", "backward", "gather", "scatter", "factors")
    }

    def add(kind: str, start: float, end: float) -> None:
        found[kind].append(((start - begin) / 1e3, (end - begin) / 1e3))

    inside: dict[str, list[Mapping[str, Any]]] = {"gather": [], "scatter": []}
    opened: dict[tuple[str, str], float] = {}
    for event in sorted(events, key=lambda e: (e["start"], -e["end"])):
        name, block = _named(event["name"])
        if name == "pre_forward" and block:
            opened["forward", block] = event["end"]
        elif name == "forward_prefetch" and block:
            running = [key for key in opened if key[0] == "forward"]
            for key in running:
                opened[key] = max(opened[key], event["end"])
        elif name == "post_forward" and block:
            add("forward", opened.pop(("forward", block), event["start"]), event["start"])
        elif name == "pre_backward" and block:
            opened["backward", block] = event["end"]
        elif name == "post_backward_accumulate" and block:
            add("backward", opened.pop(("backward", block), event["start"]), event["start"])
        elif name == "all_gather" and event["thread"] == main:
            inside["gather"].append(event)
        elif name == "post_backward_reduce" and event["thread"] == main:
            inside["scatter"].append(event)
    for event in events:
        if not event["name"].startswith("gloo:"):
            continue
        kind = "factors"
        for name, around in inside.items() if sharded else ():
            if any(e["start"] <= event["start"] <= e["end"] for e in around):
                kind = name
        add(kind, event["start"], event["end"])
    return found


def _named(name: str) -> tuple[str, str]:
    """FSDP2's phase and the block that it is of: "FSDP::pre_forward (layers.0)"."""
    if not name.startswith("FSDP::"):
        return "", ""
    words = name.removeprefix("FSDP::").split(" ", 1)
    return words[0], words[1].strip("()") if len(words) > 1 else ""


def hidden_share(found: Mapping[str, list[tuple[float, float]]]) -> float | None:
    """The share of the time in exchanges during which blocks compute; None without exchanges."""
    exchange = _union([*found["gather"], *found["scatter"], *found["factors"]])
    total = sum(b - a for a, b in exchange)
    if not total:
        return None
    compute = _union([*found["forward"], *found["backward"]])
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in exchange for c, d in compute)
    return both / total


def _union(parts: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for a, b in sorted(parts):
        if joined and a <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(b, joined[-1][1]))
        else:
            joined.append((a, b))
    return joined


def _timeline_png(context: Context, lines: Mapping[str, Any]) -> str:
    plt = pyplot(OWNER)
    figure, axes = plt.subplots(2, 1, figsize=(10, 4.6), layout="constrained")
    rows = {
        "forward": ("blocks, forward", "C0"),
        "backward": ("blocks, backward", "C1"),
        "gather": ("gather parameters", "C2"),
        "scatter": ("reduce-scatter gradients", "C3"),
        "factors": ("exchange factors P, Q", "C4"),
    }
    titles = {
        MACHINE: "two processes of one machine: shards are gathered, gradients reduce-scattered",
        CLUSTER: "two machines of one process: PowerSGD, in a thread beside the backward pass",
    }
    for axis, (name, found) in zip(axes, lines.items(), strict=True):
        shown = [key for key in rows if found[key]]
        for place, key in enumerate(shown):
            bars = [(a, b - a) for a, b in found[key]]
            axis.broken_barh(
                bars, (place - 0.4, 0.8), color=rows[key][1], edgecolor="white", lw=0.3
            )
        axis.set_yticks(range(len(shown)), [rows[key][0] for key in shown], fontsize=8)
        axis.set_ylim(len(shown) - 0.5, -0.5)
        axis.set(xlabel="ms since the step began", title=titles[name])
        axis.title.set_fontsize(10)
        axis.grid(axis="x", alpha=0.3)
    return context.plot("figure_5.png", figure)


def figure_5(context: Context) -> Figure:
    """The plan of the exchanges of one step, and its timeline."""
    found = measure(context)
    shape = PriorConfig(**found["timeline"]["prior"])
    lines = {
        name: spans(found[name]["events"], sharded=name == MACHINE) for name in (MACHINE, CLUSTER)
    }
    hidden = {name: hidden_share(each) for name, each in lines.items()}
    busy = {
        name: {key: round(sum(b - a for a, b in _union(parts)), 3) for key, parts in each.items()}
        for name, each in lines.items()
    }
    d, rank = shape.d_model, found[CLUSTER]["rank"]
    units = _units(found[MACHINE]["events"])
    plan = [
        [name, size * WIDE, size * WIDE, size * WIDE * PROCESSES] for name, size in units.items()
    ]
    paper_plan = cluster_plan(
        PRESETS["12b"], gpus=1024, per_machine=GPUS, batch=1, rank=None, **HARDWARE
    )
    sent = paper_plan["machines"]["128"]["traffic"]
    words = {
        "gather": "parameters gathered, twice (in the machine, fp16)",
        "scatter": "gradients reduce-scattered (in the machine, fp16)",
        "factors": "P and Q (between machines, 1-6-9)",
        "rest": "embeddings, heads, gains, biases (between machines, fp32)",
        "uncompressed": "in place of both without PowerSGD (fp16)",
    }
    shares = [
        ["exchange in the machine", hidden[MACHINE], "almost all"],
        ["exchange between machines", hidden[CLUSTER], "the bottleneck"],
    ]
    return Figure(
        text="Every matrix is sharded over the processes of a machine. A block's shards are "
        "gathered before it runs, forward and again backward; its gradients are reduce-scattered. "
        "Between machines the gradients travel as low-rank factors while earlier blocks still "
        "compute. The bars are events of torch's profiler in one step.",
        ours={
            "processes": PROCESSES,
            "width": d,
            "layers": shape.num_layers,
            "rank": rank,
            "shard_elements": units,
            "busy_ms": busy,
            "hidden_share": hidden,
            "powersgd": found[CLUSTER]["report"],
            "predicted_bytes_of_the_paper": {k: sent[k] for k in words},
        },
        paper={
            "gpus": 1024,
            "per_machine": GPUS,
            "hidden_share": {"in the machine": "almost all", "between machines": "the bottleneck"},
        },
        tables=[
            table(["", "share hidden behind computing", "paper"], shares, "Overlap"),
            table(
                ["unit", "bytes of a process's shard", "bytes received by a gather",
                 "bytes reduced by a reduce-scatter"],
                plan,
                "Exchange plan of one process, measured (fp32)",
            ),
            table(
                ["bytes a GPU sends in a step", "predicted"],
                [[text, sent[key]] for key, text in words.items()],
                "The same for the paper's model on 128 machines of 8 GPUs",
            ),
        ],
        pictures=[_timeline_png(context, lines)],
        command=context.own_command("figure_5"),
        differs=f"Two processes over gloo on this processor in place of 1,024 GPUs; a prior of "
        f"{shape.num_layers} layers of width {d}, {BATCH} pairs a process, fp32. On a CPU FSDP2 "
        "waits for each gather and each reduce-scatter, so those hide behind nothing; on GPUs they "
        "have streams of their own, which was not measured. PowerSGD runs in a thread.",
        missing="No second machine: the two machines of the lower half are two processes of this "
        "one, and the bytes for the paper's cluster are a prediction (dalle plan).",
    )  # fmt: skip


def _units(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Unit -> elements of one process's shard, as its first gather sent them."""
    gathers = [
        (event["start"], event["end"], _named(event["name"])[1] or "embeddings and heads")
        for event in events
        if _named(event["name"])[0] == "all_gather"
    ]
    sizes: dict[str, int] = {}
    for event in events:
        if event["name"] == "gloo:all_gather":
            for a, b, unit in gathers:
                if a <= event["start"] <= b:
                    sizes.setdefault(unit, event["elements"])
    return sizes
