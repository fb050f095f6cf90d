"""Products of a decoding step: the definition, and rows whose bits depend on nothing else."""

from __future__ import annotations

import pytest
import torch

import dalle_ext

RAW = torch.ops.dalle_ext._packed_linear
ROWS = torch.zeros(2, 3)
SHAPES = [(1, 7, 5), (3, 16, 32), (9, 48, 33), (17, 100, 500), (26, 400, 769)]  # M, N, K


def make(rows, outputs, inputs, dtype):
    draw = torch.Generator().manual_seed(rows)
    weight, bias, x, gain, shift, add = (
        torch.randn(*shape, generator=draw)
        for shape in (
            (outputs, inputs), (outputs,), (rows, inputs), (inputs,), (inputs,), (rows, outputs)
        )
    )  # fmt: skip
    layer = dalle_ext.PackedLinear(weight / inputs**0.5, bias, dtype=dtype)
    return layer, x, {"norm": (gain, shift, 1e-5), "slope": 1.702, "add": add}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition(shape, dtype):
    layer, x, options = make(*shape, dtype)
    parts = [{}, {"norm": options["norm"]}, {"slope": 1.702}, {"add": options["add"]}, options]
    for given in parts:
        found = layer(x, **given)
        with dalle_ext.use_reference():
            wanted = layer(x, **given)
        tolerance = 2e-6 if dtype == torch.float32 else 5e-3  # a rounding of a normed row flips
        scale = float(wanted.abs().max())
        assert float((found - wanted).abs().max()) <= tolerance * scale, given.keys()


def test_bf16_is_the_product_of_rounded_numbers():
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(40, 300, generator=draw), torch.randn(5, 300, generator=draw)
    found = dalle_ext.PackedLinear(weight, dtype=torch.bfloat16)(x)
    exact = x.bfloat16().double() @ weight.bfloat16().double().T
    torch.testing.assert_close(found.double(), exact, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[2:])
def test_a_row_has_the_same_bits_among_any_others_and_on_any_threads(shape, dtype):
    layer, x, options = make(*shape, dtype)
    add = options.pop("add")
    wanted, before = layer(x, add=add, **options), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for first in range(0, len(x), 5):
                for count in {1, 2, 3, 7, len(x) - first}:
                    part = slice(first, first + count)
                    found = layer(x[part].clone(), add=add[part].clone(), **options)
                    assert torch.equal(found, wanted[part]), (threads, first, count)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    layer, x, options = make(9, 33, 47, dtype)
    (gain, shift, eps), add = options["norm"], options["add"]
    for rest in ((layer.bias, gain, shift, eps, 1.702, add), (None, None, None, 0.0, 0.0, None)):
        torch.library.opcheck(RAW.default, (x, layer.weight, 33, *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_without_graph_break(dtype):
    """Two products, one after the other, for any number of rows: traced once."""
    wide, x, options = make(9, 100, 48, dtype)
    narrow, _, _ = make(9, 48, 100, dtype)
    graphs = []

    def two(x, gain, shift):
        hidden = wide(x, norm=(gain, shift, 1e-5), slope=1.702)
        return narrow(hidden, add=x)

    def count(module, _):
        graphs.append(module)
        return module

    compiled = torch.compile(two, fullgraph=True, dynamic=True, backend=count)
    for rows in (9, 4, 2):
        given = x[:rows].clone(), *options["norm"][:2]
        assert torch.equal(compiled(*given), two(*given))
    assert len(graphs) == 1


def test_large_and_nonfinite_numbers():
    layer = dalle_ext.PackedLinear(torch.eye(5))
    x = torch.tensor([[-1e30, -300.0, 0.0, 300.0, 1e30], [0.0, 1.0, -1.0, float("nan"), 2.0]])
    found = layer(x, slope=1.702)
    assert found[0].tolist() == pytest.approx([0, 0, 0, 300, 1e30], rel=1e-6, abs=1e-7)
    assert found[1].isnan().all()  # 0 times NaN
    assert layer(x[:0]).shape == (0, 5)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda p: p(torch.zeros(3)), r"packed for this x|x must be \(M, K\), got \(3\)"),
        (lambda p: p(torch.zeros(2, 4)), "packed_linear: weight must be packed for this x"),
        (lambda p: p(torch.zeros(2, 3).double()), "packed_linear: x must be contiguous float32"),
        (lambda p: p(torch.zeros(3, 2).T), "packed_linear: x must be contiguous float32, 3 wide"),
        (lambda p: p(torch.zeros(2, 3), add=torch.zeros(1, 5)), "residual must be contiguous"),
        (lambda p: p(torch.zeros(2, 3).requires_grad_()), "x must not require a gradient"),
        (lambda p: p(ROWS, add=torch.zeros(2, 5).requires_grad_()), "add must not require a grad"),
        (lambda p: p(ROWS, add=[1]), "PackedLinear: add must be a tensor, got list"),
        (lambda p: p(ROWS, norm=([1], [1], 1e-5)), "PackedLinear: gain must be a tensor, got list"),
        (lambda p: dalle_ext.PackedLinear([[1.0]]), "weight must be a tensor, got list"),
        (lambda p: dalle_ext.PackedLinear(torch.eye(3).to_sparse()), "weight must be dense, got"),
        (lambda p: dalle_ext.PackedLinear(torch.zeros(3, 2), [1.0] * 3), "bias must be a tensor"),
        (
            lambda p: dalle_ext.PackedLinear(torch.eye(3), torch.zeros(3, device="meta")),
            "bias must be on the CPU, got meta",
        ),
        (lambda p: dalle_ext.PackedLinear(torch.zeros(3)), r"weight must be \(N, K\), got \(3,\)"),
        (lambda p: dalle_ext.PackedLinear(torch.zeros(3, 2), torch.zeros(2)), "bias must be"),
        (
            lambda p: dalle_ext.PackedLinear(torch.zeros(3, 2), dtype=torch.float16),
            "dtype must be float32 or bfloat16, got torch.float16",
        ),
        (
            lambda p: dalle_ext.PackedLinear(torch.zeros(3, 2, device="meta")),
            "weight must be on the CPU, got meta",
        ),
    ],
)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_input_gets_one_line(call, line, dtype, reference):
    layer = dalle_ext.PackedLinear(torch.zeros(5, 3), torch.zeros(5), dtype=dtype)
    with (
        dalle_ext.use_reference(reference),
        pytest.raises((ValueError, RuntimeError, TypeError), match=line) as error,
    ):
        call(layer)
    assert "\n" not in str(error.value)
