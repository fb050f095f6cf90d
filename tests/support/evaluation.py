"""Sets of pictures and a pipeline for the tests of `dalle eval`."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dalle.cli import main
from support.toy_pipeline import build


def write_pictures(folder, count, *, side=16, captions=True, seed=0, bright=0):
    """Noise of `side` pixels as PNG files, with or without captions."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(bright, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        if captions:
            (folder / f"{i:03}.txt").write_text(f"picture {i % 5}\n")
    return folder


def make_eval_home(root):
    """Fills `root`: real, fake (brighter, no captions), one, empty, broken, pipe."""
    write_pictures(root / "real", 24)
    write_pictures(root / "fake", 30, captions=False, seed=1, bright=120)
    write_pictures(root / "one", 1)
    (root / "empty").mkdir()
    write_pictures(root / "broken", 2)
    for path in (root / "broken").glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    build().save_pretrained(root / "pipe")
    return root


def refused(capsys, words, code):
    """The one line of a refused command."""
    capsys.readouterr()
    assert main(words) == code, capsys.readouterr().err
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]
