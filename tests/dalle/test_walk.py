"""The commands that docs/training.md prints end in pictures."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from dalle import cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
LESS = {  # options of these commands that the test gives smaller values
    "dvae": {"--steps": "2", "--batch-size": "4"},
    "prior": {"--steps": "2", "--batch-size": "4"},
    "ranker": {"--steps": "2", "--batch-size": "4", "--num-spliced": "2"},
    "sample": {"--num-candidates": "8"},
}


def printed(heading: str) -> list[list[str]]:
    """The words of each `dalle` command in the first block under a heading, without comments."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2].split("```")[1]
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dalle ")]


def test_printed_commands_end_in_pictures(tmp_path, monkeypatch, capsys):
    """As printed, on 6 pictures, with fewer updates and pictures a batch."""
    monkeypatch.chdir(tmp_path)
    Path("DIR").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(f"DIR/{i}.png")
        Path(f"DIR/{i}.txt").write_text(f"picture number {i}")
    done = []
    for words in printed("## Commands"):
        if words[0] in ("plan", "plot", "--help"):
            continue
        less = LESS.get(words[0], {})
        words += [word for option in less.items() for word in option]  # the last one counts
        assert cli.main(words) == 0, capsys.readouterr().err
        done.append(" ".join(words[:2]))
    assert done[:5] == [
        "tokenizer train", "dvae train", "prior train", "ranker train", "pipeline make"
    ]  # fmt: skip
    assert Image.open("out/samples/00-a-caption.png").width > 8 * 32
