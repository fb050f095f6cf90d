"""Tar shards made by hand: good members and hostile ones."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from support.pictures import encode


def header(name, content=b"", **fields):
    """A member: its header and its content, padded to blocks."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def tar_of(entries, end=True):
    """A tar of (name, content) entries and of ready-made bytes."""
    parts = [entry if isinstance(entry, bytes) else header(*entry) for entry in entries]
    return b"".join(parts) + bytes(1024 if end else 0)


def picture(number, side=16):
    """A PNG that differs for each number below 2^24."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = number & 255, number >> 8 & 255, number >> 16
    pixels[number % side] ^= 127
    return encode(Image.fromarray(pixels), format="PNG")


def write_shards(folder: Path, shards: int, pairs: int, *, text="picture {}".format, side=16):
    """A folder of tars in img2dataset's layout, and the same pairs as plain files beside it."""
    plain = folder.with_name(folder.name + "-plain")
    for made in (folder, plain):
        made.mkdir(parents=True)
    for shard in range(shards):
        entries = []
        for i in range(pairs):
            number = shard * pairs + i
            key, content = f"{shard:05d}{i:04d}", picture(number, side)
            entries += [(f"{key}.png", content), (f"{key}.txt", text(number).encode())]
            (plain / f"{key}.png").write_bytes(content)
            (plain / f"{key}.txt").write_text(text(number))
        (folder / f"{shard:05d}.tar").write_bytes(tar_of(entries))
    return plain


def pax(records):
    """A pax header for the next member."""
    body = b""
    for key, value in records.items():
        line, length = f" {key}={value}\n".encode(), 0
        while length != len(str(length)) + len(line):
            length = len(str(length)) + len(line)
        body += str(length).encode() + line
    return header("PaxHeaders/x", body, type=tarfile.XHDTYPE)


def long_name(name):
    """GNU's header of a long name for the next member."""
    return header("././@LongLink", name.encode() + b"\0", type=tarfile.GNUTYPE_LONGNAME)


def by_tarfile(content):
    """(name, content) of the plain files as Python's tarfile reads them."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]
