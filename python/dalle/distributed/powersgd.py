"""PowerSGD as the paper ran it (section 2.5, appendix E.2): the part that knows no engine."""

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
from dalle.distributed.account import Account
from dalle.distributed.buffers import (
    MEASURE_EVERY,
    SPARE,
    Codes,
    Factors,
    Floats,
    Matrix,
    largest,
    leading,
    power_above,
    squares,
)
from dalle.distributed.wire import WIRES, Exchange
from dalle.errors import CheckpointError, UsageError
from dalle.precision import ResblockScaler


@dataclass
class Gradient:
    """One gradient to be reduced in place.

    Attributes:
        name: of its parameter.
        grad: this process's part of it.
        block: whose scale it carries.
        shape: that decides whether it is compressed, the same for all shards; None for `grad`'s.
    """

    name: str
    grad: Tensor
    block: int = -1
    shape: torch.Size | None = None


class Compressor:
    """Sums gradients over a group, matrices as P Q^T of a small rank with error feedback.

    What `reduce_` does with the error buffer E of a matrix: add the gradient to E; P = E Q with a
    fixed Q, brought to `rank` columns (`dalle.distributed.buffers.leading`); sum P over the group;
    orthonormalise P; Q' = E^T P; sum Q'; the gradient becomes P Q'^T, and E keeps what that leaves
    out. All else is summed in fp32 words. Every process ends with the same bits, also where their
    processors differ.

    A gradient with an Inf or NaN anywhere in the group leaves every error buffer of its block as it
    was but for the finite gradients added, and comes out as NaN everywhere, so that clipping,
    `ResblockScaler` or a loss scaler skips the update; no buffer ever holds an Inf or NaN.

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
        _check(wire in WIRES, "wire", f"one of {', '.join(WIRES)}", wire)
        _check(min_compression >= 1, "min_compression", "1 or more", min_compression)
        kinds = ResblockScaler | GradScaler | None
        _check(isinstance(scaler, kinds), "scaler", "a ResblockScaler or GradScaler", scaler)
        self.rank, self.wire, self.average, self.seed = rank, wire, average, seed
        self.error_feedback, self.min_compression = error_feedback, min_compression
        self.scaler, self.fast = scaler, fast
        self.buffers: Codes | Floats = Codes() if wire == "1-6-9" else Floats()
        self.exchange = Exchange(group)
        self.matrices: dict[str, Matrix] = {}
        self.account = Account(self.exchange.traffic)
        # By name: the squared norm of the gradient that was handed out last, unscaled; not kept
        # where a model's parameters hold the gradients.
        self.squared_norms: dict[str, Tensor] = {}
        self.notes = True
        self._agreed: set[tuple[str, ...]] = set()
        self._loaded: dict[str, tuple[Tensor, float | None]] = {}
        self._odd = False  # whether processes orthonormalise to other bits

    def __deepcopy__(self, memo: dict[int, Any]) -> Compressor:
        found = memo[id(self)] = object.__new__(Compressor)
        own = {key: value for key, value in self.__dict__.items() if key != "scaler"}
        found.__dict__.update(copy.deepcopy(own, memo))
        found.scaler = memo.get(id(self.scaler), self.scaler)  # the gradients carry its scales
        return found

    @property
    def world(self) -> int:
        return self.exchange.world

    def compresses(self, shape: torch.Size) -> bool:
        """Whether a gradient of this shape is sent as factors."""
        if len(shape) < 2:
            return False
        m, n = shape[0], math.prod(shape[1:])
        return self.rank <= min(m, n) and self.min_compression * self.rank * (m + n) <= m * n

    @torch.no_grad()
    def reduce_(self, gradients: list[Gradient], whole: set[str], *, check: bool = False) -> None:
        """Replaces the gradients by their means (or sums) over the group.

        Args:
            gradients: in an order that all processes share.
            whole: names of those that are not to be compressed.
            check: asks all processes first whether they have the same; the host waits for it.

        Raises:
            UsageError: on all processes, where they compress other matrices, or in another way.
        """
        with self.account.timed("seconds", gradients[0].grad.device):
            if check:
                self._check_same([g.name for g in gradients])
            self._reduce(gradients, whole)

    def _check_same(self, names: list[str]) -> None:
        own = zlib.crc32("\n".join(names).encode())
        ends = torch.tensor([own, -own], dtype=torch.int64, device="cpu")
        with self.account.timed("exchange_seconds", ends.device):
            self.exchange.all_reduce_max(ends)
        if ends[0] != -ends[1]:
            self.exchange.require_same({"gradients of a unit": names})

    def _reduce(self, gradients: list[Gradient], whole: set[str]) -> None:
        packed = self.packed(gradients, whole)
        names = {g.name for g in packed}
        # By name, and not in the order of a bucket: where an element lies decides how it is summed.
        rest = sorted((g for g in gradients if g.name not in names), key=lambda g: g.name)
        self.prepare(packed)
        every = [*packed, *rest]
        tops = dict(zip((g.name for g in every), largest([g.grad for g in every]), strict=True))
        blocks = sorted({g.block for g in gradients})
        own = torch.stack([_any_nonfinite(tops, gradients, block) for block in blocks])
        skips = dict(zip(blocks, own, strict=True))
        sent = [self._factors(g, tops[g.name], skips[g.block]) for g in packed]
        flags, wide = own.clone(), [g.grad.float() for g in rest]
        bounds = torch.stack([f.bound for f in sent]) if sent else own.new_empty(0)
        with self.account.timed("exchange_seconds", own.device):
            self.exchange.sum_fp32_([*wide, flags, bounds])
        nan = dict(zip(blocks, _nan_where(flags), strict=True))
        for gradient, total in zip(rest, wide, strict=True):
            self._hand_out_sum(gradient, total, nan[gradient.block])
        if sent:
            self.buffers.settle([f.matrix for f in sent], bounds)
            self._exchange(sent)
            for block, flag in zip(blocks, flags, strict=True):
                self._decompress([f for f in sent if f.block == block], flag, nan[block])
            for f in sent:
                self._note_bound(f.matrix, f.bound)
        self.account.uncompressed_bytes += sum(
            8 * (self.world - 1) * g.grad.numel() // self.world for g in gradients
        )

    def _factors(self, gradient: Gradient, top: Tensor, skip: Tensor) -> Factors:
        """Of a gradient whose largest element is `top`; `skip` where its block is not finite."""
        matrix, scale = self.matrices[gradient.name], self._scale(gradient.block)
        top = torch.where(top.isfinite(), top, 0.0)  # what is not finite is not added
        bound = matrix.bound + (top if scale is None else top / scale)
        return Factors(matrix, gradient.grad, gradient.block, scale, skip, bound)

    def _exchange(self, sent: list[Factors]) -> None:
        """P and Q of each gradient, summed over the group."""
        buffers, device = self.buffers, sent[0].grad.device
        buffers.compress(sent, self.fast)
        ps = [f.p for f in sent]
        total = squares(ps, self.rank)
        with self.account.timed("exchange_seconds", device):
            self.exchange.sum_fp32_([total])
        ps = leading(ps, total, self.rank, self.world)
        with self.account.timed("exchange_seconds", device):
            buffers.sum_(self.exchange, ps)
        for f, p in zip(sent, self._orthonormal(ps), strict=True):
            f.p = p
        buffers.project(sent, self.fast)
        with self.account.timed("exchange_seconds", device):
            buffers.sum_(self.exchange, [f.q for f in sent])

    def _decompress(self, sent: list[Factors], skip: Tensor, nan: Tensor) -> None:
        """Takes P Q^T off the buffers and makes it the gradients, those of one block."""
        if not sent:
            return
        totals = self.buffers.decompress(sent, self.world, skip, self.error_feedback, self.fast)
        for f, total in zip(sent, totals, strict=True):
            self._hand_out(f, total.view_as(f.grad), nan)

    def _hand_out(self, f: Factors, total: Tensor, nan: Tensor) -> None:
        """Makes P Q^T, in the units of Q, the gradient; `nan` is that, or 0."""
        unit = f.unit / self.world  # after the product: see `dalle.distributed.buffers`
        if self.notes:
            self._note(f.matrix.name, torch.linalg.vector_norm(f.q) * unit + nan)
        by = nan + (unit if self.average else f.unit)
        by = by if f.scale is None else by * f.scale
        if f.grad.dtype == total.dtype:
            torch.mul(total, by, out=f.grad)
        else:
            f.grad.copy_(total.mul_(by))
        rows = [torch.linalg.vector_norm(factor, dim=1).amax() for factor in (f.p, f.q)]
        f.matrix.added = rows[0] * rows[1] * unit

    def _hand_out_sum(self, gradient: Gradient, total: Tensor, nan: Tensor) -> None:
        """Makes the fp32 sum, changed in place, the gradient; `nan` is that, or 0."""
        by = nan + 1.0
        if self.notes:
            norm = torch.linalg.vector_norm(total) * by / self.world
            scale = self._scale(gradient.block)
            self._note(gradient.name, norm if scale is None else norm / scale)
        total.div_(by * self.world if self.average else by)
        if total.data_ptr() != gradient.grad.data_ptr():
            gradient.grad.copy_(total)

    def _note_bound(self, matrix: Matrix, bound: Tensor) -> None:
        """`bound`: of the buffer before what was handed out was taken off."""
        matrix.steps += 1
        if not self.error_feedback:
            matrix.error.zero_()
            matrix.bound = torch.zeros_like(bound)
        elif matrix.steps % MEASURE_EVERY == 0:
            matrix.measure()
        else:
            matrix.bound = bound + matrix.added

    def _orthonormal(self, ps: list[Tensor]) -> list[Tensor]:
        """The summed P with orthonormal columns, in words that all processes have alike."""
        words = [self.buffers.orthonormal(p) for p in ps]
        if self._odd:
            self.exchange.take_first_(words)
        return [self.buffers.numbers(w) for w in words]

    def _note(self, name: str, norm: Tensor) -> None:
        """Keeps the squared norm of what is handed out, given that of the mean, both unscaled."""
        norm = norm if self.average else norm * self.world
        self.squared_norms[name] = norm.double().square()

    def _scale(self, block: int) -> Tensor | None:
        """What the gradients of a block were multiplied with."""
        if isinstance(self.scaler, GradScaler):
            return self.scaler._get_scale_async() if self.scaler.is_enabled() else None
        return None if self.scaler is None or block < 0 else self.scaler.scales[block]

    def packed(self, gradients: list[Gradient], whole: set[str]) -> list[Gradient]:
        """Those that are sent as factors; arguments as of `reduce_`."""
        return [
            g
            for g in gradients
            if g.name not in whole and self.compresses(g.grad.shape if g.shape is None else g.shape)
        ]

    def knows(self, packed: list[Gradient]) -> bool:
        """Whether `prepare` was called for these."""
        return tuple(g.name for g in packed) in self._agreed

    @torch.no_grad()
    def prepare(self, packed: list[Gradient]) -> None:
        """Makes the matrices of gradients that are seen together for the first time. Collective.

        Raises:
            UsageError: on all processes, where they compress other matrices, or in another way.
        """
        if not self.knows(packed):
            self._agree(packed)
            self._agreed.add(tuple(g.name for g in packed))

    def _agree(self, packed: list[Gradient]) -> None:
        """Once for each set of matrices: all processes must compress the same in the same way."""
        own = {
            "rank": self.rank,
            "wire": self.wire,
            "seed": self.seed,
            "fast": self.fast,
            "average": self.average,
            "error_feedback": self.error_feedback,
            "matrices": [(g.name, tuple(_flat(g.grad).shape)) for g in packed],
        }
        self.exchange.require_same(own)
        fresh = [g for g in packed if g.name not in self.matrices]
        if not fresh:
            return
        qs = [self._draw(g) for g in fresh]
        self.exchange.take_first_(qs)  # other processors draw other bits
        for gradient, q in zip(fresh, qs, strict=True):
            self._make(gradient, q)
        # Whether all processors orthonormalise to the same bits. Where not, the first one's count.
        shapes = {(m.error.shape[0], m.error.device) for m in self.matrices.values()}
        probes = [_probe(rows, self.rank, device) for rows, device in sorted(shapes, key=str)]
        found = self.exchange.gather([_hash(self.buffers.orthonormal(p)) for p in probes])
        self._odd = any(other != found[0] for other in found)

    def _draw(self, gradient: Gradient) -> Tensor:
        seed = self.seed ^ zlib.crc32(gradient.name.encode())
        draw = torch.Generator("cpu").manual_seed(seed)
        m, n = _flat(gradient.grad).shape
        shape = n, min(self.rank + SPARE, m, n)
        return torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").to(
            gradient.grad.device
        )

    def _make(self, gradient: Gradient, q: Tensor) -> None:
        shape, device = _flat(gradient.grad).shape, gradient.grad.device
        error = torch.zeros(shape, dtype=self.buffers.dtype, device=device)
        limit = power_above(q.shape[0] * float(q.abs().max()))
        one = torch.ones((), dtype=torch.float32, device=device)
        nothing = torch.zeros_like(one)
        matrix = Matrix(gradient.name, error, q, limit, one, nothing, nothing)
        self.matrices[gradient.name] = matrix
        if gradient.name in self._loaded:
            value, unit = self._loaded.pop(gradient.name)
            matrix.set(value.to(device), None if unit is None else torch.full_like(one, unit))

    def level(self) -> None:
        """Makes the buffers of all processes their mean. Collective.

        Only the sum over the group matters, as the method is linear; who saves and goes on, and who
        loads, then hold the same bits.
        """
        for matrix in self.matrices.values():
            mean = matrix.value()
            self.exchange.all_reduce(mean)
            matrix.set(mean / self.world)

    def state_dict(self) -> dict[str, Any]:
        """The error buffers, one copy for all, after `level`."""
        errors = {name: matrix.error.clone() for name, matrix in self.matrices.items()}
        units = {name: float(matrix.unit) for name, matrix in self.matrices.items()}
        return {
            "errors": errors,
            "units": units,
            "machines": self.world,
            "rank": self.rank,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the buffers of `state_dict`, shared out over as many processes as there are now."""
        for what in ("rank", "seed"):
            own, got = getattr(self, what), state.get(what)
            if own != got:
                raise CheckpointError(f"PowerSGD: state must be of {what} {own}, got {got}")
        share, units = state["machines"] / self.world, state.get("units", {})
        for name, words in state["errors"].items():  # before the first is taken
            wanted = self.matrices[name].error.shape if name in self.matrices else words.shape
            if words.shape != wanted or not math.isfinite(units.get(name, 1.0)):
                got = f"{tuple(words.shape)}, unit {units.get(name, 1.0)}"
                raise CheckpointError(
                    f"PowerSGD: errors of {name} must be {tuple(wanted)}, got {got}"
                )
        for name, words in state["errors"].items():
            value, unit = words * share, None  # of float32 words: a unit that fits them
            if words.dtype == torch.int16:
                unit = units.get(name, 1.0)
                value = dalle_ext.unpack(words, "1-6-9") / unit * share
                unit = unit / power_above(share / 2)  # as many codes' range is used as before
            if name in self.matrices:
                matrix = self.matrices[name]
                matrix.set(value, None if unit is None else torch.full_like(matrix.unit, unit))
            else:
                self._loaded[name] = value, unit


def _probe(rows: int, rank: int, device: torch.device) -> Tensor:
    """Whole numbers, which every processor draws alike."""
    draw = torch.Generator("cpu").manual_seed(rows)
    found = torch.randint(-999, 1000, (rows, rank), generator=draw, device="cpu", dtype=torch.int64)
    return found.to(device, torch.float32)


def _hash(tensor: Tensor) -> int:
    return zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())


def _any_nonfinite(tops: dict[str, Tensor], gradients: list[Gradient], block: int) -> Tensor:
    """0-d float32: 1 where the largest element of a gradient of a block is Inf or NaN, else 0."""
    found = [~tops[g.name].isfinite() for g in gradients if g.block == block]
    return torch.stack(found).any().float()


def _nan_where(flags: Tensor) -> Tensor:
    return torch.zeros_like(flags).masked_fill(flags > 0, math.nan)


def _flat(grad: Tensor) -> Tensor:
    return grad.reshape(grad.shape[0], -1)


def _check(holds: bool, name: str, requirement: str, value: object) -> None:
    if not holds:
        raise UsageError(f"PowerSGD: {name} must be {requirement}, got {value}")
