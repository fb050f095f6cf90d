"""Bad input of every command: one line, the exit code of its kind, nothing half written."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch

from dalle import files
from dalle.cli import main
from dalle.errors import EnvironmentProblem
from dalle.ranker.model import ContrastiveRanker
from support.cli_home import DVAE, PRIOR, RECONSTRUCT, RERANK, SAMPLE, make_home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of `cli_home`."""
    root = tmp_path_factory.mktemp("home")
    make_home(root)
    return root


USAGE, DATA, SURROUNDINGS = 2, 3, 4

BAD = [
    ("dvae train", USAGE, "dvae train: --data must be given, got nothing$"),
    (f"{DVAE} --preset smal", USAGE, r"preset must be one of tiny, .*emoji.*did you mean small\?"),
    (f"{DVAE} --image-size 33 --recipe paper", USAGE, "image_size must be a multiple of 4, got 33"),
    (f"{DVAE} --image-size 37", USAGE, "^dvae train: image_size must .* such as 36, got 37$"),
    (f"{DVAE} --validation .6", USAGE, "^dvae train: validation must be 0 to 0.5, got 0.6$"),
    (f"{DVAE} --preset emoji --recipe paper", USAGE, "recipe must be quick for preset emoji"),
    (f"{DVAE} --data one --validation .1", DATA, "different pictures must be at least 4"),
    (f"{DVAE} --batch-size -3", USAGE, "batch_size must be positive, got -3"),
    (f"{DVAE} --seed 99999999999999999999", USAGE, "seed must be 0 .. 2.63 - 1, got 99999"),
    (f"{DVAE} --device meta", USAGE, "device: must be auto, cpu or .* got 'meta'"),
    (f"{DVAE} --data file", DATA, r"spec must be .* or a folder, got 'file' \(a file; those"),
    (f"{DVAE} --data empty", DATA, "got no usable pair .the folder is empty"),
    (f"{DVAE} --data broken", DATA, "data must hold at least 1 pictures that can be used .*got 0$"),
    (f"{DVAE} --data broken --recipe paper", DATA, "a batch must hold a picture .*, got .*x.png"),
    (f"{DVAE} --data bombs", DATA, "1 x too many pixels"),
    (f"{DVAE} --out taken", SURROUNDINGS, "^dvae train: taken/model/config.json must be writable"),
    (f"{PRIOR} --out full", SURROUNDINGS, "^prior train: full/model/config.json .* a device"),
    (f"{SAMPLE} --out taken", SURROUNDINGS, "^sample: taken/00-word.png .* it is a folder"),
    (f"{RERANK} --out taken", SURROUNDINGS, "^rerank: taken/sorted.png .* it is a device"),
    (f"{RECONSTRUCT} --out taken", SURROUNDINGS, "^dvae reconstruct: taken .* it is a folder"),
    (f"{DVAE} --out file", SURROUNDINGS, "out must be a folder .* got file: it is a file"),
    (f"{DVAE} --resume pipe/vae", DATA, "pipe/vae: manifest.json must be readable"),
    (f"{RECONSTRUCT} --model pipe", DATA, "class must be DiscreteVAE, got Pipeline"),
    (f"{RECONSTRUCT} --model tok", DATA, "class must be DiscreteVAE, got Tokenizer"),
    (f"{RECONSTRUCT} --data broken", DATA, "data must be .* or a folder with pictures"),
    (f"{RECONSTRUCT} --out file/x.png", SURROUNDINGS, "x.png must be .* got its folder is a file"),
    (f"{PRIOR} --tokenizer badtok", DATA, "tokenizer.json: content must match the hash"),
    (f"{PRIOR} --vae pipe/prior", DATA, "class must be DiscreteVAE, got Prior"),
    (f"{PRIOR} --decay-steps 0", USAGE, "^prior train: decay_steps must be 1 or more, got 0"),
    (f"{PRIOR} --beta1 1.5", USAGE, r"^prior train: beta1 must be in \[0, 1\), got 1.5"),
    (f"{PRIOR} --weight-decay -1", USAGE, "weight_decay must be 0 or more, got -1.0"),
    (f"{PRIOR} --eps nan", USAGE, "eps must be a finite number, got nan"),
    (f"{PRIOR} --seed -1", USAGE, "seed must be 0 .. 2.63 - 1, got -1"),
    (f"{DVAE} --seed -1", USAGE, "seed must be 0 .. 2.63 - 1, got -1"),
    (f"{PRIOR} --text-len 1", USAGE, "text_len must be at least 2, got 1"),
    (f"{PRIOR} --preset tinny", USAGE, r"preset must be .*did you mean tiny\?"),
    (f"{SAMPLE} --model cut", DATA, "cut/prior/model.safetensors: must be a safetensors file"),
    (f"{SAMPLE} --model pipe/vae", DATA, "class must be Pipeline, got DiscreteVAE"),
    (f"{SAMPLE} --seed -1", USAGE, "sample: seed must be 0 or more, got -1"),
    (f"{SAMPLE} --top 0", USAGE, "sample: top must be 1 or more, got 0"),
    (f"{SAMPLE} --file bytes.txt", DATA, "file must be readable text, got bytes.txt"),
    (f"{SAMPLE} --prime-image no.png", DATA, "no.png: image must be a plain file"),
    (f"{SAMPLE} --prime-image bombs/x.png", DATA, "x.png: image must have at most 64000000"),
    (f"{SAMPLE} --prime-image broken/x.png", DATA, "x.png: image must decode whole"),
    (f"{SAMPLE} --out file/x", SURROUNDINGS, "sample: out must be a folder .* Not a directory"),
    ("rerank", USAGE, "rerank: CAPTION, --data must be given, got nothing$"),
    (
        f"{RERANK} --data bombs",
        DATA,
        "data must hold a picture that decodes, got none of 1",
    ),
    (f"{RERANK} --ranker pipe", DATA, "class must be ContrastiveRanker, got Pipeline"),
    (f"{RERANK} --out file", SURROUNDINGS, "rerank: out must be a folder .* it is a file"),
    ("data check --data file", DATA, "file must be a folder, got a file"),
    ("data check --data pairs --show -1", USAGE, "show must be 0 or more, got -1"),
    ("data make-shapes --out out --image-size 4096", USAGE, "the sheet must have at most"),
    (f"{SAMPLE} --scale 64 --num-candidates 9999 --top 9999", USAGE, "the sheet must have at most"),
    (f"{SAMPLE} --scale 0", USAGE, "scale must be at least 1, got 0"),
    (f"{DVAE} --data shapes --image-size 8192", SURROUNDINGS, "shapes: memory must hold .* GiB"),
    ("data make-shapes --out out --seed -1", USAGE, "seed must be 0 or more, got -1"),
    ("tokenizer train --data pairs --out file", SURROUNDINGS, "out must be a folder .* a file"),
    ("tokenizer train --data pairs --out out --vocab-size 10000000000", USAGE, "256 to 1048576"),
    ("dvae import-openai --encoder no --decoder no --out out", DATA, "no: must be a readable"),
    (
        "ranker train --data pairs --image-size 15 --tokenizer tok --out out",
        USAGE,
        "ranker: image_size must be a multiple of 8 for preset tiny, got 15$",
    ),
    (
        "ranker train --data pairs --image-size 8 --preset base --tokenizer tok --out out",
        USAGE,
        "ranker: image_size must be a multiple of 16 for preset base, got 8$",
    ),
    ("tokenizer train --data pairs --out pipe/vae", USAGE, "got pipe/vae with a DiscreteVAE$"),
    (f"{PRIOR} --out pipe", USAGE, "prior train: out must be a folder of its own, got pipe with"),
    (f"{DVAE} --out tok", USAGE, "dvae train: .* its own, got tok with a Tokenizer$"),
    ("dvae import-openai --encoder no --decoder no --out tok", USAGE, "got tok with a Tokenizer$"),
    (
        f"{RECONSTRUCT} --out pairs/0.png",
        USAGE,
        "dvae reconstruct: pairs/0.png must be none of the pictures that are read$",
    ),
    ("data check --data pairs --contact pairs/0.png", USAGE, "must be none of the pictures"),
    ("data check --data pairs --text-len 1", USAGE, "text_len must be 0, or at least 2, got 1$"),
    (f"{SAMPLE} --out {'a/' * 2000}", SURROUNDINGS, "got a/.*: too many folders in each other$"),
    (f"{RECONSTRUCT} --out {'a/' * 2000}x.png", SURROUNDINGS, "(too many folders|name too long)"),
    ("plan --gpus 64 --tflops 1e-300", USAGE, "plan: tflops must be at least 0.001, got 1e-300$"),
    (f"{PRIOR} --eps 1e-320", USAGE, "prior train: eps must be at least 1e-30, got 1e-320$"),
    (f"{DVAE} --accumulate {2**63 - 1}", USAGE, "accumulate must be at most 1048576 in size, got"),
    (f"{PRIOR} --weight-decay 1e300", USAGE, "weight_decay must be at most 1000.0 in size"),
    (f"{RERANK} b", USAGE, "arguments must be those that --help lists, got also b$"),
    ("plan --preset 13b", USAGE, "preset must be one of tiny, small"),
]


@pytest.mark.parametrize(("line", "code", "match"), BAD, ids=[line[0][:60] for line in BAD])
def test_bad_input_is_one_line(home, tmp_path, monkeypatch, capsys, line, code, match):
    monkeypatch.chdir(home)
    words = [str(tmp_path / word) if word.startswith("out") else word for word in line.split()]
    assert main(words) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(said) and re.search(match, said[-1]), said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_long_caption_is_cut_and_said(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    words = SAMPLE.replace("--out out", "--file long.txt --out").split()
    assert main([*words, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "sample: caption 2 has more than 15 tokens, the rest is cut off" in out
    assert "caption 1" not in out


def test_cut_captions_are_in_the_metrics(home, tmp_path, capsys):
    folder = tmp_path / "pairs"
    shutil.copytree(home / "pairs", folder)
    for i in range(6):
        (folder / f"{i}.txt").write_text("word " * 50)
    words = PRIOR.replace("pairs", str(folder)).replace("--out out", "--out").split()
    words = [str(home / w) if w in ("tok", "pipe/vae") else w for w in words]
    assert main([*words, str(tmp_path / "out"), "--picture-every", "0"]) == 0
    assert " captions_cut 1 " in capsys.readouterr().err


def test_a_folder_without_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(EnvironmentProblem, match="sample: out must be .*: no permission"):
        files.make_folder(tmp_path, "sample")


FULL = [
    (DVAE, 100_000, "dvae: checkpoint after step 2 not saved: File too large"),
    (SAMPLE, 200, r"save: .*\.png must be writable, got File too large"),
    (RERANK, 20, r"save: .*scores.json must be writable, got File too large"),
    ("tokenizer train --data pairs --out out", 1000, "tokenizer train: .* got File too large"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "limit", "match"), FULL, ids=[line[0][:15] for line in FULL])
def test_a_full_disk_is_one_line_and_leaves_no_part(home, tmp_path, line, limit, match):
    """A file-size limit stands for the full disk: writes fail in the middle of a file."""
    words = [str(tmp_path / word) if word.startswith("out") else word for word in line.split()]
    run = subprocess.run(
        [sys.executable, "-B", "-m", "dalle", *words],
        cwd=home, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert run.returncode == SURROUNDINGS
    assert re.search(match, run.stderr.strip().splitlines()[-1]), run.stderr
    assert "Traceback" not in run.stderr
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"metrics.jsonl", "config.yaml"}


@pytest.mark.parametrize(("word", "text"), [("caf\udce9", "caf\udce9"), ("\udcc3\udca9", "é")])
def test_captions_that_no_terminal_shows_are_drawn_and_written(
    home, tmp_path, monkeypatch, word, text
):
    """Latin-1 bytes, and UTF-8 under a C locale; stdout and stderr take ASCII only."""
    monkeypatch.chdir(home)
    heard = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", heard[0])
    monkeypatch.setattr(sys, "stderr", heard[1])
    for line in (SAMPLE, RERANK):
        words = line.replace("word", word).replace("--out out", f"--out {tmp_path}").split()
        assert main(words) == 0
    samples = json.loads((tmp_path / "samples.json").read_bytes())
    scores = json.loads((tmp_path / "scores.json").read_bytes())
    assert samples["records"][0]["caption"] == scores["caption"] == text
    heard[1].flush()
    assert ascii(text)[1:-1] in heard[1].buffer.getvalue().decode("ascii")


def test_scores_that_are_no_numbers_are_an_error(home, tmp_path, monkeypatch, capsys):
    ranker = ContrastiveRanker.from_pretrained(home / "pipe/ranker")
    with torch.no_grad():
        ranker.image.out.weight.fill_(3e38)
    ranker.save_pretrained(tmp_path / "ranker")
    monkeypatch.chdir(home)
    words = RERANK.replace("pipe/ranker", str(tmp_path / "ranker"))
    assert main(words.replace("--out out", f"--out {tmp_path}/out").split()) == 5
    assert "rerank: scores must be finite, got 6 of 6 that are not" in capsys.readouterr().err
    assert not (tmp_path / "out/scores.json").exists()
