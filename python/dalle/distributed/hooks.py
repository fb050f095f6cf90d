"""`PowerSGD`: gradient compression between machines, as communication hooks of DDP and FSDP2."""

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

from dalle.distributed.buffers import MatrixState
from dalle.distributed.powersgd import Compressor, Gradient
from dalle.distributed.reduce_thread import ReduceThread
from dalle.distributed.shard import (
    as_shard,
    can_reduce_async,
    check_replicas,
    min_shard_shape,
    parameter_gradients,
    replicas,
)
from dalle.dtensor import StatsTables, gradient_stats, local_part, shard_groups
from dalle.errors import UsageError
from dalle.precision import ResblockScaler


class PowerSGD:
    """Low-rank gradients between machines (paper section 2.5, appendix E.2).

        psgd = PowerSGD(rank=32)
        psgd.attach(ddp_model)                         # DistributedDataParallel: its processes
        PowerSGD(rank=32, group=mesh["replicate"].get_group()).attach(fsdp2_model)

    With FSDP2 (`fully_shard` over the mesh of one machine) each process compresses its shards and
    reduces them with the processes that hold the same shards on other machines. With DDP the group
    is that of the model. `ddp_model.register_comm_hook(psgd, PowerSGD.ddp_hook)` does the same as
    `attach`, but without the names of parameters, the model's group, and which parameters are
    embeddings.

    Gradients come out averaged over the group, with the same bits on all its processes; NaN where
    any process had an Inf or NaN. Communication overlaps with the rest of the backward pass: on the
    CPU in a thread (with FSDP2, if gradients are reduced in their parameters' dtype), on a GPU on
    another stream, which is this class's for DDP and FSDP2's own (not yet run on a GPU).

    1-6-9 words need no loss scale: each step chooses one power of two for each matrix, the same on
    all processes (`dalle.distributed.buffers`). Error buffers hold unscaled gradients, whatever
    loss scale the gradients carry.

    Args:
        rank: columns of the factors of each matrix, or of each shard.
        group: the processes to average over, which get a process group of their own; None for those
            of the DDP model, or of the mesh axis "replicate" beside the FSDP2 model's.
        wire: format of the factors and the error buffers, "1-6-9" (16-bit words) or "fp32";
            everything else is sent in fp32.
        error_feedback: add what the factors left out to the next step's gradient.
        average: mean over the group; False for the sum.
        exclude: parameters that are not compressed. Embeddings never are: the weights of
            `nn.Embedding` and `nn.EmbeddingBag`, and what a module lists in `embedding_tables`.
            Nor are vectors, nor matrices (with FSDP2: with any shard) that the factors make smaller
            by less than `min_compression`.
        min_compression: the least ratio of a matrix to its factors, in elements.
        seed: of the fixed gaussian Q.
        scaler: a `ResblockScaler` or a `torch.amp.GradScaler` whose scales the gradients carry,
            before and after.
        fast: products of rounded words on CUDA (`dalle_ext.powersgd_compress_`).

    Raises:
        UsageError: numbers out of range, a model of neither kind, sparse gradients, a group that
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
        self._excluded_params = list(exclude)
        self._model: weakref.ref[nn.Module] | None = None
        self._params: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}  # by the parameters' id
        self._excluded: set[str] = set()  # names
        self._compressed: list[bool] = []  # of each matrix that is not excluded
        self._thread: ReduceThread | None = None
        self._stream: torch.cuda.Stream | None = None
        self._futures: list[torch.futures.Future[Tensor]] = []  # of reductions in the thread
        self._tables = StatsTables()  # of `gradient_norm`
        self._backward_id = -1  # of the backward pass that waits for them at its end

    def __getstate__(self) -> dict[str, Any]:
        # A pickle has no model until it is attached; excluded parameters are kept by name.
        return {
            **self.__dict__,
            "_model": None,
            "_params": {},
            "_names": {},
            "_excluded_params": [],
            "_thread": None,
            "_stream": None,
            "_futures": [],
        }

    def __reduce_ex__(self, protocol: Any) -> Any:  # of pickle; copies do without
        unnamed = [p for p in self._excluded_params if self._names.get(id(p)) not in self._excluded]
        if self._model is None and unnamed:
            raise UsageError(
                f"PowerSGD: exclude must be empty in a pickle before attach, got {len(unnamed)} "
                "parameters, whose names are not known yet"
            )
        return super().__reduce_ex__(protocol)

    def __copy__(self) -> "PowerSGD":
        copied = object.__new__(PowerSGD)
        copied.__dict__.update(self.__dict__)  # they share the state and the thread
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "PowerSGD":
        # Of the same parameters, or of their copies where those were made in the same call.
        copied = memo[id(self)] = object.__new__(PowerSGD)
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied._params = {name: memo.get(id(p), p) for name, p in self._params.items()}
        copied._names = {id(param): name for name, param in copied._params.items()}
        copied._excluded_params = [memo.get(id(p), p) for p in self._excluded_params]
        return copied

    def attach(self, model: nn.Module) -> None:
        """Registers the hook of a DDP model, or of every FSDP2 module inside the model.

        Collective over the group, of which it makes a new process group.
        """
        if self._model is not None and self._model() is not None:
            raise UsageError("PowerSGD: attach must be called once, got a second model")
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._register(inner)
        comm = self.compressor.comm
        if isinstance(model, DistributedDataParallel):
            ranks = dist.get_process_group_ranks(model.process_group)
            if comm.ranks is None:
                comm.set_parent(model.process_group)
            elif comm.ranks != ranks:
                raise UsageError(
                    f"PowerSGD: group must be the model's processes {ranks}, got {comm.ranks}"
                )
            model.register_comm_hook(self, PowerSGD.ddp_hook)
        else:
            parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
            if not parts:
                raise UsageError(
                    "PowerSGD: model must be DistributedDataParallel or hold fully_shard modules, "
                    f"got {type(model).__name__}"
                )
            if comm.ranks is None:
                comm.set_parent(replicas(parts))
            check_replicas(parts, comm.ranks or [])
            for part in parts:
                part.set_all_reduce_hook(self._fsdp_hook(part))
        comm.init_group()
        self._model = weakref.ref(inner)

    def _register(self, model: nn.Module) -> None:
        """Finds which parameters are excluded, and which are compressed."""
        embeddings: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                embeddings.add(id(module.weight))
                if module.sparse:
                    raise UsageError(
                        f"PowerSGD: gradients must be dense, got sparse=True in {name or 'model'}"
                    )
            embeddings |= {id(p) for p in getattr(module, "embedding_tables", ())}
        excluded = embeddings | {id(p) for p in self._excluded_params}
        self._index_parameters(model)
        self._excluded |= {name for name, p in self._params.items() if id(p) in excluded}
        shapes = [
            min_shard_shape(p)
            for name, p in self._params.items()
            if p.requires_grad and p.dim() > 1 and name not in self._excluded
        ]
        self._compressed = [self.compressor.compresses(shape) for shape in shapes]
        if not any(self._compressed):
            raise UsageError(
                "PowerSGD: rank must leave a matrix that factors make smaller, got "
                f"{self.compressor.rank}: nothing would be compressed"
            )

    def _refresh(self) -> None:
        """Reads the model's parameters again: `load_state_dict(assign=True)` replaces them."""
        model = None if self._model is None else self._model()
        if model is not None:
            self._index_parameters(model)

    def _index_parameters(self, model: nn.Module) -> None:
        self._params = dict(model.named_parameters())
        self._names = {id(param): name for name, param in self._params.items()}

    def compressed(self) -> tuple[int, int]:
        """Number of matrices sent as factors, and of all that are not excluded; once attached."""
        return sum(self._compressed), len(self._compressed)

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
            state.compressor.reduce_(gradients, state._excluded)

        if buffer.device.type == "cuda":
            return state._on_stream(reduce, buffer)
        compressed = state.compressor.to_compress(gradients, state._excluded)
        if not state.compressor.is_prepared(compressed):  # its errors are raised here, not by DDP
            ready: torch.futures.Future[Tensor] = torch.futures.Future()
            state._submit(lambda: state.compressor.prepare(compressed), ready, buffer)
            ready.wait()
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        state._wait_after_backward(future)  # before DDP does, which takes an error for a tensor
        state._submit(reduce, future, buffer)
        return future

    def _submit(self, job: Callable[[], None], future: Any, buffer: Tensor) -> None:
        if self._thread is None:
            self._thread = ReduceThread()
        self._thread.submit(job, future, buffer)

    def _on_stream(
        self, reduce: Callable[[], None], buffer: Tensor
    ) -> torch.futures.Future[Tensor]:
        """Reduces on another stream; waiting for the future makes the current stream wait."""
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
        self.compressor.track_norms = False
        name = self._names.get(id(param))
        if name is None or self._params[name] is not param:
            self._refresh()
            name = self._names.get(id(param))
        if name is None:  # not attached: parameters are numbered in the order of their gradients
            name = self._names[id(param)] = f"parameter {len(self._names)}"
            self._params[name] = param
            if any(param is p for p in self._excluded_params):
                self._excluded.add(name)
        scaler = self.compressor.scaler
        block = scaler.groups.get(param, -1) if isinstance(scaler, ResblockScaler) else -1
        return Gradient(name, grad, block, min_shard_shape(param))

    def _fsdp_hook(self, part: FSDPModule) -> Callable[[Tensor], None]:
        def hook(flat: Tensor) -> None:
            gradients = [self._gradient(p, grad) for p, grad in parameter_gradients(part, flat)]
            if can_reduce_async(part, flat):
                self._reduce_async(gradients, flat)
            else:
                self._reduce(gradients, flat.device)

        return hook

    def _reduce_async(self, gradients: list[Gradient], flat: Tensor) -> None:
        """Reduces in the thread while the backward pass goes on, which waits for it at its end."""
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._wait_after_backward(future)
        self._submit(lambda: self._reduce(gradients, flat.device), future, flat)

    def _wait_after_backward(self, future: torch.futures.Future[Tensor]) -> None:
        """Makes this backward pass wait for a future, and raise its error, at its end."""
        backward_id = torch._C._current_graph_task_id()
        if backward_id < 0:  # none: a process without data joins the collectives (DDP.join)
            return
        if backward_id != self._backward_id:  # one that failed elsewhere did not run its callback
            torch.autograd.Variable._execution_engine.queue_callback(self._wait)
            self._backward_id = backward_id
        self._futures.append(future)

    def _reduce(self, gradients: list[Gradient], device: torch.device) -> None:
        # Where a unit ran on some processes only, gloo would abort all of them without a message.
        check = device.type == "cpu" and self.compressor.world_size > 1
        self.compressor.reduce_(gradients, self._excluded, check=check)

    def _wait(self) -> None:
        futures, self._futures = self._futures, []
        start = time.perf_counter()
        for future in futures:  # after one that failed the thread runs no other
            future.wait()
        self.compressor.stats.waited_seconds += time.perf_counter() - start

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients, unscaled; 0-d float64. Collective over the shards of FSDP2.

        Of those that the model's parameters hold now, after all reductions of a step; with a
        `GradScaler`, to be called before `scaler.update()`. NaN where any element is not finite.
        Without a model, of the last reduced gradients, from their factors: P's columns are
        orthonormal, so P Q^T has the norm of Q (paper E.2), to 2^-9 with 1-6-9 words.
        """
        self._refresh()
        if not self._params:
            norms = [norm.view(1) for norm in self.compressor.norms.values()]
            return torch.cat(norms).double().square().sum().sqrt()
        scaler = self.compressor.scaler
        params = list(self._params.values())
        if isinstance(scaler, ResblockScaler):
            groups = [scaler.groups.get(p, len(scaler)) for p in params]
            norm, bad = gradient_stats(params, scaler.scales, groups, tables=self._tables)
        else:
            norm, bad = gradient_stats(params, _loss_scale(scaler), tables=self._tables)
        norm = norm + torch.zeros_like(norm).masked_fill(bad.sum() > 0, torch.nan)
        return norm

    def broadcast_norm_(self, norm: Tensor) -> None:
        """Replaces a norm by the first process's. Collective, 8 bytes.

        The gradients are equal, but processors add their squares in different orders. A clip factor
        that differs in its last bit would let the replicas drift apart.
        """
        self.compressor.comm.broadcast_([norm])

    def report(self) -> dict[str, Any]:
        """What this process sent since its start, and what it cost.

        Returns:
            bytes_sent; bytes_uncompressed (all gradients in fp32, ring all-reduce); compression
            (their ratio); seconds (of compression and communication, on the device);
            waited_seconds (of them after the backward pass, on the CPU; the rest overlaps with it);
            exchange_seconds (of them in collectives); saturated and flushed (fractions of the
            elements of P and Q that were too large for 1-6-9, or became zero); advice (one line).
        """
        return self.compressor.stats.report()

    def state_dict(self) -> dict[str, Any]:
        """The error buffers, which it averages over the group. Collective.

        With FSDP2 each is a `DTensor`, sharded as its parameter.
        """
        self._refresh()
        self.compressor.average_buffers()
        self._unify_units()
        state = self.compressor.state_dict()
        errors = {name: as_shard(self._params.get(name), e) for name, e in state["errors"].items()}
        return {**state, "errors": errors}

    def _unify_units(self) -> None:
        """Gives all shards of a matrix the smallest of their units."""
        by_groups: dict[tuple[Any, ...], list[MatrixState]] = {}
        for name, matrix in self.compressor.matrices.items():
            by_groups.setdefault(shard_groups(self._params.get(name)), []).append(matrix)
        for groups, matrices in by_groups.items():
            units = torch.stack([m.unit for m in matrices])
            for group in groups:
                dist.all_reduce(units, op=dist.ReduceOp.MIN, group=group)
            for matrix, unit in zip(matrices, units, strict=True):
                matrix.set_value(matrix.value(), unit)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a `state_dict`, of this or another number of processes."""
        saved = state.get("errors", {})
        errors = {name: local_part(error).flatten(1) for name, error in saved.items()}
        self.compressor.load_state_dict({**state, "errors": errors})


def _loss_scale(scaler: GradScaler | None) -> float | Tensor:
    """The loss scale of the gradients that parameters hold, before `scaler.update()`."""
    scale = scaler._get_scale_async() if scaler is not None and scaler.is_enabled() else None
    if scaler is None or scale is None:
        return 1.0
    stages = [state["stage"] for state in scaler._per_optimizer_states.values()]
    # `unscale_` divides them, and so does `step` where nobody did before.
    return scale.reshape(1) if all(stage is OptState.READY for stage in stages) else 1.0
