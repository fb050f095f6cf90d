"""What the host does for one step stays below a number of operators; the tables that it keeps."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import dalle_ext
from dalle.distributed.powersgd import Compressor, Gradient
from dalle.dtensor import StatsTables, gradient_stats

SCALES = torch.tensor([1.0, 2.0, 4.0])


class Counted(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of(step):
    with Counted() as seen:
        step()
    return seen.count


def parameters(count, size=16):
    made = [torch.nn.Parameter(torch.zeros(size)) for _ in range(count)]
    for i, parameter in enumerate(made):
        parameter.grad = torch.full((size,), float(i % 7))
    return made


def test_operators_do_not_grow_with_the_parameters():
    for make in (
        lambda params: dalle_ext.AdamW16(params).step,
        lambda params: lambda: gradient_stats(params, SCALES, [i % 3 for i in range(len(params))]),
    ):
        few, many = make(parameters(10)), make(parameters(200))
        few(), many()  # what the first step makes
        assert calls_of(few) == calls_of(many) < 25


@pytest.fixture
def alone():
    """A default group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_operators_of_a_unit(alone):
    """Two matrices and four vectors: what a process queues for each FSDP2 unit."""
    options = {"error_feedback": True, "average": True, "min_compression": 1.0, "seed": 0}
    compressor = Compressor(2, None, wire="1-6-9", scaler=None, **options)
    draw = torch.Generator().manual_seed(0)
    shapes = [(16, 16)] * 2 + [(16,)] * 4
    gradients = [torch.randn(shape, generator=draw) for shape in shapes]
    named = [Gradient(f"p{i}", grad) for i, grad in enumerate(gradients)]
    for _ in range(3):
        compressor.reduce_(named, set())
    found = [calls_of(lambda: compressor.reduce_(named, set())) for _ in range(3)]
    assert max(found) <= 195, found  # 165, and some more where a matrix gets another unit
    with torch.profiler.profile() as seen:  # those inside others too
        compressor.reduce_(named, set())
    names = ("aten::", "dalle_ext::", "c10d::")
    assert sum(e.count for e in seen.key_averages() if e.key.startswith(names)) <= 435


def test_a_kept_table_gives_the_same_statistics():
    params, tables = parameters(9), StatsTables()
    groups = [i % 3 for i in range(9)]

    def check():
        kept = gradient_stats(params, SCALES, groups, tables=tables)
        plain = gradient_stats(params, SCALES, groups)
        assert torch.equal(kept[0], plain[0]) and torch.equal(kept[1], plain[1])
        return tables._tables[()]

    first = check()
    assert first.columns == []
    params[4].grad[3] = float("nan")
    assert check() is first  # the same place, other numbers
    params[4].grad = torch.full((16,), float("inf"))
    second = check()
    assert second is not first  # another place
    groups[0] = 2
    third = check()
    assert third is not second  # another group
    params[1].grad = None
    check()
    params[1].grad = torch.ones(32)[::2]  # not contiguous: no table
    with pytest.raises(ValueError, match="must fill their memory without gaps"):
        gradient_stats(params, SCALES, groups, tables=tables)


def test_a_table_keeps_no_gradient_and_no_address_in_a_copy():
    params, tables = parameters(3), StatsTables()
    gradient_stats(params, 1.0, tables=tables)
    seen = weakref.ref(params[0].grad)
    params[0].grad = None
    gc.collect()
    assert seen() is None and tables._tables
    for copied in (copy.deepcopy(tables), pickle.loads(pickle.dumps(tables))):
        assert copied._tables == {}
