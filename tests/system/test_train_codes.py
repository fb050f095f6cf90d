"""`dalle train` on codes: their dVAE is taken as it is, and all other parts are trained."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dalle import cli
from dalle.commands.encode import EncodeConfig, encode
from dalle.data.codes import CodePairs, ShardRecord, map_shard, tokens_of
from dalle.data.decoded import IN_MEMORY, DecodedPairs
from dalle.data.folder import FolderPairs
from dalle.data.mixture import MixedPairs
from dalle.data.pairs import ArrayPairs
from dalle.data.split import Subset, hold_out
from dalle.demo import pace as pace_module
from dalle.demo import run, sizing
from dalle.demo import train as command
from dalle.demo.codes import FEWEST, CodesSet
from dalle.demo.pace import DECODE, Pace, measure
from dalle.demo.sets import varied
from dalle.demo.sizing import TIERS, SizesConfig, build, choose
from dalle.demo.verdict import verdict
from dalle.errors import DataError, UsageError
from dalle.pipeline import Pipeline
from dalle.pretrained import fingerprint
from dalle.recipes import quick_ranker
from dalle.reproduce.sets import open_set
from dalle.train.prior import PriorTask
from dalle.train.ranker import RankerTask, RankerTrainConfig
from support.prior import COLOURS, make_parts

SIZES = (
    "--ranker-steps 8 --prior-width 32 --prior-layers 1 --prior-steps 30 --num-samples 2 "
    "--validation 0.2"
).split()
SMALL = {"batch_size": 8, "num_spliced": 4}


def paced(*_):
    return {
        DECODE: Pace(0.001, 0.0),
        **dict.fromkeys(("data", "dvae", "ranker", "prior", "samples"), Pace(0.01, 1.0)),
    }


def write_pictures(folder, count=40):
    """Flat pictures of 8 pixels, one of them broken."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        name = list(COLOURS)[i % 3]
        image = np.array(COLOURS[name]) + rng.integers(-30, 30, (8, 8, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"{name} {i % 5}")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    _, vae, _ = make_parts()
    vae.save_pretrained(home / "vae")
    made = {"data": str(write_pictures(home / "pairs")), "vae": home / "vae", "image_size": 8}
    encode(EncodeConfig(**made, out=home / "codes", shard_size=16))
    return home


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run, "measure", paced)
    monkeypatch.setattr(sizing, "quick_ranker", lambda n: replace(quick_ranker(n), **SMALL))


def words(home, out, *more, codes="codes", vae="vae"):
    named = ["--vae", str(home / vae)] if vae else []
    data = [] if "--data" in more else ["--data", str(home / codes)]
    return ["train", *data, *named, "--out", str(out), *SIZES, *more]


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure", paced)
        patch.setattr(sizing, "quick_ranker", lambda n: replace(quick_ranker(n), **SMALL))
        assert cli.main(words(home, out)) == 0
    return out, json.loads((out / "summary.json").read_text())


def test_all_but_the_dvae_is_trained_and_the_page_says_so(finished, home):
    out, summary = finished
    assert summary["complete"] and {"train_at_1", "ranker_accuracy", "prior_loss"} <= set(summary)
    assert not {"psnr", "psnr_train", "prior_elb"} & set(summary)
    assert not (out / "work/dvae").exists() and summary["recipe"]["vae_train"] is None
    counts = summary["data"]
    assert counts["pairs"] + counts["unseen_pairs"] == 39
    assert counts["skipped"] == {"does not decode": 1}
    pipeline = Pipeline.from_pretrained(out / "pipeline")
    assert fingerprint(pipeline.vae) == CodePairs(home / "codes").vae
    page = (out / "index.html").read_text()
    assert "the dVAE was ready and was not trained here" in page
    assert "Left the picture as its tokens give it back, right what the model drew" in page
    assert "true picture" not in page and "reconstructions.png" not in page
    assert not any("--codes" in s or "dVAE" in s for s in summary["verdict"])


def test_codes_in_use_are_counted_from_the_stored_tokens(finished, home):
    _, summary = finished
    codes = CodePairs(home / "codes")
    train = hold_out(codes, 0.2)[0]
    tokens = tokens_of(train, range(len(train)), [0] * len(train))
    assert summary["codes_used"] == len(tokens.unique())
    assert summary["code_share"] == summary["codes_used"] / 32


def test_what_needs_the_pictures_of_the_run_asks_for_them(finished):
    folder = finished[0] / "pipeline"
    line = "^reproduce: data: must be pictures, got the codes of .*; give the set by --data$"
    with pytest.raises(UsageError, match=line):
        open_set("reproduce", folder, Pipeline.from_pretrained(folder), None, 0)


def test_the_same_command_or_its_options_do_nothing_more(finished, home, capsys, monkeypatch):
    out, summary = finished
    monkeypatch.setattr(RankerTask, "train_step", lambda *_: pytest.fail("trained again"))
    config = ["train", "--config", str(out / "config.yaml"), "--out", str(out)]
    for again in (words(home, out), config):
        assert cli.main(again) == 0
        assert "ready: 8 x 8 pixels to 4 x 4 codes of 32" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text())["seconds"] == summary["seconds"]


def test_a_run_that_was_killed_twice_ends_with_the_same_weights(
    finished, home, tmp_path, monkeypatch
):
    whole, _ = finished
    out = tmp_path / "run"
    for task, at in ((RankerTask, 5), (PriorTask, 20)):
        step = task.train_step

        def killed(self, number, step=step, at=at):
            if number == at:
                raise RuntimeError("killed")
            return step(self, number)

        with monkeypatch.context() as patch:
            patch.setattr(task, "train_step", killed)
            assert cli.main(words(home, out)) == 1
    assert cli.main(words(home, out)) == 0
    for name in ("pipeline/ranker/model", "pipeline/prior/model", "pipeline/vae/model"):
        file = f"{name}.safetensors"
        assert (out / file).read_bytes() == (whole / file).read_bytes(), name
    tokens = "work/samples.safetensors"
    assert (out / tokens).read_bytes() == (whole / tokens).read_bytes()


def test_another_dvae_cannot_go_on_with_a_run(finished, home, tmp_path, capsys):
    """Not even where the codes at the same place are of it."""
    out, _ = finished
    shutil.copytree(home / "codes", tmp_path / "kept")
    with_other = make_parts()[1]
    next(with_other.parameters()).data.add_(0.01)
    with_other.save_pretrained(tmp_path / "vae")
    for path in (home / "codes").glob("c*"):
        path.unlink()
    made = {"data": str(home / "pairs"), "vae": tmp_path / "vae", "image_size": 8}
    encode(EncodeConfig(**made, out=home / "codes", shard_size=16))
    try:
        assert cli.main(words(home, out, vae=tmp_path / "vae")) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(r"train: vae must be SHA-256 \w+ as in .*, got SHA-256 .*", error)
    finally:
        shutil.rmtree(home / "codes")
        shutil.copytree(tmp_path / "kept", home / "codes")


def other_vae(home):
    vae = make_parts()[1]
    next(vae.parameters()).data.add_(1)
    vae.save_pretrained(home / "other")
    return "other"


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (
            {"vae": ""},
            2,
            "train: vae must be the dVAE that made .*, got none; add --vae /",
        ),
        ({"vae": other_vae}, 2, "train: vae must be the one that .* was encoded with .*, got anot"),
        ({"vae": "nowhere"}, 3, ".*nowhere.*"),
        ({"codes": "pairs"}, 2, "train: vae must be left out with pictures, .* dalle data encode"),
        ({"more": "--dvae-steps 5"}, 2, "train: dvae_steps must be left out with codes, .* got 5"),
        ({"more": "--dvae-width 8"}, 2, "train: dvae_width must be left out with codes, .* got 8"),
        ({"more": "--image-size 16"}, 2, "train: image_size must be 8 for the codes of .*, got 16"),
        ({"more": "--patch 4"}, 2, "train: patch must be 2 for the codes of .*, got 4"),
        ({"more": "--codes 64"}, 2, "train: codes must be 32 for the codes of .*, got 64"),
        (
            {"more": "--data {}/pairs=1 --data {}/codes=1"},
            2,
            "data: parts must be all pictures or all codes, got both",
        ),
        ({"more": "--data shapes"}, 2, "train: vae must be left out with pictures"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_held_out_or_written(
    options, code, line, home, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "hold_out", lambda *_: pytest.fail("held out"))
    chosen = {key: value(home) if callable(value) else value for key, value in options.items()}
    more = chosen.pop("more", "").replace("{}", str(home)).split()
    assert cli.main(words(home, tmp_path / "run", *more, **chosen)) == code
    error = capsys.readouterr().err.splitlines()
    assert re.match(line, error[-1]), error
    assert len(error) == 1 and not (tmp_path / "run").exists()


def test_a_damaged_store_is_one_line_and_nothing_is_written(home, tmp_path, capsys):
    codes = shutil.copytree(home / "codes", tmp_path / "codes")
    shard = codes / "codes-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert cli.main(words(home, tmp_path / "run", codes=codes)) == 3
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search("codes-000001.safetensors must have the SHA-256 .* data encode", error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("header", "got"),
    [
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"[]", "other fields in its header"),
        (b'{"codes": {}}', "other fields in its header"),
        (b'{"codes": {"data_offsets": [0, 0]}}', "0 numbers of codes"),
        (b'{"codes": {"data_offsets": [0, 16]}}', "mmap length is greater than file size"),
    ],
)
def test_a_damaged_header_of_a_shard_is_one_line(tmp_path, header, got):
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    record = ShardRecord(name="x", items=2, captions=2, several=0, bytes=9, sha256="", skipped={})
    with pytest.raises(DataError, match=f"x must be a shard of codes, got: {got}$"):
        map_shard(tmp_path / "x", record, 1, (2, 2))


def test_pictures_of_several_sizes_or_of_an_odd_one_are_refused(home, tmp_path, capsys):
    for size in (4, 8):
        made = {"data": str(home / "pairs"), "vae": home / "vae", "image_size": size}
        encode(EncodeConfig(**made, out=tmp_path / str(size)))
    both = ["--data", f"{tmp_path / '4'}=1", "--data", f"{tmp_path / '8'}=1"]
    assert cli.main(words(home, tmp_path / "run", *both)) == 2
    assert "train: codes must be of pictures of one size, got 4 in" in capsys.readouterr().err
    torch.manual_seed(0)
    vae = type(make_parts()[1]).from_preset(
        "tiny", stem="patch", patch=3, n_hid=16, n_blk_per_group=1, n_init=8, vocab_size=32
    )
    vae.save_pretrained(tmp_path / "odd")
    made = {"data": str(home / "pairs"), "vae": tmp_path / "odd", "image_size": 9}
    encode(EncodeConfig(**made, out=tmp_path / "odd-codes"))
    capsys.readouterr()
    assert cli.main(words(tmp_path, tmp_path / "run", codes="odd-codes", vae="odd")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match("train: image_size must be even .* got 9 in .* such as --image-size 12", line)


def test_decoded_pictures_are_those_of_the_dvae_whatever_was_decoded_before(home):
    vae, codes = make_parts()[1], CodePairs(home / "codes")
    train, held = hold_out(codes, 0.2)
    decoded = DecodedPairs(train, vae)
    _, first = decoded.load(3), decoded.load(1)
    assert np.array_equal(first, DecodedPairs(train, vae).load(1))
    tokens = torch.from_numpy(codes.tokens(train.items[1]).astype(np.int64)).view(1, 4, 4)
    expected = (vae.decode(tokens)[0] * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(first, expected) and first.shape == (8, 8, 3)
    assert list(decoded.captions) == list(train.captions) and len(held) + len(decoded) == 39
    ranker = RankerTask(
        make_ranker(), decoded, RankerTrainConfig(batch_size=8, group=1), vae, steps=5
    )
    items, images, _ = ranker.views(2)
    codes_of, pictures = ranker._cached_round_trip(items.tolist(), images)
    assert torch.equal(codes_of.flatten(1), tokens_of(train, items.tolist(), [0] * 8))
    assert pictures is images and not ranker.vae_cache


def make_ranker():
    from dalle.ranker.model import ContrastiveRanker

    return ContrastiveRanker.from_preset("tiny", tokenizer=make_parts()[0], image_size=8)


def test_where_decoding_is_slow_few_pictures_are_decoded_and_splices_are_of_pixels(home):
    codes = CodePairs(home / "codes")
    part = Subset(MixedPairs([codes, codes], [1.0, 3.0], ["a", "b"]), range(78))
    data = CodesSet(part, Subset(codes, range(39)), make_parts()[1])
    many = IN_MEMORY // (3 * 8 * 8)
    stages = data.bounded(paced(), 10, 96)
    assert data.limit == 60_000 < many and data.splice_codes and "all 78 pairs" in data.note
    assert data.for_ranker == (data.train, data.unseen[0]) and DECODE not in stages
    assert stages["ranker"].fixed == pytest.approx(1 + 0.001 * (78 + 39))
    assert stages["samples"].fixed == pytest.approx(1 + 0.001 * 96)
    data.bounded({**paced(), DECODE: Pace(0.6, 0.0)}, 60, 96)
    assert data.limit == 600 and not data.splice_codes
    data.bounded({**paced(), DECODE: Pace(0.6, 0.0)}, 4.5, 96)
    assert data.limit == FEWEST
    data.limit = 20
    train, held = data.for_ranker
    assert (len(train), len(held)) == (20, 32) and "of 20 of 78 pairs" in data.note
    assert set(data._compared("train")) == set(data._items("train"))
    assert data.train.mixture() == ([39, 78], [1.0, 3.0])  # of the prior
    assert train.mixture() == ([5, 20], [1.0, 3.0])  # of the ranker


def test_a_few_items_have_two_captions_where_the_set_has_them():
    pairs = ArrayPairs("one", np.zeros((50, 4, 4, 3), np.uint8), ["a"] * 50)
    pairs.captions = [*["a"] * 20, "b", *["a"] * 29]
    assert varied(pairs, 5).tolist() == [0, 12, 20, 24, 36]
    pairs.captions = ["a"] * 50
    assert varied(pairs, 5).tolist() == [0, 12, 24, 36, 49]
    one = ArrayPairs("small", np.zeros((2, 4, 4, 3), np.uint8), ["a"] * 2)
    mixture = MixedPairs([pairs, one], [1e3, 1.0])
    assert varied(mixture, 5).tolist() == [0, 16, 32, 49, 50]  # of each part
    one.captions = ["a", "b"]
    assert varied(mixture, 5).tolist() == [0, 16, 32, 49, 50, 51]


def test_the_pace_is_measured_with_a_dvae_that_is_ready(home, monkeypatch):
    monkeypatch.setattr(pace_module, "ROUNDS", 1)
    vae = make_parts()[1]
    data = CodesSet(*hold_out(CodePairs(home / "codes"), 0.2), vae)
    sizes = choose(
        SizesConfig(image_size=8, patch=2, codes=32, prior_width=32, prior_layers=1),
        data.train,
        TIERS["quick"],
        ready=True,
    )
    assert sizes.dvae_steps is None and sizes.dvae_width is None
    recipe = build(sizes, len(data.train), vae)
    for slow in (1.0, 0.0):
        monkeypatch.setattr(pace_module, "SLOW", slow)
        found = measure(recipe, data.train, torch.device("cpu"), 4, vae)
        assert 0 < found[DECODE].update < 1 and 0 < found["ranker"].update < 60
        assert found["dvae"].update == 0 and found["prior"].fixed == 1


def test_several_crops_are_drawn_by_the_prior(home, tmp_path):
    made = {"data": str(home / "pairs"), "vae": home / "vae", "image_size": 4}
    encode(EncodeConfig(**made, out=tmp_path / "codes", augment="paper", crops=2))
    data = CodesSet(*hold_out(CodePairs(tmp_path / "codes"), 0.2), make_parts()[1])
    sizes = choose(SizesConfig(image_size=4), data.train, TIERS["quick"], ready=True)
    assert build(sizes, 40, data.vae, data.augment).prior_train.augment == "paper"
    assert CodesSet(*hold_out(CodePairs(home / "codes"), 0.2), data.vae).augment == "none"


def test_a_dvae_that_is_ready_gets_no_advice():
    scores = {"data": {"pairs": 300}, "code_share": 0.1}
    assert verdict(scores, [], "DIR", own_dvae=False) == []
    assert "half the --codes" in verdict(scores, [], "DIR")[0]


def test_held_out_codes_are_those_of_the_pictures(home):
    """So a training on codes and one on their pictures hold out the same."""
    pictures, codes = FolderPairs(home / "pairs"), CodePairs(home / "codes")
    held = [hold_out(pairs, 0.2)[1] for pairs in (pictures, codes)]
    names = [{pairs.captions[i] for i in range(len(pairs))} for pairs in held]
    assert names[0] == names[1]
