"""PowerSGD as the paper ran it (section 2.5, appendix E.2), independent of DDP and FSDP2."""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

import dalle_ext
from dalle.configs import integer
from dalle.distributed.buffers import (
    MEASURE_EVERY,
    OVERSAMPLING,
    CodeBuffers,
    Factors,
    FloatBuffers,
    MatrixState,
    any_of_blocks,
    gram_triangles,
    max_abs,
    next_power_of_two,
    truncate_to_rank,
)
from dalle.distributed.communicator import WIRE_FORMATS, Communicator
from dalle.distributed.traffic import CommStats
from dalle.errors import CheckpointError, UsageError
from dalle.precision import ResblockScaler


@dataclass
class Gradient:
    """One gradient to be reduced in place.

    Attributes:
        name: of its parameter.
        grad: this process's part of it.
        block: number of the residual block whose scale it carries; -1 for none.
        shape: that decides whether it is compressed, the same for all shards; None for `grad`'s.
    """

    name: str
    grad: Tensor
    block: int = -1
    shape: torch.Size | None = None


class Compressor:
    """Sums gradients over a group, matrices as P Q^T of a small rank with error feedback.

    What `reduce_` does with the error buffer E of a matrix: add the gradient to E; P = E Q with a
    fixed Q, reduced to `rank` columns (`dalle.distributed.buffers.truncate_to_rank`); sum P over
    the group; orthonormalise P; Q' = E^T P; sum Q'; the gradient becomes P Q'^T, and E keeps the
    rest. Everything else is summed in fp32. Every process ends with the same bits, also where their
    processors differ.

    Where a gradient has an Inf or NaN on any process, all gradients of its block come out as NaN on
    all of them, so that clipping, `ResblockScaler` or a loss scaler skips the update. Its block's
    error buffers keep what they have, plus the gradients of the processes whose gradients are
    finite. So no buffer ever holds an Inf or NaN.

    Args: as `dalle.distributed.PowerSGD`.
    """

    def __init__(
        self,
        rank: int,
        group: dist.ProcessGroup | None,
        *,
        wire: str,
        error_feedback: bool,
        average: bool,
        min_compression: float,
        seed: int,
        scaler: ResblockScaler | GradScaler | None,
        fast: bool = False,
    ) -> None:
        rank, seed = integer("PowerSGD", "rank", rank), integer("PowerSGD", "seed", seed)
        _check(rank >= 1, "rank", "1 or more", rank)
        member = group is None or isinstance(group, dist.ProcessGroup)
        _check(member, "group", "a process group that holds this process", group)
        _check(wire in WIRE_FORMATS, "wire", f"one of {', '.join(WIRE_FORMATS)}", wire)
        _check(min_compression >= 1, "min_compression", "1 or more", min_compression)
        kinds = ResblockScaler | GradScaler | None
        _check(isinstance(scaler, kinds), "scaler", "a ResblockScaler or GradScaler", scaler)
        self.rank, self.wire, self.average, self.seed = rank, wire, average, seed
        self.error_feedback, self.min_compression = error_feedback, min_compression
        self.scaler, self.fast = scaler, fast
        self.buffers: CodeBuffers | FloatBuffers
        self.buffers = CodeBuffers() if wire == "1-6-9" else FloatBuffers()
        self.comm = Communicator(group)
        self.matrices: dict[str, MatrixState] = {}
        self.stats = CommStats(self.comm.traffic)
        # By name, of the last reduced gradient: its squared norm, unscaled. Not computed where a
        # model's parameters hold the gradients.
        self.squared_norms: dict[str, Tensor] = {}
        self.track_norms = True
        self._prepared: set[tuple[str, ...]] = set()
        self._loaded: dict[str, tuple[Tensor, float | None]] = {}
        self._broadcast_p = False  # whether processes orthonormalise to different bits

    def __deepcopy__(self, memo: dict[int, Any]) -> Compressor:
        copied = memo[id(self)] = object.__new__(Compressor)
        attributes = {key: value for key, value in self.__dict__.items() if key != "scaler"}
        copied.__dict__.update(copy.deepcopy(attributes, memo))
        copied.scaler = memo.get(id(self.scaler), self.scaler)  # the gradients carry its scales
        return copied

    @property
    def world_size(self) -> int:
        return self.comm.world_size

    def compresses(self, shape: torch.Size) -> bool:
        """Whether a gradient of this shape is sent as factors."""
        if len(shape) < 2:
            return False
        m, n = shape[0], math.prod(shape[1:])
        return self.rank <= min(m, n) and self.min_compression * self.rank * (m + n) <= m * n

    @torch.no_grad()
    def reduce_(
        self, gradients: list[Gradient], excluded: set[str], *, check: bool = False
    ) -> None:
        """Replaces the gradients by their means (or sums) over the group.

        Args:
            gradients: in the same order on all processes.
            excluded: names of those that are not compressed.
            check: first asks whether all processes have the same gradients; the host waits for it.

        Raises:
            UsageError: on all processes, where their matrices or options differ.
        """
        with self.stats.timed("seconds", gradients[0].grad.device):
            if check:
                self._check_same([g.name for g in gradients])
            self._reduce(gradients, excluded)

    def _check_same(self, names: list[str]) -> None:
        digest = zlib.crc32("\n".join(names).encode())
        extremes = torch.tensor([digest, -digest], dtype=torch.int64, device="cpu")
        with self.stats.timed("exchange_seconds", extremes.device):
            self.comm.all_reduce_max(extremes)
        if extremes[0] != -extremes[1]:
            self.comm.require_same({"gradients of a unit": names})

    def _reduce(self, gradients: list[Gradient], excluded: set[str]) -> None:
        compressed = self.to_compress(gradients, excluded)
        names = {g.name for g in compressed}
        # Sorted by name, as a bucket's order may change: an element's position decides in which
        # order its sum is computed.
        rest = sorted((g for g in gradients if g.name not in names), key=lambda g: g.name)
        self.prepare(compressed)
        ordered = [*compressed, *rest]
        magnitudes = max_abs([g.grad for g in ordered])
        finite = magnitudes.isfinite()
        blocks = sorted({g.block for g in gradients})
        nonfinite = any_of_blocks(~finite, [g.block for g in ordered], blocks)
        skips = dict(zip(blocks, nonfinite.unbind(), strict=True))
        peaks = torch.where(finite, magnitudes, 0.0).unbind()  # what is not finite is not added
        pairs = zip(compressed, peaks[: len(compressed)], strict=True)
        factors = [self._factors(g, peak, skips[g.block]) for g, peak in pairs]
        flags, sums = nonfinite.clone(), [g.grad.float() for g in rest]
        bounds = torch.stack([f.bound for f in factors]) if factors else flags.new_empty(0)
        with self.stats.timed("exchange_seconds", flags.device):
            self.comm.all_reduce_fp32_([*sums, flags, bounds])
        nan = dict(zip(blocks, _nan_where(flags), strict=True))
        for gradient, fp32_sum in zip(rest, sums, strict=True):
            self._write_sum(gradient, fp32_sum, nan[gradient.block])
        if factors:
            self.buffers.rescale([f.matrix for f in factors], bounds)
            self._all_reduce_factors(factors)
            for block, flag in zip(blocks, flags, strict=True):
                self._decompress([f for f in factors if f.block == block], flag, nan[block])
            for f in factors:
                self._update_bound(f.matrix, f.bound)
        self.stats.uncompressed_bytes += sum(
            8 * (self.world_size - 1) * g.grad.numel() // self.world_size for g in gradients
        )

    def _factors(self, gradient: Gradient, peak: Tensor, skip: Tensor) -> Factors:
        """Of a gradient whose largest magnitude is `peak`; `skip` where its block is not finite."""
        matrix, scale = self.matrices[gradient.name], self._scale(gradient.block)
        bound = matrix.bound + (peak if scale is None else peak / scale)
        return Factors(matrix, gradient.grad, gradient.block, scale, skip, bound)

    def _all_reduce_factors(self, factors: list[Factors]) -> None:
        """P and Q of each gradient, summed over the group."""
        buffers, device = self.buffers, factors[0].grad.device
        buffers.compress(factors, self.fast)
        ps = [f.p for f in factors]
        triangles = gram_triangles(ps, self.rank)
        with self.stats.timed("exchange_seconds", device):
            self.comm.all_reduce_fp32_([triangles])
        ps = truncate_to_rank(ps, triangles, self.rank, self.world_size)
        with self.stats.timed("exchange_seconds", device):
            buffers.all_reduce_(self.comm, ps)
        for f, p in zip(factors, self._orthonormalize(ps), strict=True):
            f.p = p
        buffers.project(factors, self.fast)
        with self.stats.timed("exchange_seconds", device):
            buffers.all_reduce_(self.comm, [f.q for f in factors])

    def _decompress(self, factors: list[Factors], skip: Tensor, nan: Tensor) -> None:
        """Writes P Q^T to the gradients, those of one block, and subtracts it from the buffers."""
        if not factors:
            return
        products = self.buffers.decompress(
            factors, self.world_size, skip, self.error_feedback, self.fast
        )
        for f, product in zip(factors, products, strict=True):
            self._write_product(f, product.view_as(f.grad), nan)

    def _write_product(self, f: Factors, product: Tensor, nan: Tensor) -> None:
        """Writes P Q^T, in the units of Q, to the gradient; `nan` is that, or 0."""
        unit = f.unit / self.world_size  # after the product: see `dalle.distributed.buffers`
        if self.track_norms:
            self._record_norm(f.matrix.name, torch.linalg.vector_norm(f.q) * unit + nan)
        factor = nan + (unit if self.average else f.unit)
        factor = factor if f.scale is None else factor * f.scale
        if f.grad.dtype == product.dtype:
            torch.mul(product, factor, out=f.grad)
        else:
            f.grad.copy_(product.mul_(factor))
        row_norms = [torch.linalg.vector_norm(x, dim=1).amax() for x in (f.p, f.q)]
        f.matrix.output_bound = row_norms[0] * row_norms[1] * unit

    def _write_sum(self, gradient: Gradient, fp32_sum: Tensor, nan: Tensor) -> None:
        """Writes the sum, which it changes in place, to the gradient; `nan` is that, or 0."""
        divisor = nan + 1.0
        if self.track_norms:
            norm = torch.linalg.vector_norm(fp32_sum) * divisor / self.world_size
            scale = self._scale(gradient.block)
            self._record_norm(gradient.name, norm if scale is None else norm / scale)
        fp32_sum.div_(divisor * self.world_size if self.average else divisor)
        if fp32_sum.data_ptr() != gradient.grad.data_ptr():
            gradient.grad.copy_(fp32_sum)

    def _update_bound(self, matrix: MatrixState, bound: Tensor) -> None:
        """`bound`: of the buffer before P Q^T was subtracted."""
        matrix.steps += 1
        if not self.error_feedback:
            matrix.error.zero_()
            matrix.bound = torch.zeros_like(bound)
        elif matrix.steps % MEASURE_EVERY == 0:
            matrix.update_bound()
        else:
            matrix.bound = bound + matrix.output_bound

    def _orthonormalize(self, ps: list[Tensor]) -> list[Tensor]:
        """The summed P with orthonormal columns, with the same bits on all processes."""
        words = [self.buffers.orthonormalize(p) for p in ps]
        if self._broadcast_p:
            self.comm.broadcast_(words)
        return [self.buffers.decode(w) for w in words]

    def _record_norm(self, name: str, norm: Tensor) -> None:
        """Keeps the squared norm of the reduced gradient, given that of the mean, unscaled."""
        norm = norm if self.average else norm * self.world_size
        self.squared_norms[name] = norm.double().square()

    def _scale(self, block: int) -> Tensor | None:
        """The loss scale that the gradients of a block carry."""
        if isinstance(self.scaler, GradScaler):
            return self.scaler._get_scale_async() if self.scaler.is_enabled() else None
        return None if self.scaler is None or block < 0 else self.scaler.scales[block]

    def to_compress(self, gradients: list[Gradient], excluded: set[str]) -> list[Gradient]:
        """Those that are sent as factors; arguments as of `reduce_`."""
        return [
            g
            for g in gradients
            if g.name not in excluded
            and self.compresses(g.grad.shape if g.shape is None else g.shape)
        ]

    def is_prepared(self, compressed: list[Gradient]) -> bool:
        """Whether `prepare` was called for these."""
        return tuple(g.name for g in compressed) in self._prepared

    @torch.no_grad()
    def prepare(self, compressed: list[Gradient]) -> None:
        """Makes the state of gradients that are reduced together for the first time. Collective.

        Raises:
            UsageError: on all processes, where their matrices or options differ.
        """
        if not self.is_prepared(compressed):
            self._require_same(compressed)
            self._make_matrices([g for g in compressed if g.name not in self.matrices])
            self._prepared.add(tuple(g.name for g in compressed))

    def _require_same(self, compressed: list[Gradient]) -> None:
        names = ("rank", "wire", "seed", "fast", "average", "error_feedback")
        options = {name: getattr(self, name) for name in names}
        shapes = [(g.name, tuple(_as_matrix(g.grad).shape)) for g in compressed]
        self.comm.require_same({**options, "matrices": shapes})

    def _make_matrices(self, gradients: list[Gradient]) -> None:
        if not gradients:
            return
        qs = [self._draw_q(g) for g in gradients]
        self.comm.broadcast_(qs)  # other kinds of processors draw other bits
        for gradient, q in zip(gradients, qs, strict=True):
            self._make_matrix(gradient, q)
        # If not all processors orthonormalise to the same bits, those of the first one are used.
        shapes = {(m.error.shape[0], m.error.device) for m in self.matrices.values()}
        probes = [_probe(rows, self.rank, device) for rows, device in sorted(shapes, key=str)]
        hashes = self.comm.gather([_hash(self.buffers.orthonormalize(p)) for p in probes])
        self._broadcast_p = any(other != hashes[0] for other in hashes)

    def _draw_q(self, gradient: Gradient) -> Tensor:
        """(n, r + OVERSAMPLING) gaussian, by the seed and the parameter's name."""
        seed = self.seed ^ zlib.crc32(gradient.name.encode())
        generator = torch.Generator("cpu").manual_seed(seed)
        m, n = _as_matrix(gradient.grad).shape
        shape = n, min(self.rank + OVERSAMPLING, m, n)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(
            gradient.grad.device
        )

    def _make_matrix(self, gradient: Gradient, q: Tensor) -> None:
        shape, device = _as_matrix(gradient.grad).shape, gradient.grad.device
        error = torch.zeros(shape, dtype=self.buffers.dtype, device=device)
        max_gain = next_power_of_two(q.shape[0] * float(q.abs().max()))
        one = torch.ones((), dtype=torch.float32, device=device)
        zero = torch.zeros_like(one)
        matrix = MatrixState(gradient.name, error, q, max_gain, one, zero, zero)
        self.matrices[gradient.name] = matrix
        if gradient.name in self._loaded:
            value, unit = self._loaded.pop(gradient.name)
            matrix.set_value(value.to(device), None if unit is None else torch.full_like(one, unit))

    def average_buffers(self) -> None:
        """Replaces the buffers of all processes by their mean. Collective.

        The method is linear, so only the sum over the group matters. A run that saves its state and
        goes on, and one that loads it, then hold the same bits.
        """
        for matrix in self.matrices.values():
            mean = matrix.value()
            self.comm.all_reduce(mean)
            matrix.set_value(mean / self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """The error buffers, one copy for all processes, after `average_buffers`."""
        errors = {name: matrix.error.clone() for name, matrix in self.matrices.items()}
        units = {name: float(matrix.unit) for name, matrix in self.matrices.items()}
        return {
            "errors": errors,
            "units": units,
            "machines": self.world_size,
            "rank": self.rank,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the buffers of `state_dict`, scaled for the number of processes there are now."""
        for key in ("rank", "seed"):
            expected, got = getattr(self, key), state.get(key)
            if expected != got:
                raise CheckpointError(f"PowerSGD: state must be of {key} {expected}, got {got}")
        share, units = state["machines"] / self.world_size, state.get("units", {})
        for name, words in state["errors"].items():  # all are checked before the first is loaded
            expected = self.matrices[name].error.shape if name in self.matrices else words.shape
            if words.shape != expected or not math.isfinite(units.get(name, 1.0)):
                got = f"{tuple(words.shape)}, unit {units.get(name, 1.0)}"
                raise CheckpointError(
                    f"PowerSGD: errors of {name} must be {tuple(expected)}, got {got}"
                )
        for name, words in state["errors"].items():
            value, unit = words * share, None  # of float32 words: a unit that fits them
            if words.dtype == torch.int16:
                unit = units.get(name, 1.0)
                value = dalle_ext.unpack(words, "1-6-9") / unit * share
                unit = unit / next_power_of_two(share / 2)  # the codes keep their range
            if name in self.matrices:
                matrix = self.matrices[name]
                fitting = None if unit is None else torch.full_like(matrix.unit, unit)
                matrix.set_value(value, fitting)
            else:
                self._loaded[name] = value, unit


def _probe(rows: int, rank: int, device: torch.device) -> Tensor:
    """Integers as float32, which all processors draw with the same bits."""
    generator = torch.Generator("cpu").manual_seed(rows)
    shape = (rows, rank)
    probe = torch.randint(-999, 1000, shape, generator=generator, device="cpu", dtype=torch.int64)
    return probe.to(device, torch.float32)


def _hash(tensor: Tensor) -> int:
    return zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())


def _nan_where(flags: Tensor) -> Tensor:
    """NaN where a flag is set, else 0."""
    return torch.zeros_like(flags).masked_fill(flags > 0, math.nan)


def _as_matrix(grad: Tensor) -> Tensor:
    """(m, ...) as (m, n)."""
    return grad.reshape(grad.shape[0], -1)


def _check(holds: bool, name: str, requirement: str, value: object) -> None:
    if not holds:
        raise UsageError(f"PowerSGD: {name} must be {requirement}, got {value}")
