"""Emulated operators count their work, so that tests can check what a kernel skips."""

from __future__ import annotations

import pytest
import torch

import dalle_ext

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_counts_what_an_op_runs(backend, emulated_counts):
    before = emulated_counts()
    dalle_ext.gumbel_softmax(torch.zeros(5, 400), 1.0, seed=0)
    done = emulated_counts() - before
    assert done["blocks"] == 5  # one a row
    assert done["barriers"] > 0 and done["barriers"] % 5 == 0
    with dalle_ext.use_reference():
        dalle_ext.gumbel_softmax(torch.zeros(5, 400), 1.0, seed=0)
    assert emulated_counts() - before == done


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_the_route_ends_with_the_test(backend, emulated_counts):
    before = emulated_counts()
    dalle_ext.gumbel_softmax(torch.zeros(5, 400), 1.0, seed=0)
    assert emulated_counts() == before
