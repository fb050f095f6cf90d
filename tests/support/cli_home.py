"""Inputs of the command line, good and bad: small data, small models, commands that take them."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dalle.dvae.model import DiscreteVAE
from dalle.pipeline import Pipeline
from dalle.prior.model import Prior
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from support.shards import tar_of

DVAE = "dvae train --data pairs --preset tiny --image-size 16 --batch-size 2 --steps 2 --out out"
RECONSTRUCT = "dvae reconstruct --data pairs --model pipe/vae --image-size 16 --out out/x.png"
PRIOR = (
    "prior train --data pairs --image-size 16 --tokenizer tok --vae pipe/vae --batch-size 2 "
    "--steps 2 --out out"
)
SAMPLE = "sample word --model pipe --num-candidates 2 --top 2 --out out"
EDIT = "edit --caption word --image pairs/0.png --model pipe --num-candidates 2 --out out"
RERANK = "rerank word --data pairs --ranker pipe/ranker --out out"


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header promises more than there is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


def make_home(root: Path) -> None:
    """Fills `root`: pairs, tok, pipe (vae, prior, ranker inside), and their damaged kin."""
    rng = np.random.default_rng(0)
    for name in ("pairs", "empty", "broken", "bombs"):
        (root / name).mkdir()
    for i in range(6):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"pairs/{i}.png")
        (root / f"pairs/{i}.txt").write_text(f"picture number {i}\n")
    shards = [(path.name, path.read_bytes()) for path in sorted((root / "pairs").iterdir())]
    (root / "shards").mkdir()
    (root / "shards/0.tar").write_bytes(tar_of(shards))
    rows = [f"pairs/{i}.png,picture number {i}" for i in range(6)]
    (root / "table.csv").write_text("\n".join(["file_name,caption", *rows]))
    (root / "broken/x.png").write_bytes((root / "pairs/0.png").read_bytes()[:60])
    (root / "bombs/x.png").write_bytes(png_that_claims(60_000, 60_000))
    (root / "one").mkdir()
    shutil.copy(root / "pairs/0.png", root / "one/x.png")
    for name in ("broken", "bombs", "one"):
        (root / name / "x.txt").write_text("x\n")
    (root / "file").write_text("a file\n")
    for name in ("full/model", "taken/00-word.png"):
        (root / name).mkdir(parents=True)
    (root / "taken/model").write_text("a file\n")
    for name in ("full/model/config.json", "taken/sorted.png"):
        (root / name).symlink_to("/dev/full")
    (root / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (root / "long.txt").write_text("word " * 500)
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["picture number one"], 260)
    vae = DiscreteVAE.from_preset("tiny", vocab_size=32, n_hid=8, n_init=8)
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 2, "grid": (4, 4)}
    prior = Prior.from_preset("tiny", image_vocab=32, text_vocab=300, **sizes)
    ranker = ContrastiveRanker.from_preset("tiny", tokenizer=tokenizer, image_size=16, width=32)
    tokenizer.save_pretrained(root / "tok")
    Pipeline(tokenizer, vae, prior, ranker).save_pretrained(root / "pipe")
    shutil.copytree(root / "pipe", root / "cut")
    weights = root / "cut/prior/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(root / "tok", root / "badtok")
    (root / "badtok/tokenizer.json").write_text("{")
