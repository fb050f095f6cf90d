"""Each training alone: recipes that fit the run, sizes of the data, notes, the next command."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.cli import load_target, main
from dalle.commands import dvae, notes, presets, report
from dalle.data.folder import FolderPairs
from dalle.distributed.config import ClusterConfig
from dalle.dvae.model import DiscreteVAE
from dalle.errors import OtherTrainingError, UsageError
from dalle.options import parse_options
from dalle.recipes import quick_dvae, quick_prior, quick_ranker
from dalle.train.averaging import IterateAverage, first_share
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTrainConfig
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.ranker import RankerTrainConfig

TRAININGS = ("dvae", "prior", "ranker")


def write_folder(folder: Path, sides: list[int]) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, side in enumerate(sides):
        pixels = rng.integers(0, 256, (side, side + 3, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture number {i}")
    return folder


def parsed(*words):
    return parse_options(load_target(words[:2])[1], list(map(str, words[2:])), prog="dalle")


def test_the_next_command_of_each_step_ends_in_pictures(tmp_path, monkeypatch, capsys):
    """A user who types what each step prints last, here with fewer updates."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("my pictures"), [16] * 8)
    words = ["tokenizer", "train", "--data", "my pictures", "--out", "run/tokenizer"]
    done, said = [], ""
    while words[0] != "sample":
        less = ["--steps", "4", "--batch-size", "4"] if words[0] in TRAININGS else []
        assert main([*words, *less]) == 0, capsys.readouterr().err
        heard = capsys.readouterr()
        done.append(" ".join(words[:2]))
        said += heard.out + heard.err
        words = shlex.split(re.findall(r"next: (dalle .*)", heard.out)[-1])[1:]
    assert done == [
        "tokenizer train", "dvae train", "prior train", "ranker train", "pipeline make"
    ]  # fmt: skip
    for stage in ("dvae", "prior", "ranker"):
        assert re.search(rf"{stage} train: picture: run/{stage}/pictures/\S+\.png", said)
        assert Image.open(re.findall(rf"{stage} train: picture: (\S+)", said)[-1]).width >= 80
        assert re.search(rf"{stage} train: recipe quick: 4 updates of 4 pictures, 2 an ep", said)
        assert f"{stage} train: 6 pairs of my pictures and 2 held out" in said
    assert "PSNR" in said and "codes used" in said and "held-out nats a token" in said
    assert words[1] == "picture number 0"
    assert main([*words, "--num-candidates", "2", "--top", "2", "--out", "drawn"]) == 0
    assert list(Path("drawn").glob("*.png"))


@pytest.mark.parametrize(
    ("preset", "there", "expected"),
    [
        ("small", (), "tokenizer train --data 'my pictures' --out R/tokenizer"),
        ("emoji", ("tokenizer",), "dvae train --data 'my pictures' --preset tiny --out R/dvae"),
        ("paper", ("tokenizer", "dvae/model"), "prior train --data 'my pictures' --preset base "),
        ("12b", ("tokenizer", "dvae/model", "prior/model"), "ranker train .* --preset base "),
    ],
)
def test_the_next_command_names_what_is_there(tmp_path, preset, there, expected):
    for name in there:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    said = report.next_command("my pictures", preset, tmp_path)
    assert re.match(f"dalle {expected}", said.replace(str(tmp_path), "R")), said
    (tmp_path / "codes.json").write_text("{}")  # only a prior learns from codes
    said = report.next_command(str(tmp_path), preset, tmp_path)
    name = "PICTURES" if said.split()[1] == "ranker" else str(tmp_path)
    assert said.split()[1] != "dvae" and f" train --data {name} " in said
    vae = tmp_path / "dvae/model" if "dvae/model" in there else "VAE"
    assert said.split()[1] == "tokenizer" or f" --vae {vae} " in said


def test_a_collapse_stands_at_the_end_in_words(tmp_path):
    made = dvae.plan(parsed("dvae", "train", "--data", write_folder(tmp_path / "a", [24] * 6)), 1)
    vae = DiscreteVAE(made.model)
    vae.encoder.logits_conv().b.data[3] = 1e4
    vae.save_pretrained(tmp_path / "model")
    said = list(dvae.saved_scores(made, tmp_path, torch.device("cpu")))
    used = f"1 of {made.model.vocab_size} codes used"
    assert any(line.startswith("the codebook has collapsed: " + used) for line in said), said


def test_a_run_of_the_other_recipe_is_refused_in_a_short_line_that_says_what_to_type(
    tmp_path, capsys
):
    """The default is quick on one process and paper on several."""
    data, quick, paper = write_folder(tmp_path / "data", [24] * 6), tmp_path / "q", tmp_path / "p"
    words = ["dvae", "train", "--data", data, "--steps", "2", "--batch-size", "2"]
    words += ["--image-size", "16", "--picture-every", "0", "--preset", "tiny", "--out"]
    for out, recipe in ((quick, []), (paper, ["--recipe", "paper"])):
        assert main([*map(str, words), str(out), *recipe]) == 0
    before = (paper / "config.yaml").read_bytes()
    capsys.readouterr()
    assert main([*map(str, words), str(paper)]) == 3
    line = f"dvae train: recipe must be paper as in the run of {paper}, got quick; type --recipe "
    assert capsys.readouterr().err.splitlines()[-1] == line + "paper"
    assert (paper / "config.yaml").read_bytes() == before
    assert main([*map(str, words), str(paper), "--recipe", "paper", "--steps", "3"]) == 0
    dvae.plan(parsed(*words, paper), 2)  # it goes on there by default
    step = ["--resume", quick / "step-00000002"]
    for more in ([quick], [tmp_path / "new", *step]):
        with pytest.raises(OtherTrainingError) as caught:
            dvae.plan(parsed(*words, *more), 2)
        assert str(caught.value) == (
            f"dvae train: recipe must be quick as in the run of {quick}, got paper, as on 2 "
            "processes; go on with one process, or choose another out"
        )
    options = (quick / "config.yaml").read_text()
    (quick / "config.yaml").write_text(re.sub("parts: .*", "parts: 1", options))
    with pytest.raises(OtherTrainingError, match="as on 2 processes; type --recipe quick$"):
        dvae.plan(parsed(*words, quick), 2)
    for more in ("--accept-changes", "--resume=none"):
        dvae.plan(parsed(*words, quick, more), 2)
    (quick / "config.yaml").unlink()  # then the checkpoint says it, and names a few options
    capsys.readouterr()
    assert main([*map(str, words), str(quick), "--recipe", "paper"]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.count(", got ") == 5 and re.search(r", and \d+ more; choose another out", line)


def test_the_options_of_a_run_repeat_it_bit_for_bit(tmp_path, capsys):
    data = write_folder(tmp_path / "data", [24] * 6)
    words = ["dvae", "train", "--data", str(data), "--steps", "4", "--batch-size", "2"]
    assert main([*words, "--out", str(tmp_path / "a"), "--picture-every", "0"]) == 0
    again = ["dvae", "train", "--config", str(tmp_path / "a" / "config.yaml")]
    assert main([*again, "--out", str(tmp_path / "b")]) == 0
    a, b = (tmp_path / name / "model" / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert DiscreteVAE.from_pretrained(a.parent).factor == 2  # 24 pixels, 12 x 12 tokens
    assert "image-size: 24" in (tmp_path / "a" / "config.yaml").read_text()
    capsys.readouterr()
    before = (tmp_path / "a" / "config.yaml").read_bytes()
    assert main([*again, "--lr-start", "2e-3"]) == 3  # refused to go on: another training
    assert (tmp_path / "a" / "config.yaml").read_bytes() == before
    sheet = tmp_path / "sheet.png"
    words = ["dvae", "reconstruct", "--data", str(data), "--model", str(a.parent)]
    assert main([*words, "--out", str(sheet)]) == 0
    assert Image.open(sheet).height == 4 + 2 * (24 * 4 + 4)  # pictures of 24 pixels, not 256


@pytest.mark.parametrize(
    ("preset", "recipe", "processes", "expected"),
    [
        ("tiny", None, 1, "quick"), ("small", None, 1, "quick"), ("base", None, 1, "paper"),
        ("12b", None, 1, "paper"), ("tiny", None, 2, "paper"), ("tiny", "paper", 1, "paper"),
        ("base", "quick", 1, "quick"), ("tiny", "quick", 2, "quick"),
    ],
)  # fmt: skip
def test_which_recipe(preset, recipe, processes, expected):
    assert presets.chosen_recipe("x", recipe, preset, processes) == expected


def test_the_prior_s_updates_follow_from_the_number_of_pairs():
    tiny = [presets.prior_steps("tiny", pairs, 16) for pairs in (30, 283, 10**6)]
    assert tiny == [500, 707, 10_000]
    assert presets.prior_steps("tiny", 283, 8) == 1415
    assert presets.prior_steps("small", 10_000, 16) == 62_500
    assert presets.prior_steps("12b", 10**7, 16) == 100_000


@pytest.mark.parametrize("steps", [2, 10, 100, 5000])
def test_the_quick_recipes_fit_any_run(steps):
    train = quick_dvae(steps, image_size=40).train
    left = steps - train.warm_start_steps
    assert 1 <= train.warm_start_steps < steps and train.lr_steps == left >= train.tau_steps
    assert not list(notes.dvae_notes(train, replace(train, health_every=1), steps))
    prior = quick_prior(steps)
    assert prior.warmup_steps < steps and prior.decay_steps == steps
    assert steps < 10 or not list(notes.prior_notes(prior, prior, steps))
    ranker = quick_ranker(steps)
    assert not list(notes.ranker_notes(ranker, ranker, steps, True))


def test_sizes_follow_the_pictures(tmp_path):
    pairs = FolderPairs(write_folder(tmp_path / "a", [20, 30, 30, 31, 200]))
    assert sorted(presets.sides(pairs)) == [20, 30, 30, 31, 200]
    assert presets.fitting_size(40, pairs, 8) == 24 and presets.fitting_size(16, pairs, 8) == 16
    small = FolderPairs(write_folder(tmp_path / "b", [5]))
    assert presets.fitting_size(40, small, 8) == 8
    # At most 36 pixels in 12 x 12 tokens; the median is 30, the smallest has 5.
    large = FolderPairs(write_folder(tmp_path / "c", [99]))
    assert [presets.quick_size("tiny", x) for x in (pairs, large, small)] == [30, 36, 4]
    for size, grid, patch in ((36, 12, 3), (32, 12, 4), (30, 12, 3), (64, 16, 4), (8, 8, 1)):
        assert presets.quick_patch("x", size, grid) == patch
    with pytest.raises(UsageError, match="x: image_size must .* such as 36, got 37"):
        presets.quick_patch("x", 37, 12)
    sizes = presets.quick_model("x", "tiny", 36, 30, 0, 100).model
    assert (sizes.vocab_size, sizes.patch, sizes.stem) == (128, 3, "patch")  # 4,320 points
    assert presets.quick_model("x", "tiny", 36, 10**6, 0, 100).model.vocab_size == 1024
    assert presets.quick_model("x", "tiny", 36, 30, 77, 100).model.vocab_size == 77


@pytest.mark.parametrize(
    ("enlarges", "fate", "time"),
    [
        (True, "enlarged", "the first lines of the log have the time left"),
        (False, "left out", "about 0:16 for the 8 updates left"),
    ],
)
def test_what_a_training_says_first(tmp_path, capsys, enlarges, fate, time):
    if not enlarges:  # it goes on
        (tmp_path / "metrics.jsonl").write_text('{"step": 2, "steps_per_second": 0.5}\n')
    folder = write_folder(tmp_path / "a", [20, 40, 40, 24, 40])
    (folder / "alone.png").write_bytes((folder / "00.png").read_bytes())
    report.banner(
        "x train",
        FolderPairs(folder),
        None,
        recipe="paper",
        image_size=32,
        batch_size=4,
        loop=LoopConfig(out=tmp_path, steps=10),
        parameters=1_234_567,
        device=torch.device("cpu"),
        precision="fp32",
        enlarges=enlarges,
        more=["8 x 8 tokens"],
        notes=["lr 3 does nothing"],
    )
    threads = torch.get_num_threads()
    assert capsys.readouterr().err.splitlines() == [
        "x train: 5 pairs of a; left out 1: 1 x picture without caption",
        f"x train: pictures of 32 x 32 pixels, 2 are smaller and are {fate}",
        "x train: 8 x 8 tokens",
        "x train: recipe paper: 10 updates of 4 pictures, 2 an epoch, 8 epochs",
        f"x train: 1.23 M parameters, cpu ({threads} threads), fp32; {time}",
        "x train: note: lr 3 does nothing",
    ]


def test_the_paper_recipe_is_one_word_away(tmp_path):
    data = write_folder(tmp_path / "data", [300] * 4)
    made = dvae.plan(parsed("dvae", "train", "--data", data, "--recipe", "paper"), 1)
    assert made.train == DvaeTrainConfig(image_size=32) and made.validation is None
    assert made.config.loop.steps == 3_000_000 and made.model.stem == "released"
    made = dvae.plan(parsed("dvae", "train", "--data", data, "--preset", "base"), 1)
    assert made.config.recipe == "paper" and made.train.image_size == 256
    words = ("--steps", "1000", "--warm-start-steps", "100")
    made = dvae.plan(parsed("dvae", "train", "--data", data, *words), 1)
    assert made.train.lr_steps == 900 and made.train.tau_steps == 540
    words = ("--preset", "emoji", "--steps", "500", "--lr-start", "0.5", "--vocab-size", "64")
    made = dvae.plan(parsed("dvae", "train", "--data", data, *words), 1)
    assert (made.train.warm_start_steps, made.train.lr_start, made.train.lr_steps) == (
        350,
        0.5,
        150,
    )
    assert made.model.vocab_size == 64 and len(made.validation) == 2


PAPER = PriorTrainConfig()
NOTES = [  # (lines, what one of them says)
    (notes.prior_notes(PAPER, PAPER, 2000), "warmup_steps 5000 is not less than the 2000 updates"),
    (notes.prior_notes(PAPER, PAPER, 2000), "hold 45% of the first ones after 2000 updates"),
    (
        notes.prior_notes(*[replace(PAPER, decay_steps=9)] * 2, 10**6),
        "decay_steps 9 does nothing without --decay cosine",
    ),
    (
        notes.prior_notes(*[replace(PAPER, decay="cosine", decay_steps=9)] * 2, 10**6),
        "decay_steps 9 ends before the run: 999991 updates change nothing",
    ),
    (
        notes.prior_notes(*[replace(PAPER, decay="none", plateau_patience=9)] * 2, 10**6),
        "plateau_patience 9 does nothing without --decay plateau",
    ),
    (
        notes.prior_notes(*[replace(PAPER, muon_scale=9.0)] * 2, 10**6),
        "muon_scale 9.0 does nothing without --optimizer muon",
    ),
    (
        notes.prior_notes(*[replace(PAPER, head_scale=9.0)] * 2, 10**6),
        "head_scale 9.0 does nothing without --image-init codebook",
    ),
    (notes.dvae_notes(*[DvaeTrainConfig()] * 2, 2000), "tau_steps 150000 is more than the 2000"),
    (notes.dvae_notes(*[DvaeTrainConfig()] * 2, 2000), "hold 14% of the first ones after 2000"),
    (
        notes.dvae_notes(*[DvaeTrainConfig(mse_weight=3.0)] * 2, 10**7),
        "mse_weight 3.0 does nothing without --distortion mse",
    ),
    (
        notes.dvae_notes(*[DvaeTrainConfig(codebook_sharpness=3.0)] * 2, 10**7),
        "codebook_sharpness 3.0 does nothing without warm_start_steps",
    ),
    (
        notes.dvae_notes(*[DvaeTrainConfig(kl_weight=0.0, kl_steps=9)] * 2, 10**7),
        "kl_steps 9 does nothing with kl_weight 0",
    ),
    (notes.ranker_notes(*[RankerTrainConfig()] * 2, 9, True), "warmup 50 is not less than the 9"),
    (
        notes.ranker_notes(*[RankerTrainConfig(reconstructed=0.5)] * 2, 99, False),
        "reconstructed 0.5 does nothing without --vae",
    ),
    (
        notes.dvae_notes(*[DvaeTrainConfig(lr_steps=0, lr_start=3.0)] * 2, 10**7),
        "lr_start 3.0 does nothing with lr_steps 0",
    ),
    (
        notes.prior_notes(*[replace(PAPER, stochastic_rounding=True)] * 2, 10**6),
        "stochastic_rounding True does nothing without --half-weights",
    ),
    (
        notes.ranker_notes(*[RankerTrainConfig(reconstructed=0, num_spliced=0)] * 2, 99, True),
        "vae does nothing with reconstructed 0 and num_spliced 0",
    ),
    (
        notes.loop_notes(LoopConfig(out=Path("x"), steps=1, validate_every=5), False),
        "validate_every 5 does nothing without --validation",
    ),
    (
        notes.cluster_notes(ClusterConfig(machines=2), 1),
        "machines 2 does nothing on one process; torchrun starts several",
    ),
]


@pytest.mark.parametrize(("lines", "part"), NOTES, ids=[part for _, part in NOTES])
def test_options_without_effect_are_noted(lines, part):
    said = list(lines)
    assert any(part in line for line in said), said
    assert all("\n" not in line for line in said)


def test_the_paper_at_its_own_length_has_no_notes():
    assert not list(notes.dvae_notes(*[DvaeTrainConfig()] * 2, 3_000_000))
    assert not list(notes.prior_notes(PAPER, PAPER, 430_000))
    assert not list(notes.cluster_notes(ClusterConfig(machines=2), 4))


def test_the_share_of_the_first_weights_is_that_of_the_average():
    model = DiscreteVAE.from_preset("tiny", n_hid=8, n_init=8, vocab_size=8)
    for decay, every, warmup in ((0.99, 1, True), (0.9, 3, False), (0.0, 1, True)):
        average = IterateAverage(model, decay, every, warmup=warmup)
        for step in range(30):
            average.update(step)
        assert first_share(decay, 30 // every, warmup) == average.first_share
