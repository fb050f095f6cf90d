"""The commands that README and docs print: each option exists, the trainings end in pictures."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle import Pipeline, cli
from dalle.options import parse_options
from support.printed import printed

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
LAB_BOOK = ROOT / "docs" / "log.md"  # its commands are those of their day
EVERYWHERE = {"--help", "--debug", "--config"}
LESS = {  # options of these commands that the test gives smaller values
    "dvae": {"--steps": "40", "--batch-size": "4"},
    "prior": {"--steps": "40", "--batch-size": "4"},
    "ranker": {"--steps": "2", "--batch-size": "4", "--num-spliced": "2"},
    "sample": {"--num-candidates": "8"},
}


def test_printed_commands_end_in_pictures(tmp_path, monkeypatch, capsys):
    """As printed, on 8 plain pictures, with fewer updates and pictures a batch."""
    monkeypatch.chdir(tmp_path)
    Path("DIR").mkdir()
    colours = [[25 + 200 * (i >> bit & 1) for bit in range(3)] for i in range(8)]
    for i, colour in enumerate(colours):
        Image.new("RGB", (20, 16), tuple(colour)).save(f"DIR/{i}.png")
        Path(f"DIR/{i}.txt").write_text(f"picture number {i}")
    done, said = [], ""
    for words in printed("docs/training.md", "## Commands"):
        if words[0] in ("plan", "plot", "--help"):
            continue
        less = LESS.get(words[0], {})
        words += [word for option in less.items() for word in option]  # the last one counts
        assert cli.main(words) == 0, capsys.readouterr().err
        done.append(" ".join(words[:2]))
        said += capsys.readouterr().out
    assert done[:5] == [
        "tokenizer train", "dvae train", "prior train", "ranker train", "pipeline make"
    ]  # fmt: skip
    assert Image.open("run/samples/00-a-caption.png").width > 8 * 32
    # The results: a plain colour is given back, and drawn for the caption that it had.
    psnr = re.search(r"dvae train: PSNR ([\d.]+) dB on 6 training", said)
    used = re.search(r"dvae train: (\d+) of (\d+) codes used", said)
    assert psnr and float(psnr[1]) > 22 and used and int(used[1]) / int(used[2]) > 0.6
    pipeline = Pipeline.from_pretrained("run/pipeline")
    captions, true = [f"picture number {i}" for i in range(8)], torch.tensor(colours) / 255
    drawn = pipeline.generate(captions, num_candidates=2, top=1)
    found = torch.stack([x.images.mean((0, 2, 3)) for x in drawn])
    right = torch.cdist(found, true).argmin(1) == torch.arange(8)
    assert right.sum() >= 5, (found, true)  # six of the eight were trained on; chance is one


def commands_of(text: str) -> list[list[str]]:
    """The words after `dalle` of each command in code blocks and code spans; `torchrun`'s too."""
    blocks = "".join(text.split("```")[1::2]).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`(dalle [a-z][^`]*)`", text)
    lines = [re.sub(r"^torchrun .* -m dalle ", "dalle ", line) for line in blocks] + spans
    return [shlex.split(x, comments=True)[1:] for x in lines if re.match(r"dalle [a-z]", x)]


def unknown(words: list[str], capsys) -> list[str]:
    """Options of a command that its --help does not have."""
    if len(words) == 1 and words[0] in {verb[0] for verb in cli.COMMANDS}:
        return []
    verb, rest = cli.find_command(words)
    options = {word.split("=")[0] for word in rest if word.startswith("--")} - EVERYWHERE
    if not options:
        return []
    with pytest.raises(SystemExit):
        cli.main([*verb, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    return sorted(options - known)


def test_every_printed_command_has_its_options(capsys):
    commands = [(p.name, w) for p in PAGES if p != LAB_BOOK for w in commands_of(p.read_text())]
    assert len(commands) > 40
    assert [(page, words, x) for page, words in commands if (x := unknown(words, capsys))] == []
    assert unknown(["dvae", "train", "--bath-size", "3"], capsys) == ["--bath-size"]


def names_of(text: str) -> list[str]:
    """Dotted names of the two packages in code spans and in Python blocks, imports among them."""
    names = re.findall(r"`(dalle(?:_ext)?\.[\w.]+)", text)
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        names += re.findall(r"\bdalle_ext\.\w+", block)
        names += [".".join(x) for x in re.findall(r"from (dalle[\w.]*) import (\w+)", block)]
    return names


def missing(name: str) -> bool:
    """Whether a dotted name is neither a module nor in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is None
    return True


def test_every_printed_name_is_importable():
    names = [(p.name, x) for p in PAGES if p != LAB_BOOK for x in names_of(p.read_text())]
    assert len(names) > 15
    assert [(page, name) for page, name in names if missing(name)] == []
    assert missing("dalle.pipeline.Pipline") and missing("dalle.gone.Pipeline")


def test_values_of_the_commands_for_a_million_pairs_are_taken():
    commands = commands_of((ROOT / "docs/your_own_pictures.md").read_text())
    assert len(commands) >= 14
    for words in commands:
        verb, rest = cli.find_command(words)
        parse_options(cli.load_target(verb)[1], rest, prog=" ".join(["dalle", *verb]))
