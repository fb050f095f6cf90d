"""R22: random command lines of `tests/fuzz_cli.py`, for 30 s here and for an hour by night."""

from __future__ import annotations

import os

import pytest

import fuzz_cli
import fuzz_damage

SECONDS = float(os.environ.get("DALLE_TEST_FUZZ_SECONDS", "30"))
SEED = int(os.environ.get("DALLE_TEST_FUZZ_SEED", "0"))
TRAIN = "train --data pairs --out out"


def test_no_case_shows_the_inside(tmp_path):
    count, faults, codes = fuzz_cli.fuzz(tmp_path, seconds=SECONDS, seed=SEED)
    assert not faults, "\n\n".join(faults)[:20_000]
    assert count >= 20 and {"rc 0", "rc 2", "rc 3"} <= set(codes), (count, codes)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [  # the first is what "tokenizer train" is without its first word
        (TRAIN, f"{TRAIN} --dvae-steps 2 --ranker-steps 2 --prior-steps 2 --num-samples 1"),
        (f"{TRAIN} --dvae-steps=7", f"{TRAIN} --dvae-steps=7 --ranker-steps 2 --prior-steps 2"),
        ("prior train --seed 2", "prior train --seed 2 --steps 2"),
        ("prior train --steps x", "prior train --steps x"),
        ("sample word", "sample word"),
        ("eval fid --real shapes", "eval fid --real shapes --count 8"),
        ("", ""),
    ],
)
def test_no_damage_makes_a_whole_training(words, wanted):
    made = words.split()
    fuzz_damage.shorten(made)
    assert " ".join(made).startswith(wanted)


def test_the_checks_can_fail():
    told = "KeyError: 'x'"
    assert fuzz_cli.check(1, told, "", "whole", 0.1) == [
        "exit code 1",
        "words of the inside: KeyError",
    ]
    for told in (
        "f() takes 2 positional arguments but 3",
        "f() missing 1 required positional argument",
    ):
        assert len(fuzz_cli.check(2, told, "", "whole", 0.1)) == 1
    assert fuzz_cli.check(0, "", " positional arguments ---", "whole", 0.1) == []  # of --help
    assert fuzz_cli.check(3, "", "", "whole", 0.1) == ["failed without a word"]
    assert fuzz_cli.check(0, "", "\x1b[2J", "whole", 99.0) == ["99 seconds", "control characters"]
    assert fuzz_cli.check(2, "data: x must be y, got z\n", "", "whole", 0.1) == []
