"""`PowerSGD` over processes: exactness, the invariant, one Inf, two engines, state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dalle_ext
from support import groups, whole_state
from support.distributed import (
    PLAIN,
    STEPS,
    WIRE,
    example,
    feedback,
    gradients,
    mean_of,
    one_infinity,
    others,
    reduce_once,
    saved,
    scaled,
    too_large,
    uneven,
)
from support.engines import ddp, fsdp
from support.processes import run


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (8, 2)])
def test_gradients_of_a_small_rank_are_exact(two, count, rank):
    """1 and 8 matrices of one shape, rank 1 and 2: no rival's is right for more than one."""
    results = two[f"exact {count} {rank}"]
    means, bias = mean_of(2, count, rank)
    for found in results:
        for i, mean in enumerate(means):
            assert (found[f"m{i}"] - mean).norm() <= 1e-6 * mean.norm()
        torch.testing.assert_close(found["bias"], bias)


@pytest.mark.parametrize(("name", "within"), [("exact 8 2", 1e-6), ("inexact", 2**-9)])
def test_the_norm_is_known_from_the_factors(two, name, within):
    for found in two[name]:
        given = [grad.double() for key, grad in found.items() if key != "norm"]
        wanted = nn.utils.get_total_norm(given)
        assert abs(found["norm"] - wanted) <= within * wanted


def test_what_factors_would_not_make_smaller_is_sent_whole(two):
    wanted = mean_of(2, 1, None, 8, 64)[0][0]  # 8 (8 + 64) > 8 * 64
    torch.testing.assert_close(two["full"][0]["m0"], wanted)


def test_all_processes_hold_the_same_bits(four):
    for found in four["bits"][1:]:
        assert all(torch.equal(found[name], four["bits"][0][name]) for name in found)


@pytest.mark.parametrize("wire", WIRE)
def test_what_is_not_handed_out_is_in_the_buffers(two, wire):
    """Sum of gradients = world * handed out + sum of buffers, up to the words' rounding."""
    steps, results = STEPS, two[f"feedback {wire}"]
    for i in range(2):
        given = sum(r["given"][i] for r in results)
        kept = sum(r["kept"][i] for r in results)
        lost = given - 2 * results[0]["handed"][i] - kept
        assert kept.norm() > 0.1 * given.norm()  # the buffers do hold something
        assert lost.norm() <= steps * 2**-10 * given.norm()


def test_one_infinity_leaves_finite_state_and_the_next_step_is_right(two):
    results = two["infinity"]
    for rank, result in enumerate(results):
        assert all(g.isnan().all() for g in result["found"][1])
        assert all(g.isfinite().all() for g in result["found"][2])
        assert result["kept"].isfinite().all()
        if rank == 1:  # its own gradient had the infinity: its buffer did not change
            assert torch.equal(result["errors"][1], result["errors"][0])
    handed = 2 * (results[0]["found"][0][0] + results[0]["found"][2][0])
    given = sum(gradients(rank, 2, seed=step)[0][0] for rank in range(2) for step in (0, 2))
    given = given + gradients(0, 2, seed=1)[0][0]  # the finite gradient of the skipped step stays
    lost = given - handed - sum(r["kept"] for r in results)
    assert lost.norm() <= 5 * 2**-10 * given.norm()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes."""
    calls = {
        f"exact {count} {rank}": (reduce_once, {"rank": rank, "wire": "fp32"}, count, rank)
        for count, rank in ((1, 1), (8, 2))
    }  # fmt: skip
    calls |= {f"feedback {wire}": (feedback, wire, STEPS) for wire in WIRE}
    calls |= {
        "inexact": (reduce_once, {"rank": 4}, 2, None),
        "full": (reduce_once, {"rank": 8, "min_compression": 1.0}, 1, None, 8, 64),
        "infinity": (one_infinity,), "plain": (ddp, None, 60), "ddp": (ddp, PLAIN, 60),
        "saved": (saved,), "seed": (others, [{"seed": 0}, {"seed": 1}]),
        "fast": (others, [{"fast": False}, {"fast": True}]), "scaled": (scaled,),
        "whole state": (whole_state.gathered,), "uneven": (uneven,),
        "example": (example, 40),
    }  # fmt: skip
    return run(2, calls, tmp_path_factory.mktemp("two"))


def test_the_example_learns(two):
    """`examples/own_model_ddp.py` begins at 2.8 nats; chance is ln 16 = 2.77."""
    (loss, compression), other = two["example"]
    assert loss < 0.6 and (loss, compression) == other and compression > 4


def test_uneven_inputs_join(two):
    """The process that has run out of data follows the others outside a backward pass."""
    first, second = two["uneven"]
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four processes: two machines of two."""
    calls = {
        "bits": (reduce_once, {"rank": 2}, 2, None), "plain": (ddp, None, 4),
        "whole": (fsdp, PLAIN, 4, 1, "whole"), "fsdp": (fsdp, PLAIN, 60),
        "at once": (fsdp, PLAIN, 60, 1, "at once"), "fp16": (fsdp, PLAIN, 60, 1, "", "float16"),
        "each": (fsdp, PLAIN, 60, 2), "last": (fsdp, PLAIN, 60, 2, "last"),
        "too large": (too_large,), "pairs": (groups.pairs,), "refused": (groups.refused,),
        "norms": (groups.norms,), "drift": (groups.drift,),
    }  # fmt: skip
    return run(4, calls, tmp_path_factory.mktemp("four"))


def last_loss(results):
    return sum(sum(r["losses"][-5:]) for r in results) / (5 * len(results))


def test_ddp_trains_as_without_compression(two):
    """Several buckets, overlapped: the loss ends where plain DDP's does."""
    found = two["ddp"]
    assert found[0]["names"] == ["1.weight", "3.weight"]
    for name, weight in found[0]["weights"].items():
        assert torch.equal(weight, found[1]["weights"][name])
    assert last_loss(found) < 1.3 * last_loss(two["plain"]) + 0.02
    assert last_loss(found) < 0.2 * found[0]["losses"][0]


def test_fsdp2_compresses_shards_between_machines(four):
    """The shards' hooks run, and every process ends with the same whole weights."""
    found = four["fsdp"]
    assert found[0]["names"] == ["1.weight", "3.weight"]
    assert found[0]["compressed"] == [2, 3]  # the unembedding is too small
    for other in found[1:]:
        for name, weight in found[0]["weights"].items():
            assert torch.equal(weight, other["weights"][name])
    assert last_loss(found) < 0.2 * found[0]["losses"][0]


def test_fsdp2_overlaps_and_gives_the_same_bits(four):
    found, other = four["fsdp"][0], four["at once"][0]
    assert found["losses"] == other["losses"]
    for name, weight in found["weights"].items():
        assert torch.equal(weight, other["weights"][name])
    norm, wanted = found["norms"]
    assert abs(norm - wanted) <= 2**-9 * wanted
    assert 0 < found["report"]["waited_seconds"] < found["report"]["seconds"]
    assert other["report"]["waited_seconds"] == 0


@pytest.mark.parametrize("name", ["each", "last", "fp16"])
def test_micro_batches_and_fp16_reductions_train_too(four, name):
    """Exchanged with each micro-batch, with the last alone; and where FSDP2 casts and divides."""
    found = four[name]
    assert last_loss(found) < 0.2 * found[0]["losses"][0]
    for other in found[1:]:
        assert all(torch.equal(w, other["weights"][n]) for n, w in found[0]["weights"].items())
    waited = found[0]["report"]["waited_seconds"]
    assert waited == 0 if name == "fp16" else waited > 0


def test_fsdp2_with_nothing_compressed_is_data_parallel(four):
    """The hook's views and factors: as plain DDP over four processes, to 1e-5."""
    assert four["whole"][0]["names"] == []
    for name, weight in four["whole"][0]["weights"].items():
        torch.testing.assert_close(weight, four["plain"][0]["weights"][name], rtol=1e-5, atol=1e-6)


def test_a_rank_above_every_shards_limit_is_refused(four):
    wanted = "PowerSGD: rank must leave a matrix that factors make smaller, got 12: nothing would"
    assert all(said.startswith(wanted) for said in four["too large"])


def test_state_is_one_copy_and_goes_on_bit_for_bit(two):
    """Buffers are made equal, their sum kept; who saved and who loaded hold the same bits."""
    first, second = two["saved"]
    for name, codes in first["state"]["errors"].items():
        assert torch.equal(codes, second["state"]["errors"][name])
    unit = first["state"]["units"]["m0"]
    kept = 2 * dalle_ext.unpack(first["state"]["errors"]["m0"], "1-6-9") / unit
    torch.testing.assert_close(kept, first["sums"], rtol=2**-9, atol=1e-6)
    own, loaded = first["results"]
    assert all(torch.equal(a, b) for a, b in zip(own, loaded, strict=True))
    assert torch.equal(first["halved"], kept / 4)


def test_blocks_of_their_own_scales(two):
    """They come out scaled, else bit for bit as plain ones; an Inf is that of its block alone."""
    for found in two["scaled"]:
        for i in range(2):
            assert torch.equal(found["scaled"][i], found["plain"][i] * found["scales"][i])
        assert found["blown"][0].isfinite().all() and found["blown"][1].isnan().all()


def test_report(two):
    found = two["scaled"][0]
    report = found["report"]
    factors = 2 * (24 + 40) * 4 * 2  # P and Q of two matrices in words of 2 bytes
    once = 2 * 40 * 8 * 4  # the fixed Q of both, of four columns more
    squares = 2 * 8 * 9 // 2 * 4  # those of both P, a triangle each
    assert report["bytes_sent"] == once + factors + squares + 4 + 2 * 4  # a flag, a bound of each
    assert report["bytes_uncompressed"] == 2 * 24 * 40 * 4
    assert 0 < report["exchange_seconds"] < report["seconds"]
    assert found["advice"].startswith("compression ")


@pytest.mark.parametrize(("what", "values"), [("seed", (0, 1)), ("fast", (False, True))])
def test_other_options_on_one_process_are_named(what, values, two):
    wanted = (
        f"PowerSGD: {what} must be the same on all processes ({values[0]} on process 0), "
        f"got {values[1]} on process 1"
    )
    assert two[what] == [wanted, wanted]


def test_models_on_pairs_of_processes_keep_to_their_own(four):
    """And DDP's own exchange over unused parameters runs beside ours."""
    for rank, found in enumerate(four["pairs"]):
        pair = four["pairs"][rank // 2 * 2]
        torch.testing.assert_close(found["grad"], torch.full((64, 64), 8.0 * (rank // 2)))
        assert all(
            torch.equal(a, b) for a, b in zip(found["weights"], pair["weights"], strict=True)
        )
    weights = [four["pairs"][rank]["weights"][0] for rank in (0, 2)]
    assert not torch.equal(*weights)


def test_groups_and_models_that_do_not_fit_are_refused(four):
    for said in four["refused"]:
        assert said["one axis"].startswith("PowerSGD: group must be given where the model's mesh")
        meets = "PowerSGD: group must meet the mesh of the shards in this process alone"
        assert said["all"].startswith(meets) and said["both axes"].startswith(meets)
        assert said["ddp"].startswith("PowerSGD: group must be the model's processes [0, 1, 2, 3]")
        unused = "PowerSGD: every parameter of a fully_shard module must get a gradient, got "
        assert said["unused"].startswith(unused)
        unit = "PowerSGD: gradients of a unit must be the same on all processes (["
        assert said["unit"].startswith(unit)


def test_the_norm_is_that_of_the_whole_gradient(four):
    """Buckets cut anew, parts unfrozen, fp16 divided later, micro-batches, parts not sharded."""
    for found in four["norms"]:
        for name, pairs in found.items():
            for norm, wanted in pairs:
                assert abs(norm - wanted) <= 1e-5 * wanted, name
    for name in four["norms"][0]:
        assert len({found[name][-1][0] for found in four["norms"]}) == 1, name


def test_replicas_that_drift_apart_are_named(four):
    for found in four["drift"]:
        assert found["equal"] is None
        wanted = "weights of process 2 differ from those of process 0, which holds the same part, "
        assert found["apart"] == wanted + "in 1.weight"


def test_optimizer_state_of_fsdp2_is_gathered_whole_and_put_back(two):
    """No collective takes int16, so that codes travel as bytes."""
    first, second = two["whole state"]
    assert first["names"] == ["0.bias", "0.weight", "1.bias", "1.weight"] and first["same"]
    assert second["same"] and first["step"] == 2 and first["bytes"].shape == (97, 102, 2)
    for name in whole_state.MOMENTS:
        parts = [found["own"][name] for found in (first, second)]
        assert first[name].dtype == torch.int16
        assert torch.equal(first[name], torch.cat(parts, 1)) and first[name].any()
