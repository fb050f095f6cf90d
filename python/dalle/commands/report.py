"""What a training says before it begins and at its end, and the command to type next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dalle.commands.presets import sides
from dalle.config_files import value_of_run
from dalle.console import duration, is_main_process, printable, say
from dalle.data.codes import HEAD_FILE as CODES_FILE
from dalle.data.codes import is_code_store
from dalle.data.pairs import Pairs, format_counts
from dalle.data.sources import built_in_of, split_specs
from dalle.dvae.model import PRESETS as DVAE_PRESETS
from dalle.errors import DataError, UsageError
from dalle.files import read_object
from dalle.prior.config import PRESETS as PRIOR_PRESETS
from dalle.ranker.blocks import PRESETS as RANKER_PRESETS
from dalle.train.config import LoopConfig
from dalle.train.loop import TrainResult
from dalle.train.metrics import METRICS_FILE, read_metrics

QUICK_TEMPERATURE = 0.5  # of samples of a prior trained by the quick recipe
PRESETS: dict[str, Collection[str]] = {
    "dvae": DVAE_PRESETS,
    "prior": PRIOR_PRESETS,
    "ranker": RANKER_PRESETS,
}
STAGES = ("tokenizer", "dvae", "prior", "ranker")


def count_of(number: int) -> str:
    """Parameters in words: "1.2 M"."""
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def banner(
    owner: str,
    pairs: Pairs,
    validation: Pairs | None,
    *,
    recipe: str,
    image_size: int,
    batch_size: int,
    loop: LoopConfig,
    parameters: int,
    device: torch.device,
    precision: str,
    enlarges: bool,
    more: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> None:
    """Says what is trained on what: the data, the sizes, the length, and what to look at.

    Args:
        owner: begins every line.
        pairs, validation: the training part and the held-out part.
        recipe: its name.
        image_size: side of the pictures in pixels.
        batch_size: pairs an update.
        loop: how long.
        parameters: how many the model has.
        device, precision: where and in which numbers.
        enlarges: whether smaller pictures are enlarged; if not, they are left out.
        more: further lines.
        notes: lines on options that do nothing or do not fit.
    """
    if not is_main_process():
        return
    left = f"; left out {pairs.skipped.total()}: {format_counts(pairs.skipped)}"
    held = "" if validation is None else f" and {len(validation):,} held out"
    count = f"{len(pairs):,} pair{'s' * (len(pairs) != 1)}"
    say(f"{owner}: {count} of {pairs.name}{held}{left if pairs.skipped else ''}")
    known = sides(pairs)
    small = sum(side < image_size for side in known)
    fate = "enlarged" if enlarges else "left out"
    of = f" of {len(known)} looked at" if len(known) < len(pairs) else ""
    words = f", {small}{of} are smaller and are {fate}" if small else ""
    say(f"{owner}: pictures of {image_size} x {image_size} pixels{words}")
    for line in more:
        say(f"{owner}: {line}")
    epoch = max(1, -(-len(pairs) // batch_size))
    epochs = loop.steps * batch_size / max(1, len(pairs))
    say(
        f"{owner}: recipe {recipe}: {loop.steps:,} updates of {batch_size} pictures, "
        f"{epoch:,} an epoch, {epochs:.3g} epochs"
    )
    size = count_of(parameters)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    say(f"{owner}: {size} parameters, {device}{threads}, {precision}; {_time_left(loop)}")
    for line in notes:
        say(f"{owner}: note: {line}")


def _time_left(loop: LoopConfig) -> str:
    """How long a run that goes on will take, at the pace of its last record."""
    last: dict[str, Any] = {}
    with suppress(OSError):
        last = (read_metrics(loop.out / METRICS_FILE) or [last])[-1]
    pace, left = last.get("steps_per_second") or 0.0, loop.steps - last.get("step", 0)
    if isinstance(pace, (int, float)) and pace > 0 and left > 0:
        return f"about {duration(left / pace)} for the {left:,} updates left"
    return "the first lines of the log have the time left"


def end_block(
    owner: str, result: TrainResult, folder: Path, left_out: str, lines: Iterable[str], then: str
) -> None:
    """Prints how many updates, where the model is, its scores and picture, and what comes next."""
    if not is_main_process():
        return
    took = f" in {duration(result.seconds)}" if result.seconds >= 1 else ""
    print(f"{owner}: {result.step} updates{took}, model in {folder}{left_out}")
    for line in lines:
        print(printable(f"{owner}: {line}"))
    print(printable(f"{owner}: next: {then}"))


def newest_picture(out: Path) -> Iterable[str]:
    """A line with the picture that was drawn last, if there is one."""
    files = sorted((out / "pictures").glob("*-*.png"), key=lambda path: path.name[-12:])
    if files:
        yield f"picture: {files[-1]}"


def _store_of(data: str) -> Path | None:
    """The first code store among the sources of `--data`."""
    names = (Path(name) for name, _ in split_specs(data))
    return next((name for name in names if is_code_store(name)), None)


def _pictures_of(data: str) -> list[str]:
    """The sources that code stores were made of, with the stores' weights; [] where one of them is
    not known."""
    found: list[str] = []
    for name, weight in split_specs(data):
        sources, _ = _made_from(Path(name))
        if weight is not None:
            if len(sources) != 1 or split_specs(sources[0])[0][1] is not None:
                return []
            sources = [f"{sources[0]}={weight:g}"]
        if not sources:
            return []
        found += sources
    return found


def _made_from(store: Path) -> tuple[list[str], Path | None]:
    """The pictures and the dVAE that a code store was made of, as they are named from here; []
    and None where they are no longer there, or the store does not say it."""
    head: dict[str, Any] = {}
    with suppress(DataError):
        head = read_object(store / CODES_FILE, DataError)
    said = head.get("made_from")
    said = said if isinstance(said, dict) else {}
    data, vae = said.get("data"), said.get("vae")
    sources, folder = [], None
    if isinstance(data, str) and data:
        with suppress(UsageError):  # a weight that is none
            named = [name for name, _ in split_specs(data)]
            if all(built_in_of(name) is not None or os.path.exists(name) for name in named):
                sources = [from_here(source) for source in data.split("\n")]
    if isinstance(vae, str) and os.path.isfile(os.path.join(vae, "config.json")):
        folder = Path(from_here(vae))
    return sources, folder


def from_here(path: str) -> str:
    """A path without the current directory, where it lies below it."""
    return path.removeprefix(f"{Path.cwd()}/") or "."


def _augment_of(store: Path) -> list[str]:
    """`--augment paper` for a store with several crops of each picture."""
    with suppress(DataError):
        crops = read_object(store / CODES_FILE, DataError).get("crops")
        return ["--augment", "paper"] if crops != 1 else []
    return []


def next_of_codes(codes: Path, vae: Path) -> str:
    """The command after `dalle data encode`, complete: a prior, or the tokenizer that it needs.

    Args:
        codes: the code store.
        vae: the model folder that it was made with: RUN/dvae/model, PIPELINE/vae or any other.
    """
    places = [folder / "tokenizer" for folder in (vae.parent.parent, vae.parent, codes.parent)]
    found = [place for place in places if (place / "config.json").is_file()]
    words: list[Any] = ["dalle", "prior" if found else "tokenizer", "train", "--data", codes]
    if not found:
        return shlex.join(map(str, [*words, "--out", codes.parent / "tokenizer"]))
    preset = value_of_run(vae, "preset")
    words += ["--preset", preset if preset in PRESETS["prior"] else "tiny"]
    words += [*_augment_of(codes), "--tokenizer", found[0], "--vae", vae]
    return shlex.join(map(str, [*words, "--out", codes.with_name(f"{codes.name}-prior")]))


def train_on_codes(codes: Path, vae: Path) -> str:
    """The one command that trains all stages that are left after `dalle data encode`."""
    words = ["dalle", "train", "--data", codes, "--vae", vae]
    return shlex.join(map(str, [*words, "--out", codes.with_name(f"{codes.name}-train")]))


def next_command(data: str, preset: str, run: Path, **known: Path | None) -> str:
    """The command of the first stage of a run that is not there yet, complete.

    For codes the dVAE is the one that made them, and what needs pictures takes those that they
    were made of; VAE and PICTURES stand for them where they have gone.

    Args:
        data: `--data` of the trainings.
        preset: of the dVAE, prior and ranker.
        run: folder of the stages that are not `known`.
        known: stage -> folder of its model, of the stages that are done.
    """
    folders: dict[str, Path] = {"tokenizer": run / "tokenizer"}
    folders |= {stage: run / stage / "model" for stage in STAGES[1:]}
    folders |= {stage: folder for stage, folder in known.items() if folder is not None}
    store = _store_of(data)
    if store is not None:
        vae = _made_from(store)[1]
        there = (folders["dvae"] / "config.json").is_file()
        if known.get("dvae") is None and (vae is not None or not there):
            folders["dvae"] = vae or Path("VAE")
    missing = [
        stage
        for stage in STAGES
        if not (folders[stage] / "config.json").is_file() and not (store and stage == "dvae")
    ]
    words: list[Any] = ["dalle"]
    if not missing:
        words += ["pipeline", "make", "--tokenizer", folders["tokenizer"], "--vae", folders["dvae"]]
        words += ["--prior", folders["prior"], "--ranker", folders["ranker"]]
        if value_of_run(folders["prior"], "recipe") == "quick":
            words += ["--temperature", QUICK_TEMPERATURE]
        return shlex.join([str(word) for word in [*words, "--out", run / "pipeline"]])
    stage = missing[0]
    if stage == "prior" and store is not None:
        preset = value_of_run(folders["dvae"], "preset") or preset
    words += [stage, "train"]
    sources = data.split("\n")
    if store is not None and stage == "ranker":
        sources = _pictures_of(data) or ["PICTURES"]
    for source in sources:
        words += ["--data", source]
    if stage != "tokenizer":
        nearest = "base" if preset in ("paper", "1b", "12b") else "tiny"
        words += ["--preset", preset if preset in PRESETS[stage] else nearest]
    if stage == "prior" and store is not None:
        words += _augment_of(store)
    if stage in ("prior", "ranker"):
        words += ["--tokenizer", folders["tokenizer"], "--vae", folders["dvae"]]
    return shlex.join([str(word) for word in [*words, "--out", run / stage]])
