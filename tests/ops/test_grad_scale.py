"""Scaled gradients on every back end: ends of a block, many gradients, the update of the scales."""

from __future__ import annotations

import math

import pytest
import torch

import dalle_ext

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = math.inf, math.nan


def spread(numel, seed, low=-60, high=30, device="cpu"):
    """Normal numbers times powers of two, some of them zero, infinite or NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    x *= 2.0 ** torch.randint(low, high, (numel,), generator=generator)
    x[::17] = 0
    x[5::97], x[7::89], x[11::83] = INF, -INF, NAN
    return x.to(device)


def in_reference(function, *arguments, **options):
    with dalle_ext.use_reference():
        return function(*arguments, **options)


def same(got, wanted):
    return torch.equal(got.nan_to_num(nan=1234.5), wanted.nan_to_num(nan=1234.5))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 33, 20011])
def test_scaling_matches_the_definition(source, target, numel, device):
    grad = spread(numel, numel).to(source).to(device)
    for scale in (2.0**13, 1.7e-5):
        got = dalle_ext.scale_gradient(grad, scale, dtype=target)
        wanted = in_reference(dalle_ext.scale_gradient, grad, scale, dtype=target)
        assert got.grad.dtype == target and torch.equal(got.grad, wanted.grad)
        assert torch.equal(got.counts, wanted.counts)
        assert got.grad.isfinite().all()


def test_scaling_counts_each_fate_once(device):
    grad = torch.tensor([1.0, 3e4, -3e4, 2.0**-26, 2.0**-27, 2.0**-20, 0.0, INF, -INF, NAN])
    got = dalle_ext.scale_gradient(grad.to(device), 4.0)
    assert got.counts.tolist() == [2, 1, 2, 3]  # 2^-25 * 2 is a tie: 4 * 2^-27 vanishes
    assert got.grad.tolist() == [4.0, 0.0, 0.0, 2.0**-24, 0.0, 2.0**-18] + [0.0] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_at_the_edges_of_the_storage_type(dtype, device):
    """Every float near the limits where a float16 or bfloat16 becomes zero, subnormal, infinite."""
    if dtype == torch.float32:
        edges = [2.0**-126, 3.4028234663852886e38]
    elif dtype == torch.float16:
        edges = [2.0**-25, 2.0**-24, 2.0**-14 - 2.0**-25, 2.0**-14, 65504.0, 65520.0]
    else:
        edges = [2.0**-134, 2.0**-126 - 2.0**-134, 2.0**-126, 3.3895e38, 3.3961775292304e38]
    bits = torch.tensor(edges).view(torch.int32)
    x = (bits[:, None] + torch.arange(-300, 300, dtype=torch.int32)).flatten().view(torch.float32)
    x = x[x.isfinite()].to(device)
    got = dalle_ext.scale_gradient(x, 1.0, dtype=dtype)
    rounded = x.to(dtype)
    assert torch.equal(got.grad, torch.where(rounded.isfinite(), rounded, 0))
    tiny, size = torch.finfo(dtype).tiny, rounded.abs().double()
    wanted = [(~rounded.isfinite()), (size == 0) & (x != 0), (size > 0) & (size < tiny)]
    assert got.counts.tolist() == [int(mask.sum()) for mask in wanted] + [0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (3, 5), (8, 4099)])
def test_unscaling_into_the_stream(dtype, shape, device):
    stream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    grad = spread(stream.numel(), 2, device=device).view(shape).to(dtype)
    for scale in (2.0**20, 3.0, 2.0**-100):
        got = dalle_ext.unscale_gradient(stream, grad, scale)
        assert torch.equal(got, in_reference(dalle_ext.unscale_gradient, stream, grad, scale))
        assert got.isfinite().all() and got.dtype == torch.float32


def test_the_two_ends_are_inverse_where_nothing_is_lost(device):
    grad = 1 + torch.rand(4097, generator=torch.Generator().manual_seed(3))
    grad = (grad.half().float() * 2.0**-10).to(device)
    for exponent in (0, 10, 24):
        scale = torch.tensor(2.0**exponent, device=device)
        there = dalle_ext.scale_gradient(grad, scale)
        back = dalle_ext.unscale_gradient(torch.zeros_like(grad), there.grad, scale)
        assert there.counts.tolist() == [0, 0, 0, 0]
        assert torch.equal(back, grad)


@pytest.mark.parametrize("check_only", [False, True])
@pytest.mark.parametrize("dtypes", [DTYPES, (torch.float16,)])
def test_many_gradients_match_the_definition(check_only, dtypes, device):
    sizes = [0, 1, 7, 32768, 32769, 513, 70001, 8, 0]
    groups = [2, 0, 1, 2, 0, 3, 2, 3, 1]
    grads = [
        spread(n, n, -35, 10).to(dtypes[i % len(dtypes)]).to(device) for i, n in enumerate(sizes)
    ]
    scales = torch.tensor([2.0**13, 3.0, 1e6, 2.0**-3, 1.0], device=device)
    copies = [grad.clone() for grad in grads]
    got = dalle_ext.unscale_gradients_(grads, scales, groups, check_only=check_only)
    wanted = in_reference(
        dalle_ext.unscale_gradients_, copies, scales, groups, check_only=check_only
    )
    for mine, his in zip(grads, copies, strict=True):
        assert same(mine, his)
    for name in ("nonfinite", "zeros", "subnormals", "underflowed"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    torch.testing.assert_close(got.sum_squares, wanted.sum_squares, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.max_abs, wanted.max_abs, rtol=1e-6, atol=0)
    assert bool(got.found_nonfinite) and int(got.nonfinite[4]) == 0
    assert got.sum_squares[4] == 0 and got.max_abs[4] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 3.0, 2.0**34, 2.0**-10, 1.0007])
def test_underflow_is_counted_at_the_exact_edge(dtype, scale, device):
    """check_only finds by comparing what the division itself would make zero."""
    edge = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 2.0**-150}[dtype]
    near = torch.tensor([edge * scale], dtype=torch.float64).float().to(dtype)
    step = torch.arange(-40, 41, dtype=torch.int32)
    if dtype == torch.float32:
        bits = near.view(torch.int32) + step
        grad = bits[bits > 0].view(torch.float32)
    else:
        bits = near.view(torch.int16).int() + step
        grad = bits[bits > 0].short().view(dtype)
    if not len(grad):
        grad = torch.tensor([torch.finfo(dtype).tiny], dtype=dtype)
    grad = grad.to(device)
    counted = dalle_ext.unscale_gradients_([grad], scale, check_only=True)
    divided = grad.clone()
    written = dalle_ext.unscale_gradients_([divided], scale)
    wanted = int(((grad.float() / scale).to(dtype) == 0).sum())
    assert int(counted.underflowed) == int(written.underflowed) == wanted
    assert int((divided == 0).sum()) == wanted


def test_one_group_is_blamed_and_the_sums_hold_the_rest(device):
    grads = [torch.ones(5000, device=device), torch.full((9,), 2.0, device=device)]
    grads[0][17] = NAN
    stats = dalle_ext.unscale_gradients_(grads, torch.tensor([2.0, 4.0], device=device), [0, 1])
    assert stats.nonfinite.tolist() == [1, 0]
    assert stats.sum_squares.tolist() == [4999 / 4, 9 / 4]
    assert stats.max_abs.tolist() == [0.5, 0.5]
    assert float(stats.norm) == pytest.approx(math.sqrt(4999 / 4 + 9 / 4))
    assert grads[0][17].isnan() and grads[0][18] == 0.5  # nothing is hidden by the division


def test_views_of_dense_memory_and_a_kept_table(device):
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(4)).to(device)
    views = [base[:10], base[10:20].t(), base[20:].view(5, 4, 30).permute(2, 0, 1)]
    before = base.clone()
    table = dalle_ext.TensorTable(
        [[base[:10].flatten(), base[10:20].flatten(), base[20:].flatten()]]
    )
    dalle_ext.unscale_gradients_(views, 2.0, table=table)
    assert torch.equal(base, before / 2)
    other = [view.clone() for view in views]
    with pytest.raises(ValueError, match="table must be of these gradients"):
        dalle_ext.unscale_gradients_(other, 2.0, table=table)
    with pytest.raises(ValueError, match="grads must fill their memory without gaps"):
        dalle_ext.unscale_gradients_([base[:, :7]], 2.0)


def test_sums_are_the_same_whatever_the_threads_and_the_company():
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (70001, 40000, 9)]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(dalle_ext.unscale_gradients_(grads, 3.0, check_only=True).sum_squares)
    torch.set_num_threads(before)
    alone = dalle_ext.unscale_gradients_(grads[1:], 3.0, check_only=True)
    beside = dalle_ext.unscale_gradients_(
        grads, torch.tensor([3.0, 3.0]), [0, 1, 1], check_only=True
    )
    assert torch.equal(found[0], found[1])
    assert alone.sum_squares[0] == beside.sum_squares[1]


@pytest.mark.parametrize("block", [64, 3000, 63_488 * 2])
def test_every_half_divided_by_any_scale_is_the_definitions(device, block):
    """Bit for bit, and the counts with it: the kernels may divide and compare in their own way."""
    generator = torch.Generator().manual_seed(block)
    bits = torch.arange(0x7C00, dtype=torch.int32)  # all finite magnitudes
    halves = torch.cat([bits, bits - 0x8000]).to(torch.int16).view(torch.float16)
    halves = halves[torch.randperm(len(halves), generator=generator)].repeat(2)[:block]
    drawn = torch.rand(20, generator=generator) * 80 - 40
    for scale in [*(2**drawn).tolist(), 2.0**13, 3.0, 2.0**-24, 2.0**70, 2.0**-70]:
        grad = halves.clone().to(device)
        scales = torch.tensor([scale], device=device)
        found = dalle_ext.unscale_gradients_([grad], scales)
        wanted = (halves.float() / scales.cpu()).half()
        assert torch.equal(grad.cpu().view(torch.int16), wanted.view(torch.int16)), scale
        lost = ((wanted == 0) & (halves != 0)).sum()
        assert found.underflowed.item() == lost and found.nonfinite.item() == 0
        small = (halves.abs() < 2.0**-14) & (halves != 0)
        assert (found.zeros.item(), found.subnormals.item()) == ((halves == 0).sum(), small.sum())
        norm = (halves.double() / scale).norm()
        assert found.norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert found.max_abs.item() == (halves.float().abs().max() / scales.cpu()).item()


def run_rule(device, nonfinite, **options):
    """Scales after each update, nonfinite[t][g] being what update t found in group g."""
    groups = len(nonfinite[0])
    scales = torch.full((groups,), 2.0**13, device=device)
    since = torch.full((groups,), options.get("window", 125), dtype=torch.int64, device=device)
    found = []
    for flags in nonfinite:
        flag = torch.tensor(flags, dtype=torch.int64, device=device)
        dalle_ext.update_scales_(scales, since, flag, **options)
        found.append(scales.tolist())
    return found


def test_the_rule_of_the_scales(device):
    found = run_rule(device, [[0, 0]] * 1000)
    assert found[0][0] == pytest.approx(2.0**13 * 2 ** (1 / 1000), rel=1e-6)
    assert found[-1][1] == pytest.approx(2.0**14, rel=1e-4)
    # Only the guilty scale falls, and at most once in 125 updates.
    found = run_rule(device, [[3, 0]] * 126)
    falls = [t for t in range(126) if found[t][0] < (found[t - 1][0] if t else 2.0**13)]
    assert falls == [0, 125]
    assert found[0][0] == pytest.approx(2.0**13 / math.sqrt(2), rel=1e-6)
    assert found[-1][1] > found[0][1] > 2.0**13
    # A clean scale beside a guilty one stands still if it is told to.
    found = run_rule(device, [[3, 0]] * 3, grow_on_skip=False)
    assert [row[1] for row in found] == [2.0**13] * 3
    # Clamped at both ends.
    assert run_rule(device, [[0]] * 40, growth=2.0)[-1] == [2.0**24]
    assert run_rule(device, [[1]] * 40, window=1)[-1] == [2.0**7]


def test_the_rule_matches_the_definition(device):
    generator = torch.Generator().manual_seed(5)
    flags = (torch.rand(300, 300, generator=generator) < 0.02).long().tolist()
    for grow_on_skip in (True, False):
        got = run_rule(device, flags[:60], window=7, grow_on_skip=grow_on_skip)
        wanted = in_reference(run_rule, device, flags[:60], window=7, grow_on_skip=grow_on_skip)
        assert got == wanted
