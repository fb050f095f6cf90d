"""`dalle data check` of every kind of source: the same pictures give the same numbers."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dalle.cli import main
from dalle.commands.data_dedup import DedupConfig, dedup
from dalle.commands.data_filter import FilterConfig, filter_pairs
from dalle.commands.data_pack import PackConfig, pack
from dalle.commands.data_stats import StatsConfig, stats
from dalle.commands.encode import EncodeConfig, encode
from dalle.config_files import read_options
from dalle.data.sources import load_pairs
from dalle.errors import UsageError
from support.prior import make_parts


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Six pictures, the third broken: a folder, shards, a table, a filtered set, codes."""
    home = tmp_path_factory.mktemp("home")
    (home / "pairs").mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(6):
        path = home / f"pairs/{i}.png"
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"red {i}")
        lines.append(json.dumps({"file_name": f"pairs/{i}.png", "caption": f"red {i}"}))
    broken = home / "pairs/2.png"
    broken.write_bytes(broken.read_bytes()[:300])
    (home / "table.jsonl").write_text("\n".join(lines))
    pack(PackConfig(data=str(home / "pairs"), out=home / "shards", shard_size=4))
    dedup(DedupConfig(data=str(home / "shards"), out=home / "kept", by="exact"))
    _, vae, _ = make_parts()
    vae.save_pretrained(home / "vae")
    encode(
        EncodeConfig(
            data=str(home / "pairs"), vae=home / "vae", out=home / "codes", image_size=8,
            shard_size=3,
        )
    )  # fmt: skip
    return home


def checked(capsys, *words, code=0):
    capsys.readouterr()
    assert main(["data", "check", *map(str, words)]) == code
    return capsys.readouterr()


@pytest.mark.parametrize("source", ["pairs", "shards", "shards/00000.tar", "table.jsonl", "kept"])
def test_every_source_of_pictures(home, tmp_path, capsys, source):
    shown = checked(capsys, "--data", home / source, "--out", tmp_path / "out").out
    usable = 3 if source.endswith(".tar") else 5
    for line in (f"PNG {usable}", "width: 16 to 16", "left out: 1", "1 x does not decode"):
        assert line in shown, shown
    found = json.loads((tmp_path / "out/check.json").read_text())
    assert (found["usable"], found["captions"], found["left_out"]) == (
        usable, usable, {"does not decode": 1},
    )  # fmt: skip
    assert len(found["problems"]) == 1 and found["data"]["pairs"] >= usable


def test_several_sources_are_one(home, capsys):
    both = ("--data", f"{home / 'shards'}=1", "--data", f"{home / 'table.jsonl'}=2")
    assert "left out: 2\n  2 x does not decode" in checked(capsys, *both).out


def test_codes_are_compared_with_their_checksums(home, tmp_path, capsys):
    shown = checked(capsys, "--data", home / "codes", "--out", tmp_path).out
    assert "codes: 4 x 4 of" in shown and "shards: 2" in shown and "2 have their checksum" in shown
    assert "left out: 1\n  1 x does not decode" in shown and "5 pairs" in shown
    shard = home / "codes/codes-000001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    try:
        said = checked(capsys, "--data", home / "codes", code=3)
    finally:
        shard.write_bytes(whole)
    assert "1 have their checksum" in said.out and "codes-000001" in said.out
    assert said.out.count("must have the SHA-256") == 1  # not for each of its items
    assert said.err.splitlines()[-1].startswith("data check: the shards of ")
    line = checked(capsys, "--data", home / "codes", "--contact", tmp_path / "c.png", code=2).err
    assert "contact must be left out for codes" in line


def test_results_never_stand_in_for_what_they_are_made_of(home, tmp_path, capsys):
    for verb in ("check", "stats", "filter", "dedup", "pack"):
        words = ["data", verb, "--data", str(home / "kept"), "--out", str(home / "kept")]
        assert main(words) == 2
        line = f"data {verb}: out must be a new or empty folder, got that of data\n"
        assert capsys.readouterr().err == line
    with pytest.raises(UsageError, match="^data pack: out must be a folder outside of the shards"):
        pack(PackConfig(data=str(home / "shards"), out=home / "shards/again"))
    assert not (home / "shards/again").exists()
    one, two = tmp_path / "one", tmp_path / "two"
    dedup(DedupConfig(data=str(home / "kept"), out=one, by="exact"))
    dedup(DedupConfig(data=str(one), out=two, by="exact"))
    with pytest.raises(UsageError, match="got keep.json of another set in it$"):
        dedup(DedupConfig(data=str(two), out=one, by="exact"))
    dedup(DedupConfig(data=str(home / "kept"), out=one, by="exact"))  # the same once more
    assert len(load_pairs(str(two), image_size=0)) == 6


def test_no_result_lies_among_the_pictures_it_is_made_of(home, tmp_path, monkeypatch, capsys):
    """Not by a relative path, a link to the folder, a link in it, nor for a set made of it."""
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    shutil.copytree(home / "pairs", photos)
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(photos)
    (photos / "more").symlink_to(elsewhere)
    dedup(DedupConfig(data=str(photos), out=tmp_path / "kept", by="exact"))
    monkeypatch.chdir(photos)
    mixed = f"{home / 'shards'}=1", "--data", f"{photos}=2"
    for data, out in (
        (["."], "out"), ([photos], "../photos/a/b"), ([photos], tmp_path / "link/out"),
        ([tmp_path / "link"], photos / "out"), ([photos], elsewhere / "out"),
        ([photos], elsewhere), ([tmp_path / "kept"], photos / "out"), (mixed, "out"),
    ):  # fmt: skip
        for verb in ("check", "stats", "filter", "dedup", "pack", "encode"):
            vae = ["--vae", home / "vae"] if verb == "encode" else []
            words = ["data", verb, "--data", *data, "--out", out, *vae]
            assert main([*map(str, words)]) == 2
            line = f"data {verb}: out must be a folder outside of the pictures, got {out}\n"
            assert capsys.readouterr().err.endswith(line)
    assert sorted(os.listdir(photos)) == sorted([*os.listdir(home / "pairs"), "more"])
    assert not os.listdir(elsewhere)
    shutil.copytree(home / "pairs", tmp_path / "beside")
    stats(StatsConfig(data=str(tmp_path / "beside"), out=tmp_path / "beside-stats"))


def test_options_are_kept_beside_the_result(home, tmp_path):
    filter_pairs(FilterConfig(data=str(home / "pairs"), out=tmp_path / "kept"))
    stats(StatsConfig(data=str(home / "pairs"), out=tmp_path / "stats", limit=3))
    for name in ("kept", "stats"):
        assert read_options(tmp_path / name / "config.yaml")["data"].text == str(home / "pairs")
