"""A filter or a search for duplicates that was stopped goes on, with the result of one run."""

from __future__ import annotations

import errno
import io
import os

import numpy as np
import pytest
from PIL import Image

from dalle.commands import data_filter
from dalle.commands.data_dedup import DedupConfig, dedup
from dalle.commands.data_filter import FilterConfig, filter_pairs
from dalle.data import progress
from dalle.data.filters import FilterRule
from dalle.data.folder import FolderPairs
from dalle.data.progress import FILE_NAME, finish, in_blocks
from dalle.errors import EnvironmentProblem
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer

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
