"""`dalle data filter`, `dedup`, `check` and `stats` that were stopped go on to the same result."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle.commands import data_check, data_check_pass, data_filter, data_stats
from dalle.commands.data_check import CheckConfig, check
from dalle.commands.data_dedup import DedupConfig, dedup
from dalle.commands.data_filter import FilterConfig, filter_pairs
from dalle.commands.data_pack import PackConfig, pack
from dalle.commands.data_stats import StatsConfig, stats
from dalle.commands.encode import EncodeConfig, encode
from dalle.data import folder as folder_module
from dalle.data import progress
from dalle.data.filters import FilterRule
from dalle.data.folder import FolderPairs
from dalle.data.progress import FILE_NAME, finish, in_blocks
from dalle.data.shards import ShardPairs
from dalle.errors import DataError, EnvironmentProblem
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from support.prior import make_parts

RECORD = np.dtype([("square", "<i8"), ("odd", "?")])


class Full(io.FileIO):
    """A file on a disk that is full."""

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(progress, "BLOCK", 4)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(18):
        seed = rng.integers(0, 255, (9, 9, 3), np.uint8)
        image = Image.fromarray(seed).resize((40, 40 if i % 5 else 90), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:02d}.png")
        caption = "red dog" if i % 4 == 1 else "a brown dog runs over the green grass\nno"
        (folder / f"{i:02d}.txt").write_text(caption)
    (folder / "07.png").write_bytes((folder / "06.png").read_bytes())
    return str(folder)


def squares(seen, stop=99):
    def compute(items):
        if items.start >= stop:
            raise KeyboardInterrupt
        seen.extend(items)
        return np.array([(item**2, item % 2) for item in items], RECORD)

    return compute


def run(folder, seen, stop=99, total=10, **key):
    return in_blocks("pass", folder, key, total, RECORD, squares(seen, stop), " items")


@pytest.mark.parametrize("cut", [0, 1, 5, 40])
def test_what_was_cut_off_is_made_again(cut, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [], stop=8)
    path, seen = tmp_path / FILE_NAME, []
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    records = run(tmp_path, seen)
    assert seen == list(range(8 if cut == 0 else 4, 10))
    assert records["square"].tolist() == [i**2 for i in range(10)]
    assert f"pass: {10 - len(seen)} of 10 are there" in capsys.readouterr().err
    assert run(tmp_path, (again := []))["odd"].sum() == 5 and again == []
    finish(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_block_or_another_key_begins_anew(tmp_path):
    run(tmp_path, [], of="a")
    path, seen = tmp_path / FILE_NAME, []
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run(tmp_path, seen, of="a")["square"][9] == 81 and seen == [8, 9]
    assert run(tmp_path, (other := []), of="b")["square"][9] == 81 and len(other) == 10
    path.write_bytes(b"")
    assert run(tmp_path, (empty := []), of="b")["square"][9] == 81 and len(empty) == 10
    assert len(run(tmp_path, [], total=0, of="c")) == 0


def test_a_full_disk_is_one_line_and_an_error_of_the_work_is_its_own(tmp_path, monkeypatch):
    def broken(items):
        raise OSError(5, "no such sector")

    with pytest.raises(OSError, match="no such sector"):
        in_blocks("pass", tmp_path, {}, 10, RECORD, broken, " items")
    path = tmp_path / FILE_NAME
    monkeypatch.setattr(progress, "open", lambda *_, **__: Full(path, "r+"), raising=False)
    monkeypatch.setattr(progress, "_is_of", lambda *_: True)
    with pytest.raises(EnvironmentProblem, match=rf"^pass: .*{FILE_NAME} .*No space left"):
        run(tmp_path, [])


def result(folder):
    return {path: (folder / path).read_bytes() for path in ("keep.bin", "keep.json", "report.html")}


def test_a_filter_goes_on_and_keeps_the_same(data, tmp_path, monkeypatch, capsys):
    rule = FilterRule(english=False)
    filter_pairs(FilterConfig(data=data, out=tmp_path / "whole", rule=rule))
    judged, judge = [], data_filter._judge

    def stopping(pairs, item, caption_filter):
        judged.append(item)
        if len(judged) == 11:
            raise KeyboardInterrupt
        return judge(pairs, item, caption_filter)

    monkeypatch.setattr(data_filter, "_judge", stopping)
    with pytest.raises(
        KeyboardInterrupt, match="^data filter: stopped by the keyboard; .* goes on"
    ):
        filter_pairs(FilterConfig(data=data, out=tmp_path / "kept", rule=rule))
    filter_pairs(FilterConfig(data=data, out=tmp_path / "kept", rule=rule))
    assert judged[11:] == list(range(8, 18))
    assert "data filter: 8 of 18 are there from a run that was stopped" in capsys.readouterr().err
    expected = result(tmp_path / "whole")
    named = expected["report.html"].replace(b"/whole ", b"/kept ")
    assert result(tmp_path / "kept") == {**expected, "report.html": named}
    assert not (tmp_path / "kept" / FILE_NAME).exists()
    filter_pairs(FilterConfig(data=data, out=tmp_path / "kept", rule=FilterRule(min_words=2)))
    assert len(judged) == 21 + 18


@pytest.mark.parametrize("by", ["hash", "features"])
def test_a_search_for_duplicates_goes_on_and_keeps_the_same(by, data, tmp_path, monkeypatch):
    ranker = None
    if by == "features":
        tokenizer = Tokenizer.train(["red dog", "a brown dog"], vocab_size=260)
        sizes = {"image_size": 16, "grid": 4, "width": 32, "depth": 1, "embed_dim": 8}
        ranker = tmp_path / "ranker"
        ContrastiveRanker.from_preset("tiny", tokenizer=tokenizer, **sizes).save_pretrained(ranker)
    options = {"data": data, "by": by, "ranker": ranker, "cosine": 0.9999}
    dedup(DedupConfig(out=tmp_path / "whole", **options))
    loaded, load, stops = [], FolderPairs.load, [10]

    def stopping(self, i):
        loaded.append(i)
        if len(loaded) in stops:
            raise KeyboardInterrupt
        return load(self, i)

    monkeypatch.setattr(FolderPairs, "load", stopping)
    with pytest.raises(KeyboardInterrupt, match="^data dedup: stopped by the keyboard; .* goes on"):
        dedup(DedupConfig(out=tmp_path / "once", **options))
    del loaded[:], stops[:]
    dedup(DedupConfig(out=tmp_path / "once", **options))
    assert loaded[:10] == list(range(8, 18))  # then those of the report
    whole, once = result(tmp_path / "whole"), result(tmp_path / "once")
    assert whole["keep.bin"] == once["keep.bin"] and whole["keep.json"] == once["keep.json"]


def stopping_at(monkeypatch, place, name, number):
    """Counts the calls of a function, and stops the first time it is called so often."""
    calls, function, stops = [], getattr(place, name), [number]

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) in stops:
            del calls[:], stops[:]
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(place, name, counted)
    return calls


@pytest.fixture
def sources(data, tmp_path, monkeypatch):
    """A folder, in which a picture is broken and one has another in its place, and its shards."""
    monkeypatch.setattr(progress, "BLOCK", 4)
    folder = Path(data)
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:200])
    (folder / "12.jpg").write_bytes(b"no picture")
    (folder / "05.txt").unlink()
    pack(PackConfig(data=data, out=tmp_path / "shards", shard_size=6))
    Tokenizer.train(["red dog", "a brown dog"], vocab_size=260).save_pretrained(tmp_path / "tok")
    return {"folder": folder, "shards": tmp_path / "shards"}


def checked(capsys, source, out, tokenizer):
    capsys.readouterr()
    check(CheckConfig(data=str(source), out=out, image_size=50, tokenizer=tokenizer))
    return capsys.readouterr().out.replace(str(out), "OUT"), (out / "check.json").read_bytes()


@pytest.mark.parametrize(
    ("kind", "place", "name", "number", "left"),
    [
        ("folder", folder_module, "decode", 11, 11),  # while it is opened
        ("folder", data_check_pass, "open_checked", 11, 8),  # all are decoded by then
        ("shards", ShardPairs, "load", 7, 13),
    ],
)
def test_a_check_goes_on_and_finds_the_same(
    kind, place, name, number, left, sources, tmp_path, monkeypatch, capsys
):
    tokenizer, source = tmp_path / "tok", sources[kind]
    whole = checked(capsys, source, tmp_path / "whole", tokenizer)
    assert b'"does not decode": 1' in whole[1] and "smaller than 50 pixels" in whole[0]
    calls, out = stopping_at(monkeypatch, place, name, number), tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt, match="^data check: stopped by the keyboard; .* goes on"):
        checked(capsys, source, out, tokenizer)
    decoded = stopping_at(monkeypatch, folder_module, "decode", 0)
    assert checked(capsys, source, out, tokenizer) == whole
    assert len(calls) == left and (name == "decode" or not decoded)
    assert [path.name for path in out.iterdir()] == ["check.json"]
    assert checked(capsys, source, out, tokenizer) == whole  # from the first picture on
    assert len(calls) > left


def test_what_has_changed_since_a_check_was_stopped_is_looked_at_again(
    sources, tmp_path, monkeypatch, capsys
):
    out, folder = tmp_path / "out", sources["folder"]
    calls = stopping_at(monkeypatch, folder_module, "decode", 11)
    with pytest.raises(KeyboardInterrupt):
        checked(capsys, folder, out, None)
    (folder / "03.png").write_bytes((folder / "04.png").read_bytes())  # mended
    said, found = checked(capsys, folder, out, None)
    assert "does not decode" not in said and json.loads(found)["usable"] == 17
    assert len(calls) == 18  # also what was verified: its key is names, sizes and times
    (tmp_path / "empty").mkdir()
    shutil.copy(folder / "04.png", tmp_path / "empty")
    with pytest.raises(DataError, match="got no usable pair"):
        checked(capsys, tmp_path / "empty", tmp_path / "none", None)
    assert list((tmp_path / "none").iterdir()) == []


def test_shards_of_codes_are_compared_once_though_the_check_was_stopped(
    data, tmp_path, monkeypatch, capsys
):
    make_parts()[1].save_pretrained(tmp_path / "vae")
    codes, out = tmp_path / "codes", tmp_path / "stopped"
    options = {"vae": tmp_path / "vae", "image_size": 8, "shard_size": 3}
    encode(EncodeConfig(data=data, out=codes, **options))
    whole = checked(capsys, codes, tmp_path / "whole", None)
    calls = stopping_at(monkeypatch, data_check, "sha256", 4)
    with pytest.raises(KeyboardInterrupt, match="^data check: stopped by the keyboard"):
        checked(capsys, codes, out, None)
    assert checked(capsys, codes, out, None) == whole and len(calls) == 3
    assert [path.name for path in out.iterdir()] == ["check.json"]
    shard = codes / "codes-000001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    calls = stopping_at(monkeypatch, data_check, "sha256", 4)
    with pytest.raises(KeyboardInterrupt):
        checked(capsys, codes, out, None)
    shard.write_bytes(content)  # made anew in between
    os.utime(shard, ns=(1, 1))
    assert checked(capsys, codes, out, None) == whole and len(calls) == 6


def test_stats_go_on_and_are_the_same(sources, tmp_path, monkeypatch, capsys):
    def written(out):
        capsys.readouterr()
        stats(
            StatsConfig(data=str(sources["shards"]), out=out, tokenizer=tmp_path / "tok", limit=14)
        )
        said = capsys.readouterr().out.replace(str(out), "OUT")
        kept = sorted(path for path in out.iterdir() if path.name != "config.yaml")
        return said, {path.name: path.read_bytes() for path in kept}

    whole = written(tmp_path / "whole")
    calls = stopping_at(monkeypatch, data_stats, "picture_size", 11)
    with pytest.raises(KeyboardInterrupt, match="^data stats: stopped by the keyboard; .* goes on"):
        written(tmp_path / "stopped")
    assert written(tmp_path / "stopped") == whole and len(calls) == 14 - 8
    assert "stats.json" in whole[1] and FILE_NAME not in whole[1]
