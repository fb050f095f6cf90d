"""Reading always ends, whatever is at a path; writing replaces regular files only."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from pathlib import Path

import pytest

from dalle import files
from dalle.errors import CheckpointError, DataError


@pytest.fixture(params=["device", "full", "pipe", "socket", "folder", "link to a pipe"])
def special(request, tmp_path):
    """A path that is no regular file."""
    path = tmp_path / "special"
    if request.param in ("device", "full"):
        path.symlink_to("/dev/zero" if request.param == "device" else "/dev/full")
    elif request.param == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(os.path.relpath(path))
    elif request.param == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    return path


def test_what_is_no_regular_file_is_refused_at_once(special):
    for read in (files.read_bytes, files.sha256, lambda p: list(files.read_lines(p, 9, 9))):
        with pytest.raises(OSError, match="it is a .*not a regular file"):
            read(special)
    with pytest.raises(OSError, match="not a regular file|folder"):
        open(special, "ab", opener=files.regular_opener)
    with pytest.raises(CheckpointError, match="must be a readable file, got: it is a"):
        files.read_json(special, CheckpointError)


def test_a_rename_replaces_no_device(special):
    before = os.stat(special)
    with pytest.raises(OSError, match="not a regular file"):
        files.write_atomic(special, b"x")
    assert os.stat(special).st_mode == before.st_mode
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert not list(special.parent.glob("*.tmp-*"))


@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_a_limit_holds_to_the_byte(tmp_path, size):
    path = tmp_path / "x"
    path.write_bytes(b"a" * size)
    if size <= 9:
        assert files.read_bytes(path, 9) == b"a" * size
    else:
        with pytest.raises(OSError, match="it has more than 9 bytes"):
            files.read_bytes(path, 9)


def test_files_without_a_size_are_read_to_the_limit():
    assert b"VmSize" in files.read_bytes("/proc/self/status", 1 << 20)
    with pytest.raises(OSError, match="more than 9 bytes"):
        files.read_bytes("/proc/self/status", 9)


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path):
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(OSError, match="more than"):
        files.read_bytes(path)
    with pytest.raises(OSError, match="more than"):
        list(files.read_lines(path, 9, 1 << 30))


def test_lines_that_are_too_long_are_none(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345678\n" + b"x" * 30 + b"\n\n123456789\nend")
    assert list(files.read_lines(path, 9, 1000)) == [b"12345678\n", None, b"\n", None, b"end"]


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(OSError, match="name"):
        files.read_bytes(tmp_path / name)
    with pytest.raises(DataError, match="must be a readable file"):
        files.read_json(tmp_path / name, DataError)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "must be JSON, got: Expecting value"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "must be JSON"),
        (b"[1]", "must be a JSON object, got a list"),
        (b"null", "must be a JSON object, got null"),
        (b"true", "got a truth value"),
    ],
)
def test_json_that_is_none(tmp_path, data, match):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(DataError, match=match):
        files.read_object(tmp_path / "x.json", DataError)


def test_json_keeps_what_is_not_unicode():
    caption = "caf\udce9 \u2192 \x1b"
    data = files.to_json({"caption": caption})
    assert data.isascii() is False and json.loads(data)["caption"] == caption


READERS = re.compile(
    r"\.read_text\(|\.read_bytes\(\)|(?<![\w.])open\((?!.*opener)|\.open\(\"|json\.load\(|"
    r"safe_open|load_file\(|np\.load\("
)
OWN = {"files.py", "memory.py"}  # the one place, and what reads /proc and /sys


def test_files_are_read_in_one_place():
    root = Path(files.__file__).parent
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py")
        if path.relative_to(root).as_posix() not in OWN
        for line in path.read_text().splitlines()
        if READERS.search(line) and "/proc/" not in line and " def " not in line
    ]
    assert found == []
