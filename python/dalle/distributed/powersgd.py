"""PowerSGD as the paper ran it (section 2.5, appendix E.2): the part that knows no engine."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dalle_ext
from dalle.distributed.account import Account
from dalle.distributed.agreement import require_same
from dalle.distributed.wire import WIRES, sum_codes_, sum_fp32_
from dalle.errors import CheckpointError, UsageError
from dalle.precision import ResblockScaler


@dataclass
class Matrix:
    """A gradient that is compressed.

    Attributes:
        name: of the parameter.
        error: (m, n) int16 codes of 1-6-9: what was not sent yet.
        q: (n, r) float32, drawn once and never updated.
    """

    name: str
    error: Tensor
    q: Tensor


@dataclass
class Gradient:
    """One gradient to be reduced in place: its name, and the block whose scale it carries."""

    name: str
    grad: Tensor
    block: int = -1


class Compressor:
    """Sums gradients over a group, matrices as P Q^T of a small rank with error feedback.

    What `reduce_` does with the error buffer E of a matrix: add the gradient to E; P = E Q with a
    fixed Q; sum P over the group; orthonormalise P; Q' = E^T P; sum Q'; the gradient becomes
    P Q'^T, and E keeps what that leaves out. All else is summed in fp32 words.

    A gradient with an Inf or NaN anywhere in the group leaves every error buffer of its block as it
    was but for the finite gradients added, and comes out as NaN everywhere, so that clipping,
    `ResblockScaler` or a loss scaler skips the update; no buffer ever holds an Inf or NaN.

    Args: as `dalle.distributed.PowerSGD`.
    """

    def __init__(
        self, rank: int, group: dist.ProcessGroup | None, *, wire: str, error_feedback: bool,
        average: bool, min_compression: float, error_scale: float, factor_scale: float, eps: float,
        seed: int, scaler: ResblockScaler | None, fast: bool = False,
    ) -> None:  # fmt: skip
        _check(rank >= 1, "rank", "1 or more", rank)
        _check(wire in WIRES, "wire", f"one of {', '.join(WIRES)}", wire)
        _check(min_compression >= 1, "min_compression", "1 or more", min_compression)
        for name, value in (("error_scale", error_scale), ("factor_scale", factor_scale)):
            _check(0 < value < math.inf, name, "positive and finite", value)
        self.rank, self.group, self.wire, self.average = rank, group, wire, average
        self.error_feedback, self.min_compression = error_feedback, min_compression
        self.error_scale, self.factor_scale = error_scale, factor_scale
        self.eps, self.seed, self.scaler, self.fast = eps, seed, scaler, fast
        self.matrices: dict[str, Matrix] = {}
        self.account = Account()
        self._agreed: set[tuple[str, ...]] = set()
        self._loaded: dict[str, Tensor] = {}
        # By the gradients of a call: the squared norm of what it handed out.
        self.squared_norms: dict[tuple[str, ...], Tensor] = {}

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)

    def compresses(self, shape: torch.Size) -> bool:
        """Whether a gradient of this shape is sent as factors."""
        if len(shape) < 2:
            return False
        m, n = shape[0], math.prod(shape[1:])
        return self.rank <= min(m, n) and self.min_compression * self.rank * (m + n) <= m * n

    @torch.no_grad()
    def reduce_(self, gradients: list[Gradient], whole: set[str]) -> None:
        """Replaces the gradients by their means (or sums) over the group.

        Args:
            gradients: in an order that all processes share.
            whole: names of those that are not to be compressed.
        """
        with self.account.timed("seconds", gradients[0].grad.device):
            self._reduce(gradients, whole)

    def _reduce(self, gradients: list[Gradient], whole: set[str]) -> None:
        packed = [g for g in gradients if g.name not in whole and self.compresses(g.grad.shape)]
        names = tuple(g.name for g in packed)
        rest = [g for g in gradients if g.name not in names]
        matrices = [self._matrix(g) for g in packed]
        self._agree(packed)
        blocks = sorted({g.block for g in gradients})
        flags = torch.stack(
            [_nonfinite([g.grad for g in gradients if g.block == b]) for b in blocks]
        )
        ps = self._each_block(packed, matrices, self._compress, flags, blocks)
        wide = [g.grad.float() for g in rest]
        self._exchange([*wide, flags], whole=True)
        norms = list(torch._foreach_norm(wide)) if wide else []
        for gradient, total in zip(rest, wide, strict=True):
            gradient.grad.copy_(total / self.world if self.average else total)
        ps = self._orthonormal(ps)
        qs = dalle_ext.powersgd_project(
            [m.error for m in matrices], ps, error_scale=self.error_scale, fast=self.fast
        ) if ps else []  # fmt: skip
        self.account.sample(names, partial(self._squares, matrices, qs))
        self._exchange(qs)
        machines = 1 if self.average else self.world
        if self.average:
            qs = [q / self.world for q in qs]
        key = tuple(g.name for g in gradients)
        self.squared_norms[key] = self._squared_norm(qs, rest, norms, flags)
        for at, block in enumerate(blocks):
            own = [i for i, g in enumerate(packed) if g.block == block]
            if own:
                self._decompress(
                    [packed[i] for i in own], [matrices[i] for i in own], [ps[i] for i in own],
                    [qs[i] for i in own], machines, flags[at])  # fmt: skip
            bad = torch.where(flags[at] > 0, math.nan, 0.0)
            for gradient in (g for g in rest if g.block == block):
                gradient.grad.add_(bad)
        self.account.uncompressed_bytes += sum(
            8 * (self.world - 1) * g.grad.numel() // self.world for g in gradients
        )

    def _squared_norm(
        self, qs: list[Tensor], rest: list[Gradient], sums: list[Tensor], flags: Tensor
    ) -> Tensor:
        """Of the gradients handed out, unscaled; NaN where any of them is.

        That of P Q^T is that of Q, as P's columns are orthonormal: no matrix is read. `sums`: norms
        of the sums of the rest.
        """
        found = list(torch._foreach_norm(qs)) if qs else []
        for gradient, norm in zip(rest, sums, strict=True):
            scale = self._scale(gradient.block)
            mean = norm / self.world if self.average else norm
            found.append(mean if scale is None else mean / scale)
        squares = torch.stack(found).double().square()
        return squares.sum() + torch.where(flags.sum() > 0, math.nan, 0.0)

    def _each_block(self, packed: Any, matrices: Any, run: Any, flags: Tensor, blocks: Any) -> Any:
        """`run` over the matrices of each block, results in the order of `packed`."""
        found: dict[int, Tensor] = {}
        for at, block in enumerate(blocks):
            own = [i for i, g in enumerate(packed) if g.block == block]
            if own:
                results = run([packed[i] for i in own], [matrices[i] for i in own], flags[at])
                found |= dict(zip(own, results, strict=True))
        return [found[i] for i in range(len(packed))]

    def _compress(self, packed: list[Gradient], own: list[Matrix], flag: Tensor) -> list[Tensor]:
        return dalle_ext.powersgd_compress_(
            [m.error for m in own], [_flat(g.grad) for g in packed], [m.q for m in own],
            scale=self._scale(packed[0].block), error_scale=self.error_scale,
            skip=flag, fast=self.fast)  # fmt: skip

    def _orthonormal(self, ps: list[Tensor]) -> list[Tensor]:
        """Sums P and orthonormalises it; kept in the wire's words, as the paper does."""
        self._exchange(ps)
        found = [dalle_ext.orthogonalize(p, eps=self.eps) for p in ps]
        if self.wire == "1-6-9":
            found = [dalle_ext.unpack(dalle_ext.pack(p, "1-6-9"), "1-6-9") for p in found]
        return found

    def _decompress(
        self, packed: list[Gradient], own: list[Matrix], ps: list[Tensor], qs: list[Tensor],
        machines: int, flag: Tensor,
    ) -> None:  # fmt: skip
        errors = [m.error for m in own]
        sums = dalle_ext.powersgd_decompress_(
            errors, ps, qs, machines=machines, error_scale=self.error_scale, skip=flag,
            feedback=self.error_feedback, fast=self.fast)  # fmt: skip
        scale, bad = self._scale(packed[0].block), torch.where(flag > 0, math.nan, 0.0)
        for gradient, total, error in zip(packed, sums, errors, strict=True):
            total = total + bad if scale is None else total * scale + bad
            gradient.grad.copy_(total.view_as(gradient.grad))
            if not self.error_feedback:
                error.zero_()

    def _squares(self, matrices: list[Matrix], qs: list[Tensor]) -> tuple[float, float]:
        """Of what the buffers hold, and of its part in the span of P: `qs` are the own E^T P."""
        held = [dalle_ext.unpack(m.error, "1-6-9") / self.error_scale for m in matrices]
        whole = sum(float(e.square().sum()) for e in held)
        return whole, sum(float(q.square().sum()) for q in qs)

    def _exchange(self, tensors: list[Tensor], whole: bool = False) -> None:
        if not tensors:
            return
        with self.account.timed("exchange_seconds", tensors[0].device):
            if whole or self.wire == "fp32":
                sum_fp32_(tensors, self.group, self.account.traffic)
                return
            for tensor in tensors:
                tensor.mul_(self.factor_scale)
            sum_codes_(tensors, self.group, self.account.traffic)
            for tensor in tensors:
                tensor.div_(self.factor_scale)

    def _scale(self, block: int) -> Tensor | None:
        return None if self.scaler is None or block < 0 else self.scaler.scales[block]

    def _matrix(self, gradient: Gradient) -> Matrix:
        found = self.matrices.get(gradient.name)
        if found is None:
            flat, device = _flat(gradient.grad), gradient.grad.device
            draw = torch.Generator().manual_seed(self.seed ^ zlib.crc32(gradient.name.encode()))
            q = torch.randn(flat.shape[1], self.rank, generator=draw).to(device)
            error = torch.zeros(flat.shape, dtype=torch.int16, device=device)
            if gradient.name in self._loaded:
                error.copy_(self._loaded.pop(gradient.name))
            found = self.matrices[gradient.name] = Matrix(gradient.name, error, q)
        return found

    def _agree(self, packed: list[Gradient]) -> None:
        """Once for each set of matrices: all processes must compress the same in the same way."""
        key = tuple(g.name for g in packed)
        if key in self._agreed:
            return
        self._agreed.add(key)
        own = {
            "rank": self.rank, "wire": self.wire, "seed": self.seed, "fast": self.fast,
            "matrices": [(name, tuple(self.matrices[name].error.shape)) for name in key],
            "sums of Q": [self.matrices[name].q.sum(dtype=torch.float64).item() for name in key],
        }  # fmt: skip
        require_same("PowerSGD", own, self.group)

    def state_dict(self) -> dict[str, Any]:
        """The error buffers, one copy for all: every process gets their mean and returns it.

        Only the sum over the group matters (the method is linear), so the buffers are made equal
        first; who saves and goes on, and who loads, then hold the same bits. Collective.
        """
        for matrix in self.matrices.values():
            mean = dalle_ext.unpack(matrix.error, "1-6-9")
            dist.all_reduce(mean, group=self.group)
            matrix.error.copy_(dalle_ext.pack(mean / self.world, "1-6-9"))
        errors = {name: matrix.error.clone() for name, matrix in self.matrices.items()}
        return {"errors": errors, "machines": self.world, "rank": self.rank, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the buffers of `state_dict`, shared out over as many processes as there are now."""
        for what in ("rank", "seed"):
            own, got = getattr(self, what), state.get(what)
            if own != got:
                raise CheckpointError(f"PowerSGD: state must be of {what} {own}, got {got}")
        share = state["machines"] / self.world
        for name, codes in state["errors"].items():
            if share != 1:
                codes = dalle_ext.pack(dalle_ext.unpack(codes, "1-6-9") * share, "1-6-9")
            if name in self.matrices:
                self.matrices[name].error.copy_(codes)
            else:
                self._loaded[name] = codes.clone()


def _flat(grad: Tensor) -> Tensor:
    return grad.reshape(grad.shape[0], -1)


def _nonfinite(grads: Iterable[Tensor]) -> Tensor:
    """float32, 1 where any element is not finite; read on the device."""
    grads = list(grads)
    one = torch.ones(1, device=grads[0].device)
    found = dalle_ext.unscale_gradients_(grads, one, check_only=True).found_nonfinite
    return found.reshape(()).float()


def _check(holds: bool, name: str, requirement: str, value: Any) -> None:
    if not holds:
        raise UsageError(f"PowerSGD: {name} must be {requirement}, got {value}")
