"""A stack of transformer layers for one decoding step, in one call. CPU only.

Letters: B captions, S samples of each, R = B * S rows, d width, H heads, D head size, F inner width
of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dalle_ext import _native
from dalle_ext._checks import finite, tensor_text, untracked
from dalle_ext._switch import reference_in_use
from dalle_ext.ops.decode_attention import DecodeCache
from dalle_ext.ops.packed_linear import PackedLinear
from dalle_ext.reference import decode_layers as reference

Tensor = torch.Tensor
OP = "DecodeLayers"
PRODUCTS = ("qkv", "out", "wide_in", "wide_out")
Norm = tuple[Tensor, Tensor, float]
_EMPTY = torch.empty(0, dtype=torch.float32, device="cpu")  # in the place of scales


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


if _native.CPU_PROBLEM is None:
    _decode_layers = _native.register("_decode_layers", _fake, public=OP)


@dataclass(frozen=True)
class DecodeLayer:
    """What a layer of `DecodeLayers` is made of.

    Attributes:
        qkv: d inputs, 3 H D outputs: queries, keys and values of all heads, side by side.
        out: H D inputs, d outputs.
        wide_in, wide_out: d inputs and F outputs; F inputs and d outputs.
        norms: of the layer norms before `qkv` and before `wide_in`: gain (d,) and shift (d,),
            float32, and eps.
        cache: of float32, or of bfloat16 where the weights are.
    """

    qkv: PackedLinear
    out: PackedLinear
    wide_in: PackedLinear
    wide_out: PackedLinear
    norms: tuple[Norm, Norm]
    cache: DecodeCache


class DecodeLayers:
    """A stack of transformer layers for the few rows of a decoding step, on the CPU, in one call.

    A layer is x + out(attention(qkv(norm(x)))), then x + wide_out(act(wide_in(norm(x)))) with
    act(y) = y sigmoid(slope y), as in the paper's prior. The result has the bits of the same
    `PackedLinear` and `decode_attention` calls one after the other; what is saved is what stands
    between them: the threads of one call go through all layers together.

    Args:
        layers: at least one, all with caches of the same B, S, H, D, grid and dtype, and weights of
            one dtype. T and the kind of pattern may differ. Caches stay theirs: `set_text`, `fill`,
            `reorder` and a tensor put in another's place hold for the next step.
        slope: of the activation; 0 leaves it out.

    Attributes:
        layers: as given.

    Raises:
        TypeError: something that is no `DecodeLayer`, or no tensor; a number that requires a
            gradient while gradients are recorded.
        ValueError: sizes or dtypes that do not fit.
    """

    def __init__(self, layers: Sequence[DecodeLayer], *, slope: float) -> None:
        if not isinstance(layers, Iterable):
            name = type(layers).__name__
            raise TypeError(f"{OP}: layers must be a sequence of DecodeLayer, got {name}")
        self.layers = tuple(layers)
        self.slope = finite(OP, "slope", slope)
        if not self.layers:
            raise ValueError(f"{OP}: layers must be at least one, got none")
        for layer in self.layers:
            if not isinstance(layer, DecodeLayer):
                name = type(layer).__name__
                raise TypeError(f"{OP}: layers must be of DecodeLayer, got {name}")
            self._check_kinds(layer)
            self._check_products(layer)
            self._check_cache(layer.cache)
        caches = [layer.cache for layer in self.layers]
        self._rows = len(caches[0].text_keys) * caches[0].samples
        self._parameters = [x for layer in self.layers for x in _parameters(layer)]
        patterns = [c.pattern for c in caches]
        self._kinds = " ".join(p.kind for p in patterns)
        self._rules = [x for p in patterns for x in (*p.grid, len(p.runs), *p.runs)]
        self._eps = [finite(OP, "eps", norm[2], 0.0) for one in self.layers for norm in one.norms]

    def _check_kinds(self, layer: DecodeLayer) -> None:
        parts: dict[str, type] = dict.fromkeys(PRODUCTS, PackedLinear) | {"cache": DecodeCache}
        for name, kind in parts.items():
            part = getattr(layer, name)
            if not isinstance(part, kind):
                got = type(part).__name__
                raise TypeError(f"{OP}: {name} must be a {kind.__name__}, got {got}")
        norms: Any = layer.norms
        listed = isinstance(norms, (tuple, list))
        sizes = [len(x) if isinstance(x, (tuple, list)) else 0 for x in norms] if listed else []
        if sizes != [3, 3]:
            got = f"{len(norms)} of {sizes} parts" if listed else type(norms).__name__
            raise ValueError(f"{OP}: norms must be two of (gain, shift, eps), got {got}")

    def _check_products(self, layer: DecodeLayer) -> None:
        first, shape = self.layers[0].qkv, layer.cache.image_keys.shape
        width, inner, hidden = first.inputs, shape[2] * shape[4], layer.wide_in.outputs
        sizes_of = ((3 * inner, width), (width, inner), (hidden, width), (width, hidden))
        for name, sizes in zip(PRODUCTS, sizes_of, strict=True):
            part = getattr(layer, name)
            if (part.outputs, part.inputs) != sizes:
                got = f"{part.outputs}, {part.inputs}"
                raise ValueError(f"{OP}: {name} must have a weight of {sizes}, got ({got})")
            if part.weight.dtype != first.weight.dtype:
                want, found = first.weight.dtype, part.weight.dtype
                raise ValueError(f"{OP}: {name} must be packed as {want}, got {found}")
        for gain, shift, eps in layer.norms:
            finite(OP, "eps", eps, 0.0)
            for name, x in (("gain", gain), ("shift", shift)):
                untracked(OP, **{name: x.detach() if isinstance(x, Tensor) else x})
                if tuple(x.shape) != (width,) or x.dtype != torch.float32 or x.device.type != "cpu":
                    got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
                    raise ValueError(f"{OP}: {name} must be ({width},) float32 on cpu, got {got}")

    def _check_cache(self, cache: DecodeCache) -> None:
        first, allowed = self.layers[0].cache, {torch.float32, self.layers[0].qkv.weight.dtype}
        text, other = cache.text_keys, first.text_keys
        if text.device.type != "cpu":
            raise ValueError(f"{OP}: cache must be on the CPU, got {text.device}")
        if text.dtype not in allowed or text.dtype != other.dtype:
            types = {other.dtype} if other.dtype in allowed else allowed
            want = " or ".join(sorted(map(str, types)))
            raise ValueError(f"{OP}: cache must be {want}, got {text.dtype}")
        sizes, wanted = (
            (len(c.text_keys), c.samples, *c.text_keys.shape[1::2], c.pattern.grid)
            for c in (cache, first)
        )
        if sizes != wanted:
            raise ValueError(f"{OP}: cache must be of B, S, H, D and grid {wanted}, got {sizes}")

    def __call__(self, x: Tensor, slot: Tensor) -> Tensor:
        """All layers for one slot of every row; the caches get its keys and values.

        A row's result does not depend on the other rows or on the number of threads, to the last
        bit. The caches are written: one call of a stack at a time; other stacks may run at once.

        Args:
            x: (R, d) float32 on the CPU, contiguous.
            slot: 0-d int64 on the CPU, from 0 to N - 1, the same for all rows; slots come in order.

        Returns:
            (R, d) float32. No gradient flows.

        Raises:
            TypeError: x or slot is no tensor, or x requires a gradient while gradients are
                recorded.
            ValueError: shapes, dtypes, devices or strides that do not fit.
            RuntimeError: slot out of range.
        """
        untracked(OP, x=x, slot=slot)
        self._check_step(x, slot)
        if reference_in_use():
            with torch.no_grad():  # gain and shift may be parameters
                return reference.decode_layers(x, slot, self.layers, self.slope)
        _native.require(OP, x.device)
        given: Any = (
            x, slot, self._parameters, *self._stores(), self._kinds, self._rules, self._eps,
            self.slope,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            out: Tensor = _decode_layers(*given)
        else:  # as in decode_attention
            with torch._C._AutoDispatchBelowAutograd():
                out = _decode_layers(*given)
        return out

    def _stores(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Text, image and scales of all layers, as their caches have them now."""
        caches = [layer.cache for layer in self.layers]
        scales = [x for c in caches for x in (c.key_scales, c.value_scales)]
        return (
            [x for c in caches for x in (c.text_keys, c.text_values)],
            [x for c in caches for x in (c.image_keys, c.image_values)],
            [_EMPTY if x is None else x for x in scales],
        )

    def _check_step(self, x: Tensor, slot: Tensor) -> None:
        want = (self._rows, self.layers[0].qkv.inputs)
        plain = x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()
        if not plain or tuple(x.shape) != want:
            got = tensor_text(x) + ("" if x.device.type == "cpu" else f" on {x.device}")
            raise ValueError(f"{OP}: x must be contiguous float32 of shape {want}, got {got}")
        if slot.dtype != torch.int64 or slot.dim() != 0 or slot.device.type != "cpu":
            got = f"{tuple(slot.shape)} {slot.dtype} on {slot.device}"
            raise ValueError(f"{OP}: slot must be a 0-d int64 tensor on the CPU, got {got}")


def _parameters(layer: DecodeLayer) -> list[Tensor]:
    """In the order that the native op takes them."""

    def product(part: PackedLinear) -> list[Tensor]:
        bias = part.bias
        if bias is None:
            bias = torch.zeros(part.outputs, dtype=torch.float32, device="cpu")
        return [part.weight, bias]

    def norm(given: Norm) -> list[Tensor]:
        return [x.detach().contiguous() for x in given[:2]]

    one, two = layer.norms
    found = [*norm(one), *product(layer.qkv), *product(layer.out)]
    return [*found, *norm(two), *product(layer.wide_in), *product(layer.wide_out)]
