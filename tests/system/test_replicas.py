"""The hash that compares replicas notices transposed weights, equal pairs and sign changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dalle.distributed import replicas
from dalle.distributed.replicas import _hash, find_drift


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def changed(w, at=5, by=1):
    """One bit of one element is another."""
    other = w.clone()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    other.view(-1).view(integers.get(w.element_size(), torch.int64))[at] ^= by
    return other


W = weights(64, 64)
PAIRS = {
    "signs": (W, -W),
    "signs of equal ones": (torch.ones(512, 512), -torch.ones(512, 512)),
    "one sign": (W, changed(W, by=-(2**31))),
    "transposed": (W, W.t()),
    "transposed and whole": (W, W.t().contiguous()),
    "gains": (torch.ones(512), torch.full((512,), 0.5)),
    "biases": (torch.zeros(512), torch.full((512,), 3.0)),
    "zeros": (torch.zeros(512), -torch.zeros(512)),
    "two swapped": (W.flatten(), torch.cat([W.flatten()[1:2], W.flatten()[:1], W.flatten()[2:]])),
    "rows swapped": (W, W.flip(0)),
    "the same change twice": (torch.ones(8), changed(changed(torch.ones(8), 2), 6)),
    "last": (W, changed(W, W.numel() - 1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_differs_has_another_hash(name):
    one, other = PAIRS[name]
    assert int(_hash(one)) == int(_hash(one.clone())) != int(_hash(other))


DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.uint8,
    torch.int64, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_bit_by_bit(dtype):
    w = (weights(40) * 9).to(dtype)
    assert int(_hash(w)) == int(_hash(w.clone())) != int(_hash(changed(w)))


def test_the_hash_is_the_one_of_its_definition_in_any_chunks(monkeypatch):
    w, bits = weights(37), 2**64 - 1

    def mixed(x, odd):
        x = x * odd & bits
        return (x ^ x >> 32) * odd & bits

    ints = w.view(torch.int32).tolist()
    odd = [n & bits for n in replicas._ODD]
    wanted = sum(mixed(x, odd[0]) * (mixed(i, odd[1]) | 1) for i, x in enumerate(ints)) & bits
    for chunk in (1, 10, 37, 100):
        monkeypatch.setattr(replicas, "_CHUNK", chunk)
        assert int(_hash(w)) & bits == wanted
    assert int(_hash(torch.zeros(0, 3))) == 0 and int(_hash(torch.tensor(2.0))) != 0


def test_no_element_is_changed_by_its_hash():
    for w in (torch.arange(9), weights(9)):
        kept = w.clone()
        _hash(w)
        assert torch.equal(w, kept)


@pytest.mark.parametrize("change", [torch.Tensor.neg_, lambda w: w.copy_(w.t().clone())])
def test_replicas_of_other_signs_or_transposed_are_named(change):
    """Two machines of one process each, one after the other; all others' words are kept."""
    first, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.load_state_dict(first.state_dict())
    for wanted in (None, "weights of process 1 differ from those of process 0"):
        words = [[], []]
        for net, own in zip((first, other), words, strict=True):
            hashes = {n: int(_hash(p)) for n, p in net.named_parameters()}
            own += [hash(tuple(hashes.values())), hashes]
        said = iter(zip(*words, strict=True))
        found = find_drift(first, lambda value, said=said: next(said), shards=1)
        assert found is None if wanted is None else found.startswith(wanted)
        with torch.no_grad():
            change(other.weight)
