"""`dalle train`: sizes and updates for somebody's own pictures, then the stages of the demo."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from dalle.config_files import CONFIG_NAME, write_resolved
from dalle.configs import from_dict, to_dict
from dalle.console import duration, say
from dalle.data.codes import stores_of
from dalle.data.pairs import Pairs, format_counts
from dalle.data.sources import absolute
from dalle.data.split import Subset, hold_out
from dalle.demo.codes import CodesSet, ready_vae, with_store
from dalle.demo.config import DEMO_SETS, TrainConfig, require_codes
from dalle.demo.context import Demo
from dalle.demo.pace import with_pace
from dalle.demo.run import built_in, check_extras, measured, run_stages
from dalle.demo.sets import EmojiSet, FolderSet, open_source
from dalle.demo.sizing import CUDA_TIERS, TIERS, SizesConfig, Tier, build, choose, within
from dalle.demo.workspace import Workspace
from dalle.devices import pick_device
from dalle.dvae.model import DiscreteVAE
from dalle.errors import DataError
from dalle.files import check_targets
from dalle.pretrained import fingerprint
from dalle.recipes import DemoRecipe, factor_for, load_recipe, scale_to
from dalle.train.lock import locked_folder
from dalle.train.parts import threads_for_parts

EXPECTED = (  # pairs at most, what to expect
    (
        100,
        "it learns these pictures by heart; for another caption it mixes what it has, "
        "and the held-out scores are rough",
    ),
    (2_000, "captions of the training come out well, new combinations of their words rarely"),
    (50_000, "new combinations of known words begin to work"),
    (math.inf, "enough to draw new combinations; the longer the training the better"),
)


def run_train(config: TrainConfig) -> dict[str, Any]:
    """Trains on a folder, or goes on with it, and returns what summary.json holds.

    Raises:
        Interrupted: stopped by Ctrl-C or SIGTERM, after a report of what there is was written.
        DataError: no such folder, or nothing usable in it.
        EnvironmentProblem: a package is missing or the folder cannot be written.
        UsageError: sizes that do not fit, a run of other options in the folder, or another process
            that works in it.
    """
    check_extras("train", EmojiSet.packages if config.data == "emoji" else ())
    device = pick_device(config.device)
    tier = (CUDA_TIERS if device.type == "cuda" else TIERS)[config.time]
    minutes = tier.minutes if config.minutes is None else config.minutes
    parts, vae, given = None, None, config.sizes
    if config.data not in DEMO_SETS:
        source = open_source(config.data, tier.side, config.seed)
        if stores := stores_of(source):
            vae = ready_vae(config.vae, stores, device)
            given = with_store(given, stores[0], vae)
        elif config.vae is not None:
            require_codes(config.vae)
        parts = hold_out(source, config.validation)
    space = Workspace("train", config.out, _options(config, vae), config.seed)
    check_targets("train", *space.targets(), space.out / CONFIG_NAME)
    with locked_folder(space.work, "train"), threads_for_parts():
        space.claim()
        if parts is None:
            demo = _on_built_in(config, space, device, tier)
            pairs = demo.data.train
        else:
            pairs = parts[0]
            say(f"train: {describe_set(*parts)}")
            if all(caption == pairs.captions[0] for caption in pairs.captions):
                raise DataError(
                    f"train: {pairs.name} must hold two different captions, got only "
                    f"{pairs.captions[0]!r}"
                )
            sizes = _chosen(space, given, pairs, tier, ready=vae is not None)
            data = (
                FolderSet(*parts, sizes.image_size or 0) if vae is None else CodesSet(*parts, vae)
            )
            demo = Demo(space, build(sizes, len(pairs), vae, data.augment), data, device)
        pace = measured(demo)
        if isinstance(demo.data, CodesSet):
            pace = demo.data.bounded(pace, minutes, demo.recipe.num_captions)
        demo.recipe = with_pace(demo.recipe, pace)
        factor = factor_for(demo.recipe, minutes, "train")
        if parts is None and config.sizes == SizesConfig():
            if factor < 1 or config.minutes is not None or config.time != "quick":
                demo.recipe = scale_to(demo.recipe, minutes, "train")
            sizes = config.sizes
        else:
            sizes = _chosen(space, given, pairs, tier, ready=vae is not None)
            sizes = within(sizes, config.sizes, factor)
            recipe = build(sizes, len(pairs), vae, demo.data.augment)
            demo.recipe = with_pace(recipe, pace)
        space.write(space.work / "chosen.json", {**to_dict(config.sizes), **to_dict(sizes)})
        write_resolved(replace(config, sizes=sizes), space.out / CONFIG_NAME, owner="train")
        drawn = len(demo.data.captions(demo.recipe.num_captions).captions)
        for line in table(demo.recipe, demo.device, len(pairs), drawn):
            say(f"train: {line}")
        if demo.data.note:
            say(f"train: {demo.data.note}")
        say(f"train: all options: {space.out / CONFIG_NAME}; edit it and give it to --config")
        return run_stages(demo)


def _options(config: TrainConfig, vae: DiscreteVAE | None) -> dict[str, Any]:
    """What the folder of a run is for; another run is refused there."""
    return {
        "data": absolute(config.data),
        "vae": None if vae is None else fingerprint(vae),
        "time": config.time,
        "minutes": config.minutes,
        "validation": config.validation,
        **to_dict(config.sizes),
    }


def _chosen(
    space: Workspace, given: SizesConfig, pairs: Pairs, tier: Tier, *, ready: bool = False
) -> SizesConfig:
    """The sizes, chosen at the first run and then kept."""
    path = space.work / "sizes.json"
    saved = space.read(path)
    if saved:
        return from_dict(SizesConfig, saved, where=str(path))
    sizes = choose(given, pairs, tier, ready=ready)
    space.write(path, to_dict(sizes))
    return sizes


def _on_built_in(config: TrainConfig, space: Workspace, device: torch.device, tier: Tier) -> Demo:
    """The emoji or the shapes, by the demo's recipe, or at sizes of one's own."""
    recipe = load_recipe(config.data, "default")
    data = built_in(config.data, recipe, config.seed)
    if config.sizes != SizesConfig():
        sizes = _chosen(space, config.sizes, data.train, tier)
        recipe = replace(build(sizes, recipe.items), unseen_items=recipe.unseen_items)
        data = built_in(config.data, recipe, config.seed)
    return Demo(space, recipe, data, device)


def describe_set(train: Subset, held_out: Subset) -> str:
    """What a folder holds, in a line, and what can be expected of so many pictures."""
    total = len(train) + len(held_out)
    skipped = train.skipped.total()
    left_out = f", left out {skipped}: {format_counts(train.skipped)}" if skipped else ""
    expect = next(text for limit, text in EXPECTED if total <= limit)
    return (
        f"{total} pairs in {train.name}, {len(held_out)} of them held out{left_out}. "
        f"So many pictures: {expect}"
    )


def table(recipe: DemoRecipe, device: torch.device, num_pairs: int, drawn: int) -> list[str]:
    """The plan, a line for each stage: sizes, updates, foretold time."""
    grid = recipe.image_size // recipe.vae.factor
    epochs = recipe.prior_steps * recipe.prior_train.batch_size / num_pairs
    prior = recipe.prior
    rows = [
        (
            "dvae",
            f"{'' if recipe.vae_train else 'ready: '}"
            f"{recipe.image_size} x {recipe.image_size} pixels to {grid} x {grid} codes of "
            f"{recipe.vae.vocab_size}",
            recipe.vae_steps,
        ),
        ("ranker", "chooses among drawn pictures", recipe.ranker_steps),
        (
            "prior",
            f"{prior['num_layers']} layers of width {prior['d_model']}, {epochs:.2g} epochs",
            recipe.prior_steps,
        ),
        ("samples", f"{recipe.num_samples} of each of {drawn} captions", 0),
    ]
    lines = [f"{'stage':<8} {'what':<44} {'updates':>8} {'time':>8}"]
    for stage, words, updates in rows:
        seconds = duration(recipe.seconds.get(stage, 0.0))
        lines.append(f"{stage:<8} {words:<44} {updates or '':>8} {seconds:>8}")
    total = duration(sum(recipe.seconds.values()))
    return [*lines, f"{'all':<8} {'on ' + str(device):<44} {'':>8} {total:>8}"]
