"""Tars are walked as `tarfile` does, and hostile or damaged ones are counted, never followed."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from dalle.data import tar
from dalle.data.tar import Member, members
from support.shards import by_tarfile, header, long_name, pax, tar_of


def walk(content):
    """What is found: (name, content) of members, and reasons."""
    file = io.BytesIO(content)
    found = list(members(file, len(content)))
    return [
        entry if isinstance(entry, str) else (entry.name, content[entry.offset :][: entry.size])
        for entry in found
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_gives_what_tarfile_gives(form):
    buffer = io.BytesIO()
    names = ["a.jpg", "b/c.txt", "é/ü.png", "x" * 90 + "/" + "y" * 60 + ".jpg"]
    if form != tarfile.USTAR_FORMAT:
        names += ["n" * 300 + ".txt", "d/" * 120 + "deep.png"]
    with tarfile.open(fileobj=buffer, mode="w", format=form) as made:
        made.addfile(tarfile.TarInfo("folder"), None)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 511 + number
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
            made.addfile(info, io.BytesIO(bytes([number]) * info.size))
    assert walk(buffer.getvalue()) == by_tarfile(buffer.getvalue())


LINKS = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
HOSTILE = {
    tar.LINK: [header("a.jpg", **LINKS), header("a.jpg", type=tarfile.LNKTYPE, linkname="b")],
    tar.DEVICE: [header("a.jpg", type=kind) for kind in (tarfile.CHRTYPE, tarfile.FIFOTYPE)],
    tar.ABSOLUTE: [header("/etc/a.jpg", b"x"), pax({"path": "/a.jpg"}) + header("a.jpg", b"x")],
    tar.OUTSIDE: [
        header("../a.jpg", b"x"),
        header("b/../../a.jpg"),
        long_name("../" * 60 + "a") + header("a"),
    ],
    tar.SPARSE: [
        header("a.jpg", b"x" * 600, type=tarfile.GNUTYPE_SPARSE),
        pax({"GNU.sparse.major": "1"}) + header("a.jpg", b"x"),
    ],
    tar.OTHER: [header("a.jpg", b"x", type=b"M"), header("a.jpg", b"x", type=b"~")],
    tar.DAMAGED: [
        header("x", b"no records", type=tarfile.XHDTYPE) + header("a.jpg", b"x"),
        pax({"size": "-5"}) + header("a.jpg", b"x"),
        header("x", b"9" * 600, type=tarfile.XHDTYPE) + header("a.jpg", b"x"),
        b"\xff" * 1536,
        header("", b"x"),
    ],
    tar.BEYOND: [header("a.jpg", size=1 << 40), pax({"size": 10**18}) + header("a.jpg", b"x")],
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_hostile_members_are_counted_and_what_follows_is_found(reason):
    good = [("0.txt", b"before"), ("1.txt", b"after")]
    for bad in HOSTILE[reason]:
        content = tar_of([good[0], bad, good[1]])
        assert walk(content) == [good[0], reason, good[1]], bad[:120]


def test_the_end_of_a_tar():
    good = [("0.txt", b"one"), ("1.txt", b"x" * 700)]
    whole = tar_of(good)
    assert walk(b"") == walk(bytes(10240)) == []
    assert walk(tar_of(good, end=False)) == walk(whole + whole) == good
    assert walk(tar_of([good[0], bytes(512), good[1]])) == good  # one block of zeros is no end
    for cut in (512 + 512 + 512 + 699, 512 + 512 + 512):  # within the content
        assert walk(whole[:cut]) == [good[0], tar.BEYOND]
    assert walk(whole[: 512 + 512 + 100]) == [good[0], tar.BEYOND]  # within a header


def test_large_and_signed_numbers():
    info = tarfile.TarInfo("big")
    info.size = 9 << 30  # in base 256, as it has more than eleven octal digits
    large = info.tobuf(tarfile.GNU_FORMAT)
    (found,) = members(io.BytesIO(large), info.size + 512)
    assert found == Member("big", 512, 9 << 30)
    old = bytearray(header("é" * 20, b"x"))
    old[148:156] = b" " * 8
    signed = sum(byte - 256 * (byte > 127) for byte in old[:512])
    old[148:156] = b"%06o\0 " % signed
    assert walk(bytes(old)) == [("é" * 20, b"x")]


def test_damage_anywhere_ends_and_is_deterministic():
    content = tar_of([(f"{i}.txt", bytes([i]) * 40 * i) for i in range(12)])
    rng = random.Random(7)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        found = walk(bytes(damaged))
        assert found == walk(bytes(damaged))
        assert all(isinstance(entry, str) or len(entry[1]) <= len(content) for entry in found)
        assert len(found) <= 14
