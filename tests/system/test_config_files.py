"""Files of options: any spelling of a value, bad ones in one line, those of a run given back."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from dalle.cli import COMMANDS, load_target, main
from dalle.config_files import write_resolved
from dalle.dvae.model import DiscreteVAEConfig
from dalle.errors import UnknownOption, UsageError
from dalle.options import option_names, parse_options
from dalle.prior.config import PriorConfig
from dalle.ranker.blocks import RankerConfig
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTrainConfig
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.ranker import RankerTrainConfig
from support import cli_target
from support.cli_target import TOY, LoopOptions, ToyConfig, line_of


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(COMMANDS, ("toy", "train"), ("support.cli_target:train", "trains a toy"))
    cli_target.SEEN.clear()


@pytest.mark.parametrize(
    ("config", "wrong", "near"),
    [
        (PriorConfig, "d_modle", "d_model"),
        (DiscreteVAEConfig, "n_hidden", "n_hid"),
        (RankerConfig, "embed", "embed_dim"),
        (PriorTrainConfig, "batchsize", "batch_size"),
        (DvaeTrainConfig, "kl_wieght", "kl_weight"),
        (RankerTrainConfig, "warmup_steps", "warmup"),
        (LoopConfig, "checkpoint_evry", "checkpoint_every"),
    ],
)
def test_a_misspelt_field_in_python_is_named_too(config, wrong, near):
    line = f"^{config.__name__}: {wrong} is not an option \\(did you mean {near}\\?\\)$"
    with pytest.raises(UnknownOption, match=line):
        config(**{wrong: 1})


def test_config_file_fills_and_the_command_line_wins(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(
        "batch_size: 4\nquick: true\ngrid: [2, 3]\nloop: {out: y, steps: 7}\nlr: 1e-5\n"
    )
    assert main(["toy", "train", "--config", str(path), "--steps", "8"]) == 0
    expected = ToyConfig(
        loop=LoopOptions(out=Path("y"), steps=8), batch_size=4, quick=True, grid=(2, 3), lr=1e-5
    )
    assert cli_target.SEEN == [expected]
    path.write_text("")
    assert main([*TOY, f"--config={path}"]) == 0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bath_size: 4", r"toy.yaml: bath_size is not an option \(did you mean batch_size\?\)"),
        ("loop: {stps: 4}", r"loop: stps is not an option \(did you mean steps\?\)"),
        ("[1, 2]", "must be a mapping of options, got a list"),
        ("a: [", "must be plain YAML"),
        ("a: !!python/object/apply:os.system ['touch pwned']", "must be plain YAML"),
        ("batch_size: many", "many"),
        ("loop: {out: ''}", "--out must have a value"),
        ("words: &a [*a, *a]", "found unconstructable recursive node"),
        ("words: [&a [x], *a]", "words must be a plain value or a list of them, got a list"),
        ("batch_size: !!int x", "--batch-size: must be an integer, got 'x'$"),
        ("lr: !!binary =", "lr must be a plain value or a list of them, got bytes"),
        ("lr: 1\nlr: 2", "must be plain YAML, got: found the key lr twice in line 2$"),
        ("batch-size: 1\nbatch_size: 2", "batch_size must be given once, got also .*batch-size$"),
        ("loop: {steps: 1}\nsteps: 2", "steps must be given once, got also toy.yaml: loop: steps$"),
        ("bath-size: 4", r"toy.yaml: bath-size is not an option \(did you mean batch-size\?\)"),
        ("rate: 4\nsize: 1", r"rate is not an option$"),
        ("size: 1", r"size is not an option \(did you mean batch_size\?\)"),
        ("bs: 1", r"bs is not an option \(did you mean batch_size\?\)"),
        ("batch_size: 1.5e0", "--batch-size: must be an integer, got '1.5e0'$"),
        ("batch_size: 1e99", "--batch-size: must be an integer|at most"),
        ("batch_size: '1e999999999'", "--batch-size: must be an integer"),
        ("quick: 'yes'", "toy.yaml: quick must be true or false, got 'yes'$"),
        ("a: \x1b", "special characters are not allowed"),
        ("a: 1\n---\na: 2", "but found another document in line 2"),
        ("lr: .nan", "lr must be a finite number"),
        ("? [a]\n: 1", "found a key that is no plain value in line 1"),
        ("a: " + "[" * 500, "nested too deeply"),
        ('words: ["\\0"]', "must hold no NUL character"),
        ("loop: 5", "toy.yaml: loop must be a mapping of options, got the text '5'$"),
        ("loop:", "toy.yaml: loop must be a mapping of options, got nothing$"),
        ("loop: [{out: y}]", "toy.yaml: loop must be a mapping of options, got a list$"),
        ("quick: 1", "toy.yaml: quick must be true or false, got 1$"),
        ("quick: 'no'", "toy.yaml: quick must be true or false, got 'no'$"),
        ("quick: [true]", r"toy.yaml: quick must be true or false, got a list$"),
        ("mode: --help", "invalid choice '--help'"),
        ("words: [a, --help]", "words must hold no value that begins with -$"),
        ("words: ['']", "--words must have a value, got an empty one"),
        ("batch_size: []", "toy.yaml: batch_size must be one value, got a list$"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path, monkeypatch, capsys, text, match):
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(text)
    assert main([*TOY, "--config", "toy.yaml"]) == 2
    assert re.search(match, line_of(capsys))
    assert not Path("pwned").exists() and cli_target.SEEN == []


TYPED = """
batch-size: 1e3
top: 0x10
lr: 1e-3
grid: [1e1, 2_0]
mode: null
quick: yes
words: [no, 1e3, 2026-01-01, "null", 007]
out: 1_000
"""
TYPED_TOML = """
batch_size = 1e3
top = 0x10
lr = 1e-3
grid = [10, 2_0]
quick = true
words = ["no", "1e3", "2026-01-01", "null", "007"]
[loop]
out = "1_000"
"""


@pytest.mark.parametrize(("name", "text"), [("o.yaml", TYPED), ("o.TOML", TYPED_TOML)])
def test_a_value_is_read_by_the_type_of_its_option(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert main(["toy", "train", "--config", str(tmp_path / name)]) == 0
    assert cli_target.SEEN == [
        ToyConfig(
            loop=LoopOptions(out=Path("1_000")),
            batch_size=1000,
            top=16,
            grid=(10, 20),
            quick=True,
            words=("no", "1e3", "2026-01-01", "null", "007"),
        )
    ]


def test_numbers_of_the_command_line_are_spelled_as_in_a_file():
    assert main([*TOY, "--batch-size", "1e3", "--top=2e1", "--grid", "1e1", "0x2"]) == 0
    (config,) = cli_target.SEEN
    assert (config.batch_size, config.top, config.grid) == (1000, 20, (10, 2))
    config = parsed(("sample",), "--num-candidates", "1e1", "1e3", "0x10")
    assert (config.num_candidates, config.captions) == (10, ("1e3", "0x10"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bath_size = 4", r"o.toml: bath_size is not an option \(did you mean batch_size\?\)"),
        ("lr = ", "must be plain TOML, got: Invalid value"),
        ("quick = 'true'", "quick must be true or false, got 'true'$"),
        ("lr = 1\nlr = 2", "must be plain TOML, got: Cannot overwrite a value"),
        ("words = [[1]]", "words must be a plain value or a list of them, got a list"),
        ("a = " + "[" * 3000, "must be plain TOML, got"),
        ("batch_size = " + "1" * 5000, "must be plain TOML, got|must be an integer"),
    ],
)
def test_bad_toml_is_one_line(tmp_path, monkeypatch, capsys, text, match):
    monkeypatch.chdir(tmp_path)
    Path("o.toml").write_text(text)
    assert main([*TOY, "--config", "o.toml"]) == 2
    assert re.search(match, line_of(capsys)) and cli_target.SEEN == []


def parsed(verb, *words):
    return parse_options(load_target(verb)[1], list(words), prog=" ".join(["dalle", *verb]))


def test_arguments_without_a_name_may_stand_in_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("o.yaml").write_text("captions: [a red circle, -x, no]\nnum-candidates: 4\n")
    config = parsed(("sample",), "--config", "o.yaml")
    assert (config.captions, config.num_candidates) == (("a red circle", "-x", "no"), 4)
    assert parsed(("sample",), "one", "--config", "o.yaml").captions == ("one",)
    Path("o.yaml").write_text("caption: a red circle\ndata: x\n")
    assert parsed(("rerank",), "--config", "o.yaml").caption == "a red circle"
    assert parsed(("rerank",), "--config", "o.yaml", "mine").caption == "mine"
    Path("o.yaml").write_text("images: x\n")  # the name of before
    for words in (("--config", "o.yaml"), ("--images", "x"), ("--images=x",)):
        assert parsed(("rerank",), "mine", *words).data == Path("x")
    Path("o.yaml").write_text("images: x\ndata: y\n")
    with pytest.raises(UsageError, match="data must be given once, got also .*images$"):
        parsed(("rerank",), "mine", "--config", "o.yaml")
    Path("o.yaml").write_text("caption: [a, b]")
    assert main(["rerank", "--config", "o.yaml"]) == 2
    assert line_of(capsys) == "o.yaml: caption must be one value, got 2"


REQUIRED = {  # options without a default
    "data": "emoji", "folder": "DIR", "image-size": "32", "tokenizer": "t", "vae": "v",
    "prior": "p", "out": "o", "steps": "9", "images": "i", "run": "r", "encoder": "e",
    "decoder": "d", "image": "p.png", "real": "x", "fake": "y", "model": "m",
    "ours": "a", "theirs": "b",
}  # fmt: skip


@pytest.mark.parametrize("verb", sorted(set(COMMANDS) - {("toy", "train")}), ids=" ".join)
def test_the_options_of_a_run_give_the_same_options_again(tmp_path, verb):
    names = option_names(load_target(verb)[1])
    if verb == ("train",):
        names = set(names) - {"vae"}  # has a default, and goes with codes alone
    words = [f"--{name}={value}" for name, value in REQUIRED.items() if name in names]
    config = parsed(verb, *words, *(["a, b: [c]"] if verb[0] in ("sample", "rerank") else []))
    path = tmp_path / "new" / "config.yaml"
    write_resolved(config, path, owner=" ".join(verb))
    assert parsed(verb, "--config", str(path)) == config
    assert f"dalle {' '.join(verb)} --config" in path.read_text()


def test_a_file_of_a_run_holds_any_value(tmp_path):
    odd = LoopOptions(out=Path(os.fsdecode(b"pictures \xff: {x}, #\xc3\xa4")), steps=3)
    words = ("null", "true", "1e3", "  two  ", "line\nline", "~", "\u732b")
    config = ToyConfig(loop=odd, top=2, words=words, lr=1e-5, quick=True, mode="column")
    write_resolved(config, tmp_path / "o.yaml")
    assert parsed(("toy", "train"), "--config", str(tmp_path / "o.yaml"), "--top=3") == (
        dataclasses.replace(config, top=3)
    )


def test_a_pipe_of_options_is_refused_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    wanted = "it is a pipe, not a regular file; write what it gives into a file first"
    assert main([*TOY, "--config", "pipe"]) == 2
    assert line_of(capsys) == f"pipe: must be a readable file, got: {wanted}"
    assert main(["sample", "--file", "pipe"]) == 3
    assert line_of(capsys) == f"sample: file must be readable text, got pipe: {wanted}"
