"""Error buffers of `PowerSGD` and the words its factors travel in: 1-6-9, or float32.

In 1-6-9 each matrix has a unit, a power of two, alike on all processes: its buffer, P and Q are
kept times that. It is chosen anew in each step from a bound of what all processes hold together, so
that neither a buffer nor a sum over the processes can reach 16, and stays where that bound moves
little: then no code changes but by its gradient.

Products of two such words have 20 bits, so that float32 holds them exactly: P Q^T has the same bits
on every processor, whether it fuses multiplication and addition or not, as long as P and Q are the
words themselves; what they are divided by comes after. Float32 words are rounded to a grid on which
sums of their products are exact in float64, which gives the same.

Where the fixed Q lies badly for a gradient, P = E Q has columns nearly alike, and rounding it to
words loses what tells them apart: a gradient of the factors' rank came back up to 40 % wrong. So Q
has SPARE columns more than the rank, and what travels is P T, of as many columns as the rank, for
one small matrix T that all processes find alike (`leading`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import dalle_ext
from dalle.distributed.wire import Exchange

FORMAT = "1-6-9"
# Exponents of bound times unit, of 1-6-9's -60 to 4: below, and above, a new unit brings it to AIM.
# Above, a factor of two is left for the rounding of codes; below, 40 octaves for small elements.
LEAST, AIM, MOST = -20, -8, 3
MEASURE_EVERY = 16  # steps; until then a buffer's bound grows by what could have been added
GRID_P, GRID_Q = 26, 22  # bits of float32 words: after the point, and below the largest number
SPARE = 4  # columns of Q beyond the rank
RIDGE = 2.0**-40  # of the squares of P T; keeps directions that P does not have from being blown up
EPS = 1e-6  # of the largest element of P; added to its diagonal before it is made orthonormal


@dataclass
class Matrix:
    """A gradient that is compressed.

    Attributes:
        name: of the parameter.
        error: (m, n), what was not sent yet: int16 codes of 1-6-9 of it times `unit`, or float32.
        q: (n, r + SPARE) float32, drawn once and never updated; fewer columns where m or n is less.
        limit: a power of two; no element of E Q is larger than this times the largest of E.
        unit: 0-d float32, a power of two.
        bound: 0-d float32; no element of what the buffer holds is larger.
        added: 0-d float32; no element of what was handed out last is larger.
        steps: reductions so far.
    """

    name: str
    error: Tensor
    q: Tensor
    limit: float
    unit: Tensor
    bound: Tensor
    added: Tensor
    steps: int = 0

    def value(self) -> Tensor:
        """What the buffer holds, (m, n) float32, in the units of the gradients."""
        if self.error.dtype != torch.int16:
            return self.error.clone()
        return dalle_ext.unpack(self.error, FORMAT) / self.unit

    def set(self, value: Tensor, unit: Tensor | None = None) -> None:
        """Makes the buffer hold this, (m, n) float32, in the unit given or in one that fits."""
        if self.error.dtype == torch.int16:
            fits = new_units(largest([value]), self.unit[None])[0]
            self.unit = fits if unit is None else unit
            self.error.copy_(dalle_ext.pack(value * self.unit, FORMAT))
        else:
            self.error.copy_(value)
        self.measure()
        self.steps = 0  # who sets and goes on, and who loads what was set, choose the same units

    def measure(self) -> None:
        """Finds the bound anew; nothing waits for the device."""
        self.bound = largest([self.value()])[0]


@dataclass
class Factors:
    """A gradient on its way through one reduction, as P Q^T.

    Attributes:
        matrix: its error buffer E and what else outlives the reduction.
        grad: of m n elements, replaced at the end.
        block: whose scale the gradient carries.
        scale: 0-d, that scale; None where there is none.
        skip: 0-d float32; where it is not 0 the gradient is not added to E.
        bound: 0-d float32; no element of E with the gradient is larger.
        p: (m, c), the own E Q; then P, (m, r) float32, orthonormal and alike on all processes.
        q: (n, r) float32, the own E^T P; then its sum over the group.
        limit: a power of two; no element of the own E^T P is larger than it times the largest of E.
        unit: 0-d float32; `q` times this is in the units of the gradients.
    """

    matrix: Matrix
    grad: Tensor
    block: int
    scale: Tensor | None
    skip: Tensor
    bound: Tensor
    p: Tensor = field(init=False)
    q: Tensor = field(init=False)
    limit: float = field(init=False)
    unit: Tensor = field(init=False)

    @property
    def rows(self) -> Tensor:
        """The gradient as (m, n)."""
        return self.grad.reshape(self.grad.shape[0], -1)


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """(len,) float32 largest magnitudes; Inf or NaN where a tensor has one, 0 of an empty one."""
    nothing = torch.zeros((), dtype=torch.float32, device=tensors[0].device)
    filled = [t for t in tensors if t.numel()]
    if nothing.device.type == "cpu":  # a twentieth of the time of norms
        ends = [torch.aminmax(t) for t in filled]
        found = [torch.maximum(-end.min, end.max).float() for end in ends]
    else:
        found = [norm.float() for norm in torch._foreach_norm(filled, math.inf)] if filled else []
    norms = iter(found)
    return torch.stack([next(norms) if t.numel() else nothing for t in tensors])


def new_units(bounds: Tensor, units: Tensor) -> Tensor:
    """Powers of two that bring what is at most `bounds` into the range of 1-6-9.

    Those that are there, where they do.
    """
    exponents = (bounds.view(torch.int32) >> 23) - 127  # bounds are not negative
    wanted = ((AIM - exponents).clamp(-100, 100) + 127 << 23).view(torch.float32)
    now = bounds * units
    fits = (now < 2.0**MOST) & (now >= 2.0**LEAST) | (bounds == 0)
    return torch.where(fits, units, wanted)


def squares(ps: list[Tensor], rank: int) -> Tensor:
    """Upper triangles of P^T P of each matrix, (k, ...) float32, zeros where P has fewer columns.

    Args:
        ps: (m, c) each, c at least `rank` and at most rank + SPARE.
    """
    size = rank + SPARE
    found = ps[0].new_zeros(len(ps), size, size)
    for one, p in zip(found, ps, strict=True):
        one[: p.shape[1], : p.shape[1]] = p.t() @ p
    row, column = torch.triu_indices(size, size, device=found.device, dtype=torch.int64)
    return found[:, row, column].float()


def leading(ps: list[Tensor], total: Tensor, rank: int, world: int) -> list[Tensor]:
    """P T of each matrix, (m, rank) float32: the part of P that most of the gradients lie in.

    With C = sum of P^T P over the processes, T is C's first `rank` columns made orthonormal in the
    sense of C: a step of the power method, which filters what rounding put into P, and a scaling
    that gives all directions of P T one size, so that rounding P T to words hurts all alike. All
    processes have the same C. The sum of their P T has 2^AIM as a bound.

    Args:
        ps: (m, c) each, the own E Q, in units alike on all processes.
        total: the sum of their `squares`.
    """
    size = rank + SPARE
    row, column = torch.triu_indices(size, size, device=total.device, dtype=torch.int64)
    c = total.new_zeros(len(ps), size, size, dtype=torch.float64)
    c[:, row, column] = c[:, column, row] = total.double()
    power = c[:, :, :rank] / _trace(c)
    inner = power.mT @ c @ power
    trace = _trace(inner)
    ridge = RIDGE * torch.eye(rank, dtype=torch.float64, device=c.device)
    lower, _ = torch.linalg.cholesky_ex(inner / trace + ridge)
    t = torch.linalg.solve_triangular(lower.mT, power / trace.sqrt(), upper=True, left=False)
    t = t * (2.0**AIM / power_above(math.sqrt(world * rank)))
    return [(p @ one[: p.shape[1]].to(p.dtype)).float() for p, one in zip(ps, t, strict=True)]


def _trace(matrices: Tensor) -> Tensor:
    """(k, 1, 1) of (k, n, n); 1 where it is 0."""
    found = matrices.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return torch.where(found > 0, found, 1.0)


def power_above(x: float) -> float:
    """The smallest power of two that is larger than x, a positive number."""
    return 2.0 ** math.frexp(x)[1]


class Codes:
    """Buffers and words of 1-6-9."""

    dtype = torch.int16

    def settle(self, matrices: list[Matrix], totals: Tensor) -> None:
        """Gives matrices new units where `totals`, the sums of all processes' bounds, ask for it.

        No element of a buffer or of a sum of buffers is larger than the total times the unit.
        """
        before = torch.stack([m.unit for m in matrices])
        after = new_units(totals, before)
        change = after / before
        # On the CPU the host may look; elsewhere it does not wait, and shifts by 1 what stays.
        on_host = change.device.type == "cpu"
        for i, matrix in enumerate(matrices):
            matrix.unit = after[i]
            if not (on_host and change[i] == 1):
                held = dalle_ext.unpack(matrix.error, FORMAT)
                matrix.error.copy_(dalle_ext.pack(held * change[i], FORMAT))

    def compress(self, sent: list[Factors], fast: bool) -> None:
        """Adds gradients, divided by their scales, to the buffers; P = E Q in units of its own."""
        for f in sent:
            m, by = f.matrix, f.matrix.limit / f.matrix.unit
            (f.p,) = dalle_ext.powersgd_compress_(
                [m.error],
                [f.rows],
                [m.q],
                scale=by if f.scale is None else f.scale * by,
                error_scale=m.limit,
                skip=f.skip,
                fast=fast,
            )

    def sum_(self, exchange: Exchange, factors: list[Tensor]) -> None:
        """Sums of P or of Q over the processes."""
        exchange.sum_codes_(factors)

    def orthonormal(self, p: Tensor) -> Tensor:
        """Words of orthonormal columns that span those of P, whatever P's size."""
        top = p.abs().amax()
        return dalle_ext.pack(
            dalle_ext.orthogonalize(p / torch.where(top > 0, top, 1.0), EPS), FORMAT
        )

    def numbers(self, words: Tensor) -> Tensor:
        """What words of `orthonormal` stand for."""
        return dalle_ext.unpack(words, FORMAT)

    def project(self, sent: list[Factors], fast: bool) -> None:
        """Q = E^T P, in units of its own."""
        rows = max(f.matrix.error.shape[0] for f in sent)
        limit = power_above(1.01 * math.sqrt(rows))  # P's columns have norm 1
        errors, ps = [f.matrix.error for f in sent], [f.p for f in sent]
        qs = dalle_ext.powersgd_project(errors, ps, error_scale=limit, fast=fast)
        for f, q in zip(sent, qs, strict=True):
            f.q, f.limit, f.unit = q, limit, limit / f.matrix.unit

    def decompress(
        self, sent: list[Factors], world: int, skip: Tensor, feedback: bool, fast: bool
    ) -> list[Tensor]:
        """D = P Q^T in units of Q; buffers lose D / world where `skip` is 0."""
        return dalle_ext.powersgd_decompress_(
            [f.matrix.error for f in sent],
            [f.p for f in sent],
            [f.q for f in sent],
            machines=world,
            error_scale=sent[0].limit,
            skip=skip,
            feedback=feedback,
            fast=fast,
        )


class Floats:
    """Buffers and words of float32."""

    dtype = torch.float32

    def settle(self, matrices: list[Matrix], totals: Tensor) -> None:
        """As `Codes`, so that squares of P stay in the range of float32; buffers keep theirs."""
        after = new_units(totals, torch.stack([m.unit for m in matrices]))
        for matrix, unit in zip(matrices, after, strict=True):
            matrix.unit = unit

    def compress(self, sent: list[Factors], fast: bool) -> None:
        """Adds gradients, divided by their scales, to the buffers; P = E Q, as of `Codes`."""
        for f in sent:
            m, given = f.matrix, f.rows.float() if f.scale is None else f.rows / f.scale
            m.error.add_(torch.where(f.skip > 0, 0.0, given))
            f.p = m.error.double() @ m.q.double() * (m.unit / m.limit)

    def sum_(self, exchange: Exchange, factors: list[Tensor]) -> None:
        """Sums of P or of Q over the processes."""
        exchange.sum_fp32_(factors)

    def orthonormal(self, p: Tensor) -> Tensor:
        """See `Codes`. Float64, lest what P's columns have in common hides what they have not."""
        found: Tensor = torch.linalg.qr(p.double()).Q
        return ((found * 2.0**GRID_P).round_() * 2.0**-GRID_P).float()

    def numbers(self, words: Tensor) -> Tensor:
        """See `Codes`."""
        return words

    def project(self, sent: list[Factors], fast: bool) -> None:
        """Q = E^T P."""
        for f in sent:
            f.q, f.limit, f.unit = f.matrix.error.t() @ f.p, 1.0, torch.ones_like(f.matrix.unit)

    def decompress(
        self, sent: list[Factors], world: int, skip: Tensor, feedback: bool, fast: bool
    ) -> list[Tensor]:
        """D = P Q^T; buffers lose D / world where `skip` is 0."""
        totals = [(f.p.double() @ _on_grid(f.q).t()).float() for f in sent]
        for f, total in zip(sent, totals, strict=True):
            if feedback:
                f.matrix.error.sub_(torch.where(skip > 0, 0.0, total / world))
        return totals


def _on_grid(q: Tensor) -> Tensor:
    """Float64 of `q`, whole numbers of 2^(1 - GRID_Q) times the power of two below its largest."""
    top = q.abs().amax()
    power = (top.view(torch.int32) >> 23 << 23).view(torch.float32)
    step = power.double() * 2.0 ** (1 - GRID_Q)
    return torch.where(top > 0, (q.double() / step).round() * step, 0.0)
