"""Distances of features agree with torch-fidelity and torchmetrics to 1e-6, for few rows too."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from dalle.errors import DataError, UsageError
from dalle.evaluate import (
    frechet_distance,
    frechet_distance_infinite,
    inception_score,
    kernel_distance,
    precision_recall,
    ssim,
)
from dalle.evaluate.intervals import bootstrap, wilson
from support.evaluation import oracle

RNG = np.random.default_rng(0)


def features(n, d, shift=0.0):
    """Correlated features."""
    return torch.from_numpy(RNG.normal(size=(n, d)) @ RNG.normal(size=(d, d)) + shift)


@pytest.mark.parametrize(("n", "m", "d"), [(500, 400, 64), (30, 40, 64), (2, 3, 9), (64, 64, 64)])
def test_frechet_distance_is_that_of_torch_fidelity(n, m, d):
    a, b = features(n, d), features(m, d, 0.3)
    fid = oracle("torch_fidelity.metric_fid")
    of = [fid.fid_features_to_statistics(x) for x in (a, b)]
    wanted = fid.fid_statistics_to_metric(*of, False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(b.numpy(), a.tolist()) == pytest.approx(wanted, rel=1e-6)


def test_frechet_distance_is_that_of_torchmetrics():
    class Same(torch.nn.Module):
        num_features = 24

        def forward(self, x):
            return x

    a, b = features(300, 24), features(200, 24, 0.2)
    metric = (
        oracle("torchmetrics.image.fid")
        .FrechetInceptionDistance(feature=Same(), input_img_size=(24,))
        .set_dtype(torch.float64)
    )
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_distance_in_closed_form():
    """Diagonal Gaussians, and covariances of rank one in other directions."""
    a = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # covariance diag(2, 0)
    b = torch.tensor([[3.0, -2.0], [3.0, 2.0]])  # diag(0, 8), mean 3 away
    assert frechet_distance(a, b) == pytest.approx(9 + 2 + 8, rel=1e-12)
    assert frechet_distance(a, 3 * a) == pytest.approx(2 * (3 - 1) ** 2, rel=1e-12)
    assert frechet_distance(a.int(), a.int()) == 0


def test_frechet_distance_of_nearly_singular_sets_loses_no_digits():
    """Two columns differ by a billionth, where eigenvalues of C1 C2 may turn complex."""
    a, b = features(200, 8), features(150, 8, 0.1)
    alike = [torch.cat([x, x[:, :1] + 1e-9 * x[:, 1:2]], 1) for x in (a, b)]
    twice = [torch.cat([x, x[:, :1]], 1) for x in (a, b)]
    assert frechet_distance(*alike) == pytest.approx(frechet_distance(*twice), rel=1e-7)
    assert frechet_distance(alike[0], alike[0]) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_that_of_the_oracles():
    a, b = features(130, 16), features(120, 16, 0.2)
    numbers = {"kid_subsets": 7, "kid_subset_size": 100, "verbose": False}
    wanted = oracle("torch_fidelity.metric_kid").kid_features_to_metric(a, b, **numbers)
    got = kernel_distance(a, b, subsets=7, subset_size=100)
    for value, name in zip(got, ("mean", "std"), strict=True):
        assert value == pytest.approx(wanted[f"kernel_inception_distance_{name}"], rel=1e-6)
    a, b = a[:60], b[:60]
    wanted = oracle("torchmetrics.image.kid").poly_mmd(a, b)
    whole = kernel_distance(a, b)
    assert whole == pytest.approx(float(wanted), rel=1e-6) and whole.std == 0
    assert kernel_distance(a, b, subset_size=9) != kernel_distance(a, b, subset_size=9, seed=2)


def test_kernel_distance_is_unbiased_for_sets_of_different_sizes():
    """The mean over many pairs of small sets of one distribution is 0."""
    sets = torch.from_numpy(RNG.normal(size=(1000, 12, 4)))
    values = [kernel_distance(x[:5], x[5:]) for x in sets]
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 4 * error


def test_inception_score_is_that_of_the_oracles():
    logits = torch.from_numpy(RNG.normal(size=(1001, 30)) * 2)
    wanted = oracle("torch_fidelity.metric_isc").isc_features_to_metric(
        logits, splits=10, shuffle=False
    )
    mean, std = inception_score(logits.softmax(1))
    assert mean == pytest.approx(wanted["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(wanted["inception_score_std"], rel=1e-6)

    class Same(torch.nn.Module):
        def forward(self, x):
            return x

    metric = (
        oracle("torchmetrics.image.inception")
        .InceptionScore(feature=Same(), splits=1)
        .set_dtype(torch.float64)
    )
    metric.update(logits)
    assert inception_score(logits.softmax(1), splits=1) == pytest.approx(
        float(metric.compute()[0]), rel=1e-6
    )


def test_inception_score_of_known_cases():
    """Sure pictures of all classes: the number of classes. All alike: 1."""
    assert inception_score(np.eye(8), splits=1) == pytest.approx(8)
    assert inception_score(np.full((20, 5), 0.2), splits=2) == pytest.approx(1)


def test_precision_and_recall_are_those_of_torch_fidelity():
    a, b = features(300, 8), features(200, 8, 0.5)
    wanted = oracle("torch_fidelity.metric_prc").prc_features_to_metric(b, a, verbose=False)
    got = precision_recall(a, b)
    assert got.precision == pytest.approx(wanted["precision"], rel=1e-6)
    assert got.recall == pytest.approx(wanted["recall"], rel=1e-6)


def test_a_generator_that_knows_one_of_two_modes():
    """All it makes is real (precision 1), half of what is real it makes (recall 1/2)."""
    mode = torch.from_numpy(RNG.normal(size=(100, 4)))
    real = torch.cat([mode, mode + 100])
    assert precision_recall(real, mode) == (1, 0.5)
    assert precision_recall(mode, real) == (0.5, 1)
    assert precision_recall(real, real) == (1, 1)


def test_ssim_is_that_of_torchmetrics():
    torch.manual_seed(0)
    a = torch.rand(3, 3, 32, 40, dtype=torch.float64)
    b = (a + 0.1 * torch.randn_like(a)).clamp(0, 1)
    of_oracle = oracle("torchmetrics.functional.image").structural_similarity_index_measure
    wanted = of_oracle(a, b, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(a, b), wanted, rtol=1e-6, atol=0)
    assert ssim(a, a).tolist() == [1, 1, 1]
    small = torch.rand(2, 3, 4, 5)
    assert torch.isfinite(ssim(small, small.flip(0))).all()
    with pytest.raises(UsageError, match="both sets must have one shape"):
        ssim(a, b[:2])
    assert torch.equal(ssim(a.numpy(), b.numpy()), ssim(a, b))
    with pytest.raises(UsageError, match="fractions in .0, 1., got torch.uint8"):
        ssim(a.byte(), b.byte())


def test_extrapolation_takes_the_bias_away():
    """Of one distribution the distance is 0; of few rows it is far from it."""
    a, b = (torch.from_numpy(RNG.normal(size=(n, 32))) for n in (20_000, 2000))
    line = frechet_distance_infinite(a, b)
    assert abs(line.value) < 0.15 * frechet_distance(a, b)
    assert line.sizes[0] == 200 and line.sizes[-1] == 2000 and len(line.values) == 15


def test_intervals_hold_the_value_as_often_as_they_say():
    """95 % of the intervals of a mean hold the true mean (R: 90 to 99 % of 100)."""
    hits = 0
    for i in range(100):
        x = torch.from_numpy(RNG.normal(size=(60, 1)))
        found = bootstrap(lambda s: float(s.mean()), [x], count=200, seed=i)
        low, high = found["interval"]
        hits += low <= 0 <= high
    assert 88 <= hits <= 99
    assert bootstrap(float, [x], count=0)["interval"] is None
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 100))
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)


def test_features_may_be_of_any_kind_and_are_left_as_they_are(recwarn):
    a, b = np.round(4 * features(40, 5).numpy()), np.round(4 * features(30, 5, 1.0).numpy())
    a, b = a.clip(-100, 100), b.clip(-100, 100)  # whole numbers that float16 holds
    for measure in (frechet_distance, kernel_distance, precision_recall):
        wanted = measure(a, b)
        for dtype in ("float16", ">f4", "int8"):
            assert measure(a.astype(dtype), b.astype(dtype)) == pytest.approx(wanted, rel=1e-12)
        for kind in (torch.bfloat16, torch.int64):
            assert measure(torch.tensor(a).to(kind), b.tolist()) == pytest.approx(wanted, rel=1e-12)
        kept = a.copy()
        kept.setflags(write=False)  # as of a file that is mapped
        assert measure(kept, list(torch.tensor(b))) == pytest.approx(wanted, rel=1e-12)
        assert (kept == a).all()
    assert not recwarn.list
    score = copy.deepcopy(kernel_distance(a, b, subset_size=9))
    assert score.std > 0 and score == kernel_distance(a, b, subset_size=9)
    p = torch.softmax(features(50, 6), 1)
    rough = inception_score(p.bfloat16())
    assert rough == pytest.approx(inception_score(p), rel=2e-3)


GOOD = np.ones((4, 3))
NAN = np.array([[0.0, np.nan, 1.0], [0, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: frechet_distance(GOOD[:1], GOOD), "a must hold 2 or more rows, got 1"),
        (lambda: frechet_distance(GOOD, GOOD[:0]), "b must hold 2 or more rows, got 0"),
        (lambda: frechet_distance(GOOD, GOOD[:, :2]), "b must have the 3 columns of a, got 2"),
        (lambda: frechet_distance(GOOD, NAN), "got NaN or infinity in 1 of 3 rows"),
        (lambda: frechet_distance(GOOD[0], GOOD), r"a must be \(n, d\) features, got \(3,\)"),
        (lambda: frechet_distance("x", GOOD), r"a must be \(n, d\) numbers, got str"),
        (lambda: frechet_distance(GOOD, [["1", "2"]] * 3), r"b must be \(n, d\) numbers, got list"),
        (lambda: kernel_distance(None, GOOD), r"a must be \(n, d\) numbers, got NoneType"),
        (lambda: frechet_distance(3.0, GOOD), r"a must be \(n, d\) features, got \(\)"),
        (lambda: frechet_distance(GOOD, GOOD * 1e160), "b must hold numbers of at most 1e.50"),
        (lambda: kernel_distance(GOOD * 1e200, GOOD), "a must hold numbers of at most 1e.50"),
        (lambda: frechet_distance(torch.eye(3).to_sparse(), GOOD), "a must be a dense tensor"),
        (lambda: frechet_distance(torch.empty(3, 3, device="meta"), GOOD), "tensor .*, got meta"),
        (lambda: frechet_distance(np.ma.masked_equal(GOOD, 1), GOOD), "got masked entries"),
        (lambda: frechet_distance(GOOD, GOOD * 1j), "b must be real numbers, got complex128"),
        (lambda: kernel_distance(NAN, GOOD), "kernel_distance: a must hold finite numbers"),
        (lambda: kernel_distance(GOOD, GOOD, subsets=0), "subsets must be 1 or more, got 0"),
        (lambda: inception_score(GOOD, splits=1), "add up to 1 in each row"),
        (lambda: inception_score(np.eye(3)), "splits must be at most the 3 rows, got 10"),
        (lambda: inception_score(np.eye(3), splits=0), "splits must be 1 or more, got 0"),
        (lambda: precision_recall(GOOD[:3], GOOD), "a must hold more than k = 3 rows, got 3"),
        (lambda: precision_recall(GOOD, GOOD, k=0), "k must be 1 or more, got 0"),
        (lambda: frechet_distance_infinite(GOOD, GOOD), "b must hold 20 or more rows, got 4"),
    ],
)
def test_bad_input_gets_one_line(call, line):
    with pytest.raises((DataError, UsageError), match=line) as caught:
        call()
    assert "\n" not in str(caught.value)
