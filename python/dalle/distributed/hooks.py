"""`PowerSGD`: gradient compression between machines, as hooks of DDP and of FSDP2."""

# No `from __future__ import annotations`: DDP looks at the annotations of its hook.

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dalle.distributed.fsdp import (
    as_shard,
    can_follow,
    largest_shard,
    parameter_gradients,
    sharded_parameters,
)
from dalle.distributed.powersgd import Compressor, Gradient
from dalle.errors import UsageError
from dalle.precision import ResblockScaler
from dalle.sharded import local_part, over_shards


class PowerSGD:
    """Low-rank gradients between machines (paper section 2.5, appendix E.2).

        psgd = PowerSGD(rank=32)
        psgd.attach(ddp_model)                         # DistributedDataParallel: all processes
        PowerSGD(rank=32, group=mesh["replicate"].get_group()).attach(fsdp2_model)

    With FSDP2 (`fully_shard` over the mesh of one machine) each process compresses its own shards
    and exchanges them with the same-ordinal processes of the other machines; with DDP the group is
    that of the model. `ddp_model.register_comm_hook(psgd, PowerSGD.ddp_hook)` does the same as
    `attach`, but knows no names of parameters. Gradients come out averaged over the group, NaN
    where any process had an Inf or NaN. The exchange overlaps with the rest of the backward pass:
    on the CPU in a thread, with FSDP2 where gradients are reduced in their parameters' dtype; on a
    GPU on a stream beside it, DDP here and FSDP2 by itself (not yet run on one).

    Args:
        rank: columns of the factors of each matrix (each shard).
        group: the processes to sum over; None for all.
        wire: "1-6-9" (16-bit words) or "fp32", of the factors; everything else is sent in fp32.
        error_feedback: keep what the factors left out for the next step.
        average: mean over the group; False for the sum.
        exclude: parameters that are not compressed; embeddings never are. Gains and biases are no
            matrices; nor is anything compressed less than `min_compression` times.
        min_compression: see there.
        error_scale, factor_scale: constants that move error buffers, and P and Q, into the range of
            1-6-9, 2^-60 to 16.
        eps: added to the diagonal of P before it is made orthonormal.
        seed: of the fixed gaussian Q.
        scaler: whose scales the blocks' gradients carry; they come out scaled as they came.
        fast: products of rounded words on CUDA (`dalle_ext.powersgd_compress_`).

    Raises:
        UsageError: numbers out of range, a model that is neither, or nothing to compress.
    """

    def __init__(
        self, rank: int = 32, group: dist.ProcessGroup | None = None, *, wire: str = "1-6-9",
        error_feedback: bool = True, average: bool = True, exclude: Iterable[nn.Parameter] = (),
        min_compression: float = 2.0, error_scale: float = 1.0, factor_scale: float = 1.0,
        eps: float = 1e-6, seed: int = 0, scaler: ResblockScaler | None = None,
        fast: bool = False,
    ) -> None:  # fmt: skip
        self.compressor = Compressor(
            rank, group, wire=wire, error_feedback=error_feedback, average=average,
            min_compression=min_compression, error_scale=error_scale, factor_scale=factor_scale,
            eps=eps, seed=seed, scaler=scaler, fast=fast)  # fmt: skip
        self._exclude = {id(p) for p in exclude}
        self._names: dict[int, str] = {}
        self._params: dict[str, Tensor] = {}
        self._whole: set[str] = set()
        self._matrices: list[bool] = []  # of those that may be compressed: whether they are
        self._thread: _InOrder | None = None
        self._stream: torch.cuda.Stream | None = None
        self._following: list[torch.futures.Future[Tensor]] = []

    def attach(self, model: nn.Module) -> None:
        """Registers the hook of a DDP model, or of every FSDP2 module inside the model."""
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._name(inner)
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(self, PowerSGD.ddp_hook)
            return
        parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
        if not parts:
            raise UsageError(
                "PowerSGD: model must be DistributedDataParallel or hold fully_shard modules, got "
                f"{type(model).__name__}"
            )
        for part in parts:
            part.set_all_reduce_hook(self._fsdp_hook(part))

    def _name(self, model: nn.Module) -> None:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        shapes = []
        for name, param in model.named_parameters():
            self._names[id(param)], self._params[name] = name, param
            if id(param) in self._exclude | embeddings:
                self._whole.add(name)
            elif param.requires_grad and param.dim() > 1:
                shapes.append(largest_shard(param))
        self._matrices = [self.compressor.compresses(shape) for shape in shapes]
        if not any(self._matrices):
            raise UsageError(
                "PowerSGD: rank must leave a matrix that factors make smaller, got "
                f"{self.compressor.rank}: nothing would be compressed"
            )

    def compressed(self) -> tuple[int, int]:
        """How many matrices travel as factors, of how many that may; once attached."""
        return sum(self._matrices), len(self._matrices)

    @staticmethod
    def ddp_hook(state: "PowerSGD", bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """A DDP communication hook."""
        gradients = [
            state._gradient(param, grad)
            for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True)
        ]
        buffer = bucket.buffer()

        def reduce() -> None:
            state.compressor.reduce_(gradients, state._whole)

        if buffer.device.type == "cuda":
            return state._on_stream(reduce, buffer)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        state._in_order(reduce, future, buffer)
        return future

    def _in_order(self, job: Callable[[], None], future: Any, buffer: Tensor) -> None:
        if self._thread is None:
            self._thread = _InOrder()
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
        name = self._names.setdefault(id(param), f"parameter {len(self._names)}")
        if id(param) in self._exclude:
            self._whole.add(name)
        scaler = self.compressor.scaler
        return Gradient(name, grad, -1 if scaler is None else scaler.groups.get(param, -1))

    def _fsdp_hook(self, part: FSDPModule) -> Callable[[Tensor], None]:
        def hook(flat: Tensor) -> None:
            gradients = [self._gradient(p, grad) for p, grad in parameter_gradients(part, flat)]
            if can_follow(part, flat):  # what the optimizer will read is this buffer
                self._follow(gradients, flat)
            else:
                self.compressor.reduce_(gradients, self._whole)

        for param in sharded_parameters(part):
            if id(param) not in self._names:
                raise UsageError("PowerSGD: parameters must be of the model, got one that is not")
        return hook

    def _follow(self, gradients: list[Gradient], flat: Tensor) -> None:
        """Reduces in the thread while the backward pass goes on; its end waits for the thread."""
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        if not self._following:  # the first of this backward pass
            torch.autograd.Variable._execution_engine.queue_callback(self._wait)
        self._following.append(future)
        self._in_order(lambda: self.compressor.reduce_(gradients, self._whole), future, flat)

    def _wait(self) -> None:
        following, self._following = self._following, []
        begin = time.perf_counter()
        for future in following:  # after one that failed no other is begun
            future.wait()
        self.compressor.account.waited_seconds += time.perf_counter() - begin

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient as it was handed out last, unscaled; 0-d float64, collective.

        From the factors alone: P's columns are orthonormal, so P Q^T has the norm of Q (paper E.2),
        to 2^-9 with 1-6-9 words. With several exchanges a step, that of the last ones. NaN where
        any process had an Inf or NaN.
        """
        total = torch.stack(list(self.compressor.squared_norms.values())).sum()
        if self._params:
            nothing = torch.zeros(0, dtype=torch.int64, device=total.device)
            return over_shards(self._params.values(), total.sqrt(), nothing)[0]
        return total.sqrt()

    def report(self) -> dict[str, Any]:
        """What this process sent and what it cost since the start.

        Returns:
            bytes_sent, bytes_uncompressed (all gradients in fp32, ring all-reduce), compression
            (their ratio), seconds (in all, on the device), waited_seconds (of them after the
            backward pass, with FSDP2 on the CPU; the others were hidden behind it),
            exchange_seconds (of them in collectives), reconstruction_error (the part of what this
            process's buffers held that the factors cannot express, 0 to 1, by norms, each where it
            was last sampled),
            saturated and flushed (elements of P and Q that 1-6-9 could not hold; counted on the
            CPU), advice (one line).
        """
        return self.compressor.account.report()

    def state_dict(self) -> dict[str, Any]:
        """The error buffers, averaged over the group, and equal on it from here on. Collective.

        With FSDP2 each is a `DTensor` like its parameter, of which a process holds its part.
        """
        state = self.compressor.state_dict()
        errors = {name: as_shard(self._params.get(name), e) for name, e in state["errors"].items()}
        return {**state, "errors": errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The buffers of `state_dict`, of this or another number of processes."""
        given = state.get("errors", {})
        errors = {name: local_part(error).flatten(1) for name, error in given.items()}
        self.compressor.load_state_dict({**state, "errors": errors})


class _InOrder:
    """One thread that reduces buckets in the order in which they came, so that all processes issue
    their collectives in one order. After one that failed, all fail: they would wait in vain."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Any, Tensor]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="PowerSGD").start()

    def put(self, job: Callable[[], None], future: Any, result: Tensor) -> None:
        self._jobs.put((job, future, result))

    def _run(self) -> None:
        failed: Exception | None = None
        while True:
            job, future, result = self._jobs.get()
            if failed is None:
                try:
                    job()
                except Exception as error:  # it reaches the caller through the future
                    failed = error
            if failed is None:
                future.set_result(result)
            else:
                future.set_exception(failed)
