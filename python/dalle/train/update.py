"""The second half of a training step: backward, check, clip, optimizer, average."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dalle.dtensor import local_part
from dalle.errors import NumericalError
from dalle.precision import ResblockScaler, ScalerStep, first_nonfinite
from dalle.precision.queued import Values, skips_on_device, step_unless
from dalle.train.accumulate import Accumulated, backward
from dalle.train.late import LateReads, late_reads
from dalle.train.task import Task


def check_loss(
    name: str,
    loss: Tensor | float,
    step: int,
    model: nn.Module | None = None,
    forward: Callable[[], object] | None = None,
) -> None:
    """Stops a training whose loss is not a number.

    Args:
        name: of the task, at the head of the line.
        loss: scalar.
        step: as given to `train_step`.
        model, forward: `forward()` repeats the forward pass of `model`, to say where it began.

    Raises:
        NumericalError: with the loss and the first nonfinite module.
    """
    value = float(loss)
    if math.isfinite(value):
        return
    where = None
    if model is not None and forward is not None:
        where = first_nonfinite(model, forward)
    because = f" (first nonfinite: {where})" if where else ""
    raise NumericalError(f"{name}: loss must be finite, got {value} at step {step}{because}")


def check_gradients(name: str, model: nn.Module, step: int) -> None:
    """Raises NumericalError naming the first parameter of `model` with a nonfinite gradient."""
    for key, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(local_part(parameter.grad).isfinite().all()):
            raise NumericalError(
                f"{name}: gradient of {key} must be finite, got nonfinite values at step {step}"
            )


def update(
    task: Task,
    loss: Tensor | Accumulated,
    step: int,
    *,
    lr: float | Callable[[], float],
    clip_norm: float | None = None,
    scaler: ResblockScaler | None = None,
    forward: Callable[[], object] | None = None,
) -> float | Tensor:
    """Backward, check, clip, optimizer step, average: the second half of most `train_step`s.

    Args:
        task: whose parameters are updated.
        loss: scalar with a graph, or one that is computed in micro-batches.
        step: as given to `train_step`.
        lr: step size of this update, for all parameter groups; a function is called when all that
            hangs on the update before has happened.
        clip_norm: largest global gradient norm, or None.
        scaler: of the gradients of the model's residual blocks. Then nonfinite gradients in a
            block skip the update and lower that block's scale.
        forward: repeats the forward pass, to name the first nonfinite module.

    Returns:
        The global gradient norm before clipping, of the finite gradients. In the training loop it
        is a 0-d tensor on the device, and what follows is raised a step later (`train.late`).

    Raises:
        NumericalError: if loss or gradients are not finite, or stay so in a block whose scale
            cannot fall any more; the weights are then untouched.
        DalleError: the problem of a process of the cluster, on all of them; nothing has changed.
    """
    # The host reads nothing of the device before the backward pass is queued.
    task.world.raise_postponed()
    if task.world.size > 1:  # a forward pass is collective: no process repeats it alone
        forward = None
    task.optimizer.zero_grad(set_to_none=True)
    with task.world.device_exchange():
        whole = backward(task, loss)
    value = whole.detach()
    reads = late_reads(task)
    explaining = None if reads is None else reads.explaining
    if reads is not None and explaining is None and skips_on_device(task.optimizer):
        reads.settle()
        _set_lr(task, lr)
        return _queue(reads, task, value, step, clip_norm, scaler)
    mean_loss = task.world.mean_loss(value)
    if explaining is not None:
        check_loss(task.name, mean_loss, step, task.model, forward)
        with task.world.raise_on_all():  # it may be in another process's part
            check_gradients(task.name, task.model, step)
        raise explaining
    _set_lr(task, lr)
    if scaler is None:
        norm = _plain_step(task, mean_loss, step, clip_norm, forward)
    else:
        check_loss(task.name, mean_loss, step, task.model, forward)
        sync_norm = task.world.broadcast_norm_
        result = scaler.step(task.optimizer, clip_norm=clip_norm, sync_norm=sync_norm)
        with task.world.device_exchange():
            norm, skipped = float(result.norm), bool(result.skipped)
        if skipped:
            _explain_skip(task, step, scaler, result)
            return norm
    if task.average is not None:
        task.average.update(step)
    return norm


def _set_lr(task: Task, lr: float | Callable[[], float]) -> None:
    value = lr() if callable(lr) else lr
    for group in task.optimizer.param_groups:
        group["lr"] = value


def _queue(
    reads: LateReads,
    task: Task,
    loss: Tensor,
    step: int,
    clip_norm: float | None,
    scaler: ResblockScaler | None,
) -> Tensor:
    """The update of a training in the loop: nothing of the device is read here."""
    mean_loss = task.world.queue_mean_loss(loss)
    verdict: dict[str, Tensor] = {"loss": mean_loss}
    if scaler is None:
        grads = [p.grad for p in task.model.parameters() if p.grad is not None]
        norm = task.world.queue_gradient_norm(grads)
        bad = ~(norm + mean_loss).isfinite()
        if clip_norm is not None:
            factor = (clip_norm / norm.double()).clamp_max(1)
            torch._foreach_mul_([local_part(grad) for grad in grads], factor.to(norm.dtype))
        step_unless(task.optimizer, bad)
    else:
        sync_norm = task.world.broadcast_norm_
        result = scaler.step(
            task.optimizer,
            clip_norm=clip_norm,
            sync_norm=sync_norm,
            found_nonfinite=~mean_loss.isfinite(),
        )
        norm = result.norm
        verdict |= {
            "skipped": result.skipped,
            "elsewhere": result.nonfinite[-1],  # what belongs to no block has no scale
            "stuck": scaler.stuck_for,
        }

    def judge(values: Values) -> bool:
        loss_value, norm_value = float(values["loss"]), float(values["norm"])
        if not math.isfinite(loss_value):
            line = f"{task.name}: loss must be finite, got {loss_value} at step {step}"
            reads.explain(step, NumericalError(line))
        if scaler is None:
            if not math.isfinite(norm_value):
                reads.explain(step, _bad_norm(task, norm_value, step))
            return True
        if not values["skipped"]:
            return True
        if values["elsewhere"]:
            line = f"{task.name}: gradients of no block must be finite, got nonfinite values"
            reads.explain(step, NumericalError(f"{line} at step {step}"))
        stuck = torch.as_tensor(values["stuck"], dtype=torch.int64, device="cpu")
        _raise_stuck(task, step, scaler, scaler.stuck(stuck))
        return False

    reads.queue(step, {**verdict, "norm": norm}, judge, task.average)
    return norm


def _bad_norm(task: Task, norm: float, step: int) -> NumericalError:
    return NumericalError(f"{task.name}: gradient norm must be finite, got {norm} at step {step}")


def _plain_step(
    task: Task,
    loss: Tensor,
    step: int,
    clip_norm: float | None,
    forward: Callable[[], object] | None,
) -> float:
    grads = [p.grad for p in task.model.parameters() if p.grad is not None]
    norm = task.world.gradient_norm(grads)
    if not math.isfinite(norm + float(loss)):
        check_loss(task.name, loss, step, task.model, forward)
        check_gradients(task.name, task.model, step)
        raise _bad_norm(task, norm, step)
    if clip_norm is not None and norm > clip_norm:
        torch._foreach_mul_([local_part(grad) for grad in grads], clip_norm / norm)
    task.optimizer.step()
    return norm


def _explain_skip(task: Task, step: int, scaler: ResblockScaler, result: ScalerStep) -> None:
    """Raises NumericalError if no smaller scale can repair a skipped update."""
    if int(result.nonfinite[-1]):  # what belongs to no block has no scale
        with task.world.raise_on_all():  # it may be in another process's part
            check_gradients(task.name, task.model, step)
    _raise_stuck(task, step, scaler, scaler.stuck())


def _raise_stuck(task: Task, step: int, scaler: ResblockScaler, stuck: list[str]) -> None:
    if stuck:
        raise NumericalError(
            f"{task.name}: gradients of {stuck[0]} must be finite at the smallest scale, "
            f"got nonfinite values in {scaler.window} updates in a row, the last at step {step}"
        )
