"""`PowerSGD`: gradient compression between machines, as hooks of DDP and of FSDP2."""

# No `from __future__ import annotations`: DDP looks at the annotations of its hook.

import copy
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dalle.distributed.buffers import Matrix
from dalle.distributed.in_order import InOrder
from dalle.distributed.powersgd import Compressor, Gradient
from dalle.distributed.shard import (
    as_shard,
    can_follow,
    check_replicas,
    parameter_gradients,
    replicas,
    smallest_shard,
)
from dalle.dtensor import gradient_stats, local_part, shard_groups
from dalle.errors import UsageError
from dalle.precision import ResblockScaler


class PowerSGD:
    """Low-rank gradients between machines (paper section 2.5, appendix E.2).

        psgd = PowerSGD(rank=32)
        psgd.attach(ddp_model)                         # DistributedDataParallel: its processes
        PowerSGD(rank=32, group=mesh["replicate"].get_group()).attach(fsdp2_model)

    With FSDP2 (`fully_shard` over the mesh of one machine) each process compresses its own shards
    and exchanges them with the same-ordinal processes of the other machines; with DDP the group is
    that of the model. `ddp_model.register_comm_hook(psgd, PowerSGD.ddp_hook)` does the same as
    `attach`, but knows neither names of parameters (nor which are embeddings) nor the model's
    group. Gradients come out averaged over the group, with the same bits on all its processes, NaN
    where any process had an Inf or NaN. The exchange overlaps with the rest of the backward pass:
    on the CPU in a thread, with FSDP2 where gradients are reduced in their parameters' dtype; on a
    GPU on a stream beside it, DDP here and FSDP2 by itself (not yet run on one).

    The range of 1-6-9 is used by itself: in each step all processes choose one power of two for
    each matrix (`dalle.distributed.buffers`). Error buffers are in the units of unscaled gradients,
    whatever loss scale these carry.

    Args:
        rank: columns of the factors of each matrix (each shard).
        group: the processes to average over, of which a new group is made; None for those of the
            DDP model, or of the axis "replicate" beside the FSDP2 model's own mesh.
        wire: "1-6-9" (16-bit words) or "fp32", of the factors and the error buffers; everything
            else is sent in fp32.
        error_feedback: keep what the factors left out for the next step.
        average: mean over the group; False for the sum.
        exclude: parameters that are not compressed; embeddings never are: the weights of
            `nn.Embedding` and `nn.EmbeddingBag`, and what a module lists in `embedding_tables`.
            Gains and biases are no matrices; nor is anything compressed less than
            `min_compression` times, nor, with FSDP2, what has one shard of which that is true.
        min_compression: see there.
        seed: of the fixed gaussian Q.
        scaler: whose scale, or scales of blocks, the gradients carry: a `ResblockScaler` or a
            `torch.amp.GradScaler`; they come out scaled as they came.
        fast: products of rounded words on CUDA (`dalle_ext.powersgd_compress_`).

    Raises:
        UsageError: numbers out of range, a model that is neither, sparse gradients, a group that
            does not fit the model, or nothing to compress.
    """

    def __init__(
        self,
        rank: int = 32,
        group: dist.ProcessGroup | None = None,
        *,
        wire: str = "1-6-9",
        error_feedback: bool = True,
        average: bool = True,
        exclude: Iterable[nn.Parameter] = (),
        min_compression: float = 2.0,
        seed: int = 0,
        scaler: ResblockScaler | GradScaler | None = None,
        fast: bool = False,
    ) -> None:
        self.compressor = Compressor(
            rank,
            group,
            wire=wire,
            error_feedback=error_feedback,
            average=average,
            min_compression=min_compression,
            seed=seed,
            scaler=scaler,
            fast=fast,
        )
        self._exclude = list(exclude)
        self._model: weakref.ref[nn.Module] | None = None
        self._params: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}  # by the parameters' id
        self._whole: set[str] = set()
        self._matrices: list[bool] = []  # of those that may be compressed: whether they are
        self._thread: InOrder | None = None
        self._stream: torch.cuda.Stream | None = None
        self._following: list[torch.futures.Future[Tensor]] = []
        self._backward = -1  # whose end waits for them

    def __getstate__(self) -> dict[str, Any]:
        # A pickle belongs to no model until it is attached; exclusions are kept by name.
        return {
            **self.__dict__,
            "_model": None,
            "_params": {},
            "_names": {},
            "_exclude": [],
            "_thread": None,
            "_stream": None,
            "_following": [],
        }

    def __reduce_ex__(self, protocol: Any) -> Any:  # of pickle alone: copies have their own ways
        unnamed = [p for p in self._exclude if self._names.get(id(p)) not in self._whole]
        if self._model is None and unnamed:
            raise UsageError(
                f"PowerSGD: exclude must be empty in a pickle before attach, got {len(unnamed)} "
                "parameters, whose names are not known yet"
            )
        return super().__reduce_ex__(protocol)

    def __copy__(self) -> "PowerSGD":
        found = object.__new__(PowerSGD)
        found.__dict__.update(self.__dict__)  # one state, and one thread that changes it
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "PowerSGD":
        # Of the same parameters, or of their copies where those were made in the same call.
        found = memo[id(self)] = object.__new__(PowerSGD)
        found.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        found._params = {name: memo.get(id(p), p) for name, p in self._params.items()}
        found._names = {id(param): name for name, param in found._params.items()}
        found._exclude = [memo.get(id(p), p) for p in self._exclude]
        return found

    def attach(self, model: nn.Module) -> None:
        """Registers the hook of a DDP model, or of every FSDP2 module inside the model.

        All processes of the group call it; it makes a group of its own of them.
        """
        if self._model is not None and self._model() is not None:
            raise UsageError("PowerSGD: attach must be called once, got a second model")
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._name(inner)
        exchange = self.compressor.exchange
        if isinstance(model, DistributedDataParallel):
            own = dist.get_process_group_ranks(model.process_group)
            if exchange.ranks is None:
                exchange.take(model.process_group)
            elif exchange.ranks != own:
                raise UsageError(
                    f"PowerSGD: group must be the model's processes {own}, got {exchange.ranks}"
                )
            model.register_comm_hook(self, PowerSGD.ddp_hook)
        else:
            parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
            if not parts:
                raise UsageError(
                    "PowerSGD: model must be DistributedDataParallel or hold fully_shard modules, "
                    f"got {type(model).__name__}"
                )
            if exchange.ranks is None:
                exchange.take(replicas(parts))
            check_replicas(parts, exchange.ranks or [])
            for part in parts:
                part.set_all_reduce_hook(self._fsdp_hook(part))
        exchange.open()
        self._model = weakref.ref(inner)

    def _name(self, model: nn.Module) -> None:
        embeddings: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                embeddings.add(id(module.weight))
                if module.sparse:
                    raise UsageError(
                        f"PowerSGD: gradients must be dense, got sparse=True in {name or 'model'}"
                    )
            embeddings |= {id(p) for p in getattr(module, "embedding_tables", ())}
        excluded = embeddings | {id(p) for p in self._exclude}
        self._know(model)
        self._whole |= {name for name, p in self._params.items() if id(p) in excluded}
        shapes = [
            smallest_shard(p)
            for name, p in self._params.items()
            if p.requires_grad and p.dim() > 1 and name not in self._whole
        ]
        self._matrices = [self.compressor.compresses(shape) for shape in shapes]
        if not any(self._matrices):
            raise UsageError(
                "PowerSGD: rank must leave a matrix that factors make smaller, got "
                f"{self.compressor.rank}: nothing would be compressed"
            )

    def _refresh(self) -> None:
        """The parameters by name as the model has them now; some calls put others in their place.

        `load_state_dict(assign=True)` and `to_empty` do.
        """
        model = None if self._model is None else self._model()
        if model is not None:
            self._know(model)

    def _know(self, model: nn.Module) -> None:
        self._params = dict(model.named_parameters())
        self._names = {id(param): name for name, param in self._params.items()}

    def compressed(self) -> tuple[int, int]:
        """How many matrices travel as factors, of how many that may; once attached."""
        return sum(self._matrices), len(self._matrices)

    @staticmethod
    def ddp_hook(state: "PowerSGD", bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """A DDP communication hook."""
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            raise UsageError(f"PowerSGD: gradients must be dense, got {buffer.layout}")
        gradients = [
            state._gradient(param, grad)
            for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True)
        ]

        def reduce() -> None:
            state.compressor.reduce_(gradients, state._whole)

        if buffer.device.type == "cuda":
            return state._on_stream(reduce, buffer)
        packed = state.compressor.packed(gradients, state._whole)
        if not state.compressor.knows(packed):  # what differs is raised here, and not by DDP
            ready: torch.futures.Future[Tensor] = torch.futures.Future()
            state._in_order(lambda: state.compressor.prepare(packed), ready, buffer)
            ready.wait()
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        state._wait_at_end(future)  # before DDP does, which would take an error for a tensor
        state._in_order(reduce, future, buffer)
        return future

    def _in_order(self, job: Callable[[], None], future: Any, buffer: Tensor) -> None:
        if self._thread is None:
            self._thread = InOrder()
        self._thread.put(job, future, buffer)

    def _on_stream(
        self, reduce: Callable[[], None], buffer: Tensor
    ) -> torch.futures.Future[Tensor]:
        """Reduces beside the backward pass; who waits for the future lets its stream wait."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(buffer.device)
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        buffer.record_stream(self._stream)
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device])
        with torch.cuda.stream(self._stream):
            reduce()
            future.set_result(buffer)
        return future

    def _gradient(self, param: Tensor, grad: Tensor) -> Gradient:
        self.compressor.notes = False
        name = self._names.get(id(param))
        if name is None or self._params[name] is not param:
            self._refresh()
            name = self._names.get(id(param))
        if name is None:  # no model is known: they are numbered as they come
            name = self._names[id(param)] = f"parameter {len(self._names)}"
            self._params[name] = param
            if any(param is p for p in self._exclude):
                self._whole.add(name)
        scaler = self.compressor.scaler
        block = scaler.groups.get(param, -1) if isinstance(scaler, ResblockScaler) else -1
        return Gradient(name, grad, block, smallest_shard(param))

    def _fsdp_hook(self, part: FSDPModule) -> Callable[[Tensor], None]:
        def hook(flat: Tensor) -> None:
            gradients = [self._gradient(p, grad) for p, grad in parameter_gradients(part, flat)]
            if can_follow(part, flat):  # what the optimizer will read is this buffer
                self._follow(gradients, flat)
            else:
                self._reduce(gradients, flat.device)

        return hook

    def _follow(self, gradients: list[Gradient], flat: Tensor) -> None:
        """Reduces in the thread while the backward pass goes on; its end waits for the thread."""
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._wait_at_end(future)
        self._in_order(lambda: self._reduce(gradients, flat.device), future, flat)

    def _wait_at_end(self, future: torch.futures.Future[Tensor]) -> None:
        """Has this backward pass wait for a future, and raise its error, at its end."""
        backward = torch._C._current_graph_task_id()
        if backward < 0:  # none: a process that has run out of data follows the others (DDP.join)
            return
        if backward != self._backward:  # one that failed elsewhere has waited for nothing
            torch.autograd.Variable._execution_engine.queue_callback(self._wait)
            self._backward = backward
        self._following.append(future)

    def _reduce(self, gradients: list[Gradient], device: torch.device) -> None:
        # A unit that ran on some processes only would have gloo end them all without a word.
        check = device.type == "cpu" and self.compressor.world > 1
        self.compressor.reduce_(gradients, self._whole, check=check)

    def _wait(self) -> None:
        following, self._following = self._following, []
        begin = time.perf_counter()
        for future in following:  # after one that failed no other is begun
            future.wait()
        self.compressor.account.waited_seconds += time.perf_counter() - begin

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient, unscaled; 0-d float64. Collective over the shards of FSDP2.

        That of the gradients the model's parameters hold now: of all exchanges of a step, and as
        FSDP2 left them; with a `GradScaler` before `scaler.update()`. NaN where any element is not
        finite. Where only the compressor was used, without a model, that of what it handed out
        last, from the factors alone: P's columns are orthonormal, so P Q^T has the norm of Q (paper
        E.2), to 2^-9 with 1-6-9 words.
        """
        self._refresh()
        if not self._params:
            return torch.stack(list(self.compressor.squared_norms.values())).sum().sqrt()
        scaler = self.compressor.scaler
        params = list(self._params.values())
        if isinstance(scaler, ResblockScaler):
            groups = [scaler.groups.get(p, len(scaler)) for p in params]
            norm, bad = gradient_stats(params, scaler.scales, groups)
        else:
            norm, bad = gradient_stats(params, _loss_scale(scaler))
        norm = norm + torch.zeros_like(norm).masked_fill(bad.sum() > 0, torch.nan)
        return norm

    def broadcast_norm_(self, norm: Tensor) -> None:
        """Makes a norm that of the first process, in place. Collective, 8 bytes.

        The gradients are equal, but processors add their squares in different orders; a clip factor
        that differs in its last bit would let the replicas drift.
        """
        self.compressor.exchange.take_first_([norm])

    def report(self) -> dict[str, Any]:
        """What this process sent and what it cost since the start.

        Returns:
            bytes_sent, bytes_uncompressed (all gradients in fp32, ring all-reduce), compression
            (their ratio), seconds (in all, on the device), waited_seconds (of them after the
            backward pass, on the CPU; the others were hidden behind it), exchange_seconds (of them
            in collectives), saturated and flushed (shares of the elements of P and Q that were too
            large for 1-6-9, or vanished in it), advice (one line).
        """
        return self.compressor.account.report()

    def state_dict(self) -> dict[str, Any]:
        """The error buffers, averaged over the group, and equal on it from here on. Collective.

        With FSDP2 each is a `DTensor` like its parameter, of which a process holds its part.
        """
        self._refresh()
        self.compressor.level()
        self._level_units()
        state = self.compressor.state_dict()
        errors = {name: as_shard(self._params.get(name), e) for name, e in state["errors"].items()}
        return {**state, "errors": errors}

    def _level_units(self) -> None:
        """Gives all shards of a matrix one unit, the smallest; all have the same matrices."""
        kinds: dict[tuple[Any, ...], list[Matrix]] = {}
        for name, matrix in self.compressor.matrices.items():
            kinds.setdefault(shard_groups(self._params.get(name)), []).append(matrix)
        for groups, matrices in kinds.items():
            units = torch.stack([m.unit for m in matrices])
            for group in groups:
                dist.all_reduce(units, op=dist.ReduceOp.MIN, group=group)
            for matrix, unit in zip(matrices, units, strict=True):
                matrix.set(matrix.value(), unit)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The buffers of `state_dict`, of this or another number of processes."""
        given = state.get("errors", {})
        errors = {name: local_part(error).flatten(1) for name, error in given.items()}
        self.compressor.load_state_dict({**state, "errors": errors})


def _loss_scale(scaler: GradScaler | None) -> float | Tensor:
    """What the gradients that parameters hold were multiplied with, before `scaler.update()`."""
    scale = scaler._get_scale_async() if scaler is not None and scaler.is_enabled() else None
    if scaler is None or scale is None:
        return 1.0
    stages = [state["stage"] for state in scaler._per_optimizer_states.values()]
    # `unscale_` divides them, and so does `step` where nobody did before.
    return scale.reshape(1) if all(stage is OptState.READY for stage in stages) else 1.0
