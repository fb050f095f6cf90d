"""PowerSGD as the paper ran it (section 2.5, appendix E.2), independent of DDP and FSDP2."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
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
    Scalars,
    gram_triangles,
    next_power_of_two,
    scalars_of,
    truncate_to_rank,
)
from dalle.distributed.communicator import WIRE_FORMATS, Communicator
from dalle.distributed.small import elements, joined, max_abs, membership, number, split_rows
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
        # By name, of the last reduced gradient: its norm, unscaled. Not computed where a
        # model's parameters hold the gradients.
        self.norms: dict[str, Tensor] = {}
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
        ordered, k = [*compressed, *rest], len(compressed)
        device = ordered[0].grad.device
        scales = self._scales(ordered)
        position, members = membership(tuple(g.block for g in ordered), device)
        magnitudes = max_abs([g.grad for g in ordered])
        bad = (magnitudes - magnitudes).isnan()  # of a gradient that is not finite
        flags = torch.where(bad, members, number(0.0, device)).amax(1)
        peaks = magnitudes.nan_to_num_(0.0, 0.0, 0.0)  # what is not finite is not added
        factors = self._factors(compressed, peaks, scales, position, flags) if compressed else None
        bounds = [] if factors is None else [factors.bounds]
        flat = joined([*(g.grad for g in rest), flags, *bounds])
        with self.stats.timed("exchange_seconds", device):
            self.comm.sum_fp32_(flat)
        sizes = [*(g.grad.numel() for g in rest), len(flags), k]
        *sums, flags, summed_bounds = flat.split_with_sizes(sizes)
        nan = elements(flags.neg().sqrt_())  # where a flag is set; else 0
        self._write_sums(rest, sums, nan, position[k:], None if scales is None else scales[k:])
        if factors is not None:
            self.buffers.rescale(factors, summed_bounds)
            self._all_reduce_factors(factors)
            self._decompress(factors, flags, nan)
            self._update_bounds(factors)
        self.stats.uncompressed_bytes += sum(
            8 * (self.world_size - 1) * g.grad.numel() // self.world_size for g in gradients
        )

    def _factors(
        self,
        gradients: list[Gradient],
        peaks: Tensor,
        scales: Tensor | None,
        position: list[int],
        skip: Tensor,
    ) -> Factors:
        """Of these, the first of the gradients that all else is given for."""
        k, matrices = len(gradients), [self.matrices[g.name] for g in gradients]
        scales = None if scales is None else scales[:k]
        added = peaks[:k] if scales is None else peaks[:k] / scales
        bounds = scalars_of(matrices).bound + added
        return Factors(matrices, [g.grad for g in gradients], position[:k], scales, skip, bounds)

    def _all_reduce_factors(self, factors: Factors) -> None:
        """P and Q of each gradient, summed over the group."""
        buffers, device, rank = self.buffers, factors.bounds.device, self.rank
        buffers.compress(factors, self.fast)
        triangles = gram_triangles(factors.ps, rank)
        with self.stats.timed("exchange_seconds", device):
            self.comm.sum_fp32_(triangles)
        ps = truncate_to_rank(factors.ps, triangles, rank, self.world_size)
        with self.stats.timed("exchange_seconds", device):
            flat = buffers.all_reduce(self.comm, ps)
        words = buffers.orthonormalize(split_rows(flat, factors.errors, 0, rank))
        if self._broadcast_p:  # else all processes have the same bits
            self.comm.broadcast_([words])
        factors.ps = split_rows(buffers.decode(words), factors.errors, 0, rank)
        buffers.project(factors, self.fast)
        with self.stats.timed("exchange_seconds", device):
            flat = buffers.all_reduce(self.comm, factors.qs)
        factors.qs = split_rows(flat, factors.errors, 1, rank)

    def _decompress(self, factors: Factors, skip: Tensor, nan: Sequence[Tensor]) -> None:
        """Writes P Q^T to the gradients and subtracts it from the buffers.

        Args:
            skip: (blocks,), where it is not 0 the buffers of a block stay as they are.
            nan: (1,) of each block: that, or 0.
        """
        # After the product: see `dalle.distributed.buffers`.
        units = factors.units / number(self.world_size, skip.device)
        added = torch.cat([nan[block] for block in factors.blocks])
        by = added + (units if self.average else factors.units)
        if self.track_norms:
            for matrix, q, factor in zip(factors.matrices, factors.qs, elements(by), strict=True):
                self.norms[matrix.name] = torch.linalg.vector_norm(q) * factor
        to_write = elements(by if factors.scales is None else by * factors.scales)
        for block, flag in enumerate(elements(skip)):
            which = [i for i, other in enumerate(factors.blocks) if other == block]
            if not which:
                continue
            products = self.buffers.decompress(
                factors, which, self.world_size, flag, self.error_feedback, self.fast
            )
            for i, product in zip(which, products, strict=True):
                grad = factors.grads[i]
                product = product if grad.dim() == 2 else product.view(grad.shape)
                if grad.dtype == product.dtype:
                    torch.mul(product, to_write[i], out=grad)
                else:
                    grad.copy_(product.mul_(to_write[i]))
        sides = [*factors.ps, *factors.qs]
        lengths = joined([torch.linalg.vector_norm(x, dim=1).amax() for x in sides])
        factors.output_bounds = lengths.view(2, -1).prod(0) * units

    def _write_sums(
        self,
        gradients: list[Gradient],
        sums: Sequence[Tensor],
        nan: Sequence[Tensor],
        position: Sequence[int],
        scales: Tensor | None,
    ) -> None:
        """Writes sums, which it changes in place, to the gradients; `nan`: as of `_decompress`."""
        device = nan[0].device
        divisors = [n + number(1.0, device) for n in nan]
        if self.average:
            divisors = [d * number(self.world_size, device) for d in divisors]
        for gradient, total, block in zip(gradients, sums, position, strict=True):
            total.div_(divisors[block])
            shape = gradient.grad.shape
            gradient.grad.copy_(total if len(shape) == 1 else total.view(shape))
        if self.track_norms and gradients:
            norms = torch._foreach_norm(list(sums))
            if scales is not None:
                norms = torch._foreach_div(norms, list(elements(scales)))
            self.norms.update(zip((g.name for g in gradients), norms, strict=True))

    def _update_bounds(self, factors: Factors) -> None:
        """After P Q^T was subtracted."""
        scalars = factors.scalars
        if self.error_feedback:
            scalars.bound = factors.bounds + factors.output_bounds
        else:
            scalars.bound = torch.zeros_like(factors.bounds)
        for matrix in factors.matrices:
            matrix.steps += 1
            if not self.error_feedback:
                matrix.error.zero_()
            elif matrix.steps % MEASURE_EVERY == 0:
                matrix.update_bound()

    def _scales(self, gradients: list[Gradient]) -> Tensor | None:
        """(len,), the loss scales that gradients carry; None where there are none."""
        if self.scaler is None:
            return None
        if isinstance(self.scaler, GradScaler):
            scale = self.scaler._get_scale_async() if self.scaler.is_enabled() else None
            return None if scale is None else scale.expand(len(gradients))
        scales = elements(self.scaler.scales)
        without = number(1.0, gradients[0].grad.device).view(1)
        return torch.cat([scales[g.block] if g.block >= 0 else without for g in gradients])

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
        hashes = self.comm.gather([_hash(self.buffers.orthonormalize([p])) for p in probes])
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
        one = torch.ones(1, dtype=torch.float32, device=device)
        scalars = Scalars(one, torch.zeros_like(one))
        matrix = MatrixState(gradient.name, error, q, max_gain, scalars)
        self.matrices[gradient.name] = matrix
        if gradient.name in self._loaded:
            value, unit = self._loaded.pop(gradient.name)
            matrix.set_value(
                value.to(device), None if unit is None else torch.full_like(one[0], unit)
            )

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


def _as_matrix(grad: Tensor) -> Tensor:
    """(m, ...) as (m, n)."""
    return grad.reshape(grad.shape[0], -1)


def _check(holds: bool, name: str, requirement: str, value: object) -> None:
    if not holds:
        raise UsageError(f"PowerSGD: {name} must be {requirement}, got {value}")
