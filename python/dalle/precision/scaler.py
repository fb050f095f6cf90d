"""`ResblockScaler`: one gradient scale for each residual block (paper 2.4, appendix D)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dalle_ext
from dalle.configs import integer
from dalle.console import say
from dalle.dtensor import StatsTables, gradient_stats, local_part
from dalle.errors import CheckpointError, UsageError
from dalle.precision.ends import BINS, COUNTS, BlockEnds
from dalle.precision.queued import HostCopy, skips_on_device, step_unless

Block = nn.Module | Sequence[nn.Module]
REPORT_EVERY = 10  # updates between reports, while all of them have been skipped


class ScalerStep(NamedTuple):
    """One update.

    Attributes:
        norm: 0-d fp64, of all finite gradients, unscaled, before clipping.
        nonfinite: (blocks + 1,) int64 elements by block; the last entry is everything else.
        skipped: 0-d bool, whether nothing was updated.
    """

    norm: Tensor
    nonfinite: Tensor
    skipped: Tensor


class ResblockScaler:
    """Gradient scales of the residual blocks of any transformer, for 16-bit training.

    The identity path is fp32. Each block's gradient is multiplied by its own scale where it enters
    the block and divided by it where it leaves, so a block's 16 bits cover the gradients of that
    block alone. Parameter gradients stay scaled in `.grad` until `step`.

        scaler = ResblockScaler({"0": layer0, "1": layer1})
        x, y = scaler["0"].enter(x)                   # in the model: fp32 -> fp32, fp32
        x = x + scaler["0"].leave(f(norm(y).half()))
        loss.backward()
        scaler.step(optimizer, clip_norm=4.0)         # instead of optimizer.step()

    Works with activation checkpointing, gradient accumulation and `torch.compile`. For a model
    whose code must stay unchanged: `scaler["0"].hook(first_module, last_module)` around each
    branch. A layer with two residual sums is two blocks.

    Args:
        blocks: name -> module or modules of one residual block (norm and branch), in order. What
            no block holds (embeddings, heads) has no scale.
        replicas: M, the number of data-parallel replicas; start and bounds are multiplied by it.
        initial, low, high: the scale's start and bounds for M = 1.
        growth: factor after a clean update.
        backoff: factor after nonfinite parameter gradients of the block; then the update is
            skipped, and the scale falls at most once in `window` updates.
        window: least number of updates between two falls of a scale.
        grow_on_skip: whether clean blocks' scales grow also on a skipped update.
        shared: one scale for all blocks: a global loss scale, to compare with.
        sample_every: at every so many updates, count the gradients' exponents; 0 for never.

    Raises:
        UsageError: no blocks, a parameter in two blocks, several devices, numbers out of range.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        *,
        replicas: int = 1,
        initial: float = 2.0**13,
        low: float = 2.0**7,
        high: float = 2.0**24,
        growth: float = 2 ** (1 / 1000),
        backoff: float = 2**-0.5,
        window: int = 125,
        grow_on_skip: bool = True,
        shared: bool = False,
        sample_every: int = 100,
    ) -> None:
        replicas, window = (
            integer("ResblockScaler", name, value)
            for name, value in (("replicas", replicas), ("window", window))
        )
        sample_every = integer("ResblockScaler", "sample_every", sample_every)
        _check(replicas >= 1, "replicas", "1 or more", replicas)
        ordered = 0 < low <= initial <= high < math.inf
        _check(ordered, "initial", "in [low, high], all positive", (low, initial, high))
        _check(1 <= growth < math.inf, "growth", "1 or more, finite", growth)
        _check(0 < backoff < 1, "backoff", "in (0, 1)", backoff)
        _check(window >= 1, "window", "1 or more", window)
        _check(sample_every >= 0, "sample_every", "0 or more", sample_every)
        self.names = list(blocks)
        self.groups = _groups(blocks)
        device = next(iter(self.groups)).device
        self.shared, self.sample_every, self.updates, self.window = shared, sample_every, 0, window
        self.low, self.high = low * replicas, high * replicas
        self._growth, self._backoff = growth, backoff
        self._grow_on_skip = grow_on_skip
        count = len(self.names)
        # One more entry for the parameters of no block; its scale stays 1.
        start = float(initial * replicas)
        self.scales = torch.full((count + 1,), start, dtype=torch.float32, device=device)
        self.scales[count] = 1
        self.since_drop = torch.full((count,), window, dtype=torch.int64, device=device)
        # (blocks,): skipped updates in a row that a block caused at its lowest scale.
        self.stuck_for = torch.zeros(count, dtype=torch.int64, device=device)
        self._skips = torch.zeros(2, dtype=torch.float64, device=device)  # skipped, updates
        # Number of updates as long as all have been skipped; None after the first that was not.
        self._all_skipped: Tensor | None = torch.zeros((), dtype=torch.int64, device=device)
        self._tables = StatsTables()
        self._report: HostCopy | None = None  # of these updates, on its way to the host
        # Since the last `metrics`: whether there was an update, and one that counted exponents.
        self._updated = self._sampled = False
        self._ends = {
            name: BlockEnds(self.scales[i], name, i, self.groups)
            for i, name in enumerate(self.names)
        }
        self._sample()

    def __getitem__(self, name: str) -> BlockEnds:
        return self._ends[name]

    def __len__(self) -> int:
        return len(self.names)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for ends, scale in zip(self._ends.values(), self.scales, strict=False):
            ends.scale = scale  # views again, of which pickling makes separate tensors
            ends.groups = self.groups

    def __deepcopy__(self, memo: dict[int, Any]) -> ResblockScaler:
        """For the same parameters, or for their copies where the same call makes them."""
        new = memo[id(self)] = object.__new__(ResblockScaler)
        attributes = {key: value for key, value in self.__dict__.items() if key != "groups"}
        groups = {memo.get(id(param), param): group for param, group in self.groups.items()}
        new.__setstate__({**copy.deepcopy(attributes, memo), "groups": groups})
        return new

    @torch.no_grad()
    def step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        sync_norm: Callable[[Tensor], object] | None = None,
        found_nonfinite: Tensor | None = None,
    ) -> ScalerStep:
        """Unscales, clips, updates the parameters unless a gradient is nonfinite, and the scales.

        With `dalle_ext.AdamW16` the gradients are read as they are and nothing waits for the
        device. Other optimizers get them unscaled in place; they need fp32 parameters, as unscaled
        gradients would vanish in fp16. Of these, the host waits to learn whether gradients are
        finite unless it is one of torch's with `fused=True`.

        Args:
            optimizer: of all parameters; those without a gradient are left alone.
            clip_norm: largest global norm of the unscaled gradients.
            sync_norm: called with the norm (0-d float64) before it clips, to make it one number on
                processes that hold equal gradients: the order in which squares are added depends
                on the processor (`PowerSGD.broadcast_norm_`).
            found_nonfinite: 0-d bool on the device; where it is set nothing is updated either.

        Raises:
            UsageError: no gradients, none of the blocks' parameters (a copy of the scaler alone
                does not know a copy of the model), or 16-bit parameters in another optimizer.
        """
        params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if not params:
            raise UsageError("ResblockScaler: optimizer must hold gradients, got none")
        fused = isinstance(optimizer, dalle_ext.AdamW16)
        no_block = len(self)
        groups = [self.groups.get(p, no_block) for p in params]
        # With no parameter of a block it is another model's, unless all blocks are frozen.
        if min(groups) == no_block and any(p.requires_grad for p in self.groups):
            raise UsageError(
                "ResblockScaler: optimizer must hold parameters of the blocks, got gradients of "
                f"{len(params)} others"
            )
        if not fused:
            _check_fp32(params, optimizer)
        norm, nonfinite = gradient_stats(
            params, self.scales, groups, check_only=fused, tables=self._tables
        )
        if sync_norm is not None:
            sync_norm(norm)
        skipped = (nonfinite.sum() > 0) | (False if found_nonfinite is None else found_nonfinite)
        factor = None
        if clip_norm is not None:
            factor = (clip_norm / norm.clamp_min(clip_norm)).float()
        if isinstance(optimizer, dalle_ext.AdamW16):
            group_of = dict(zip(params, groups, strict=True))
            optimizer.step(
                clip_factor=factor, found_nonfinite=skipped, scales=self.scales, groups=group_of
            )
        elif skips_on_device(optimizer) or not bool(skipped):
            if factor is not None:
                torch._foreach_mul_([local_part(p.grad) for p in params], factor)
            step_unless(optimizer, skipped) if skips_on_device(optimizer) else optimizer.step()
        self._update_scales(nonfinite)
        self._skips += torch.stack([skipped.double(), torch.ones_like(norm)])
        if self._all_skipped is not None:
            self._all_skipped += skipped
            if self.updates % REPORT_EVERY == 0:
                self._report = self._copy_report(nonfinite)
            self._report_start()
        return ScalerStep(norm, nonfinite, skipped)

    def _update_scales(self, nonfinite: Tensor) -> None:
        count = len(self)
        scales, counts = self.scales[:count], nonfinite[:count]
        nonfinite_elsewhere = nonfinite[count] > 0
        if self.shared:
            counts = nonfinite.sum().expand(count)
        at_floor = (scales <= self.low) & (counts > 0)
        self.stuck_for = torch.where(at_floor, self.stuck_for + 1, 0)
        before = scales.clone() if not self._grow_on_skip else None
        dalle_ext.update_scales_(
            scales,
            self.since_drop,
            counts,
            growth=self._growth,
            backoff=self._backoff,
            window=self.window,
            low=self.low,
            high=self.high,
            grow_on_skip=self._grow_on_skip,
        )
        if before is not None:  # the op sees the blocks alone
            scales.copy_(torch.where(nonfinite_elsewhere, torch.minimum(scales, before), scales))
        self._sampled |= self._sampling()
        self._updated = True
        self.updates += 1
        self._sample()

    def _copy_report(self, nonfinite: Tensor) -> HostCopy:
        """What a report of the first updates says, on its way to the host."""
        values = {"nonfinite": nonfinite[:-1], "scales": self.scales, "entered": self._probed()}
        assert self._all_skipped is not None
        return HostCopy({**values, "skipped": self._all_skipped, "updates": self.updates})

    def _report_start(self) -> None:
        """Reports a training that begins with nothing but skipped updates or overflow.

        As soon as its numbers have arrived: at once on the CPU, a few updates later on a GPU.
        """
        if self._report is None or not self._report.ready():
            return
        read, self._report = self._report.read(), None
        dtype = torch.float64
        values = {k: torch.as_tensor(v, dtype=dtype, device="cpu") for k, v in read.items()}
        updates, entered = int(values["updates"]), values["entered"]
        if updates == REPORT_EVERY:
            high = (2 * entered[:, 0] > entered[:, len(COUNTS)]).nonzero()[:, 0].tolist()
            text = "most scaled gradients that enter block {} overflow"
            self._report_too_high(text, high, values["scales"])
        if int(values["skipped"]) < updates:
            self._all_skipped = None
            return
        self._report_too_high(
            f"all of the first {updates} updates were skipped, as scaled gradients of block "
            "{} were not finite",
            values["nonfinite"].nonzero()[:, 0].tolist(),
            values["scales"],
        )

    def _report_too_high(self, text: str, blocks: list[int], scales: Tensor) -> None:
        if blocks:
            names = self.names[blocks[0]]
            names += f" and {len(blocks) - 1} others" if len(blocks) > 1 else ""
            say(
                f"ResblockScaler: {text.format(names)}: initial must be lower, got scale "
                f"{float(scales[blocks[0]]):g} by now"
            )

    def stuck(self, stuck_for: Tensor | None = None) -> list[str]:
        """Blocks whose gradients were nonfinite at the lowest scale for `window` updates.

        Args:
            stuck_for: as it was after an earlier update; now if left out.
        """
        counts = (self.stuck_for if stuck_for is None else stuck_for).tolist()
        return [n for n, c in zip(self.names, counts, strict=True) if c >= self.window]

    def _sampling(self) -> bool:
        """Whether the exponents of this update's gradients are counted."""
        interval = self.sample_every
        return interval > 0 and self.updates % interval == interval - 1

    def _sample(self) -> None:
        due = self._sampling()
        for ends in self._ends.values():
            ends.sampling = due

    def _probed(self) -> Tensor:
        probes = [self._ends[name].probe for name in self.names]
        return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in probes])

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Statistics of the blocks' gradients since the last call, (blocks,) each.

        "block_scale" is log2 of it now; "block_overflow", "block_underflow" (not zero, but zero in
        16 bits), "block_subnormal" and "block_nonfinite" are shares of the elements that entered
        the block; and where they were sampled, "block_exponents" (blocks, 80) are shares of the
        elements by floor(log2 |g|) from -64, before scaling. "skipped" is the share of skipped
        updates, one number.
        """
        totals = self._probed()
        for ends in self._ends.values():
            ends.probe.grad = None
        values = {"block_scale": self.scales[: len(self)].log2()}
        values["skipped"] = self._skips[0] / self._skips[1].clamp_min(1)
        self._skips.zero_()
        counts, size, bins = totals.split([len(COUNTS), 1, BINS], 1)
        shares = counts / size.clamp_min(1)
        values |= {f"block_{name}": shares[:, i] for i, name in enumerate(COUNTS)}
        sampled = self._sampled if self._updated else self._sampling()
        if sampled:  # known without a look at the device
            values["block_exponents"] = bins / bins.sum(1, keepdim=True).clamp_min(1)
        self._updated = self._sampled = False
        return values

    def state_dict(self) -> dict[str, Any]:
        """JSON values: scales and updates since they fell, by block, and the updates done."""
        return {
            "names": list(self.names),
            "scales": self.scales[: len(self)].tolist(),
            "since_drop": self.since_drop.tolist(),
            "stuck": self.stuck_for.tolist(),
            "updates": self.updates,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, bit for bit.

        Raises:
            CheckpointError: a state of other blocks, or scales out of range.
        """
        if state.get("names") != self.names:
            got = state.get("names")
            raise CheckpointError(f"ResblockScaler: blocks must be {self.names}, got {got}")
        scales = torch.tensor(state["scales"], dtype=torch.float32, device="cpu")
        counts = {"since_drop": self.since_drop, "stuck": self.stuck_for}
        loaded = {
            name: torch.tensor(state[name], dtype=torch.int64, device="cpu") for name in counts
        }
        sizes = [scales.shape, *(tensor.shape for tensor in loaded.values())]
        if sizes != [(len(self),), *(tensor.shape for tensor in counts.values())]:
            raise CheckpointError("ResblockScaler: state must have numbers for all blocks")
        if not bool(((scales >= self.low) & (scales <= self.high)).all()):
            within, got = f"[{self.low:g}, {self.high:g}]", state["scales"]
            raise CheckpointError(f"ResblockScaler: scales must be in {within}, got {got}")
        updates = integer("ResblockScaler", "updates", state["updates"], 0)
        self.scales[: len(self)] = scales.to(self.scales.device)
        for name, tensor in counts.items():
            tensor.copy_(loaded[name])
        self.updates = updates
        self._all_skipped = None
        self._sample()


def _check(holds: bool, name: str, requirement: str, value: object) -> None:
    if not holds:
        raise UsageError(f"ResblockScaler: {name} must be {requirement}, got {value}")


def _groups(blocks: Mapping[str, Block]) -> dict[Tensor, int]:
    """Parameter -> number of its block."""
    groups: dict[Tensor, int] = {}
    for index, (name, block) in enumerate(blocks.items()):
        modules: Iterable[nn.Module] = [block] if isinstance(block, nn.Module) else block
        for parameter in (p for module in modules for p in module.parameters()):
            if groups.setdefault(parameter, index) != index:
                raise UsageError(
                    f"ResblockScaler: blocks must not share parameters, got one of {name} that "
                    f"is in {list(blocks)[groups[parameter]]} too"
                )
    _check(bool(groups), "blocks", "modules with parameters", list(blocks))
    devices = {p.device for p in groups}
    _check(len(devices) == 1, "blocks", "on one device", sorted(map(str, devices)))
    return groups


def _check_fp32(params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    for parameter in params:
        if parameter.dtype != torch.float32:
            raise UsageError(
                f"ResblockScaler: {parameter.dtype} parameters must be in dalle_ext.AdamW16, "
                f"got {type(optimizer).__name__}"
            )
