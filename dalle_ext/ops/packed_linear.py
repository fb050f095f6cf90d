"""Products of a decoding step: a linear layer whose weight is packed once, for few rows. CPU only.

Letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from dalle_ext import _native
from dalle_ext._checks import finite, shape_text, tensor_text, untracked
from dalle_ext._switch import reference_in_use
from dalle_ext.reference import packed_linear as reference

Tensor = torch.Tensor
OP, NATIVE = "PackedLinear", "packed_linear"  # what begins the lines of each


def _fake(x: Tensor, weight: Tensor, outputs: int, *rest: Any) -> Tensor:
    return x.new_empty(x.size(0), outputs)  # len(x) would make a traced graph one of these rows


if _native.CPU_PROBLEM is None:
    _packed_linear = _native.register("_packed_linear", _fake, public=OP)


class PackedLinear:
    """A linear layer for the few rows of a decoding step, on the CPU: its weight is packed once.

    A row's result does not depend on the other rows or on the number of threads, to the last bit,
    and one row costs little more than reading the weight. Products are float32; with `dtype`
    bfloat16 weight and rows are rounded to it and the sums are float32.

    Args:
        weight: (N, K) float32 or bfloat16 on the CPU, copied.
        bias: (N,), or None.
        dtype: of the packed weight, float32 or bfloat16; the weight's own if left out.

    Raises:
        TypeError: weight or bias is no dense tensor.
        ValueError: shapes, dtypes or devices that do not fit.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        untracked(
            OP, **{name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}
        )
        dtype = weight.dtype if dtype is None else dtype
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"{OP}: weight must be (N, K), got {tuple(weight.shape)}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{OP}: dtype must be float32 or bfloat16, got {dtype}")
        if weight.device.type != "cpu":
            raise ValueError(f"{OP}: weight must be on the CPU, got {weight.device}")
        self.outputs, self.inputs = weight.shape
        if bias is not None and tuple(bias.shape) != (self.outputs,):
            want, got = (self.outputs,), tuple(bias.shape)
            raise ValueError(f"{OP}: bias must be {want}, got {got}")
        if bias is not None and bias.device != weight.device:
            raise ValueError(f"{OP}: bias must be on the CPU, got {bias.device}")
        self.weight = reference.pack_linear(weight.detach().to(dtype))
        self.bias = None if bias is None else bias.detach().float().contiguous()

    def __call__(
        self,
        x: Tensor,
        *,
        norm: tuple[Tensor, Tensor, float] | None = None,
        slope: float = 0.0,
        add: Tensor | None = None,
    ) -> Tensor:
        """add + act(norm(x) W^T + b), with act(y) = y sigmoid(slope y).

        Args:
            x: (M, K) float32, contiguous.
            norm: gain (K,), shift (K,) and eps of a layer norm of the rows; the tensors float32,
                contiguous, eps finite and 0 or more.
            slope: a finite number; 0 leaves the activation out.
            add: (M, N) float32, contiguous.

        Returns:
            (M, N) float32. No gradient flows.

        Raises:
            TypeError: x, add, gain or shift is no tensor, or requires a gradient while gradients
                are recorded; norm is not of three parts.
            ValueError: another device; eps or slope is no number, or out of range.
            RuntimeError: shapes, dtypes or strides that do not fit.
        """
        gain, shift, eps = (None, None, 0.0) if norm is None else _parts(norm)
        given: dict[str, Any] = {"x": x} if add is None else {"x": x, "add": add}
        if norm is not None:
            given |= {"gain": gain, "shift": shift}
        untracked(OP, **given)
        floats = True
        for name, tensor in given.items():
            if not tensor.is_cpu:  # the native op takes one of meta, and returns any numbers
                raise ValueError(f"{OP}: {name} must be on the CPU, got {tensor.device}")
            floats = floats and tensor.dtype == torch.float32
        eps, slope = finite(OP, "eps", eps, 0.0), finite(OP, "slope", slope)
        if x.dim() != 2:
            raise RuntimeError(f"{NATIVE}: x must be (M, K), got {shape_text(x.shape)}")
        if x.size(1) != self.inputs:  # bf16 panels hold an even number of inputs
            want = f"packed for this x, {shape_text(x.shape)}"
            raise RuntimeError(f"{NATIVE}: weight must be {want}, got one of {self.inputs} inputs")
        plain = reference_in_use()
        if plain or not floats:  # there are dtypes that the native op cannot name
            self._check(x, bias=self.bias, gain=gain, shift=shift, add=add)
        options = (self.outputs, self.bias, gain, shift, eps, slope, add)
        if plain:
            return reference.packed_linear(x, self.weight, *options)
        out: Tensor = _packed_linear(x, self.weight, *options)
        return out

    def _check(self, x: Tensor, **others: Tensor | None) -> None:
        """What the native op asks of its tensors, in the same words."""
        shapes = {
            "x": (len(x), self.inputs),
            "bias": (self.outputs,),
            "gain": (self.inputs,),
            "shift": (self.inputs,),
            "add": (len(x), self.outputs),
        }
        for name, tensor in {"x": x, **others}.items():
            if tensor is None:
                continue
            fits = tuple(tensor.shape) == shapes[name] and tensor.is_contiguous()
            if not fits or tensor.dtype != torch.float32:
                want = f"contiguous float32 of shape {shape_text(shapes[name])}"
                raise RuntimeError(f"{NATIVE}: {name} must be {want}, got {tensor_text(tensor)}")


def _parts(norm: Any) -> tuple[Any, Any, Any]:
    """Gain, shift and eps; TypeError for what is not three parts."""
    if not isinstance(norm, (tuple, list)) or len(norm) != 3:
        got = f"{len(norm)} of them" if isinstance(norm, (tuple, list)) else type(norm).__name__
        raise TypeError(f"{OP}: norm must be (gain, shift, eps), got {got}")
    gain, shift, eps = norm
    return gain, shift, eps
