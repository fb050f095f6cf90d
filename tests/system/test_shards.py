"""Folders of tar shards: every pair found, everything else counted; indexes follow their tars."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from dalle.cli import main
from dalle.data import shard_files, shard_index, sources
from dalle.data.folder import FolderPairs
from dalle.data.images import BadPicture
from dalle.data.pairs import all_captions, captions_of, fingerprints, load_or_draw
from dalle.data.shards import ShardGone, ShardPairs
from dalle.data.split import hold_out
from dalle.errors import DataError, EnvironmentProblem
from support.pictures import JPEG, PNG, WIDE_GIF
from support.shards import header, picture, tar_of, write_shards


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DALLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shard(folder, name, entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(tar_of(entries))
    return folder


def test_shards_hold_what_the_plain_folder_holds(tmp_path, capsys):
    plain = write_shards(tmp_path / "set", 3, 5)
    pairs = sources.load_pairs(str(tmp_path / "set"), image_size=8)
    said = capsys.readouterr().err
    assert isinstance(pairs, ShardPairs)
    assert "data: indexed 3 shards of 15 pairs in " in said and str(tmp_path / "set") in said
    files = FolderPairs(plain)
    assert list(pairs.captions) == list(files.captions) and pairs.captions[-1] == "picture 14"
    for i in range(15):
        np.testing.assert_array_equal(pairs.load(i), files.load(i))
    assert hold_out(pairs, 0.3)[1].items == hold_out(files, 0.3)[1].items
    again = sources.load_pairs(str(tmp_path / "set"), image_size=8)
    assert capsys.readouterr().err == "" and fingerprints(again) == fingerprints(pairs)
    copy = pickle.loads(pickle.dumps(pairs))  # as for a worker process
    np.testing.assert_array_equal(copy.load(7), pairs.load(7))
    with pytest.raises(IndexError, match="item must be 0 .. 14, got 15"):
        pairs.load(15)


def test_everything_that_is_no_pair_is_counted_by_its_reason(tmp_path):
    broken = JPEG[:-40]
    entries = [
        ("a/0.jpg", JPEG), ("a/0.txt", b"zero"),
        ("1.png", PNG), ("1.json", json.dumps({"caption": "one", "url": "x"}).encode()),
        ("./2.WEBP", picture(2)), ("2.txt", b"two\nzwei"), ("2.json", b"not read"),
        ("3.jpg", JPEG), ("3.json", json.dumps({"caption": ["three", "drei"]}).encode()),
        ("4.jpg", JPEG),
        ("5.txt", b"alone"),
        ("6.jpg", b""), ("6.txt", b"empty file"),
        ("7.jpg", b"hello"), ("7.txt", b"no picture"),
        ("8.jpg", WIDE_GIF), ("8.txt", b"another format"),
        ("9.jpg", JPEG), ("9.txt", b" \n"),
        ("10.jpg", JPEG), ("10.txt", b"caf\xe9"),
        ("11.jpg", JPEG), ("11.txt", b"x" * 70_000),
        ("12.jpg", JPEG), ("12.json", b"{"),
        ("13.jpg", JPEG), ("13.json", b'{"caption": null}'), ("14.jpg", JPEG), ("14.json", b"[]"),
        ("0.cls", b"5"), ("15.tiff", b"II*"), (".16.jpg", JPEG),
        ("a/0.jpg", PNG), ("1.PNG", PNG),
        ("17.jpg", broken), ("17.txt", b"cut off"),
        ("18.jpg", b"nothing"), ("18.png", PNG), ("18.txt", b"the second picture"),
        ("19.jpg", JPEG), ("19.png", PNG), ("19.txt", b"the first picture"),
        header("20.jpg", type=b"2", linkname="/etc/passwd"),
    ]  # fmt: skip
    pairs = ShardPairs(shard(tmp_path / "set", "00000.tar", entries))
    assert dict(pairs.skipped) == {
        "picture without caption": 1, "caption without picture": 1, "empty file": 1,
        "not a picture": 2, "picture of another format": 2, "caption is empty": 1,
        "caption is not UTF-8": 1, "caption too long": 1, "caption file is no JSON": 1,
        "no caption in the JSON": 2, "neither picture nor caption": 1, "hidden file": 1,
        "duplicate key": 2, "link in the tar": 1, "second picture of a caption": 1,
    }  # fmt: skip
    assert [captions_of(pairs, i)[0] for i in range(len(pairs))] == [
        "zero", "one", "two", "three", "cut off", "the second picture", "the first picture"
    ]  # fmt: skip
    assert dict(pairs.several) == {2: ["two", "zwei"], 3: ["three", "drei"]}
    assert 2 in pairs.several and 0 not in pairs.several and len(pairs.several) == 2
    assert len(all_captions(pairs)) == pairs.number_of_captions() == 9
    with pytest.raises(DataError, match="00000.tar/17.jpg: image must decode whole"):
        pairs.load(4)
    assert all("\n" not in line for line in pairs.problems)


def test_large_members_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle.data.images.MAX_FILE_BYTES", 1000)
    entries = [("a.png", bytes(1001)), ("a.txt", b"large"), ("b.png", PNG), ("b.txt", b"small")]
    pairs = ShardPairs(shard(tmp_path / "set", "0.tar", entries))
    assert len(pairs) == 1 and pairs.skipped == {"file too large": 1}


def test_an_index_follows_its_tar(tmp_path, capsys):
    folder = shard(tmp_path / "set", "0.tar", [("a.png", picture(1)), ("a.txt", b"old")])
    path = folder / "0.tar"
    assert ShardPairs(folder).captions[0] == "old"
    status = path.stat()
    capsys.readouterr()
    changes = {
        "content": lambda: path.write_bytes(tar_of([("a.png", picture(2)), ("a.txt", b"new")])),
        "headers": lambda: path.write_bytes(tar_of([("b.png", picture(2)), ("b.txt", b"sec")])),
        "time": lambda: os.utime(path, ns=(1, 1)),
        "index": lambda: (folder / "0.tar.index").write_bytes(b"x" * 300),
        "cut": lambda: os.truncate(folder / "0.tar.index", 60),
        "format": lambda: (folder / "0.tar.index").write_bytes(shard_index.MAGIC + bytes(64)),
    }
    for name, change in changes.items():
        change()
        if name == "headers":  # same size and time
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        pairs = ShardPairs(folder)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and " (1 anew: " in said and "0.tar" in said, (name, said)
        np.testing.assert_array_equal(pairs.load(0)[0, 0, 0], 2)
    assert pairs.captions[0] == "sec"
    ShardPairs(folder)
    assert capsys.readouterr().err == ""


def test_damaged_columns_are_made_anew_or_left_out(tmp_path, capsys, monkeypatch):
    folder = shard(tmp_path / "set", "0.tar", [("a.png", PNG), ("a.txt", b"a")])
    ShardPairs(folder)
    index = folder / "0.tar.index"
    whole = index.read_bytes()
    for place in range(1, shard_index.PAIR_BYTES + 1):
        damaged = bytearray(whole)
        damaged[-place] ^= 1
        index.write_bytes(damaged)
        capsys.readouterr()
        assert ShardPairs(folder).captions[0] == "a" and index.read_bytes() == whole
        assert "(1 anew: " in capsys.readouterr().err
    index.write_bytes(damaged)
    monkeypatch.setattr("dalle.data.shards.CHECKED", 0)  # as of a set of many shards, which are
    monkeypatch.setattr("dalle.data.shard_files.CHECKED", 0)  # checked when they are read
    pairs = ShardPairs(folder)
    for read in (pairs.load, pairs.captions_at):
        with pytest.raises(DataError, match=r"0.tar: shard must have an index of its own \(dalle"):
            read(0)
    monkeypatch.setattr("zlib.crc32", lambda content: pairs.shards[0].head.columns)
    index.write_bytes(whole[: -shard_index.PAIR_BYTES] + b"\xff" * shard_index.PAIR_BYTES)
    pairs = ShardPairs(folder)  # nothing outside of the tar is read, whatever stands there
    for read in (pairs.load, pairs.captions_at):
        with pytest.raises(DataError, match="0.tar: shard must have an index of its own"):
            read(0)


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(
    tmp_path, monkeypatch, capsys, cache
):
    folder = shard(tmp_path / "set", "0.tar", [("a.png", PNG), ("a.txt", b"a")])
    write = shard_index.write

    def refuse(path, *content):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        write(path, *content)

    monkeypatch.setattr(shard_index, "write", refuse)
    assert len(ShardPairs(folder)) == 1
    said = capsys.readouterr().err
    assert f"the indexes are in {cache} (beside the shards they cannot be" in said
    assert len(ShardPairs(folder)) == 1 and capsys.readouterr().err == ""
    shutil.rmtree(cache)
    cache.write_text("a file")
    with pytest.raises(EnvironmentProblem, match="data index: .* must be writable, got .*; DALLE_"):
        ShardPairs(folder)


def test_processes_begin_at_different_shards(tmp_path, monkeypatch):
    write_shards(tmp_path / "set", 6, 1)
    paths, _ = shard_files.find_shards(tmp_path / "set")
    monkeypatch.setenv("WORLD_SIZE", "3")
    built = []
    make = shard_files.make_index

    def make_index(path, *places):
        built.append(path.name)
        if len(built) == 1:  # another process has made the last one meanwhile
            make(paths[1])
        return make(path, *places)

    monkeypatch.setattr(shard_files, "make_index", make_index)
    monkeypatch.setattr(shard_files, "THREADS_FROM", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setenv("RANK", "1")
    shards, problems = shard_files.open_shards(paths)
    assert built == [f"0000{i}.tar" for i in (2, 3, 4, 5, 0)] and problems == []
    assert [shard.path for shard in shards] == paths


def test_data_index(tmp_path, capsys, cache):
    shard(tmp_path / "set", "1.tar", [("a.png", PNG), ("a.txt", b"a"), ("b.txt", b"b")])
    write_shards(tmp_path / "set" / "more", 1, 2)
    (tmp_path / "set" / "more-plain").rename(tmp_path / "elsewhere")
    assert main(["data", "index", "--data", str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert "set: 3 pairs in 2 shards, " in out
    assert "left out: 1\n  1 x caption without picture\n" in out
    before = (tmp_path / "set" / "1.tar.index").stat().st_mtime_ns
    assert main(["data", "index", "--data", str(tmp_path / "set")]) == 0
    assert (tmp_path / "set" / "1.tar.index").stat().st_mtime_ns == before
    assert main(["data", "index", "--data", str(tmp_path / "set"), "--force"]) == 0
    assert (tmp_path / "set" / "1.tar.index").stat().st_mtime_ns > before
    (tmp_path / "set" / "1.tar.index").unlink()
    assert main(["data", "index", "--data", str(tmp_path / "set"), "--out", str(cache)]) == 0
    assert len(list(cache.glob("1.tar-*.index"))) == 1
    capsys.readouterr()
    assert len(ShardPairs(tmp_path / "set")) == 3 and capsys.readouterr().err == ""
    for data, got in ((tmp_path / "elsewhere", "got none"), (tmp_path / "no", "no such folder")):
        assert main(["data", "index", "--data", str(data)]) == 3
        err = capsys.readouterr().err
        assert err.startswith("data index: data must be a folder of .tar") and got in err


def test_folders_without_a_pair_get_one_line(tmp_path, capsys):
    empty = shard(tmp_path / "empty", "0.tar", [])
    assert main(["tokenizer", "train", "--data", str(empty), "--out", str(tmp_path / "t")]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(DataError, match=r"got no usable pair \(1 x shard without a pair\)$"):
        ShardPairs(empty)
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "0.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    os.mkfifo(tmp_path / "zip" / "1.tar")
    (tmp_path / "zip" / "2.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "zip" / "3.tar").symlink_to("3.tar")
    reasons = "3 x shard is not readable, 1 x compressed tar"
    with pytest.raises(DataError, match=rf"\({reasons}\); .*0.tar: tar must not be compressed"):
        ShardPairs(tmp_path / "zip")
    with pytest.raises(DataError, match="must be a folder, got no such folder"):
        ShardPairs(tmp_path / "no")


def test_which_folders_are_of_shards(tmp_path):
    nested = shard(tmp_path / "n" / "a" / "b", "0.tar", [])
    assert shard_files.is_shard_folder(tmp_path / "n") and nested.is_dir()
    (tmp_path / "n" / "mine.png").write_bytes(PNG)
    assert not shard_files.is_shard_folder(tmp_path / "n")
    assert not shard_files.is_shard_folder(tmp_path / "none")
    one = shard(tmp_path / "one", "0.tar", [("a.png", PNG), ("a.txt", b"a")]) / "0.tar"
    assert shard_files.is_shard_folder(one) and not shard_files.is_shard_folder(one.with_name("1"))
    assert list(sources.load_pairs(str(one), image_size=8).parts()) == ["0.tar"]
    assert sources.is_picture_folder(str(tmp_path / "n"))
    assert not sources.is_picture_folder(str(tmp_path / "n" / "a"))


def test_a_shard_that_goes_away_leaves_the_others_and_is_named_once(tmp_path, capsys, monkeypatch):
    write_shards(tmp_path / "set", 3, 20)
    pairs = ShardPairs(tmp_path / "set")
    assert all(pairs.load(i).size for i in (25, 45))  # which opens both
    (tmp_path / "set" / "00001.tar").unlink()
    (tmp_path / "set" / "00002.tar").write_bytes(b"other")
    capsys.readouterr()
    images, items = load_or_draw(pairs, range(60), lambda p: p, lambda image, _: image)
    assert len(images) == 60 and max(items) < 20
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("left out: " in line for line in said), said
    assert set(pairs.skipped) == {"shard has gone", "shard has changed"}
    again = ShardPairs(tmp_path / "set")  # what is there now
    assert len(again) == 20 and again.skipped["member beyond the end of its tar"] == 1


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    write_shards(tmp_path / "set", 4, 2)
    monkeypatch.setattr("dalle.data.shards.MAX_OPEN", 2)
    pairs = ShardPairs(tmp_path / "set")
    assert [pairs.captions[i] for i in range(8)] == [f"picture {i}" for i in range(8)]
    assert list(pairs._open) == [2, 3]
    files = [opened.file for opened in pairs._open.values()]
    assert pairs.load(0).size and list(pairs._open) == [3, 0] and not files[1].closed


def test_a_changed_set_has_another_fingerprint_and_says_which_shard(tmp_path):
    write_shards(tmp_path / "set", 2, 3)
    first = ShardPairs(tmp_path / "set")
    path = Path(tmp_path / "set" / "00001.tar")
    path.write_bytes(path.read_bytes().replace(b"picture 4", b"picture 5"))
    second = ShardPairs(tmp_path / "set")
    assert first.fingerprint()["pictures"] == second.fingerprint()["pictures"]
    assert first.fingerprint()["captions"] != second.fingerprint()["captions"]
    assert first.parts()["00000.tar"] == second.parts()["00000.tar"]
    assert first.parts()["00001.tar"] != second.parts()["00001.tar"]


def test_errors_come_back_from_a_worker_process_as_they_were(tmp_path):
    for error in (
        BadPicture(tmp_path / "a.png", "not a picture", "be one", "detail"),
        ShardGone(tmp_path / "0.tar", "shard has gone", "be readable"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)
        assert again.reason == error.reason
        assert getattr(again, "group", None) == getattr(error, "group", None)


def test_a_part_of_shards_reads_like_the_part_of_the_folder(tmp_path):
    plain = write_shards(tmp_path / "set", 2, 15, text=lambda n: f"{n}\nzwei" if n % 4 else f"{n}")
    parts = [hold_out(pairs, 0.3) for pairs in (ShardPairs(tmp_path / "set"), FolderPairs(plain))]
    for mine, right in zip(*parts, strict=True):
        assert list(mine.captions) == list(right.captions) and len(mine) == len(right)
        assert {k: tuple(v) for k, v in mine.several.items()} == dict(right.several)
        assert len(mine.several) == len(right.several) and mine.captions[-1] == right.captions[-1]
        assert mine.read_bytes(1)[0] == right.read_bytes(1)[0]
        hashes = [np.concatenate(list(part.hold_hashes())) for part in (mine, right)]
        np.testing.assert_array_equal(*hashes)
        assert hold_out(mine, 0.3)[1].captions[0] == hold_out(right, 0.3)[1].captions[0]
    train, held = parts[0]
    assert train.fingerprint()["items"] != held.fingerprint()["items"]
    assert train.parts() == held.parts() == ShardPairs(tmp_path / "set").parts()


def test_bombs_cost_no_memory(tmp_path):
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    bomb = PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(4096)))
    entries = [("a.png", bomb + chunk(b"IEND", b"")), ("a.txt", b"a bomb")]
    pairs = ShardPairs(shard(tmp_path / "set", "0.tar", entries))
    tracemalloc.start()
    with pytest.raises(BadPicture, match="too many pixels"):
        pairs.load(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20
