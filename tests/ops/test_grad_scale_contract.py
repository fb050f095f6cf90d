"""grad_scale as operators: opcheck, torch.compile, export, messages."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dalle_ext

X = torch.linspace(-20, 20, 77)
RAW = torch.ops.dalle_ext
SCALE = torch.tensor(8.0)


def test_opcheck():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.library.opcheck(RAW._grad_scale_scale, (X, SCALE, dtype))
        torch.library.opcheck(RAW._grad_scale_unscale, (X, X.to(dtype), SCALE))
    since, flags = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1])
    torch.library.opcheck(
        RAW._grad_scale_update_, (torch.ones(2) * 512, since, flags, 1.1, 0.5, 3, 1.0, 1e6, True)
    )


def test_shapes_without_data():
    """opcheck copies its inputs, and a table refuses copies: the fake kernel is called alone."""
    grads = [torch.randn(9), torch.randn(40).half()]
    table = dalle_ext.TensorTable([grads], [0, 1])
    scales = torch.ones(2)
    real = RAW._grad_scale_unscale_(table.columns[0], table.host, table.rows, scales, True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(grad) for grad in grads]
        fake = RAW._grad_scale_unscale_(
            fakes, table.host, table.rows, mode.from_tensor(scales), True
        )
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
    schema = RAW._grad_scale_unscale_.default._schema
    assert schema.is_mutable and schema.arguments[0].alias_info.is_write


def test_compiles_and_exports():
    class Ends(torch.nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            there = dalle_ext.scale_gradient(x * 2, scale)
            return dalle_ext.unscale_gradient(x, there.grad, scale) + there.counts.sum()

    wanted = Ends()(X, SCALE)
    compiled = torch.compile(Ends(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, SCALE), wanted)
    assert torch.equal(torch.export.export(Ends(), (X, SCALE)).module()(X, SCALE), wanted)


def test_scales_update_in_compiled_code():
    def update(scales, since, flags):
        dalle_ext.update_scales_(scales, since, flags, growth=2.0)
        return scales * 1

    both = []
    for function in (update, torch.compile(update, fullgraph=True, backend="aot_eager")):
        scales, since = torch.full((3,), 256.0), torch.full((3,), 125)
        both.append((function(scales, since, torch.tensor([0, 1, 0])), scales, since))
    for eager, compiled in zip(*both, strict=True):
        assert torch.equal(eager, compiled)


def scales(*values):
    return torch.tensor(values)


BAD = {
    "scale_gradient: grad must be float32, float16 or bfloat16, got torch.int64": lambda: (
        dalle_ext.scale_gradient(X.long(), 1.0)
    ),
    "scale_gradient: dtype must be float32, float16 or bfloat16, got torch.float64": lambda: (
        dalle_ext.scale_gradient(X, 1.0, dtype=torch.float64)
    ),
    "scale_gradient: scale must be positive and finite, got 0.0": lambda: dalle_ext.scale_gradient(
        X, 0.0
    ),
    "scale_gradient: scale must be positive and finite, got nan": lambda: dalle_ext.scale_gradient(
        X, float("nan")
    ),
    r"scale_gradient: scale must be one float32 on cpu, got shape \(2,\)": lambda: (
        dalle_ext.scale_gradient(X, scales(1.0, 2.0))
    ),
    "unscale_gradient: scale must be positive and finite, got -1.0": lambda: (
        dalle_ext.unscale_gradient(X, X, -1.0)
    ),
    "unscale_gradient: scale must be positive and finite, got inf": lambda: (
        dalle_ext.unscale_gradient(X, X, float("inf"))
    ),
    "unscale_gradient: stream must be float32, got torch.float16": lambda: (
        dalle_ext.unscale_gradient(X.half(), X, 1.0)
    ),
    r"unscale_gradient: grad must be \(77,\) on cpu, got \(76,\) on cpu": lambda: (
        dalle_ext.unscale_gradient(X, X[1:], 1.0)
    ),
    "unscale_gradients_: grads must hold a tensor, got none": lambda: dalle_ext.unscale_gradients_(
        [], 1.0
    ),
    "unscale_gradients_: grads must be dense, got torch.sparse_coo at index 1": lambda: (
        dalle_ext.unscale_gradients_([X, X.to_sparse()], 1.0)
    ),
    "unscale_gradients_: grads must be float32, float16 or bfloat16, got torch.complex64": lambda: (
        dalle_ext.unscale_gradients_([X.to(torch.complex64)], 1.0)
    ),
    "unscale_gradients_: groups must be 0 or more and below 1, got 1": lambda: (
        dalle_ext.unscale_gradients_([X], 1.0, [1])
    ),
    "unscale_gradients_: groups must be one a tensor, 1, got 2": lambda: (
        dalle_ext.unscale_gradients_([X], 1.0, [0, 0])
    ),
    r"unscale_gradients_: scales must be \(G,\) float32, got shape \(1,\) torch.float64": lambda: (
        dalle_ext.unscale_gradients_([X], scales(1.0).double())
    ),
    "unscale_gradients_: scale must be positive and finite, got 0.0": lambda: (
        dalle_ext.unscale_gradients_([X], 0.0)
    ),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("reference", [False, True])
def test_bad_input_gets_one_line(message, reference):
    with dalle_ext.use_reference(reference), pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_raw_op_checks():
    since, flags = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="scale_gradient: grad must be contiguous"):
        RAW._grad_scale_scale(X.view(7, 11).t(), SCALE, torch.float16)
    for value in (0.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match="scale_gradient: scale must be positive and finite"):
            dalle_ext.scale_gradient(X, torch.tensor(value))
        with pytest.raises(RuntimeError, match="unscale_gradients_: scales must be positive"):
            dalle_ext.unscale_gradients_([X.clone()], scales(value))
    table = dalle_ext.TensorTable([[X]])
    for moved in (X.clone(), X.half(), X[:5]):
        with pytest.raises(RuntimeError, match="unscale_gradients_: table must be of these"):
            RAW._grad_scale_unscale_([moved], table.host, table.rows, scales(1.0), True)
    with pytest.raises(RuntimeError, match="update_scales_: growth must be 1 or more"):
        dalle_ext.update_scales_(scales(512.0), since, flags, growth=0.5)
    with pytest.raises(RuntimeError, match="update_scales_: since_drop must be contiguous int64"):
        dalle_ext.update_scales_(scales(512.0), since.float(), flags)
    with pytest.raises(RuntimeError, match="update_scales_: low must be above 0"):
        dalle_ext.update_scales_(scales(512.0), since, flags, low=3.0, high=2.0)


def test_raw_ops_name_what_is_wrong_of_a_tensor_of_the_right_shape():
    apart, good = torch.ones(4)[::2], torch.ones(2)
    since = torch.zeros(2, dtype=torch.int64)
    rest = (1.1, 0.5, 3, 1.0, 1e6, True)
    for call, got in (
        (lambda: RAW._grad_scale_unscale(good.double(), good, SCALE), "(2) of float64"),
        (lambda: RAW._grad_scale_unscale(good, apart, SCALE), "(2) of float32 with strides (2)"),
        (lambda: RAW._grad_scale_unscale(good, good, SCALE.half()), "() of float16"),
        (lambda: RAW._grad_scale_update_(good, since.int(), since, *rest), "(2) of int32"),
        (lambda: RAW._grad_scale_update_(apart, since, since, *rest), "float32 with strides (2)"),
        (lambda: RAW._formats_pack(good, 0, torch.tensor(1.0), False), "() of float32"),
    ):
        with pytest.raises(RuntimeError, match=rf"got .*{re.escape(got)}$"):
            call()
