"""Products of a decoding step: the definition, and rows whose bits depend on nothing else."""

from __future__ import annotations

import numpy as np
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
        (
            lambda p: p(torch.zeros(2, 3, device="meta")),
            "PackedLinear: x must be on the CPU, got meta",
        ),
        (lambda p: p(ROWS, norm=ROWS[0]), r"norm must be \(gain, shift, eps\), got Tensor"),
        (lambda p: p(ROWS, norm=(ROWS[0], ROWS[0])), r"\(gain, shift, eps\), got 2 of them"),
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


def lines_of(call):
    """What the native op says, and what the reference says."""
    lines = []
    for reference in (False, True):
        with dalle_ext.use_reference(reference), pytest.raises((RuntimeError, ValueError)) as error:
            call()
        lines.append(str(error.value))
    return lines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_that_does_not_fit_is_named_with_all_that_may_be_wrong_of_it(dtype):
    """By the name that the caller used, in the same words of both."""
    layer = dalle_ext.PackedLinear(torch.zeros(5, 3), dtype=dtype)
    one = dalle_ext.PackedLinear(torch.zeros(1, 3), dtype=dtype)
    row, gain = ROWS[:1].clone(), torch.zeros(3)
    f32 = "of float32"
    for name, wrong, call, want, got in (
        # as many numbers as are wanted, in another shape
        ("add", torch.zeros(5), lambda t: layer(row, add=t), (1, 5), f"(5) {f32}"),
        ("add", torch.zeros(1, 1, 5), lambda t: layer(row, add=t), (1, 5), f"(1, 1, 5) {f32}"),
        ("add", torch.tensor(0.0), lambda t: one(row, add=t), (1, 1), f"() {f32}"),
        ("add", torch.zeros(5, 2), lambda t: layer(ROWS, add=t), (2, 5), f"(5, 2) {f32}"),
        ("gain", gain[None], lambda t: layer(ROWS, norm=(t, gain, 0.0)), (3,), f"(1, 3) {f32}"),
        ("shift", gain[:2], lambda t: layer(ROWS, norm=(gain, t, 0.0)), (3,), f"(2) {f32}"),
        ("add", torch.zeros(0, 5), lambda t: layer(row, add=t), (1, 5), f"(0, 5) {f32}"),
        # of another dtype
        ("x", ROWS.double(), layer, (2, 3), "(2, 3) of float64"),
        ("add", torch.zeros(2, 5).int(), lambda t: layer(ROWS, add=t), (2, 5), "(2, 5) of int32"),
        ("gain", gain.half(), lambda t: layer(ROWS, norm=(t, gain, 0.0)), (3,), "(3) of float16"),
        # with other strides
        ("x", torch.zeros(3, 2).T, layer, (2, 3), f"(2, 3) {f32} with strides (1, 2)"),
        (
            "add",
            torch.zeros(2, 9)[:, :5],
            lambda t: layer(ROWS, add=t),
            (2, 5),
            f"(2, 5) {f32} with strides (9, 1)",
        ),
    ):
        shape = str(want).replace(",)", ")")
        line = f"packed_linear: {name} must be contiguous float32 of shape {shape}, got {got}"
        assert lines_of(lambda t=wrong, call=call: call(t)) == [line] * 2


@pytest.mark.parametrize(
    "name",
    "float64 float16 bfloat16 float8_e4m3fn complex64 complex128 bool int8 int16 int32 int64 "
    "uint8 uint16 uint32 uint64 bits16".split(),
)
def test_a_dtype_has_the_name_that_it_has_in_python(name):
    layer = dalle_ext.PackedLinear(torch.zeros(5, 3))
    add = torch.empty(2, 5, dtype=getattr(torch, name))
    line = f"packed_linear: add must be contiguous float32 of shape (2, 5), got (2, 5) of {name}"
    assert lines_of(lambda: layer(ROWS, add=add)) == [line] * 2
    if name != "bits16":  # the stable ABI has none
        with pytest.raises(RuntimeError) as error:
            RAW(ROWS, layer.weight, 5, None, None, None, 0.0, 0.0, add)
        assert str(error.value) == line


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("1", "'1'"),
        (None, "NoneType"),
        ([1.0], "list"),
        (1j, "complex"),
        (np.ones((3, 3)), "ndarray"),
        (torch.ones(2), "(2) of float32"),
        (torch.tensor(1j), "() of complex64"),
        (torch.tensor(float("nan")), "nan"),
        (float("inf"), "inf"),
        (10**400, "inf"),
    ],
)
def test_eps_and_slope_are_finite_numbers(value, got):
    layer, gain = dalle_ext.PackedLinear(torch.zeros(5, 3)), torch.zeros(3)
    want = f"must be a finite number, got {got}"
    assert lines_of(lambda: layer(ROWS, slope=value)) == [f"PackedLinear: slope {want}"] * 2
    want = f"must be a finite number of at least 0, got {got}"
    given = {"norm": (gain, gain, value)}
    assert lines_of(lambda: layer(ROWS, **given)) == [f"PackedLinear: eps {want}"] * 2


@pytest.mark.parametrize("value", [2, True, np.float32(2), torch.tensor(2.0), torch.tensor([2])])
def test_eps_and_slope_may_be_numbers_of_any_kind(value):
    layer, x, _ = make(3, 16, 32, torch.float32)
    gain = torch.ones(32)
    for reference in (False, True):
        with dalle_ext.use_reference(reference):
            found = layer(x, norm=(gain, gain, value), slope=value)
            plain = layer(x, norm=(gain, gain, float(value)), slope=float(value))
        assert torch.equal(found, plain)
    with pytest.raises(ValueError, match=r"eps must be a finite number of at least 0, got -1\.0"):
        layer(x, norm=(gain, gain, -value / value))


def test_messages_of_the_raw_op():
    layer, gain = dalle_ext.PackedLinear(torch.zeros(5, 3)), torch.zeros(3)
    for weight, shift, message in (
        (layer.weight.double(), gain, r"weight must be packed .*, got \(1, 3, 16, 1\) of float64"),
        (layer.weight, None, "shift must be given where gain is, got gain alone"),
    ):
        with pytest.raises(RuntimeError, match=f"^packed_linear: {message}"):
            RAW(ROWS, weight, 5, None, gain, shift, 0.0, 0.0, None)
