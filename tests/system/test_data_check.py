"""`dalle data check` of every kind of source: the same pictures give the same numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dalle.cli import main
from dalle.commands.data_dedup import DedupConfig, dedup
from dalle.commands.data_pack import PackConfig, pack
from dalle.commands.encode import EncodeConfig, encode
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
    assert said.err.splitlines()[-1].startswith("data check: the shards of ")
    line = checked(capsys, "--data", home / "codes", "--contact", tmp_path / "c.png", code=2).err
    assert "contact must be left out for codes" in line
