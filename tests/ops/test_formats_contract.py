"""formats as operators: opcheck, torch.compile, export, messages."""

from __future__ import annotations

import pytest
import torch

import dalle_ext

X = torch.linspace(-20, 20, 77)
RAW = torch.ops.dalle_ext


@pytest.mark.parametrize("format", [0, 1])
@pytest.mark.parametrize("seed", [None, torch.tensor(3)])
def test_opcheck(format, seed):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.library.opcheck(RAW._formats_pack, (X.to(dtype), format, seed, True))
        codes, _ = RAW._formats_pack(X.to(dtype), format, seed, False)
        torch.library.opcheck(RAW._formats_unpack, (codes, format, dtype))
    torch.library.opcheck(RAW._formats_sum, (codes.view(7, 11), format, seed, True))


def test_compiles_and_exports():
    class Round(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            codes = dalle_ext.pack(x * 2, "1-6-9")
            both = dalle_ext.sum_codes(torch.stack([codes, codes]), "1-6-9")
            return dalle_ext.unpack(both.codes, "1-6-9", torch.float16)

    wanted = Round()(X)
    compiled = torch.compile(Round(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), wanted)
    assert torch.equal(torch.export.export(Round(), (X,)).module()(X), wanted)


def test_no_gradient_flows():
    x = X.clone().requires_grad_()
    assert not dalle_ext.pack(x, "1-6-9").requires_grad


CODES = torch.zeros(4, dtype=torch.int16)
BAD = {
    "pack: format must be one of 1-6-9, 0-6-10, got '1-5-10'": lambda: dalle_ext.pack(X, "1-5-10"),
    "unpack: format must be one of 1-6-9, 0-6-10, got ''": lambda: dalle_ext.unpack(CODES, ""),
    "pack: rounding must be nearest or stochastic, got 'up'": lambda: dalle_ext.pack(
        X, "1-6-9", rounding="up"
    ),
    "pack: seed must be None with rounding to nearest, got 3": lambda: dalle_ext.pack(
        X, "1-6-9", seed=3
    ),
    "pack: seed must fit 64 bits, got 18446744073709551616": lambda: dalle_ext.pack(
        X, "1-6-9", rounding="stochastic", seed=2**64
    ),
    r"pack: seed must be a 0-d int64 tensor on cpu, got shape \(1,\)": lambda: dalle_ext.pack(
        X, "1-6-9", rounding="stochastic", seed=torch.tensor([1])
    ),
    "pack: x must be float32, float16 or bfloat16, got torch.int32": lambda: dalle_ext.pack(
        X.int(), "1-6-9"
    ),
    "pack: x must be float32, float16 or bfloat16, got torch.complex64": lambda: dalle_ext.pack(
        X.to(torch.complex64), "1-6-9"
    ),
    "unpack: codes must be int16, got torch.int32": lambda: dalle_ext.unpack(CODES.int(), "1-6-9"),
    "unpack: dtype must be float32, float16 or bfloat16, got torch.float64": lambda: (
        dalle_ext.unpack(CODES, "1-6-9", torch.float64)
    ),
    "sum_codes: codes must be int16, got torch.float32": lambda: dalle_ext.sum_codes(X, "1-6-9"),
    r"sum_codes: codes must hold a buffer, got shape \(0, 4\)": lambda: dalle_ext.sum_codes(
        CODES.view(1, 4)[:0], "1-6-9"
    ),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("reference", [False, True])
def test_bad_input_gets_one_line(message, reference):
    with dalle_ext.use_reference(reference), pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_raw_op_checks():
    with pytest.raises(RuntimeError, match="pack: format must be 0"):
        RAW._formats_pack(X, 2, None, False)
    with pytest.raises(RuntimeError, match="pack: x must be contiguous"):
        RAW._formats_pack(X.view(7, 11).t(), 0, None, False)
    with pytest.raises(RuntimeError, match="unpack: codes must be int16"):
        RAW._formats_unpack(X, 0, torch.float32)
    with pytest.raises(RuntimeError, match="pack: seed must be an int64 scalar"):
        RAW._formats_pack(X, 0, torch.tensor([1.0]), False)
