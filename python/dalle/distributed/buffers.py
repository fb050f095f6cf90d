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

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import dalle_ext
from dalle.distributed.communicator import Communicator

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
class MatrixState:
    """What a compressed gradient keeps between steps.

    Attributes:
        name: of the parameter.
        error: (m, n), what was not sent yet: int16 codes of 1-6-9 of it times `unit`, or float32.
        q: (n, r + OVERSAMPLING) float32, drawn once and never updated; fewer columns where m or n
            is less.
        max_gain: a power of two, at least max |E Q| / max |E|.
        unit: 0-d float32, a power of two.
        bound: 0-d float32, at least the largest magnitude in the buffer, in units of the gradient.
        output_bound: 0-d float32, at least the largest magnitude of the last reduced gradient.
        steps: reductions so far.
    """

    name: str
    error: Tensor
    q: Tensor
    max_gain: float
    unit: Tensor
    bound: Tensor
    output_bound: Tensor
    steps: int = 0

    def value(self) -> Tensor:
        """The buffer's content, (m, n) float32, in units of the gradient."""
        if self.error.dtype != torch.int16:
            return self.error.clone()
        return dalle_ext.unpack(self.error, FORMAT) / self.unit

    def set_value(self, value: Tensor, unit: Tensor | None = None) -> None:
        """Overwrites the buffer with (m, n) float32, in the unit given or in one that fits."""
        if self.error.dtype == torch.int16:
            fitting = new_units(max_abs([value]), self.unit[None])[0]
            self.unit = fitting if unit is None else unit
            self.error.copy_(dalle_ext.pack(value * self.unit, FORMAT))
        else:
            self.error.copy_(value)
        self.update_bound()
        self.steps = 0  # so that this run and one that loads its state choose the same units

    def update_bound(self) -> None:
        """Sets the bound to the largest magnitude; the host does not wait for the device."""
        self.bound = max_abs([self.value()])[0]


@dataclass
class Factors:
    """A gradient during one reduction, as P Q^T.

    Attributes:
        matrix: its error buffer E and what else outlives the reduction.
        grad: of m n elements, replaced at the end.
        block: number of the residual block whose scale the gradient carries.
        scale: 0-d, that scale; None where there is none.
        skip: 0-d float32; where it is not 0 the gradient is not added to E.
        bound: 0-d float32, at least the largest magnitude of E with the gradient.
        p: (m, c), this process's E Q; then P, (m, r) float32, orthonormal, the same on all
            processes.
        q: (n, r) float32, this process's E^T P; then its sum over the group.
        max_gain: a power of two, at least max |E^T P| / max |E|.
        unit: 0-d float32; `q` times this is in units of the gradient.
    """

    matrix: MatrixState
    grad: Tensor
    block: int
    scale: Tensor | None
    skip: Tensor
    bound: Tensor
    p: Tensor = field(init=False)
    q: Tensor = field(init=False)
    max_gain: float = field(init=False)
    unit: Tensor = field(init=False)

    @property
    def grad_2d(self) -> Tensor:
        """The gradient as (m, n)."""
        return self.grad.reshape(self.grad.shape[0], -1)


def max_abs(tensors: Sequence[Tensor]) -> Tensor:
    """(len,) float32 largest magnitudes; Inf or NaN where a tensor has one, 0 of an empty one."""
    zero = torch.zeros((), dtype=torch.float32, device=tensors[0].device)
    nonempty = [t for t in tensors if t.numel()]

    def stacked(found: Sequence[Tensor]) -> Tensor:
        remaining = (value.float() for value in found)
        return torch.stack([next(remaining) if t.numel() else zero for t in tensors])

    if zero.device.type == "cpu":  # a twentieth of the time of norms
        ranges = [torch.aminmax(t) for t in nonempty]
        return torch.maximum(-stacked([r.min for r in ranges]), stacked([r.max for r in ranges]))
    return stacked(torch._foreach_norm(nonempty, math.inf) if nonempty else ())


def any_of_blocks(flags: Tensor, block_of: list[int], blocks: list[int]) -> Tensor:
    """(blocks,) float32: 1 where a flag of the block is set, else 0."""
    if len(blocks) == 1:
        return flags.any().float()[None]
    pairs = list(zip(flags.unbind(), block_of, strict=True))
    members = [torch.stack([flag for flag, b in pairs if b == block]) for block in blocks]
    return torch.stack([of_block.any() for of_block in members]).float()


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


def gram_triangles(ps: list[Tensor], rank: int) -> Tensor:
    """Upper triangles of P^T P of each matrix, (k, ...) float32, zeros where P has fewer columns.

    Args:
        ps: (m, c) each, c at least `rank` and at most rank + OVERSAMPLING.
    """
    size = rank + OVERSAMPLING
    grams = ps[0].new_zeros(len(ps), size, size)
    for gram, p in zip(grams, ps, strict=True):
        gram[: p.shape[1], : p.shape[1]] = p.t() @ p
    row, column = torch.triu_indices(size, size, device=grams.device, dtype=torch.int64)
    return grams[:, row, column].float()


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
    row, column = torch.triu_indices(size, size, device=triangles.device, dtype=torch.int64)
    c = triangles.new_zeros(len(ps), size, size, dtype=torch.float64)
    c[:, row, column] = c[:, column, row] = triangles.double()
    power = c[:, :, :rank] / _trace(c)
    inner = power.mT @ c @ power
    trace = _trace(inner)
    ridge = RIDGE * torch.eye(rank, dtype=torch.float64, device=c.device)
    lower, _ = torch.linalg.cholesky_ex(inner / trace + ridge)
    ts = torch.linalg.solve_triangular(lower.mT, power / trace.sqrt(), upper=True, left=False)
    ts = ts * (2.0**TARGET_EXPONENT / next_power_of_two(math.sqrt(world_size * rank)))
    return [(p @ t[: p.shape[1]].to(p.dtype)).float() for p, t in zip(ps, ts, strict=True)]


def _trace(matrices: Tensor) -> Tensor:
    """(k, 1, 1) of (k, n, n); 1 where it is 0."""
    traces = matrices.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return torch.where(traces > 0, traces, 1.0)


def next_power_of_two(x: float) -> float:
    """The smallest power of two that is larger than x, a positive number."""
    return 2.0 ** math.frexp(x)[1]


class CodeBuffers:
    """Buffers and words of 1-6-9."""

    dtype = torch.int16

    def rescale(self, matrices: list[MatrixState], bounds: Tensor) -> None:
        """Gives matrices new units where `bounds`, summed over all processes, ask for it.

        No element of a buffer, or of a sum of buffers, is larger than the bound times the unit.
        """
        before = torch.stack([m.unit for m in matrices])
        after = new_units(bounds, before)
        change = after / before
        # On the CPU the host may read the values. On a GPU it does not wait: it multiplies by 1.
        on_host = change.device.type == "cpu"
        for i, matrix in enumerate(matrices):
            matrix.unit = after[i]
            if not (on_host and change[i] == 1):
                decoded = dalle_ext.unpack(matrix.error, FORMAT)
                matrix.error.copy_(dalle_ext.pack(decoded * change[i], FORMAT))

    def compress(self, compressed: list[Factors], fast: bool) -> None:
        """Adds gradients, divided by their scales, to the buffers; P = E Q unit / max_gain."""
        for f in compressed:
            m, factor = f.matrix, f.matrix.max_gain / f.matrix.unit
            (f.p,) = dalle_ext.powersgd_compress_(
                [m.error],
                [f.grad_2d],
                [m.q],
                scale=factor if f.scale is None else f.scale * factor,
                error_scale=m.max_gain,
                skip=f.skip,
                fast=fast,
            )

    def all_reduce_(self, comm: Communicator, factors: list[Tensor]) -> None:
        """Sums of P or of Q over the processes."""
        comm.all_reduce_codes_(factors)

    def orthonormalize(self, p: Tensor) -> Tensor:
        """Words of orthonormal columns that span those of P, whatever P's size."""
        peak = p.abs().amax()
        return dalle_ext.pack(
            dalle_ext.orthogonalize(p / torch.where(peak > 0, peak, 1.0), EPS), FORMAT
        )

    def decode(self, words: Tensor) -> Tensor:
        """The float32 values of words of `orthonormalize`."""
        return dalle_ext.unpack(words, FORMAT)

    def project(self, compressed: list[Factors], fast: bool) -> None:
        """Q = E^T P / `Factors.unit`, which it sets."""
        rows = max(f.matrix.error.shape[0] for f in compressed)
        max_gain = next_power_of_two(1.01 * math.sqrt(rows))  # P's columns have norm 1
        errors, ps = [f.matrix.error for f in compressed], [f.p for f in compressed]
        qs = dalle_ext.powersgd_project(errors, ps, error_scale=max_gain, fast=fast)
        for f, q in zip(compressed, qs, strict=True):
            f.q, f.max_gain, f.unit = q, max_gain, max_gain / f.matrix.unit

    def decompress(
        self, compressed: list[Factors], world_size: int, skip: Tensor, feedback: bool, fast: bool
    ) -> list[Tensor]:
        """D = P Q^T in units of Q; subtracts D / world size from the buffers where `skip` is 0."""
        return dalle_ext.powersgd_decompress_(
            [f.matrix.error for f in compressed],
            [f.p for f in compressed],
            [f.q for f in compressed],
            machines=world_size,
            error_scale=compressed[0].max_gain,
            skip=skip,
            feedback=feedback,
            fast=fast,
        )


class FloatBuffers:
    """Buffers and words of float32."""

    dtype = torch.float32

    def rescale(self, matrices: list[MatrixState], bounds: Tensor) -> None:
        """As `CodeBuffers`, so that P^T P stays in the range of float32; buffers do not change."""
        after = new_units(bounds, torch.stack([m.unit for m in matrices]))
        for matrix, unit in zip(matrices, after, strict=True):
            matrix.unit = unit

    def compress(self, compressed: list[Factors], fast: bool) -> None:
        """Adds gradients, divided by their scales, to the buffers; P = E Q, as `CodeBuffers`."""
        for f in compressed:
            m, grad = f.matrix, f.grad_2d.float() if f.scale is None else f.grad_2d / f.scale
            m.error.add_(torch.where(f.skip > 0, 0.0, grad))
            f.p = m.error.double() @ m.q.double() * (m.unit / m.max_gain)

    def all_reduce_(self, comm: Communicator, factors: list[Tensor]) -> None:
        """Sums of P or of Q over the processes."""
        comm.all_reduce_fp32_(factors)

    def orthonormalize(self, p: Tensor) -> Tensor:
        """See `CodeBuffers`. In float64, since the columns of P may be nearly parallel."""
        q: Tensor = torch.linalg.qr(p.double()).Q
        return ((q * 2.0**GRID_P).round_() * 2.0**-GRID_P).float()

    def decode(self, words: Tensor) -> Tensor:
        """See `CodeBuffers`."""
        return words

    def project(self, compressed: list[Factors], fast: bool) -> None:
        """Q = E^T P."""
        for f in compressed:
            f.q, f.max_gain, f.unit = f.matrix.error.t() @ f.p, 1.0, torch.ones_like(f.matrix.unit)

    def decompress(
        self, compressed: list[Factors], world_size: int, skip: Tensor, feedback: bool, fast: bool
    ) -> list[Tensor]:
        """D = P Q^T; subtracts D / world size from the buffers where `skip` is 0."""
        products = [(f.p.double() @ _round_to_grid(f.q).t()).float() for f in compressed]
        for f, product in zip(compressed, products, strict=True):
            if feedback:
                f.matrix.error.sub_(torch.where(skip > 0, 0.0, product / world_size))
        return products


def _round_to_grid(q: Tensor) -> Tensor:
    """Float64 multiples of 2^(1 - GRID_Q) times the power of two below q's largest magnitude."""
    peak = q.abs().amax()
    power = (peak.view(torch.int32) >> 23 << 23).view(torch.float32)
    step = power.double() * 2.0 ** (1 - GRID_Q)
    return torch.where(peak > 0, (q.double() / step).round() * step, 0.0)
