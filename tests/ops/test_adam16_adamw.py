"""AdamW16 and `torch.optim.AdamW`: each takes the other's state, converted, or says why not."""

from __future__ import annotations

import io

import pytest
import torch

import dalle_ext

CODED = 8192


def one(numel=CODED):
    param = torch.nn.Parameter(torch.zeros(numel))
    return param, dalle_ext.AdamW16([param], lr=1e-3)


def run(optimizer, param, grads):
    for grad in grads:
        param.grad = grad
        optimizer.step()


def adamw(numel=CODED, dtype=torch.float32, updates=20, make=torch.optim.AdamW, **options):
    """Parameters of two sizes after some updates by torch, and how to go on."""
    draw = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (numel, 100)]
    optimizer = make(params, **{"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.1, **options})
    grads = [[torch.randn(len(p), generator=draw).to(dtype) for p in params] for _ in range(40)]
    run_all(optimizer, params, grads[:updates])
    return params, optimizer, grads[updates:]


def run_all(optimizer, params, grads):
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def sixteen(params, **options):
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    return twins, dalle_ext.AdamW16(twins, lr=1.0, **options)


def changes(before, after):
    return [(b.detach() - a).double() for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp32", [False, True])
def test_a_state_of_adamw_goes_on(dtype, fp32):
    """And back: moments, counts and options are those that torch has."""
    params, theirs, grads = adamw(dtype=dtype)
    twins, ours = sixteen(params, seed=7, variance_clip=9.0, fp32_moments=fp32)
    ours.param_groups[0]["initial_lr"] = 3.0
    given = theirs.state_dict()
    ours.load_state_dict(given)
    group = ours.param_groups[0]
    assert {k: group[k] for k in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.1
    }  # fmt: skip
    assert group["seed"] == 7 and group["variance_clip"] == 9.0 and group["fp32_moments"] is fp32
    assert not set(group) & {"amsgrad", "foreach", "fused", "decoupled_weight_decay"}
    back = ours.adamw_state_dict()
    assert back["param_groups"] == given["param_groups"]
    for index in (0, 1):
        for name, error in (("exp_avg", 2**-10), ("exp_avg_sq", 2**-11)):
            kept = ours.state[twins[index]][name]
            coded = index == 0 and not fp32
            assert kept.dtype == (torch.int16 if coded else torch.float32)
            wanted, found = given["state"][index][name].float(), back["state"][index][name]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted, rtol=error * coded, atol=2.0**-60)
        assert ours.state[twins[index]]["step"].item() == 20
        assert back["state"][index]["step"] == given["state"][index]["step"]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = torch.optim.AdamW(others, lr=1.0)
    again.load_state_dict(back)
    before = [p.detach().clone() for p in params]
    for optimizer, each in ((theirs, params), (ours, twins), (again, others)):
        run_all(optimizer, each, grads)
    wanted = changes(before, params)
    exact = 1e-6 if fp32 or dtype == torch.bfloat16 else 2e-3
    limits = {"back": exact} if dtype == torch.bfloat16 else {"back": exact, "ours": exact}
    for name, limit in limits.items():  # torch's arithmetic on bfloat16 is another one
        each = twins if name == "ours" else others
        for found, change in zip(changes(before, each), wanted, strict=True):
            assert (found - change).norm() < limit * change.norm(), name
    assert all(ours.state[p]["step"] == 40 for p in twins)


@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_adamw_does_not_take_codes_for_numbers(path):
    """torch's loading turns int16 into floats: moments of 20,000."""
    param, optimizer = one()
    run(optimizer, param, [torch.ones(CODED)])
    plain = torch.nn.Parameter(torch.ones(CODED))
    theirs = torch.optim.AdamW([plain])
    theirs.load_state_dict(optimizer.state_dict())
    theirs.param_groups[0].update(path)  # loading took the options of the state
    plain.grad = torch.ones(CODED)
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        theirs.step()
    assert torch.equal(plain, torch.ones(CODED))
    before = optimizer.state_dict()
    optimizer.load_state_dict(before)
    after = optimizer.state_dict()
    assert "amsgrad" not in optimizer.param_groups[0]
    assert [list(group.items()) for group in after["param_groups"]] == [
        list(group.items()) for group in before["param_groups"]
    ]  # in the same order, as a hash of a checkpoint has it
    assert list(after["state"][0]) == list(before["state"][0])


def test_states_of_adamw_from_files_groups_and_schedulers():
    """In another memory order, with a tensor as lr, with what a scheduler adds, before any step."""
    params = [torch.nn.Parameter(torch.rand(128, 64).t()), torch.nn.Parameter(torch.rand(3))]
    groups = [{"params": params[:1], "weight_decay": 0.5}, {"params": params[1:]}]
    theirs = torch.optim.AdamW(groups, lr=torch.tensor(0.25), eps=1e-6)
    torch.optim.lr_scheduler.LinearLR(theirs)
    own = [{"params": params[:1], "seed": 3}, {"params": params[1:], "fp32_moments": True}]
    ours = dalle_ext.AdamW16(own)
    ours.load_state_dict(theirs.state_dict())  # before any update
    assert not ours.state and [g["weight_decay"] for g in ours.param_groups] == [0.5, 0.01]
    assert [g["seed"] for g in ours.param_groups] == [3, 0]
    assert [g["fp32_moments"] for g in ours.param_groups] == [False, True]
    assert all("initial_lr" in group for group in ours.param_groups)
    for param in params:
        param.grad = torch.rand_like(param)
    theirs.step()
    stream = io.BytesIO()
    torch.save(theirs.state_dict(), stream)
    stream.seek(0)
    ours.load_state_dict(torch.load(stream))
    state, wanted = ours.state[params[0]], theirs.state[params[0]]
    assert state["exp_avg"].stride() == params[0].stride() == (1, 64)
    torch.testing.assert_close(
        dalle_ext.unpack(state["exp_avg"], "1-6-9"), wanted["exp_avg"], rtol=2**-10, atol=0
    )
    ours.step()


def adamw_group(**changed):
    params, theirs, _ = adamw(updates=1)
    state = theirs.state_dict()
    return {**state, "param_groups": [state["param_groups"][0] | changed]}


def adamw_state(**changed):
    state = adamw_group()
    state["state"][0] |= changed
    return state


def state_of(make, **options):
    return adamw(make=make, updates=1, **options)[1].state_dict()


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (lambda: adamw_group(amsgrad=True), "amsgrad of the state must be False, got True"),
        (lambda: adamw_group(maximize=True), "maximize of the state must be False, got True"),
        (
            lambda: state_of(torch.optim.Adam),
            "weight_decay of the state must be decoupled or 0, got 0.1 of an Adam that adds it",
        ),
        (
            lambda: torch.optim.SGD([torch.ones(CODED), torch.ones(100)]).state_dict(),
            "state must be of AdamW16 or torch.optim.AdamW, got groups without betas and eps",
        ),
        (
            lambda: state_of(torch.optim.NAdam, weight_decay=0.0),
            "state of parameter 0 must be exp_avg, exp_avg_sq, step, got exp_avg, exp_avg_sq, mu_p",
        ),
        (lambda: adamw_group(lr=-1.0), "lr must be 0 or more and finite, got -1.0"),
        (
            lambda: adamw_state(exp_avg=torch.full((CODED,), -16.0)),
            "state exp_avg of parameter 0 must be at most 15.984375 to fit 16 bits, got 16; Adam",
        ),
        (
            lambda: adamw_state(exp_avg=torch.full((CODED,), float("nan"))),
            "state exp_avg of parameter 0 must be finite, got nan to nan",
        ),
        (
            lambda: adamw_state(exp_avg_sq=torch.full((CODED,), float("inf"))),
            "state exp_avg_sq of parameter 0 must be 0 or more and finite, got inf to inf",
        ),
        (
            lambda: adamw_state(exp_avg_sq=torch.full((CODED,), -1e-3)),
            "state exp_avg_sq of parameter 0 must be 0 or more and finite, got -0.001 to -0.001",
        ),
        (
            lambda: adamw_state(exp_avg=torch.ones(7)),
            r"state exp_avg of parameter 0 must be \(8192,\) torch.int16, got \(7,\) torch.float32",
        ),
        (
            lambda: adamw_state(step=torch.tensor(float("nan"))),
            "state step of parameter 0 must be a number, got",
        ),
    ],
)  # fmt: skip
def test_states_that_cannot_be_converted(state, line):
    params, _, _ = adamw(updates=0)
    twins, ours = sixteen(params)
    before = ours.state_dict()
    with pytest.raises(ValueError, match=f"^AdamW16: {line}") as caught:
        ours.load_state_dict(state())
    assert "\n" not in str(caught.value) and ours.state_dict() == before
    ours.load_state_dict(state_of(torch.optim.Adam, weight_decay=0.0))
    assert int(ours.state[twins[0]]["step"]) == 1
