"""R22: random command lines of `tests/fuzz_cli.py`, for 30 s here and for an hour by night."""

from __future__ import annotations

import os

import fuzz_cli

SECONDS = float(os.environ.get("DALLE_TEST_FUZZ_SECONDS", "30"))
SEED = int(os.environ.get("DALLE_TEST_FUZZ_SEED", "0"))


def test_no_case_shows_the_inside(tmp_path):
    count, faults, codes = fuzz_cli.fuzz(tmp_path, seconds=SECONDS, seed=SEED)
    assert not faults, "\n\n".join(faults)[:20_000]
    assert count >= 20 and {"rc 0", "rc 2", "rc 3"} <= set(codes), (count, codes)


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
