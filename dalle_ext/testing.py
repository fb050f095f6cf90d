"""Sample inputs and tolerances for the tests and benchmarks of the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

SENTINEL = 12345.0


def sliced(
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    order: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal numbers as a slice of a larger buffer whose border holds `SENTINEL`.

    Args:
        shape: shape of the slice.
        dtype: of both; the numbers are drawn in float64, so every dtype rounds the same ones.
        device: of both.
        seed: of the numbers.
        order: axes from the outermost in memory to the innermost; as they come if left out.

    Returns:
        The slice and the buffer around it; `border_intact(slice, buffer)` tells whether a kernel
        wrote outside the slice. The innermost axis is contiguous, no other axis is packed.
    """
    axes = list(range(len(shape))) if order is None else list(order)
    padded = [shape[a] + 2 for a in axes]
    buffer = torch.full(padded, SENTINEL, dtype=dtype, device=device)
    inverse = [axes.index(a) for a in range(len(axes))]
    view = buffer[tuple(slice(1, -1) for _ in axes)].permute(inverse)
    generator = torch.Generator().manual_seed(seed)
    view.copy_(torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu"))
    return view, buffer


def border_intact(view: torch.Tensor, buffer: torch.Tensor) -> bool:
    """Whether everything of `buffer` outside of `view` still holds `SENTINEL`."""
    outside = torch.ones(
        buffer.untyped_storage().size() // buffer.element_size(), dtype=torch.bool, device="cpu"
    )
    inside = outside.as_strided(view.shape, view.stride(), view.storage_offset())
    inside.zero_()
    return bool((buffer.reshape(-1).cpu()[outside] == SENTINEL).all())


def max_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference in float64; 0.0 for empty tensors."""
    if got.numel() == 0:
        return 0.0
    return float((got.double().cpu() - exact.double().cpu()).abs().max())


def rms_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square difference in float64; 0.0 for empty tensors."""
    if got.numel() == 0:
        return 0.0
    return float((got.double().cpu() - exact.double().cpu()).square().mean().sqrt())


def accuracy(
    got: torch.Tensor, torch_same_precision: torch.Tensor, exact: torch.Tensor, *, factor: float = 2
) -> tuple[float, float]:
    """The error of `got`, and the largest allowed: `factor` times that of PyTorch's own result.

    Errors are root mean squares: the largest of a few thousand errors is mostly luck.

    Args:
        got: result under test.
        torch_same_precision: plain PyTorch in the dtype of `got`.
        exact: plain PyTorch in float64 on the same numbers.
        factor: allowed ratio of errors; half a unit in the last place of typical values of `exact`
            is always allowed.
    """
    assert got.shape == exact.shape and got.dtype == torch_same_precision.dtype
    typical = rms_error(exact, torch.zeros_like(exact))
    rounding = 0.5 * typical * torch.finfo(got.dtype).eps
    limit = max(factor * rms_error(torch_same_precision, exact), rounding)
    return rms_error(got, exact), limit


def assert_as_accurate(
    got: torch.Tensor, torch_same_precision: torch.Tensor, exact: torch.Tensor, *, factor: float = 2
) -> None:
    """Fails unless `got` is as accurate as `accuracy` allows; arguments as there."""
    error, limit = accuracy(got, torch_same_precision, exact, factor=factor)
    assert error <= limit, f"error {error:.3e} must be <= {limit:.3e}"


def gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of sum(function(*inputs) * grad) with respect to each of `inputs`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)
