"""A code store trains a prior as pictures do, is bound to its dVAE, and goes on after a stop."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle.cli import load_target
from dalle.commands import encode as command
from dalle.commands.data_pack import PackConfig, pack
from dalle.commands.data_stats import StatsConfig, stats
from dalle.commands.encode import EncodeConfig, encode
from dalle.commands.presets import split_pairs
from dalle.commands.report import next_command
from dalle.data.codes import CodePairs, stores_of, tokens_of
from dalle.data.folder import FolderPairs
from dalle.data.mixture import MixedPairs, with_choice
from dalle.data.pairs import captions_of
from dalle.data.sources import load_pairs
from dalle.data.split import hold_out
from dalle.demo.sets import open_parts
from dalle.errors import DataError, UsageError
from dalle.options import parse_options
from dalle.train.config import LoopConfig
from dalle.train.loop import train
from dalle.train.metrics import read_metrics
from dalle.train.prior import PriorTask
from support.prior import SMALL, make_parts, make_task


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Twelve pictures, one of them broken, one with two captions; a dVAE; their codes."""
    home = tmp_path_factory.mktemp("home")
    _, vae, toy = make_parts()
    vae.save_pretrained(home / "vae")
    (home / "pairs").mkdir()
    for i, (image, caption) in enumerate(zip(toy.images, toy.captions, strict=True)):
        Image.fromarray(image).save(home / f"pairs/{i:02d}.png")
        (home / f"pairs/{i:02d}.txt").write_text(caption + "\nünder" * (i == 3), encoding="utf-8")
    broken = (home / "pairs/05.png").read_bytes()
    (home / "pairs/05.png").write_bytes(broken[: len(broken) // 2])
    encode(options(home))
    return home


def options(home, **changes):
    folder = {"data": str(home / "pairs"), "vae": home / "vae", "out": home / "codes"}
    return EncodeConfig(**(folder | {"image_size": 8, "shard_size": 5, "batch_size": 3} | changes))


def prior_task(data, config=SMALL, vae=None, validation=None):
    parts = make_parts()
    model = make_task(parts).model
    return PriorTask(model, parts[0], vae or parts[1], data, config, validation=validation)


def losses(task, out, steps=5):
    train(task, LoopConfig(out=out, steps=steps, log_every=1, picture_every=0, validate_every=2))
    return [
        (record["loss"], record.get("val_loss")) for record in read_metrics(out / "metrics.jsonl")
    ]


def test_codes_and_captions_are_those_of_the_pictures(home):
    pairs, codes = FolderPairs(home / "pairs"), load_pairs(str(home / "codes"), image_size=0)
    usable = [i for i in range(12) if i != 5]
    assert isinstance(codes, CodePairs) and len(codes) == 11 and codes.grid == (4, 4)
    assert [captions_of(codes, k) for k in range(11)] == [
        list(captions_of(pairs, i)) for i in usable
    ]
    assert dict(codes.several) == {3: ["red", "ünder"]} and len(codes.several) == 1
    expected = prior_task(pairs).tokens
    assert np.array_equal(tokens_of(codes, range(11), [0] * 11), expected)
    assert codes.number_of_captions() == 12 and codes.skipped.total() == 1
    assert np.array_equal(pickle.loads(pickle.dumps(codes)).tokens(4), codes.tokens(4))


def test_the_loss_curve_is_that_of_the_pictures_bit_for_bit(home, tmp_path):
    parts = [hold_out(p, 0.2) for p in (FolderPairs(home / "pairs"), CodePairs(home / "codes"))]
    curves = [
        losses(prior_task(pairs, validation=held), tmp_path / str(k))
        for k, (pairs, held) in enumerate(parts)
    ]
    assert curves[0] == curves[1] and curves[0][-1][1] is not None


def test_crops_of_the_papers_augmentation_are_drawn_from_the_store(home, tmp_path):
    for i in range(12):
        (home / "large").mkdir(exist_ok=True)
        rng = np.random.default_rng(i)
        picture = Image.fromarray(rng.integers(0, 255, (14, 20, 3), np.uint8))
        picture.save(home / f"large/{i}.png")
        (home / f"large/{i}.txt").write_text("word")
    out = tmp_path / "codes"
    encode(options(home, data=str(home / "large"), augment="paper", crops=3, out=out))
    codes = CodePairs(out)
    assert codes.crops == 3 and len({codes.tokens(0, crop).tobytes() for crop in range(3)}) > 1
    config = replace(SMALL, augment="paper", batch_size=12)
    task, again = (prior_task(codes, config) for _ in range(2))
    assert np.array_equal(task.batch(3).tokens, again.batch(3).tokens)
    items = task.sampler.indices(0)
    chosen = [
        [np.array_equal(row, codes.tokens(int(item), crop)) for crop in range(3)]
        for item, row in zip(items, task.batch(0).tokens, strict=True)
    ]
    assert np.array(chosen).any(1).all() and (np.argmax(chosen, 1) > 0).any()


def test_pictures_that_cannot_be_encoded_are_named_and_no_more_than_ten(home, tmp_path, capsys):
    (tmp_path / "pairs").mkdir()
    for i in range(14):
        side = 4 if i else 9
        Image.new("RGB", (side, 9), (i, 0, 0)).save(tmp_path / f"pairs/{i:02d}.png")
        (tmp_path / f"pairs/{i:02d}.txt").write_text("word")
    data = str(tmp_path / "pairs")
    encode(options(home, data=data, augment="paper", out=tmp_path / "codes"))
    said = capsys.readouterr()
    assert said.err.count("pairs: left out: ") == 10 and "pairs/01.png: " in said.err
    assert "1 pictures in 3 shards" in said.out and "; left out 13: 13 x smaller" in said.out


def test_a_set_without_a_usable_picture_is_an_error_and_not_a_next_command(home, tmp_path, capsys):
    (tmp_path / "pairs").mkdir()
    for name in ("05.png", "05.txt"):  # broken
        shutil.copy(home / "pairs" / name, tmp_path / "pairs" / name)
    data = str(tmp_path / "pairs")
    for verb, run in (
        ("encode", lambda: encode(options(home, data=data, out=tmp_path / "codes"))),
        ("pack", lambda: pack(PackConfig(data=data, out=tmp_path / "packed", verify="full"))),
    ):
        with pytest.raises(DataError, match=f"^data {verb}: .*pairs must hold a picture that can"):
            run()
        said = capsys.readouterr().out
        assert "left out 1: 1 x does not decode" in said and "next" not in said
    stats(StatsConfig(data=data, out=tmp_path / "stats"))
    assert "1 of 1 pictures could not be measured" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["", "RUN", "PIPELINE"])
def test_the_next_command_is_complete(place, home, tmp_path, capsys):
    vae = tmp_path / {"": "vae", "RUN": "my run/dvae/model", "PIPELINE": "my run/vae"}[place]
    shutil.copytree(home / "vae", vae)
    out, tokenizer = tmp_path / "my codes", tmp_path / "my run/tokenizer"
    if place:
        make_parts()[0].save_pretrained(tokenizer)
    encode(options(home, vae=vae, out=out))
    said = capsys.readouterr().out
    short = shlex.split(said.split(" in one command: ")[1].splitlines()[0])
    one_command = ["train", "--data", str(out), "--vae", str(vae), "--out", f"{out}-train"]
    assert short == ["dalle", *one_command]
    parse_options(load_target(("train",))[1], one_command[1:], prog="dalle")
    words = shlex.split(said.split(": next: ")[1])
    expected = f"dalle tokenizer train --data OUT --out {tmp_path}/tokenizer"
    if place:
        expected = "dalle prior train --data OUT --preset tiny --tokenizer TOKENIZER --vae VAE"
        expected += " --out OUT-prior"
    known = {
        "OUT": str(out),
        "TOKENIZER": str(tokenizer),
        "VAE": str(vae),
        "OUT-prior": f"{out}-prior",
    }
    assert words == [known.get(word, word) for word in expected.split()]
    parse_options(
        load_target(("prior", "train") if place else ("tokenizer", "train"))[1],
        words[3:],
        prog="dalle",
    )


def test_the_next_commands_of_codes_name_what_they_were_made_of(home, tmp_path, monkeypatch):
    """So that each runs as it is printed; PICTURES and VAE stand for what has gone."""
    monkeypatch.chdir(tmp_path)
    for name in ("pairs", "vae"):
        shutil.copytree(home / name, tmp_path / name)
    encode(
        options(home, data="pairs", vae=Path("vae"), augment="paper", crops=2, out=Path("codes"))
    )
    make_parts()[0].save_pretrained("run/tokenizer")
    tokenizer = {"tokenizer": Path("run/tokenizer")}
    prior = "dalle prior train --data codes --preset tiny --augment paper --tokenizer run/tokenizer"
    assert next_command("codes", "tiny", Path("run"), **tokenizer) == (
        f"{prior} --vae vae --out run/prior"
    )
    encode(options(home, data="pairs", vae=Path("vae"), out=Path("more")))
    (tmp_path / "run/prior/model").mkdir(parents=True)
    (tmp_path / "run/prior/model/config.json").write_text("{}")
    ranker = "dalle ranker train --data {} --preset tiny --tokenizer run/tokenizer --vae {}"
    said = next_command("codes=0.5\nmore=2", "tiny", Path("run"), **tokenizer)
    assert "--data pairs=0.5 --data pairs=2 --preset" in said
    for pictures, vae in (("pairs", "vae"), ("PICTURES", "VAE")):
        said = next_command("codes", "tiny", Path("run"), **tokenizer)
        assert said == f"{ranker.format(pictures, vae)} --out run/ranker"
        for name in ("pairs", "vae"):
            shutil.rmtree(name, ignore_errors=True)


@pytest.mark.parametrize(
    ("keys", "value", "got"),
    [
        (("num_codes",), "x", "got num_codes 'x'"),
        (("grid",), [4, None], r"got grid \[4, None\]"),
        (("crops",), 0, "got crops 0"),
        (("shards",), {}, "got shards {}"),
        (("shards", 0, "name"), "../codes-000000.safetensors", "got name "),
        (("shards", 0, "items"), None, "got items None"),
        (("shards", 0, "bytes"), 1 << 70, "got bytes 1180"),
        (("shards", 0, "skipped"), 0, "got skipped 0"),
    ],
)
def test_a_damaged_head_is_one_line(keys, value, got, home, tmp_path):
    shutil.copytree(home / "codes", tmp_path / "codes")
    head = json.loads((tmp_path / "codes/codes.json").read_bytes())
    inner = head
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / "codes/codes.json").write_text(json.dumps(head))
    with pytest.raises(DataError, match=f"^data: .*codes.json must .*{got}"):
        CodePairs(tmp_path / "codes")


def test_another_dvae_or_grid_is_refused_in_one_line(home):
    codes = CodePairs(home / "codes")
    _, vae, _ = make_parts()
    with_other = make_parts()[1]
    next(with_other.parameters()).data.add_(1)
    with pytest.raises(UsageError, match=r"^prior train: vae must be the one that .* \(SHA-256 "):
        prior_task(codes, vae=with_other)
    parts = make_parts()
    model = make_task(parts, grid=(2, 2)).model
    with pytest.raises(UsageError, match="^prior train: image_size must be 8 for the codes"):
        PriorTask(model, parts[0], vae, codes, SMALL)


@pytest.mark.parametrize("augment", ["none", "paper"])
def test_workers_read_codes_ahead_and_change_no_bit(augment, home, tmp_path):
    def curve(workers):
        task = prior_task(CodePairs(home / "codes"), replace(SMALL, augment=augment))
        task.loader.workers = workers
        out = tmp_path / str(workers)
        train(task, LoopConfig(out=out, steps=3, log_every=1, picture_every=0))
        records = read_metrics(out / "metrics.jsonl")
        return [(record["loss"], 0 <= record["data_wait"] <= 1) for record in records]

    assert curve(0) == curve(1)


def test_a_shard_that_goes_ends_a_training_with_a_checkpoint_and_it_goes_on_once_it_is_back(
    home, tmp_path
):
    out = tmp_path / "codes"
    encode(options(home, out=out))
    expected = losses(prior_task(CodePairs(out)), tmp_path / "whole")
    codes = CodePairs(out)
    task = prior_task(codes)
    step = task.train_step

    def train_step(number):
        if number == 3:
            (out / "codes-000001.safetensors").unlink()
            codes._open.clear()  # as where it was not read yet
        return step(number)

    task.train_step = train_step
    with pytest.raises(DataError, match="must be readable, got: .*; the same `dalle data encode`"):
        losses(task, tmp_path / "run")
    assert (tmp_path / "run/step-00000003").is_dir()
    encode(options(home, out=out))
    assert losses(prior_task(CodePairs(out)), tmp_path / "run") == expected


def test_shards_of_a_finished_store_that_are_damaged_or_gone_are_made_anew(home, tmp_path, capsys):
    out = tmp_path / "codes"
    encode(options(home, out=out))
    whole, first = files_of(out), (out / "codes-000000.safetensors").stat().st_mtime_ns
    (out / "codes-000001.safetensors").unlink()
    content = bytearray(whole["codes-000002.safetensors"])
    content[-1] ^= 1
    (out / "codes-000002.safetensors").write_bytes(content)
    again = r"got: No such file or directory; the same `dalle data encode` makes it anew$"
    with pytest.raises(DataError, match=again):
        CodePairs(out)
    (out / "codes-000001.safetensors").write_bytes(whole["codes-000001.safetensors"])
    with pytest.raises(DataError, match="must have the SHA-256 .*; the same `dalle data encode`"):
        split_pairs("prior train", str(out), CodePairs(out), None, "quick", 8, 0)
    (out / "codes-000001.safetensors").unlink()
    capsys.readouterr()
    encode(options(home, out=out))
    assert "data encode: 2 of 3 shards are made anew" in capsys.readouterr().err
    assert files_of(out) == whole
    assert (out / "codes-000000.safetensors").stat().st_mtime_ns == first
    encode(options(home, out=out))
    assert capsys.readouterr().out == f"data encode: {out} is encoded already\n"


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "config.yaml"}


def test_a_stopped_encoding_goes_on_and_gives_the_same_files(home, tmp_path, monkeypatch):
    whole = files_of(home / "codes")
    made = command._encode_items

    def stop(config, vae, pairs, size, items, bar):
        if items[0]:
            raise KeyboardInterrupt
        return made(config, vae, pairs, size, items, bar)

    out = tmp_path / "codes"
    monkeypatch.setattr(command, "_encode_items", stop)
    with pytest.raises(KeyboardInterrupt, match="^data encode: stopped .* the same command goes"):
        encode(options(home, out=out))
    (left := out / "codes-000001.safetensors.tmp-0123abcd").write_bytes(b"of a killed process")
    os.utime(left, (0, 0))
    with pytest.raises(DataError, match="must be encoded to the end"):
        CodePairs(out)
    first = (out / "codes-000000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(command, "_encode_items", made)
    encode(options(home, out=out))
    assert files_of(out) == whole
    assert (out / "codes-000000.safetensors").stat().st_mtime_ns == first
    encode(options(home, out=out))  # nothing left to do
    with pytest.raises(UsageError, match="^data encode: out must hold codes of this data"):
        encode(options(home, out=out, image_size=4))
    with pytest.raises(UsageError, match="out must be a new or empty folder"):
        encode(options(home, out=home / "pairs"))


def test_a_damaged_or_missing_shard_is_named(home, tmp_path):
    out = tmp_path / "codes"
    encode(options(home, out=out))
    shard = out / "codes-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    codes = CodePairs(out)
    codes.tokens(0)
    with pytest.raises(DataError, match="codes-000001.safetensors must have the SHA-256"):
        codes.tokens(7)
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match="codes-000001.safetensors must have [0-9,]+ bytes, got"):
        CodePairs(out)
    shard.unlink()
    with pytest.raises(DataError, match="codes-000001.safetensors must be readable, got"):
        CodePairs(out)
    head = json.loads((out / "codes.json").read_text())
    for damage, line in (({"format_version": 9}, "format_version"), ({"shards": [{}]}, "describe")):
        (out / "codes.json").write_text(json.dumps(head | damage))
        with pytest.raises(DataError, match=line):
            CodePairs(out)


def test_codes_in_subsets_and_mixtures_but_not_with_pictures(home):
    codes = CodePairs(home / "codes")
    both = with_choice(MixedPairs([codes, codes], [1.0, 2.0]), "first")
    assert len(stores_of(both)) == 2
    assert np.array_equal(tokens_of(both, [13], [0])[0], codes.tokens(2))
    held = hold_out(codes, 0.3)[1]
    assert np.array_equal(tokens_of(held, [0], [0])[0], codes.tokens(held.items[0]))
    with pytest.raises(UsageError, match="parts must be all pictures or all codes"):
        stores_of(MixedPairs([codes, FolderPairs(home / "pairs")]))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"crops": 2}, "crops must be 1 without --augment paper, got 2"),
        ({"crops": 0}, "crops must be "),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_options_out_of_range(home, changes, line):
    with pytest.raises(UsageError) as caught:
        options(home, **changes)
    assert str(caught.value).startswith("data encode: ") and line in str(caught.value)


def test_codes_are_no_pictures(home):
    codes = str(home / "codes")
    with pytest.raises(UsageError, match="^data encode: data must be pictures, got the codes of"):
        encode(options(home, data=codes, out=home / "again"))
    with pytest.raises(UsageError, match="^data: data must be pictures, got the codes of"):
        open_parts(codes, 0.1)
