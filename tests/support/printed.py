"""The commands that a page of the documentation prints."""

from __future__ import annotations

import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def printed(page: str, heading: str) -> list[list[str]]:
    """The words of each `dalle` command in the first block under a heading, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    block = text.partition(f"\n{heading}\n")[2].split("```")[1]
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dalle ")]
