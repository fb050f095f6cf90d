"""`PowerSGD` on simulated machines: exact at any scale, units, loss scales, copies."""

from __future__ import annotations

import copy
import math
import pickle
import re
import threading
from functools import partial

import pytest
import torch
from torch import nn

import dalle_ext
from dalle.distributed import PowerSGD
from dalle.distributed.buffers import (
    MAX_EXPONENT,
    TARGET_EXPONENT,
    gram_triangles,
    new_units,
    truncate_to_rank,
)
from dalle.distributed.powersgd import Gradient
from dalle.errors import CheckpointError, UsageError
from dalle.prior.model import Prior
from support.engines import model
from support.machines import copies, machines

WITHIN = {"1-6-9": 5e-3, "fp32": 1e-5}
SHAPE = (48, 64)


def low_rank(inner, seed=0, by=1.0):
    """A gradient of rank `inner`; all seeds share its row space, so that sums have no more."""
    draw, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    left = torch.randn(SHAPE[0], inner, generator=draw)
    return left @ torch.randn(inner, SHAPE[1], generator=shared) * by


def reduced(psgd, grad, name="m", block=-1):
    given = Gradient(name, grad.clone(), block)
    psgd.compressor.reduce_([given], set())
    return given.grad


def off(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("wire", WITHIN)
@pytest.mark.parametrize("world", [1, 3, 128, 1024])
def test_gradients_of_a_small_rank_are_exact_at_any_scale(wire, world):
    """Gradients of 2^-40 to 2^20, averaged over up to 1,024 machines; nothing saturates."""
    for exponent in (-40, -17, 0, 20):
        for inner in (1, 3):
            grad = low_rank(inner, by=2.0**exponent)
            psgd = copies(world, rank=4, wire=wire, min_compression=1.0)
            assert off(reduced(psgd, grad), grad.double()) <= WITHIN[wire]
            assert psgd.report()["saturated"] == psgd.report()["flushed"] == 0
            norm = float(psgd.gradient_norm() / grad.double().norm())
            assert abs(norm - 1) <= 2**-9


@pytest.mark.parametrize("wire", WITHIN)
@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
def test_gradients_of_the_factors_own_rank_are_exact_however_q_lies(wire, rank):
    """40 draws: with P in place of P T the worst was 35 % wrong, with fp32 words 2e-5 to 1e-4."""
    for seed in range(40):
        exponent, world = (-40, -17, 0, 20)[seed % 4], (1, 3, 128, 1024)[seed // 4 % 4]
        draw = torch.Generator().manual_seed(seed)
        grad = torch.randn(48, rank, generator=draw) @ torch.randn(rank, 64, generator=draw)
        grad *= 2.0**exponent
        psgd = copies(world, rank=rank, wire=wire, min_compression=1.0, seed=seed)
        assert off(reduced(psgd, grad), grad.double()) <= WITHIN[wire] / 2


def test_a_q_whose_columns_are_nearly_alike_is_made_up_for():
    """P of the first four alone would be rounding noise but for one direction."""
    grad = low_rank(4)
    for tilt in (1e-1, 1e-2, 1e-3):
        psgd = copies(3, rank=4, min_compression=1.0)
        psgd.compressor.prepare([Gradient("m", torch.zeros(SHAPE))])
        q = psgd.compressor.matrices["m"].q
        q[:, 1:4] = q[:, :1] + tilt * q[:, 1:4]
        assert off(reduced(psgd, grad), grad.double()) <= WITHIN["1-6-9"]


def test_what_travels_has_orthonormal_columns_together():
    """Of P T: the sum of (P T)^T (P T) over the machines is the identity times one number."""

    def body(rank, psgd):
        ps = [
            torch.randn(30, 7, generator=torch.Generator().manual_seed(rank)),
            torch.zeros(30, 7),
            torch.randn(5, 5, generator=torch.Generator().manual_seed(9)),
        ]
        total = gram_triangles(ps, 3)
        psgd.compressor.comm.all_reduce_fp32_([total])
        return truncate_to_rank(ps, total, 3, 3)

    every = machines(3, body)
    for at in (0, 2):
        gram = sum(found[at].double().mT @ found[at].double() for found in every)
        assert (gram / gram[0, 0] - torch.eye(3)).abs().max() <= 1e-4
        assert float(sum(found[at] for found in every).abs().max()) <= 2.0**TARGET_EXPONENT
    assert all(torch.equal(found[1], torch.zeros(30, 3)) for found in every)


@pytest.mark.parametrize("wire", WITHIN)
def test_machines_of_their_own_gradients_hold_the_same_bits(wire):
    """Three machines and sixteen; a scale that changes between steps; sums beside means."""
    for world, average in ((3, True), (16, True), (3, False)):
        mean = sum(low_rank(2, seed=r).double() for r in range(world)) / world

        def body(rank, psgd):
            return [reduced(psgd, low_rank(2, seed=rank, by=by)) for by in (1.0, 2.0**18, 2.0**-30)]

        found = machines(world, body, rank=4, wire=wire, average=average, min_compression=1.0)
        for step, by in enumerate((1.0, 2.0**18)):
            assert all(torch.equal(other[step], found[0][step]) for other in found)
            wanted = mean * by * (1 if average else world)
            assert off(found[0][step], wanted) <= WITHIN[wire]


def test_what_leaves_the_buffers_is_what_is_handed_out():
    """(Sum of buffers before) - (after) = handed out, whatever units the steps choose."""

    def body(rank, psgd):
        seen = []
        for step, by in enumerate((1.0, 2.0**12, 2.0**-9, 1.0, 2.0**-35, 2.0**15)):
            draw = torch.Generator().manual_seed(10 * step + rank)
            grad = torch.randn(SHAPE, generator=draw) * by
            held = psgd.compressor.matrices
            before = held["m"].value() if held else torch.zeros(SHAPE)
            out = reduced(psgd, grad)
            seen.append((before, grad, out, held["m"].value(), float(held["m"].unit)))
        return seen

    every = machines(3, body, rank=4)
    units = [step[4] for step in every[0]]
    assert len(set(units)) > 1 and all(math.log2(unit).is_integer() for unit in units)
    for steps in zip(*every, strict=True):
        assert len({unit for *_, unit in steps}) == 1
        given = sum(before.double() + grad for before, grad, *_ in steps)
        after = sum(after.double() for *_, after, _ in steps)
        lost = given - 3 * steps[0][2].double() - after
        size = sum((before.double() + grad).square().sum() for before, grad, *_ in steps).sqrt()
        assert float(lost.norm() / size) <= 2**-9


@pytest.mark.parametrize("wire", WITHIN)
def test_a_matrix_is_reduced_as_if_it_were_alone(wire):
    """Of three shapes and two blocks, over steps of which one has an Inf: to the last bit."""
    shapes = {"a": SHAPE, "b": (33, 70), "c": SHAPE, "d": (24, 6, 11)}

    def given(step, rank):
        draw = torch.Generator().manual_seed(10 * step + rank)
        grads = [torch.randn(shape, generator=draw) for shape in shapes.values()]
        if (step, rank) == (2, 1):
            grads[1][3, 5] = math.inf
        return [
            Gradient(name, grad, block)
            for name, grad, block in zip(shapes, grads, (0, 1, 0, 1), strict=True)
        ]

    def body(rank, psgd, groups):
        found = []
        for step in range(4):
            gradients = given(step, rank)
            for names in groups:
                psgd.compressor.reduce_([g for g in gradients if g.name in names], set())
            kept = psgd.compressor.matrices
            found.append({g.name: (g.grad, kept[g.name].value()) for g in gradients})
        return found

    together, alone = (
        machines(2, partial(body, groups=groups), rank=4, wire=wire, min_compression=1.0)
        for groups in (["abcd"], ["a", "c", "bd"])
    )
    for one, other in zip(together, alone, strict=True):
        for step, same in zip(one, other, strict=True):
            for name in shapes:
                for x, y in zip(step[name], same[name], strict=True):
                    assert torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0)), name
        assert one[2]["b"][0].isnan().all() and one[2]["a"][0].isfinite().all()


def test_no_buffer_outgrows_its_bound():
    """Forty steps of gradients that the factors mostly cannot express, of changing size."""

    def body(rank, psgd):
        for step in range(40):
            draw = torch.Generator().manual_seed(100 * step + rank)
            reduced(psgd, torch.randn(SHAPE, generator=draw) * 2.0 ** (5 * math.sin(step)))
            matrix = psgd.compressor.matrices["m"]
            top = float(matrix.value().abs().max())
            yield top, float(matrix.bound), float(matrix.unit)

    for steps in machines(3, lambda rank, psgd: list(body(rank, psgd)), rank=4):
        for top, bound, unit in steps:
            assert top <= bound * 1.01 and bound * unit < 16
        assert steps[-1][1] < 100 * steps[-1][0]  # and no bound runs away


def test_units_change_only_where_the_range_asks_for_it():
    bounds = torch.tensor([0.0, 1.0, 7.9, 9.0, 2.0**-30, 3.0e30, 1e-38])
    units = new_units(bounds, torch.ones(7))
    assert units[:3].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(torch.frexp(units).mantissa, torch.full((7,), 0.5))  # powers of two
    scaled = (bounds * units)[1:6]
    assert (scaled < 2.0**MAX_EXPONENT).all() and (scaled > 2.0**-20).all()


def test_losses_scaled_by_torch_leave_the_buffers_in_their_units():
    """`torch.amp.GradScaler`: handed out scaled, buffers as unscaled, also when it backs off."""
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(torch.zeros(()))  # makes the tensor
    plain, scaled = copies(2, rank=4), copies(2, rank=4, scaler=scaler)
    for step in range(4):
        grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
        wanted, scale = reduced(plain, grad), scaler.get_scale()
        assert torch.equal(reduced(scaled, grad * scale), wanted * scale)
        assert torch.equal(scaled.gradient_norm(), plain.gradient_norm())
        scaler.update(scale / 8)
    held, other = (p.compressor.matrices["m"].value() for p in (plain, scaled))
    assert torch.equal(held, other)
    assert torch.equal(
        reduced(copies(2, rank=4, scaler=torch.amp.GradScaler("cpu", enabled=False)), grad),
        reduced(copies(2, rank=4), grad),
    )


@pytest.mark.parametrize("unscale", [False, True])
def test_the_norm_is_unscaled_before_and_after_the_step(unscale):
    """`scaler.step` divides the gradients where `unscale_` did not."""
    net = nn.Linear(64, 48)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    psgd = copies(2, rank=4, scaler=scaler)
    psgd._register(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(3, 64)).square().mean()).backward()
        norms = [float(psgd.gradient_norm())]
        if unscale:
            scaler.unscale_(optimizer)
            norms.append(float(psgd.gradient_norm()))
        scaler.step(optimizer)
        norms.append(float(psgd.gradient_norm()))
        wanted = float(torch.cat([p.grad.flatten() for p in net.parameters()]).norm())
        assert norms == pytest.approx([wanted] * len(norms), rel=1e-6)
        scaler.update()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("by", [2.0**-40, 1.0, 1000.0, 2.0**20])
def test_a_state_of_fp32_buffers_loads_into_words(known, by):
    """In a unit that fits, whatever the gradients' size; it saturated at 16."""
    first, other = copies(2, rank=4, wire="fp32"), copies(2, rank=4)
    for seed in range(2):
        reduced(first, low_rank(9, seed, by=by))
    if known:
        reduced(other, low_rank(9))
    other.load_state_dict(first.state_dict())
    if not known:
        other.compressor.prepare([Gradient("m", torch.zeros(SHAPE))])
    held = [p.compressor.matrices["m"].value() for p in (other, first)]
    assert off(*held) < 2**-9


def test_what_words_cannot_hold_is_counted():
    psgd = copies(2, rank=4, min_compression=1.0)
    grad = low_rank(1)
    grad[3:] *= 2.0**-55  # far below what the largest leaves room for
    reduced(psgd, grad)
    report = psgd.report()
    assert report["saturated"] == 0 and 0.1 < report["flushed"] < 1


def test_report_of_one_process_and_of_none():
    psgd = copies(1, rank=4)
    assert psgd.report()["advice"].startswith("nothing was sent")
    reduced(psgd, low_rank(2))
    report = psgd.report()
    assert report["bytes_sent"] == 0 and report["advice"].startswith("nothing was sent")


def test_other_processors_take_the_first_ones_columns(monkeypatch):
    """One machine orthonormalises to other bits; all hold the same."""
    plain, odd = dalle_ext.orthogonalize, []

    def other(p, eps):
        found = plain(p, eps)
        return found * (1 + 2.0**-8) if odd and odd[0] == threading.current_thread() else found

    monkeypatch.setattr(dalle_ext, "orthogonalize", other)

    def body(rank, psgd):
        if rank == 1:
            odd.append(threading.current_thread())
        psgd.compressor.comm.gather(None)
        grads = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(rank + 3 * i))
                 for i in range(2)]  # fmt: skip
        return [reduced(psgd, grad) for grad in grads], psgd.compressor._broadcast_p

    every = machines(3, body, rank=4)
    assert all(seen for _, seen in every)
    for found, _ in every[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, every[0][0], strict=True))


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_goes_on_as_its_original_would(way):
    first, same = copies(2, rank=4), copies(2, rank=4)
    for psgd in (first, same):
        reduced(psgd, low_rank(9))
    found = way(first)
    if way is not copy.copy:
        found.compressor.comm = copies(2).compressor.comm  # a pickle's group is all
        before = first.compressor.matrices["m"].error.clone()
    grad = low_rank(9, seed=1)
    assert torch.equal(reduced(found, grad), reduced(same, grad))
    if way is not copy.copy:  # one that is not shared
        assert torch.equal(first.compressor.matrices["m"].error, before)


def test_a_pickle_before_attach_does_not_lose_what_is_excluded():
    net = model()
    psgd = PowerSGD(rank=4, exclude=[net[1].weight])
    with pytest.raises(UsageError, match="PowerSGD: exclude must be empty in a pickle before att"):
        pickle.dumps(psgd)
    assert (
        copy.deepcopy(psgd)._excluded_params == copy.copy(psgd)._excluded_params == [net[1].weight]
    )
    psgd._register(net)
    assert "1.weight" in pickled(psgd)._excluded
    pickled(PowerSGD(rank=4))


BAD = {
    "PowerSGD: rank must be 1 or more, got 0": lambda: PowerSGD(rank=0),
    "PowerSGD: rank must be a whole number, got 2.5": lambda: PowerSGD(rank=2.5),
    "PowerSGD: rank must be a whole number, got True": lambda: PowerSGD(rank=True),
    "PowerSGD: seed must be a whole number, got 1.5": lambda: PowerSGD(seed=1.5),
    "PowerSGD: wire must be one of 1-6-9, fp32, got fp8": lambda: PowerSGD(wire="fp8"),
    "PowerSGD: scaler must be a ResblockScaler or GradScaler, got 8":
        lambda: PowerSGD(scaler=8),
    "PowerSGD: model must be DistributedDataParallel or hold fully_shard modules, got Sequential":
        lambda: PowerSGD(rank=4).attach(model()),
    "PowerSGD: rank must leave a matrix that factors make smaller, got 500: nothing would be":
        lambda: PowerSGD(rank=500).attach(model()),
    "PowerSGD: gradients must be dense, got sparse=True in 0":
        lambda: PowerSGD().attach(nn.Sequential(nn.Embedding(9, 64, sparse=True))),
    "PowerSGD: state must be of rank 4, got 5":
        lambda: PowerSGD(rank=4).load_state_dict({"rank": 5, "seed": 0}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gets_one_line(message):
    with pytest.raises((UsageError, CheckpointError), match=re.escape(message)):
        BAD[message]()


@pytest.mark.parametrize("preset", ["small", "base"])
def test_no_table_of_the_prior_is_compressed(preset):
    """Nothing outside the residual blocks is, but what its user leaves in: see E.2."""
    with torch.device("meta"):
        prior = Prior.from_preset(preset)
    psgd = PowerSGD(rank=8, exclude=[prior.text_head.weight, prior.image_head.weight])
    psgd._register(prior)
    left = [n for n, p in prior.named_parameters() if p.dim() > 1 and n not in psgd._excluded]
    assert left and all(name.startswith("layers.") for name in left)
