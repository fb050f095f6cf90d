"""Error buffers of `PowerSGD` and the words in which its factors are sent: 1-6-9, or float32.

In 1-6-9 each matrix has a unit: a power of two, the same on all processes. Its buffer, P and Q are
stored multiplied by that. Each step chooses it from an upper bound of the sum of all processes'
buffers, so that neither a buffer nor a sum over the processes can reach 16. It stays as long as
that bound changes little, and then the codes change by the gradient alone.

The product of two such words has 20 bits, so it is exact in float32. P Q^T therefore has the same
bits on every processor, whether it fuses multiplication and addition or not, as long as P and Q are
the words themselves. So divisions come after the product. Float32 words are rounded to a grid on
which sums of their products are exact in float64, with the same effect.

The fixed Q may be ill-conditioned for a gradient: then the columns of P = E Q are nearly parallel,
and rounding them to words loses their difference. A gradient of the factors' rank came back up to
40 % wrong. So Q has OVERSAMPLING columns more than the rank, as in randomized SVD (Halko et al.
2011). P T is sent, with as many columns as the rank, for a small matrix T that all processes
compute with the same bits (`truncate_to_rank`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import dalle_ext
from dalle.distributed.communicator import Communicator
from dalle.distributed.small import elements, joined, max_abs, number, numbers

FORMAT = "1-6-9"
# Exponents of bound times unit; 1-6-9 has those from -60 to 4. Outside of MIN to MAX a new unit
# brings it to TARGET. Above MAX a factor of two is left for the rounding of codes, and below MIN 40
# octaves for small elements.
MIN_EXPONENT, TARGET_EXPONENT, MAX_EXPONENT = -20, -8, 3
MEASURE_EVERY = 16  # steps; in between, a buffer's bound grows by what may have been added
GRID_P, GRID_Q = 26, 22  # bits of float32 words: after the point, and below the largest element
OVERSAMPLING = 4  # columns of Q beyond the rank
RIDGE = 2.0**-40  # relative to the trace; directions that P does not have are not amplified
EPS = 1e-6  # of the largest element of P; added to its diagonal before it is orthonormalised


@dataclass
class Scalars:
    """Of the matrices that were last reduced together, (k,) float32 each.

    Attributes:
        unit: powers of two.
        bound: at least the largest magnitude in a buffer, in units of the gradient.
    """

    unit: Tensor
    bound: Tensor


@dataclass
class MatrixState:
    """What a compressed gradient keeps between steps.

    Attributes:
        name: of the parameter.
        error: (m, n), what was not sent yet: int16 codes of 1-6-9 of it times `unit`, or float32.
        q: (n, r + OVERSAMPLING) float32, drawn once and never updated; fewer columns where m or n
            is less.
        max_gain: a power of two, at least max |E Q| / max |E|.
        scalars, index: element `index` of each is this matrix's.
        steps: reductions so far.
    """

    name: str
    error: Tensor
    q: Tensor
    max_gain: float
    scalars: Scalars
    index: int = 0
    steps: int = 0

    @property
    def unit(self) -> Tensor:
        """0-d float32, see `Scalars`."""
        return self.scalars.unit[self.index]

    @property
    def bound(self) -> Tensor:
        """0-d float32, see `Scalars`."""
        return self.scalars.bound[self.index]

    def value(self) -> Tensor:
        """The buffer's content, (m, n) float32, in units of the gradient."""
        if self.error.dtype != torch.int16:
            return self.error.clone()
        return dalle_ext.unpack(self.error, FORMAT) / self.unit

    def set_value(self, value: Tensor, unit: Tensor | None = None) -> None:
        """Overwrites the buffer with (m, n) float32, in the unit given or in one that fits."""
        if self.error.dtype == torch.int16:
            fitting = new_units(max_abs([value]), self.unit[None])[0]
            self.scalars.unit[self.index] = fitting if unit is None else unit
            self.error.copy_(dalle_ext.pack(value * self.unit, FORMAT))
        else:
            self.error.copy_(value)
        self.update_bound()
        self.steps = 0  # so that this run and one that loads its state choose the same units

    def update_bound(self) -> None:
        """Sets the bound to the largest magnitude; the host does not wait for the device."""
        self.scalars.bound[self.index] = max_abs([self.value()])[0]


def scalars_of(matrices: list[MatrixState]) -> Scalars:
    """Those of matrices that are reduced together, in their order."""
    kept = matrices[0].scalars
    same = all(m.scalars is kept and m.index == i for i, m in enumerate(matrices))
    if same and len(kept.unit) == len(matrices):
        return kept
    units, bounds = [m.unit for m in matrices], [m.bound for m in matrices]
    made = Scalars(torch.stack(units), torch.stack(bounds))
    for index, matrix in enumerate(matrices):
        matrix.scalars, matrix.index = made, index
    return made


@dataclass
class Factors:
    """Gradients that are reduced together, during one reduction, each as P Q^T.

    Attributes:
        matrices: their error buffers E and what else outlives the reduction.
        grads: of m n elements each, replaced at the end.
        blocks: of each, the position of its residual block in `skip`.
        scales: (k,), the loss scales that they carry; None where there are none.
        skip: (blocks,) float32; where it is not 0 the block's gradients are not added to E.
        bounds: (k,) float32, at least the largest magnitudes of E with the gradients.
        ps: (m, c) each, this process's E Q; then P, (m, r) float32, orthonormal, the same on all
            processes.
        qs: (n, r) float32 each, this process's E^T P; then its sum over the group.
        max_gain: a power of two, at least max |E^T P| / max |E| of each.
        units: (k,) float32; `qs` times these are in units of the gradients.
        output_bounds: (k,) float32, at least the largest magnitudes of the reduced gradients.
    """

    matrices: list[MatrixState]
    grads: list[Tensor]
    blocks: list[int]
    scales: Tensor | None
    skip: Tensor
    bounds: Tensor
    ps: list[Tensor] = field(default_factory=list)
    qs: list[Tensor] = field(default_factory=list)
    max_gain: float = field(init=False)
    units: Tensor = field(init=False)
    output_bounds: Tensor = field(init=False)

    @property
    def scalars(self) -> Scalars:
        """Those of `matrices`."""
        return scalars_of(self.matrices)

    @property
    def errors(self) -> list[Tensor]:
        """Those of `matrices`."""
        return [m.error for m in self.matrices]

    @property
    def grads_2d(self) -> list[Tensor]:
        """The gradients as (m, n)."""
        return [g if g.dim() == 2 else g.reshape(g.shape[0], -1) for g in self.grads]


def new_units(bounds: Tensor, units: Tensor) -> Tensor:
    """Powers of two that bring magnitudes of at most `bounds` into the range of 1-6-9.

    Those of `units`, where they do.
    """
    exponents = (bounds.view(torch.int32) >> 23) - 127  # bounds are not negative
    shift = (TARGET_EXPONENT - exponents).clamp(-100, 100)
    fitting = (shift + 127 << 23).view(torch.float32)
    scaled = bounds * units
    fits = (scaled < 2.0**MAX_EXPONENT) & (scaled >= 2.0**MIN_EXPONENT) | (bounds == 0)
    return torch.where(fits, units, fitting)


@functools.lru_cache(maxsize=16)
def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the upper triangle's elements lie in (size * size,), and each of these in them."""
    row, column = torch.triu_indices(size, size, device="cpu", dtype=torch.int64)
    positions = torch.empty(size, size, device="cpu", dtype=torch.int64)
    order = torch.arange(len(row), device="cpu", dtype=torch.int64)
    positions[row, column] = positions[column, row] = order
    return (row * size + column).to(device), positions.flatten().to(device)


def gram_triangles(ps: list[Tensor], rank: int) -> Tensor:
    """Upper triangles of P^T P of each matrix, (k, ...) float32, zeros where P has fewer columns.

    Args:
        ps: (m, c) each, c at least `rank` and at most rank + OVERSAMPLING.
    """
    size = rank + OVERSAMPLING
    grams = [torch.mm(p.transpose(0, 1), p) for p in ps]
    missing = [size - len(gram) for gram in grams]
    padded = [F.pad(g, (0, n, 0, n)) if n else g for g, n in zip(grams, missing, strict=True)]
    upper = _triangle(size, ps[0].device)[0]
    return joined(padded).view(len(ps), -1).index_select(1, upper).float()


def truncate_to_rank(
    ps: list[Tensor], triangles: Tensor, rank: int, world_size: int
) -> list[Tensor]:
    """P T of each matrix, (m, rank) float32: the part of P in which most of the gradients lie.

    With C = sum of P^T P over the processes, T is C's first `rank` columns, orthonormal under the
    inner product x^T C y. That is a step of the power method, which filters what rounding added to
    P, and a scaling that gives all directions of P T the same size, so that rounding P T to words
    affects all of them alike. All processes have the same C. The sum of their P T is at most
    2^TARGET_EXPONENT.

    Args:
        ps: (m, c) each, this process's E Q, in units that are the same on all processes.
        triangles: the sum of their `gram_triangles`.
    """
    size = rank + OVERSAMPLING
    full = triangles.index_select(1, _triangle(size, triangles.device)[1])
    c = full.double().view(-1, size, size)
    power = c[..., :rank] / _trace(c)
    inner = torch.bmm(torch.bmm(power.transpose(1, 2), c), power)
    trace = _trace(inner)
    inner /= trace
    inner.diagonal(dim1=1, dim2=2).add_(RIDGE)
    lower, _ = torch.linalg.cholesky_ex(inner)
    power *= 2.0**TARGET_EXPONENT / next_power_of_two(math.sqrt(world_size * rank))
    power /= trace.sqrt_()
    ts = torch.linalg.solve_triangular(lower.transpose(1, 2), power, upper=True, left=False)
    every = zip(ps, ts.to(ps[0].dtype).unbind(), strict=True)
    return [torch.mm(p, t if p.shape[1] == size else t[: p.shape[1]]).float() for p, t in every]


def _trace(matrices: Tensor) -> Tensor:
    """(k, 1, 1) of (k, n, n) float64; 1 where it is 0."""
    traces = matrices.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
    return traces.masked_fill_(traces <= number(0.0, traces.device, traces.dtype), 1.0)


def _fits(bound: float, unit: float) -> bool:
    """Whether `new_units` keeps the unit."""
    return bound == 0 or 2.0**MIN_EXPONENT <= bound * unit < 2.0**MAX_EXPONENT


def next_power_of_two(x: float) -> float:
    """The smallest power of two that is larger than x, a positive number."""
    return 2.0 ** math.frexp(x)[1]


class CodeBuffers:
    """Buffers and words of 1-6-9."""

    dtype = torch.int16

    def rescale(self, factors: Factors, bounds: Tensor) -> None:
        """Gives matrices new units where `bounds`, summed over all processes, ask for it.

        No element of a buffer, or of a sum of buffers, is larger than the bound times the unit.
        """
        scalars, before = factors.scalars, factors.scalars.unit
        # On the CPU the host may read the values. On a GPU it does not wait: it multiplies by 1.
        on_host = before.device.type == "cpu"
        if on_host and all(map(_fits, bounds.tolist(), before.tolist())):
            return
        scalars.unit = new_units(bounds, before)
        change = scalars.unit / before
        for error, by in zip(factors.errors, elements(change), strict=True):
            if not (on_host and by == 1):
                decoded = dalle_ext.unpack(error, FORMAT)
                error.copy_(dalle_ext.pack(decoded * by, FORMAT))

    def compress(self, factors: Factors, fast: bool) -> None:
        """Adds gradients, divided by their scales, to the buffers; P = E Q unit / max_gain."""
        gains = numbers(tuple(m.max_gain for m in factors.matrices), factors.bounds.device)
        scales = gains / factors.scalars.unit
        if factors.scales is not None:
            scales = factors.scales * scales
        skips = elements(factors.skip)
        rows = zip(
            factors.matrices, factors.grads_2d, elements(scales), factors.blocks, strict=True
        )
        for m, grad, scale, block in rows:
            factors.ps += dalle_ext.powersgd_compress_(
                [m.error],
                [grad],
                [m.q],
                scale=scale,
                error_scale=m.max_gain,
                skip=skips[block],
                fast=fast,
            )

    def all_reduce(self, comm: Communicator, factors: Sequence[Tensor]) -> Tensor:
        """The sums of P or of Q over the processes, all elements one after another."""
        return comm.sum_codes(joined(factors))

    def orthonormalize(self, ps: Sequence[Tensor]) -> Tensor:
        """Words of orthonormal columns that span those of each P, whatever P's size; flat."""
        tiny = number(2.0**-100, ps[0].device)  # below any word: of a P of zeros
        peaks = [torch.maximum(p.abs().amax(), tiny) for p in ps]
        every = zip(ps, peaks, strict=True)
        return dalle_ext.pack(
            joined([dalle_ext.orthogonalize(p / peak, EPS) for p, peak in every]), FORMAT
        )

    def decode(self, words: Tensor) -> Tensor:
        """The float32 values of words of `orthonormalize`."""
        return dalle_ext.unpack(words, FORMAT)

    def project(self, factors: Factors, fast: bool) -> None:
        """Q = E^T P / `Factors.units`, which it sets."""
        rows = max(m.error.shape[0] for m in factors.matrices)
        factors.max_gain = gain = next_power_of_two(1.01 * math.sqrt(rows))  # P's columns: norm 1
        factors.qs = dalle_ext.powersgd_project(
            factors.errors, factors.ps, error_scale=gain, fast=fast
        )
        factors.units = number(gain, factors.bounds.device) / factors.scalars.unit

    def decompress(
        self, factors: Factors, which: list[int], world_size: int, skip: Tensor, feedback: bool,
        fast: bool,
    ) -> list[Tensor]:  # fmt: skip
        """D = P Q^T in units of Q, of the matrices `which`; subtracts D / world size from the
        buffers where `skip` is 0."""
        return dalle_ext.powersgd_decompress_(
            [factors.matrices[i].error for i in which],
            [factors.ps[i] for i in which],
            [factors.qs[i] for i in which],
            machines=world_size,
            error_scale=factors.max_gain,
            skip=skip,
            feedback=feedback,
            fast=fast,
        )


class FloatBuffers:
    """Buffers and words of float32."""

    dtype = torch.float32

    def rescale(self, factors: Factors, bounds: Tensor) -> None:
        """As `CodeBuffers`, so that P^T P stays in the range of float32; buffers do not change."""
        factors.scalars.unit = new_units(bounds, factors.scalars.unit)

    def compress(self, factors: Factors, fast: bool) -> None:
        """Adds gradients, divided by their scales, to the buffers; P = E Q, as `CodeBuffers`."""
        rows = zip(factors.matrices, factors.grads_2d, factors.blocks, strict=True)
        for i, (m, grad, block) in enumerate(rows):
            grad = grad.float() if factors.scales is None else grad / factors.scales[i]
            m.error.add_(torch.where(factors.skip[block] > 0, 0.0, grad))
            factors.ps.append(m.error.double() @ m.q.double() * (m.unit / m.max_gain))

    def all_reduce(self, comm: Communicator, factors: Sequence[Tensor]) -> Tensor:
        """The sums of P or of Q over the processes, all elements one after another."""
        return comm.sum_fp32_(joined(factors))

    def orthonormalize(self, ps: Sequence[Tensor]) -> Tensor:
        """See `CodeBuffers`. In float64, since the columns of P may be nearly parallel."""
        qs = joined([torch.linalg.qr(p.double()).Q for p in ps])
        return ((qs * 2.0**GRID_P).round_() * 2.0**-GRID_P).float()

    def decode(self, words: Tensor) -> Tensor:
        """See `CodeBuffers`."""
        return words

    def project(self, factors: Factors, fast: bool) -> None:
        """Q = E^T P."""
        pairs = zip(factors.errors, factors.ps, strict=True)
        factors.qs = [error.t() @ p for error, p in pairs]
        factors.max_gain, factors.units = 1.0, torch.ones_like(factors.bounds)

    def decompress(
        self, factors: Factors, which: list[int], world_size: int, skip: Tensor, feedback: bool,
        fast: bool,
    ) -> list[Tensor]:  # fmt: skip
        """See `CodeBuffers`."""
        pairs = [(factors.ps[i], factors.qs[i]) for i in which]
        products = [(p.double() @ _round_to_grid(q).t()).float() for p, q in pairs]
        for i, product in zip(which, products, strict=True):
            if feedback:
                error = factors.matrices[i].error
                error.sub_(torch.where(skip > 0, 0.0, product / world_size))
        return products


def _round_to_grid(q: Tensor) -> Tensor:
    """Float64 multiples of 2^(1 - GRID_Q) times the power of two below q's largest magnitude."""
    peak = q.abs().amax()
    power = (peak.view(torch.int32) >> 23 << 23).view(torch.float32)
    step = power.double() * 2.0 ** (1 - GRID_Q)
    return torch.where(peak > 0, (q.double() / step).round() * step, 0.0)
