"""AdamW16 on every back end: against float64 AdamW, tiny gradients, skipped steps, states."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import dalle_ext

BETAS, EPS = (0.9, 0.96), 1e-8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def exact_adamw(param, grads, lr, decay, clip=5.0):
    """AdamW in float64 with the variance clipped; the parameters after every update."""
    p, m, v = param.double(), 0.0, 0.0
    for t, grad in enumerate(grads, 1):
        g = grad.double()
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = torch.clamp(BETAS[1] * v + (1 - BETAS[1]) * g * g, max=clip)
        root = v.sqrt() / math.sqrt(1 - BETAS[1] ** t) + EPS
        p = p * (1 - lr * decay) - lr / (1 - BETAS[0] ** t) * m / root
    return p


def numbers(shape, seed, device, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * size).to(dtype).to(device)


def run(params, grads, **options):
    """One optimizer over all updates; grads[t][i] is parameter i's gradient of update t."""
    optimizer = dalle_ext.AdamW16(params, betas=BETAS, eps=EPS, **options)
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return optimizer


def snapshot(optimizer):
    tensors = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return tensors + [t.clone() for s in optimizer.state.values() for t in s.values()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("numel", [100, 8192, 40001])
def test_200_updates_stay_near_float64(numel, device):
    """Bound: an update is lr |m| / sqrt(v) and m, v are off by 2^-10 and 2^-11 of themselves a
    rounding, of which about 1 / (1 - beta) count: at most 10 * 2^-10 + 25 / 2 * 2^-11 = 1.6 % of
    an update if all errors had one sign; they do not, so that 200 updates of size up to lr may be
    off by 1.6 % of 200 lr at the very most, and typically by a twentieth of that."""
    updates, lr = (200, 1e-3) if numel < 40001 else (20, 1e-3)
    start = numbers(numel, 0, device)
    grads = [[numbers(numel, 1 + t, device, size=0.1)] for t in range(updates)]
    param = torch.nn.Parameter(start.clone())
    run([param], grads, lr=lr, weight_decay=0.045)
    error = (param.double() - exact_adamw(start, [g for (g,) in grads], lr, 0.045)).abs()
    assert error.max() <= 0.016 * updates * lr
    assert error.pow(2).mean().sqrt() <= 0.016 * updates * lr / 20
    plain = torch.nn.Parameter(start.clone())
    torch_adamw = torch.optim.AdamW([plain], lr=lr, betas=BETAS, eps=EPS, weight_decay=0.045)
    for (grad,) in grads:
        plain.grad = grad.clone()
        torch_adamw.step()
    if numel < 8192:  # float32 moments: as near as torch's own
        theirs = (plain.double() - exact_adamw(start, [g for (g,) in grads], lr, 0.045)).abs()
        assert error.max() <= 2 * theirs.max() + 1e-6


@pytest.mark.parametrize("exponent", range(-40, -23, 4))
def test_tiny_gradients_still_move(exponent, device):
    """|g| of 2^-40 has a variance that 0-6-10 cannot hold; the mean still can, and eps decides."""
    numel, lr = 8192, 1e-3
    grad = torch.full((numel,), 2.0**exponent, device=device)
    param = torch.nn.Parameter(torch.zeros(numel, device=device))
    run([param], [[grad]] * 10, lr=lr, weight_decay=0.0)
    exact = exact_adamw(torch.zeros(1), [grad[:1].cpu()] * 10, lr, 0.0)
    ratio = float(param.detach()[0].double().cpu() / exact[0])
    # What is lost of v where it is below 2^-60 is at most its share of the denominator.
    share = 2.0**exponent / (2.0**exponent + EPS)
    assert 0.98 <= ratio <= 1.02 / (1 - share) if share < 0.9 else 0.98 <= ratio <= 1.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_matches_the_definition(dtype, stochastic, device):
    """The second tensor's variances lie where they become zero or code 1 by chance."""
    shapes, sizes = [(33011,), (8200,), (7, 9), (0,), (64, 200)], (1e-2, 3e-9, 1e-2, 1e-2, 1.0)
    grads = [
        [numbers(s, 10 * t + i, device, dtype, sizes[i]) for i, s in enumerate(shapes)]
        for t in range(5)
    ]
    options = {"lr": 1e-2, "stochastic_rounding": stochastic, "seed": 3}
    found = []
    for reference in (False, True):
        params = [torch.nn.Parameter(numbers(s, i, device, dtype)) for i, s in enumerate(shapes)]
        with dalle_ext.use_reference(reference):
            found.append(snapshot(run(params, grads, **options)))
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    assert same(*found)  # every bit: the replicas of a model must not drift apart


def test_moments_are_codes_from_8192_elements_on(device):
    params = [torch.nn.Parameter(numbers(n, n, device)) for n in (8191, 8192, 100_000)]
    grads = [[torch.ones_like(p) for p in params]]
    optimizer = run(params, grads, lr=1e-3)
    dtypes = [optimizer.state[p]["exp_avg"].dtype for p in params]
    assert dtypes == [torch.float32, torch.int16, torch.int16]
    assert optimizer.state_bytes() == 8 * 8191 + 4 * 108_192 + 3 * 8
    mean = dalle_ext.unpack(optimizer.state[params[1]]["exp_avg"], "1-6-9")
    assert mean[0].item() == pytest.approx(0.1, rel=2**-9)
    assert mean.mean().item() == pytest.approx(0.1, rel=2**-14)


def test_a_group_may_keep_float32_moments(device):
    """Embeddings do in the paper (appendix D, guideline 2); such a state goes round too."""
    params = [torch.nn.Parameter(numbers(9000, 0, device)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "fp32_moments": True}]
    optimizer = dalle_ext.AdamW16(groups, lr=1e-3, variance_clip=1e9)
    plain = torch.optim.AdamW(params[2:], lr=1e-3)
    for step in range(3):
        for param in params:
            param.grad = numbers(9000, step + 1, device)
        optimizer.step()
        plain.step()
    dtypes = [optimizer.state[p]["exp_avg_sq"].dtype for p in params[:2]]
    assert dtypes == [torch.int16, torch.float32] and optimizer.state_bytes() == 12 * 9000 + 2 * 8
    torch.testing.assert_close(params[1], params[2], rtol=1e-6, atol=1e-7)
    again = dalle_ext.AdamW16(groups, lr=1e-3)
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"AdamW16: state exp_avg of parameter 1 must be"):
        dalle_ext.AdamW16(params[:2], lr=1e-3).load_state_dict(
            {
                **optimizer.state_dict(),
                "param_groups": dalle_ext.AdamW16(params[:2]).state_dict()["param_groups"],
            }
        )


def test_variance_is_clipped_and_the_clip_is_a_number(device):
    param = torch.nn.Parameter(torch.zeros(8192, device=device))
    optimizer = run([param], [[torch.full((8192,), 100.0, device=device)]] * 3, lr=1e-3)
    variance = dalle_ext.unpack(optimizer.state[param]["exp_avg_sq"], "0-6-10")
    assert variance[0].item() == 5.0


def test_skipped_step_changes_no_bit(device):
    params = [torch.nn.Parameter(numbers(n, n, device)) for n in (100, 9000)]
    optimizer = run(params, [[torch.ones_like(p) for p in params]] * 2, lr=1e-3)
    before = snapshot(optimizer)
    for flag in (True, torch.tensor(True, device=device), torch.tensor(1.0, device=device)):
        params[0].grad[3] = math.nan
        optimizer.step(found_nonfinite=flag)
        assert same(before, snapshot(optimizer))
    params[0].grad[3] = 1.0
    optimizer.step(found_nonfinite=torch.tensor(False, device=device))
    assert not same(before, snapshot(optimizer)) and optimizer.state[params[0]]["step"] == 3


def test_scales_and_clip_factor_are_read_on_the_device(device):
    """Gradients times their group's scale, unscaled inside, move parameters as the plain ones."""
    scales = torch.tensor([2.0**13, 2.0**20], device=device)
    found = []
    for scaled in (False, True):
        params = [torch.nn.Parameter(numbers(9000, i, device)) for i in range(3)]
        groups = {params[1]: 1, params[2]: 1}
        optimizer = dalle_ext.AdamW16(params, lr=1e-2)
        for i, param in enumerate(params):
            grad = numbers(9000, 50 + i, device) * 0.5
            param.grad = grad * 2 * scales[groups.get(param, 0)] if scaled else grad
        if scaled:
            half = torch.tensor(0.5, device=device)
            optimizer.step(scales=scales, groups=groups, clip_factor=half)
        else:
            optimizer.step()
        found.append(snapshot(optimizer))
    assert same(*found)


def test_state_round_trip_keeps_codes_and_bits(device):
    def make(seed):
        return [torch.nn.Parameter(numbers(s, seed, device)) for s in ((9000,), (30,), (96, 100))]

    grads = [[numbers(p.shape, 7 * t, device, size=0.1) for p in make(0)] for t in range(6)]
    options = {"lr": 1e-2, "stochastic_rounding": True}
    straight = make(0)
    whole = snapshot(run(straight, grads, **options))
    first = make(0)
    saved = run(first, grads[:3], **options).state_dict()
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = dalle_ext.AdamW16(second, betas=BETAS, eps=EPS, **options)
    resumed.load_state_dict(saved)
    assert resumed.state[second[0]]["exp_avg"].dtype == torch.int16
    assert resumed.state_dict()["param_groups"] == saved["param_groups"]
    for row in grads[3:]:
        for param, grad in zip(second, row, strict=True):
            param.grad = grad.clone()
        resumed.step()
    assert same(whole, snapshot(resumed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_keeps_small_updates(dtype, device):
    """Updates of a hundredth of a unit in the last place: nearest loses all, stochastic none."""
    ulp = torch.finfo(dtype).eps
    for value in (1.0, 2.0**-16) if dtype == torch.float16 else (1.0,):
        unit = ulp * value if value == 1.0 else 2.0**-24
        for stochastic in (False, True):
            param = torch.nn.Parameter(torch.full((20_000,), value, dtype=dtype, device=device))
            grads = [[torch.full_like(param, -1.0)]] * 50
            options = {"lr": 0.01 * unit, "weight_decay": 0.0, "stochastic_rounding": stochastic}
            run([param], grads, **options)
            moved = (param.detach().double().mean().item() - value) / unit
            # 50 updates of .01 unit; each lane is a coin of p = .01 an update.
            sigma = math.sqrt(50 * 0.01 / 20_000)
            wanted = 0.5 if stochastic else 0.0
            assert abs(moved - wanted) <= (5 * sigma + 0.01 if stochastic else 0.0)


def test_layouts_schedulers_and_missing_gradients(device):
    base = numbers((128, 96), 0, device)
    plain, turned = torch.nn.Parameter(base.clone()), torch.nn.Parameter(base.t().clone().t())
    unused = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = dalle_ext.AdamW16(
        [{"params": [plain, unused]}, {"params": [turned], "weight_decay": 0.01}], lr=0.1,
        fp32_moments=True,  # draws go by place in memory, and a group has its own
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        grad = numbers((128, 96), 5 + step, device)
        plain.grad, turned.grad = grad, grad.clone()
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8
    assert torch.equal(plain, turned) and torch.equal(unused, torch.ones_like(unused))
    assert unused not in optimizer.state


def test_a_step_makes_no_python_calls_for_each_parameter():
    """The host's cost: what a step does for each of many parameters, it does inside C."""

    def calls_of_a_step(count):
        params = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(count)]
        optimizer, counted = dalle_ext.AdamW16(params), [0]

        def count_call(frame, event, _):
            hashing = frame.f_code.co_name == "__hash__"  # torch's tensors hash in Python
            counted[0] += event == "call" and not hashing

        kept = []  # so that the second gradients lie elsewhere: the table is made again
        for profiled in (False, True):
            for param in params:
                kept.append(param.grad)
                param.grad = torch.ones(4, 4)
            sys.setprofile(count_call if profiled else None)
            try:
                optimizer.step()
            finally:
                sys.setprofile(None)
        return counted[0]

    assert calls_of_a_step(60) == calls_of_a_step(3)


def test_tensors_that_moved_between_steps():
    """New memory of a parameter, gradient or moment is found, and the bits are the same."""
    numbers_of = [numbers((64, 160), i, "cpu") for i in range(5)]
    moved, plain = ([torch.nn.Parameter(numbers_of[0].clone())] for _ in range(2))
    optimizers = [dalle_ext.AdamW16(params, lr=0.1) for params in (moved, plain)]
    for step in range(1, 5):
        for params, optimizer in zip((moved, plain), optimizers, strict=True):
            params[0].grad = numbers_of[step].clone()
            if params is moved and step == 2:
                params[0].data = params[0].data.clone()
            if params is moved and step == 3:
                state = optimizer.state[params[0]]
                state["exp_avg"] = state["exp_avg"].clone()
            if params is moved and step == 4:
                state = optimizer.state[params[0]]
                optimizer.state[params[0]] = {name: t.clone() for name, t in state.items()}
            optimizer.step()
    assert torch.equal(moved[0], plain[0])
    assert same(*(snapshot(optimizer) for optimizer in optimizers))
