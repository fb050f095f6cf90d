"""Distances between two sets of features, and the Inception Score: numbers in, numbers out.

Features are (n, d) arrays or tensors of any real type; all arithmetic is float64. Nothing here
knows which network the features are from, so nothing here may be called FID (`extractors`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle.configs import integer, seed_number
from dalle.errors import DataError

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as its authors and torch-fidelity have them
POINTS = 15  # sizes through which `frechet_distance_infinite` lays its line
ROWS_TO_EXTRAPOLATE = 20
LARGEST = 1e50  # of a feature: its sixth power, in the kernel, is still finite
CHUNK = 1024  # rows whose distances to all others are held at once

Done = Callable[[int], None]  # is told how many more rows are done


class Score(float):
    """A mean that remembers its spread: a float, which also unpacks as `mean, std = score`.

    Attributes:
        std: standard deviation over splits or subsets, 0 for a single one.
    """

    std: float

    def __new__(cls, mean: float, std: float) -> Score:
        score = super().__new__(cls, mean)
        score.std = float(std)
        return score

    @property
    def mean(self) -> float:
        """The value itself."""
        return float(self)

    def __getnewargs__(self) -> tuple[float, float]:  # type: ignore[override]
        return float(self), self.std  # what a copy is made from

    def __iter__(self) -> Iterator[float]:
        return iter((float(self), self.std))

    def __getitem__(self, index: int) -> float:
        return (float(self), self.std)[index]


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1].

    Attributes:
        precision: of the generated features, inside the real manifold.
        recall: of the real features, inside the generated manifold.
    """

    precision: float
    recall: float


class Infinite(NamedTuple):
    """A line of the distance over 1 / n.

    Attributes:
        value: where the line meets 1 / n = 0.
        sizes: n of each point.
        values: the distance at each.
    """

    value: float
    sizes: list[int]
    values: list[float]


def as_features(owner: str, name: str, values: Any, minimum: int = 2) -> Tensor:
    """`values` as a finite (n, d) float64 tensor on its device.

    Raises:
        DataError: another shape or type, fewer than `minimum` rows, masked entries, or numbers that
            are not finite or above `LARGEST` in size.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise DataError(f"{owner}: {name} must be whole, got masked entries")
    if not isinstance(values, (Tensor, np.ndarray)):
        got = type(values).__name__
        try:
            values = np.asarray(values)
        except (TypeError, ValueError, RuntimeError) as problem:
            raise DataError(f"{owner}: {name} must be (n, d) numbers, got {got}") from problem
        if values.dtype.kind not in "fiub":  # also of words that numpy would read as numbers
            raise DataError(f"{owner}: {name} must be (n, d) numbers, got {got}")
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "fiub":
            raise DataError(f"{owner}: {name} must be real numbers, got {values.dtype}")
        # Copied: torch warns of an array that cannot be written to, such as one of a file.
        values = torch.from_numpy(np.array(values, dtype=np.float64, order="C"))
    elif values.is_complex():
        raise DataError(f"{owner}: {name} must be real numbers, got {values.dtype}")
    if values.layout != torch.strided or values.is_meta or values.is_quantized:
        kind = "meta" if values.is_meta else values.dtype if values.is_quantized else values.layout
        raise DataError(f"{owner}: {name} must be a dense tensor of numbers, got {kind}")
    if values.dim() != 2 or values.shape[1] < 1:
        raise DataError(f"{owner}: {name} must be (n, d) features, got {tuple(values.shape)}")
    if len(values) < minimum:
        raise DataError(f"{owner}: {name} must hold {minimum} or more rows, got {len(values)}")
    checked: Tensor = values.detach().double()
    bad = int(checked.isfinite().all(1).logical_not().sum())
    if bad:
        raise DataError(
            f"{owner}: {name} must hold finite numbers, got NaN or infinity in {bad} of "
            f"{len(values)} rows"
        )
    if len(checked) and float(checked.abs().max()) > LARGEST:
        raise DataError(
            f"{owner}: {name} must hold numbers of at most {LARGEST:g} in size, got "
            f"{float(checked.abs().max()):.3g}"
        )
    return checked


def _two(owner: str, a: Any, b: Any, minimum: int = 2) -> tuple[Tensor, Tensor]:
    """Both sets checked, of one width, on the device of the first."""
    first, second = as_features(owner, "a", a, minimum), as_features(owner, "b", b, minimum)
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"{owner}: b must have the {first.shape[1]} columns of a, got {second.shape[1]}"
        )
    return first, second.to(first.device)


class Moments(NamedTuple):
    """A set as the Fréchet distance sees it.

    Attributes:
        mean: (d,).
        root: (min(n, d), d), with root^T root the unbiased covariance.
    """

    mean: Tensor
    root: Tensor


def moments(features: Tensor) -> Moments:
    """Mean and a root of the unbiased covariance of (n, d) float64 features, n >= 2.

    The root is the triangle of a QR factorisation, so no digits are lost by squaring. Rows beyond
    d come in pieces, which bounds the memory.
    """
    mean = features.mean(0)
    root = (features - mean) / (len(features) - 1) ** 0.5
    n, d = root.shape
    if n <= d:
        return Moments(mean, root)
    upper = root[:0]
    for part in root.split(4 * d):
        upper = torch.linalg.qr(torch.cat([upper, part]), mode="r").R
    return Moments(mean, upper)


def frechet_of(a: Moments, b: Moments) -> float:
    """The Fréchet distance of two Gaussians; see `frechet_distance`.

    The eigenvalues of sqrt(C1) C2 sqrt(C1) are the squared singular values of R1 R2^T for any roots
    Ri^T Ri = Ci. For fewer rows than columns these matrices are as small as the rows are few.
    """
    overlap = torch.linalg.svdvals(a.root @ b.root.T).sum()
    spread = a.root.square().sum() + b.root.square().sum() - 2 * overlap
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def frechet_distance(a: Any, b: Any) -> float:
    """Squared Fréchet distance between Gaussians with the means and covariances of two sets.

    |m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(sqrt(C1) C2 sqrt(C1))), with unbiased covariances. Exact for
    singular covariances too, such as those of fewer rows than columns; never complex.

    Args:
        a, b: (n, d) and (m, d) features, 2 rows or more each.

    Raises:
        DataError: other shapes, too few rows, or numbers that are not finite.
    """
    first, second = _two("frechet_distance", a, b)
    return frechet_of(moments(first), moments(second))


def frechet_distance_infinite(a: Any, b: Any, *, points: int = POINTS, seed: int = 0) -> Infinite:
    """The distance extrapolated to infinitely many rows of b (Chong & Forsyth 2020, FID-infinity).

    The bias of the distance falls as 1 / n. Random parts of b of `points` sizes, from a tenth of it
    to all, give a line over 1 / n.

    Args:
        a: (n, d), the real features, all of them used each time.
        b: (m, d), the generated ones, 20 rows or more.
        points: sizes, 3 or more.
        seed: which parts.

    Raises:
        DataError: as `frechet_distance`, or b has under 20 rows.
        UsageError: points or seed out of range.
    """
    owner = "frechet_distance_infinite"
    points, seed = integer(owner, "points", points, 3, 1000), seed_number(owner, seed)
    first, second = _two(owner, a, b)
    if len(second) < ROWS_TO_EXTRAPOLATE:
        raise DataError(
            f"{owner}: b must hold {ROWS_TO_EXTRAPOLATE} or more rows, got {len(second)}"
        )
    rng, real = np.random.default_rng(seed), moments(first)
    sizes = np.linspace(len(second) // 10, len(second), points).astype(int)
    values = []
    for size in sizes:
        rows = torch.from_numpy(rng.permutation(len(second))[:size]).to(second.device)
        values.append(frechet_of(real, moments(second[rows])))
    slope_and_value = np.polyfit(1 / sizes, values, 1)
    return Infinite(float(slope_and_value[1]), sizes.tolist(), values)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def unbiased_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD under the kernel (x.y / d + 1)^3; may be negative."""
    within = []
    for x in (a, b):
        gram = _kernel(x, x)
        within.append((gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1)))
    return float(within[0] + within[1] - 2 * _kernel(a, b).mean())


def kernel_distance(
    a: Any, b: Any, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 2020
) -> Score:
    """The kernel distance (KID): unbiased squared MMD under (x.y / d + 1)^3.

    Sets of at most `subset_size` rows are compared whole, once. Larger ones give the mean over
    random subsets of both; these are the ones that torch-fidelity draws for the seed.

    Args:
        a, b: (n, d) and (m, d) features, 2 rows or more each.
        subsets: how many are drawn.
        subset_size: rows of each, 2 or more; fewer where a set has fewer.
        seed: which subsets, 0 to 2^32 - 1.

    Returns:
        The mean, with the standard deviation over subsets as `std`.

    Raises:
        DataError: as `frechet_distance`.
        UsageError: a number out of range.
    """
    owner = "kernel_distance"
    subsets = integer(owner, "subsets", subsets, 1, 10_000)
    subset_size = integer(owner, "subset_size", subset_size, 2)
    seed = integer(owner, "seed", seed, 0, 2**32 - 1)
    first, second = _two(owner, a, b)
    size = min(subset_size, len(first), len(second))
    if max(len(first), len(second)) <= subset_size:
        return Score(unbiased_mmd(first, second), 0.0)
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows = [
            torch.from_numpy(rng.choice(len(x), size, replace=False)).to(x.device)
            for x in (first, second)
        ]
        values.append(unbiased_mmd(first[rows[0]], second[rows[1]]))
    return Score(float(np.mean(values)), float(np.std(values)))


def inception_score(probabilities: Any, splits: int = 10) -> Score:
    """exp of the mean KL divergence of each picture's class distribution from the mean one.

    Args:
        probabilities: (n, classes), each row a distribution.
        splits: parts of consecutive rows, each with a score of its own; at most n.

    Returns:
        The mean over the splits, with their standard deviation as `std`.

    Raises:
        DataError: rows that are no distributions, or fewer than splits.
        UsageError: splits below 1.
    """
    owner = "inception_score"
    splits = integer(owner, "splits", splits, 1)
    p = as_features(owner, "probabilities", probabilities, 1)
    if len(p) < splits:
        raise DataError(f"{owner}: splits must be at most the {len(p)} rows, got {splits}")
    total = p.sum(1, keepdim=True)
    off = max(float(-p.min()), float((total - 1).abs().max()))
    # bfloat16 rounds each entry by up to 1 / 512 of it, and a row with them.
    if off > (4e-3 if getattr(probabilities, "dtype", None) == torch.bfloat16 else 1e-3):
        raise DataError(
            f"{owner}: probabilities must be 0 or more and add up to 1 in each row, "
            f"got a row that is off by {off:.3g}"
        )
    p = p.clamp_min(0) / total
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        mean = part.mean(0, keepdim=True)
        # xlogy: 0 log 0 is 0. A class that is 0 in the mean is 0 in each row.
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, mean)).sum(1).mean()
        scores.append(float(divergence.exp()))
    return Score(float(np.mean(scores)), float(np.std(scores)))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) distances; of equal rows exactly 0, unless there is so much that products must do."""
    exact = a.numel() * len(b) <= 4e9
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist"
    return torch.cdist(a, b, compute_mode=mode)


def radii(features: Tensor, k: int, done: Done = lambda rows: None) -> Tensor:
    """Distance of each row to its k-th nearest other row: (n,)."""
    parts = []
    for part in features.split(CHUNK):
        parts.append(_distances(part, features).kthvalue(k + 1, dim=1).values)
        done(len(part))
    return torch.cat(parts)


def inside(
    points: Tensor, centres: Tensor, reach: Tensor, done: Done = lambda rows: None
) -> Tensor:
    """(n,) bool: whether each point lies in the ball of any centre."""
    parts = []
    for part in points.split(CHUNK):
        parts.append((_distances(part, centres) <= reach).any(1))
        done(len(part))
    return torch.cat(parts)


def both_inside(
    first: Tensor, second: Tensor, k: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Which rows of each set lie in the manifold of the other, see `precision_recall`.

    Args:
        first, second: (n, d) and (m, d) float64, more than k rows each.
        k: neighbours.
        progress: called with (rows done, in all).

    Returns:
        Of the second in that of the first (m,), of the first in that of the second (n,); bool.
    """
    total, counted = 2 * (len(first) + len(second)), [0]

    def done(rows: int) -> None:
        counted[0] += rows
        if progress is not None:
            progress(counted[0], total)

    of_second = inside(second, first, radii(first, k, done), done)
    return of_second, inside(first, second, radii(second, k, done), done)


def precision_recall(a: Any, b: Any, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    A set's manifold is the union of balls around its features, each as large as the distance to the
    k-th nearest other feature of the set.

    Args:
        a: (n, d) real features, more than k.
        b: (m, d) generated features, more than k.
        k: neighbours.

    Returns:
        (precision, recall), shares in [0, 1].

    Raises:
        DataError: as `frechet_distance`, or k or fewer rows.
        UsageError: k below 1.
    """
    k = integer("precision_recall", "k", k, 1)
    first, second = _two("precision_recall", a, b)
    for name, x in (("a", first), ("b", second)):
        if len(x) <= k:
            raise DataError(
                f"precision_recall: {name} must hold more than k = {k} rows, got {len(x)}"
            )
    return PrecisionRecall(*(float(x.double().mean()) for x in both_inside(first, second, k)))
