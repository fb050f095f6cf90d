"""`dalle train` on a small folder: what it leaves, its plan, its verdict, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle import cli
from dalle.configs import to_dict
from dalle.data import sources
from dalle.data.mixture import MixedPairs
from dalle.data.pairs import ArrayPairs
from dalle.data.shapes_pairs import ShapesPairs
from dalle.data.split import Subset
from dalle.demo import run, sets, sizing
from dalle.demo.config import TrainConfig
from dalle.demo.pace import Pace
from dalle.demo.sets import FolderSet, open_parts
from dalle.demo.sizing import CUDA_TIERS, TIERS, SizesConfig, build, choose, ranker_grid, within
from dalle.demo.train import run_train, table
from dalle.demo.verdict import verdict
from dalle.demo.workspace import Workspace
from dalle.errors import CheckpointError, DataError, UsageError
from dalle.options import parse_options
from dalle.pipeline import Pipeline
from dalle.recipes import quick_ranker
from support.printed import printed

SIZES = (
    "--image-size 16 --patch 4 --codes 32 --dvae-width 32 --dvae-steps 120 --ranker-steps 12 "
    "--prior-width 32 --prior-layers 2 --prior-steps 60 --num-samples 2"
).split()
RANKER = {"batch_size": 16, "num_spliced": 4}  # a batch of 96 takes most of the test's time
KEYS = {
    "psnr", "psnr_train", "codes_used", "code_share", "train_at_1", "held_out_at_1",
    "held_out_at_5", "ranker_accuracy", "prior_loss", "prior_image_loss", "seconds", "verdict",
}  # fmt: skip


def write_folder(folder, count=40, side=24):
    """Shapes as JPEG and PNG, with captions; one caption has no picture."""
    folder.mkdir()
    pairs = ShapesPairs("train", image_size=side, size=count)
    for number in range(count):
        suffix = "png" if number % 2 else "jpg"
        Image.fromarray(pairs.images[number]).save(folder / f"{number:03}.{suffix}", quality=95)
        (folder / f"{number:03}.txt").write_text(pairs.captions[number])
    (folder / "alone.txt").write_text("a caption alone")
    return folder


def steady_pace(*_):
    """In place of the measurement, which has its own test and takes seconds."""
    return dict.fromkeys(("data", "dvae", "ranker", "prior", "samples"), Pace(0.01, 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("own") / "DIR")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The commands of docs/training.md as printed, at a size of seconds."""
    train, sample = printed("docs/training.md", "## One command")
    assert train in printed("README.md", "## Quick start")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        patch.setattr(run, "measure", steady_pace)
        patch.setattr(sizing, "quick_ranker", lambda steps: replace(quick_ranker(steps), **RANKER))
        assert cli.main([*train, *SIZES]) == 0
        assert cli.main([*sample, "--num-candidates", "2", "--out", "drawn"]) == 0
    out = folder.parent / "run"
    return out, json.loads((out / "summary.json").read_text())


def test_one_command_leaves_scores_a_page_and_a_pipeline_that_draws(finished, folder):
    out, summary = finished
    assert KEYS <= set(summary) and summary["complete"] is True
    assert summary["psnr"] > 14 and summary["code_share"] > 0.6
    assert summary["data"]["pairs"] + summary["data"]["unseen_pairs"] == 40
    assert summary["data"]["skipped"] == {"caption without picture": 1}
    assert summary["verdict"] and "nearest to a right picture" in summary["verdict"][-1]
    page = (out / "index.html").read_text()
    assert re.search(r"<code>--[\w-]+", page)  # an option that no line break cuts
    assert "In words" in page and "dalle train: DIR" in page and "http" not in page
    with pytest.raises(CheckpointError, match="run: must be a pipeline, got a run: take "):
        Pipeline.from_pretrained(out)
    pipeline = Pipeline.from_pretrained(out / "pipeline")
    assert pipeline.sampling.temperature == 0.5
    drawn = pipeline.generate("a red circle on a white background", num_candidates=2, top=1)
    assert drawn.images.shape == (1, 3, 16, 16)


def test_the_same_command_does_nothing_more_and_other_options_are_refused(finished, folder, capsys):
    out, summary = finished
    words = ["train", "--data", str(folder), "--out", str(out)]
    assert len(list((folder.parent / "drawn").rglob("*.png"))) == 3  # a grid and two pictures
    assert cli.main([*words, *SIZES]) == 0
    captured = capsys.readouterr()
    assert "prior 60/60" not in captured.err
    assert f"look at {out / 'index.html'}" in captured.out
    assert f'dalle sample "A CAPTION" --model {out / "pipeline"}' in captured.out
    again = json.loads((out / "summary.json").read_text())
    assert again["seconds"] == summary["seconds"]
    config = str(out / "config.yaml")  # holds sizes that the command left out
    assert cli.main(["train", "--config", config, "--data", str(folder), "--out", str(out)]) == 0
    printed_last = capsys.readouterr().out
    assert f"train: {summary['psnr']:.4g} dB PSNR of reconstructions" in printed_last
    assert re.search(r"train: [\d.]+ % of training captions have the best of 2 near", printed_last)
    assert cli.main([*words, *SIZES[:-1], "3"]) == 2
    assert "train: num_samples must be 2 as in" in capsys.readouterr().err


def test_a_folder_of_another_run_is_refused_and_left_alone(finished, folder, tmp_path, capsys):
    """Also where `dalle pipeline make` or `dalle demo` made it: its models would be taken."""
    out, _ = finished
    shutil.copytree(out / "pipeline", tmp_path / "steps" / "pipeline")
    shutil.copytree(out, tmp_path / "demo")
    (tmp_path / "demo" / "work" / "train.json").rename(tmp_path / "demo" / "work" / "demo.json")
    for name, there in (("steps", "pipeline"), ("demo", "work/demo.json")):
        place = tmp_path / name
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
        assert cli.main(["train", "--data", str(folder), "--out", str(place), *SIZES]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == (
            f"train: {place} must hold nothing of another run, got {there}; choose another --out"
        )
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_options_may_change_until_a_stage_has_begun(folder, tmp_path, capsys, monkeypatch):
    """A refused call does not bind its folder to the options that were wrong."""
    monkeypatch.setattr(run, "measure", steady_pace)
    words = ["train", "--data", str(folder), "--out", str(tmp_path / "run")]
    for wrong, line in (
        (["--image-size", "18"], "train: image_size must be a multiple"),
        (["--minutes", "0.001"], "train: minutes must be"),
        (["--image-size", "16", "--codes", "100000"], "train: codes must be at most"),
    ):
        assert cli.main([*words, "--patch", "4", *wrong]) == 2
        assert line in capsys.readouterr().err
    space = Workspace("train", tmp_path / "run", {"data": "right"}, 0)
    space.claim()
    assert not (space.work / "sizes.json").exists() and not (space.work / "pace.json").exists()
    space.add_time("data", 1.0, 1.0, done=True)
    with pytest.raises(UsageError, match="train: data must be right as in .*, got wrong; choose"):
        Workspace("train", tmp_path / "run", {"data": "wrong"}, 0)


def test_the_options_written_give_the_same_run_again(finished, folder):
    out, summary = finished
    config = parse_options(TrainConfig, ["--config", str(out / "config.yaml")], prog="dalle train")
    assert Path(config.data).name == "DIR" and config.out.name == "run"
    assert all(value is not None for value in to_dict(config.sizes).values())
    recipe = build(config.sizes, summary["data"]["pairs"])
    wanted = {
        k: v for k, v in summary["recipe"].items() if k not in ("seconds", "fixed", "ranker_train")
    }
    assert {k: v for k, v in to_dict(recipe).items() if k in wanted} == wanted


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--data", "nowhere"], "nowhere must be a folder, got no such folder"),
        (["--data", "{}", "--validation", "0.7"], "train: validation must be above 0 and at most"),
        (["--data", "{}", "--minutes", "0.001"], "train: minutes must be .* or more here"),
        (["--data", "{}", "--image-size", "18", "--patch", "4"], "image_size must be a multiple"),
        (["--data", "{}", "--codes", "100000"], "train: codes must be at most"),
        (["--data", "{}", "--prior-width", "33"], "train: prior_width must be a multiple of 32"),
        (["--data", "{}", "--time", "week"], "--time"),
    ],
)
def test_bad_input_gets_one_line(folder, tmp_path, capsys, monkeypatch, words, line):
    monkeypatch.setattr(run, "measure", steady_pace)
    words = [word.format(folder) for word in words]
    assert cli.main(["train", *words, "--out", str(tmp_path / "run")]) in (2, 3)
    error = capsys.readouterr().err.splitlines()
    assert re.search(line, error[-1]), error


def test_one_caption_for_all_pictures_is_refused_before_the_training(folder, tmp_path, capsys):
    same = shutil.copytree(folder, tmp_path / "same")
    for path in same.glob("*.txt"):
        path.write_text("thing")
    assert cli.main(["train", "--data", str(same), "--out", str(tmp_path / "run")]) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "train: same must hold two different captions, got only 'thing'"


def some_pairs(count, side):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    return ArrayPairs("noise", images, [f"a picture of number {i}" for i in range(count)])


def test_sizes_follow_the_number_and_the_size_of_the_pictures():
    few = choose(SizesConfig(), some_pairs(30, 64), TIERS["quick"])
    assert (few.image_size, few.patch, few.codes) == (36, 3, 128)
    many = choose(SizesConfig(), some_pairs(600, 64), TIERS["quick"])
    assert many.codes == 1024 and many.prior_steps > few.prior_steps
    small = choose(SizesConfig(), some_pairs(30, 26), TIERS["quick"])
    assert (small.image_size, small.patch) == (24, 3)
    hour = choose(SizesConfig(), some_pairs(30, 200), TIERS["hour"])
    assert (hour.image_size, hour.patch) == (64, 4) and hour.prior_width > few.prior_width
    given = choose(SizesConfig(codes=16, image_size=32), some_pairs(30, 64), TIERS["quick"])
    assert (given.codes, given.image_size, given.patch) == (16, 32, 2)
    with pytest.raises(DataError, match="pictures must be at least 8 pixels wide and high, got 6"):
        choose(SizesConfig(), some_pairs(30, 6), TIERS["quick"])


@pytest.mark.parametrize("tier", [*TIERS.values(), *CUDA_TIERS.values()])
def test_every_tier_gives_models_that_fit_each_other(tier):
    recipe = build(choose(SizesConfig(), some_pairs(40, 40), tier), 40)
    assert recipe.image_size % ranker_grid(recipe.image_size) == 0
    assert recipe.vae.patch * (recipe.image_size // recipe.vae.patch) == recipe.image_size
    assert recipe.vae_train.warm_start_steps < recipe.vae_steps
    assert recipe.prior_train.decay_steps == recipe.prior_steps


@pytest.mark.parametrize("side", [0, 1, 33])
def test_an_odd_side_has_no_grid_of_a_ranker(side):
    assert (ranker_grid(32), ranker_grid(2)) == (8, 2)
    with pytest.raises(UsageError, match=f"^ranker: image_size must be even .* got {side}$"):
        ranker_grid(side)


@pytest.mark.parametrize(("stem", "grid"), [("patch", 8), ("released", 4)])
def test_the_plan_names_the_codes_of_either_stem(stem, grid):
    sizes = choose(SizesConfig(image_size=32, patch=4), some_pairs(40, 40), TIERS["quick"])
    recipe = build(sizes, 40)
    recipe = replace(recipe, vae=replace(recipe.vae, stem=stem, group_count=4))
    lines = table(recipe, torch.device("cpu"), 40, 4)
    assert f"32 x 32 pixels to {grid} x {grid} codes" in "\n".join(lines)


def test_a_short_time_scales_what_was_not_given():
    given = SizesConfig(prior_steps=100)
    sizes = within(choose(given, some_pairs(40, 40), TIERS["quick"]), given, 0.5)
    assert (sizes.prior_steps, sizes.dvae_steps) == (100, TIERS["quick"].dvae_steps // 2)
    assert within(sizes, given, 3.0) == sizes


def test_a_new_source_is_one_entry_for_dalle_train_too(monkeypatch, tmp_path):
    pairs, asked = some_pairs(12, 32), []
    opens = lambda *values: asked.append(values) or pairs  # noqa: E731
    monkeypatch.setitem(sources.BUILT_IN, "toy", opens)
    monkeypatch.setattr(sources, "FOLDER_FORMATS", ((Path.is_dir, lambda path: pairs),))
    for data in ("toy", str(tmp_path)):
        assert sum(map(len, open_parts(data, 0.2, 36, 3))) == 12
    assert asked == [(32, "train", 3)]
    pairs.captions = ["one"] * 12
    with pytest.raises(DataError, match="noise must hold two different captions, got only 'one'"):
        run_train(TrainConfig(data="toy", out=tmp_path / "run"))


@pytest.mark.parametrize("in_memory", [1 << 30, 0])
def test_a_picture_keeps_its_caption_and_its_part(folder, tmp_path, monkeypatch, in_memory):
    """Also where the pictures are too many for the memory, and one is broken in its middle."""
    monkeypatch.setattr(sets, "IN_MEMORY", in_memory)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    for path in (damaged / "004.jpg", damaged / "005.png"):
        path.write_bytes(path.read_bytes()[:-200])
    train, held_out = open_parts(str(damaged), 0.2)
    data = FolderSet(train, held_out, 16)
    columns = data.captions(12)
    originals = data.originals(columns)
    assert len(columns.captions) == len(originals) <= 12
    for split, item, caption in zip(columns.splits, columns.items, columns.captions, strict=True):
        part = data.train if split == "train" else data.unseen[0]
        assert part.captions[item] == caption
    scores = np.zeros((len(columns.captions), 2))
    result = data.sample_scores(columns, originals[:, None].expand(-1, 2, -1, -1, -1), scores)
    assert result["train_at_1"] == 1.0 and result["held_out_at_1"] == 1.0


def test_weights_of_several_sets_are_kept_in_memory():
    """Of the second part an item is broken, and one of each is held out."""
    first, second = some_pairs(6, 8), some_pairs(5, 8)
    second.images = [None if i == 2 else image for i, image in enumerate(second.images)]
    mixed = MixedPairs([first, second], [1.0, 3.0])
    kept = sets.decoded(Subset(mixed, [0, 1, 2, 4, 5, 6, 7, 8, 10]), 8)
    assert len(kept) == 8 and kept.mixture() == ([5, 8], [1.0, 3.0])
    assert sets.decoded(first, 8).mixture() is None


SCORES = {"data": {"pairs": 300}, "psnr": 25.0, "psnr_train": 25.5, "code_share": 0.9}


@pytest.mark.parametrize(
    ("changes", "losses", "words"),
    [
        (
            {"psnr": 18.0, "psnr_train": 19.0},
            [],
            "Reconstructions are blurred (18.0 dB on held-out pictures)",
        ),
        ({"psnr_train": 28.0}, [], "3.0 dB better than held-out ones"),
        ({"code_share": 0.3}, [], "Only 30% of the codes are in use"),
        (
            {},
            [(300, 4.0), (600, 3.0), (900, 2.0), (1200, 3.0)],
            "The prior memorises: 300 pictures, its held-out loss rises after step 900",
        ),
        ({}, [(300, 4.0), (600, 3.0), (900, 2.5), (1200, 2.4)], "held-out loss still falls"),
        ({"ranker_accuracy": 0.1, "ranker_choices": 20.0}, [], "hardly more than by chance"),
        ({"train_at_1": 0.2, "true_pictures": 300}, [], "the prior needs more updates"),
    ],
)
def test_the_verdict_names_the_weak_part(changes, losses, words):
    (sentence,) = verdict({**SCORES, **changes}, losses, "pictures")
    assert words in sentence
    assert verdict(SCORES, [], "pictures") == []


def test_a_prior_that_draws_little_right_is_not_told_to_train_less():
    losses = [(300, 4.0), (600, 3.0), (900, 2.0), (1200, 3.0)]
    for share, memorises in ((0.3, False), (0.7, True)):
        scores = {**SCORES, "train_at_1": share, "true_pictures": 300}
        said = " ".join(verdict(scores, losses, "pictures"))
        assert ("The prior memorises" in said) is memorises is ("more updates" not in said)


def test_the_demo_s_verdict_names_the_command_that_has_the_options():
    usual = {**SCORES, "psnr": 22.9, "psnr_train": 22.5, "held_out_at_1": 0.82, "samples": 976}
    (drawn,) = verdict({**usual, "captions_drawn": 122}, [], "emoji", "demo")
    assert drawn == (
        "Drawn for held-out captions, the best of 8 is nearest to a right picture of emoji in 82% "
        "of the cases (chance: 0.8%)."
    )
    assert verdict({**SCORES, "psnr": 18.0}, [], "emoji", "demo")[-1] == (
        "These are options of dalle train --data emoji."
    )


def test_sizes_are_checked():
    with pytest.raises(UsageError, match="train: codes must be 2 or more, got 1"):
        SizesConfig(codes=1)
    with pytest.raises(UsageError, match="train: temperature must be 0 or more, got -1"):
        SizesConfig(temperature=-1.0)
