"""The planted faults of `tests/mutants.py` can still be inserted; `.ci/night` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutants import MUTANTS, ROOT, problem_of


def test_there_are_twenty_of_different_places():
    assert len(MUTANTS) >= 20
    assert len({(mutant.file, mutant.old) for mutant in MUTANTS}) == len(MUTANTS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_can_be_put_in(mutant):
    assert problem_of(mutant, ROOT) is None
    assert mutant.old != mutant.new
    files = [word for word in mutant.tests.split() if word.startswith("tests/")]
    assert files and all((ROOT / Path(file)).is_file() for file in files)
