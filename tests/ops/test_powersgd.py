"""PowerSGD's products and Householder on every back end, against float64 and the definition."""

from __future__ import annotations

import pytest
import torch

import dalle_ext
from dalle_ext.reference import powersgd as reference

SHAPES = [(1, 1, 1), (5, 7, 2), (24, 40, 4), (13, 97, 13), (70, 33, 33), (17, 140, 16)]


def matrices(shape, device, dtype=torch.float32, seed=0):
    """Codes of an error buffer, a gradient, Q."""
    m, n, r = shape
    draw = torch.Generator().manual_seed(seed)
    error = dalle_ext.pack(torch.randn(m, n, generator=draw), "1-6-9")
    grad = torch.randn(m, n, generator=draw).to(dtype)
    return error.to(device), grad.to(device), torch.randn(n, r, generator=draw).to(device)


def value(codes):
    return dalle_ext.unpack(codes, "1-6-9")


def error_of(got, a, b):
    """Largest error of a product in units of that of plain fp32, each against float64."""
    exact = a.double() @ b.double()
    own, torchs = (got.double() - exact).abs().max(), ((a @ b).double() - exact).abs().max()
    return float(own / (torchs + 1e-7 * exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_round_against_float64(shape, dtype, device):
    error, grad, q = matrices(shape, device, dtype)
    before, scale = value(error) / 4, torch.tensor(3.0, device=device)
    (p,) = dalle_ext.powersgd_compress_([error], [grad], [q], scale=scale, error_scale=4.0)
    kept, wanted = value(error) / 4, before + grad.float() / 3
    assert ((kept - wanted).abs() <= 2**-9.9 * wanted.abs() + 1e-12).all()
    assert error_of(p, kept, q) <= 2
    (new,) = dalle_ext.powersgd_project([error], [p], error_scale=4.0)
    assert error_of(new, kept.t(), p) <= 2
    (handed,) = dalle_ext.powersgd_decompress_([error], [p], [new], machines=2, error_scale=4.0)
    assert error_of(handed, p, new.t()) <= 2
    rest, wanted = value(error) / 4, kept - handed / 2
    beyond = (4 * wanted).abs() > 15.984375  # saturated
    near = (rest - wanted).abs() <= 2**-9.9 * wanted.abs() + 1e-6 * handed.abs()
    assert (near | beyond).all()


def test_codes_are_the_definitions(device):
    error, grad, q = matrices((24, 40, 4), device)
    other = error.clone()
    dalle_ext.powersgd_compress_([error], [grad], [q])
    reference.compress_(other, grad, q, None, 1.0, None)
    apart = (error.int() - other.int()).abs()  # a product that is added at once rounds once less
    assert apart.max() <= 1 and (apart != 0).float().mean() < 0.01


def test_skip_leaves_every_bit(device):
    error, grad, q = matrices((24, 40, 4), device)
    grad[3, 5] = float("inf")
    before, on = error.clone(), torch.ones((), device=device)
    (p,) = dalle_ext.powersgd_compress_([error], [grad], [q], skip=on)
    assert torch.equal(error, before)
    torch.testing.assert_close(p, value(before) @ q, rtol=1e-5, atol=1e-5)
    dalle_ext.powersgd_decompress_([error], [p], [q], skip=on)
    dalle_ext.powersgd_decompress_([error], [p], [q], feedback=False)
    assert torch.equal(error, before)
    grad[3, 5] = 0.0  # the next step is as if nothing had been
    off = torch.zeros((), device=device)
    (p,) = dalle_ext.powersgd_compress_([error], [grad], [q], skip=off)
    assert not torch.equal(error, before) and p.isfinite().all()


def rounds(grads, rank, device):
    """One whole round over a group of matrices; what is handed out, and the buffers."""
    draw = torch.Generator().manual_seed(5)
    errors = [torch.zeros(g.shape, dtype=torch.int16, device=device) for g in grads]
    qs = [torch.randn(g.shape[1], rank, generator=draw).to(device) for g in grads]
    ps = dalle_ext.powersgd_compress_(errors, grads, qs)
    ps = [dalle_ext.orthogonalize(p) for p in ps]
    qs = dalle_ext.powersgd_project(errors, ps)
    return dalle_ext.powersgd_decompress_(errors, ps, qs), errors


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("rank", [1, 2])
def test_gradients_of_a_small_rank_are_exact(count, rank, device):
    """1, 2 and 8 matrices of one shape at rank 1 and 2; the buffer holds these integers exactly."""
    draw = torch.Generator().manual_seed(count)
    grads = []
    for _ in range(count):
        a = torch.randint(-2, 3, (24, rank), generator=draw).float()
        b = torch.randint(-2, 3, (rank, 33), generator=draw).float()
        grads.append((a @ b).to(device))
    handed, errors = rounds(grads, rank, device)
    for got, grad, error in zip(handed, grads, errors, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-4)
        assert value(error).abs().max() <= 1e-4


def test_full_rank_is_exact(device):
    grad = torch.randint(-9, 10, (12, 40), generator=torch.Generator().manual_seed(0)).float()
    handed, _ = rounds([grad.to(device)], 12, device)
    torch.testing.assert_close(handed[0].cpu(), grad, rtol=1e-5, atol=1e-4)


def test_a_group_is_its_matrices_one_by_one(device):
    """More than a CUDA launch takes, of three types, sizes that are not alike, an empty one."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    shapes = [(3 + i % 7, 5 + i % 11, 1 + i % 3) for i in range(45)]
    group = [matrices(s, device, dtypes[i // 20], seed=i) for i, s in enumerate(shapes)]
    group.append(matrices((0, 5, 2), device))
    alone = [tuple(t.clone() for t in one) for one in group]
    errors, grads, qs = (list(column) for column in zip(*group, strict=True))
    ps = dalle_ext.powersgd_compress_(errors, grads, qs)
    for p, error, (e, g, q) in zip(ps, errors, alone, strict=True):
        (own,) = dalle_ext.powersgd_compress_([e], [g], [q])
        assert torch.equal(own, p) and torch.equal(e, error)


def test_slices(device):
    """Gradients that are views; and nothing outside is touched."""
    wide = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)).to(device)
    error, _, q = matrices((24, 40, 4), device)
    copy, same = wide[3:27, 5:45].clone(), error.clone()
    (p,) = dalle_ext.powersgd_compress_([error], [wide[3:27, 5:45]], [q])
    (own,) = dalle_ext.powersgd_compress_([same], [copy], [q])
    assert torch.equal(p, own) and torch.equal(error, same)


def test_bits_do_not_depend_on_threads():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            error, grad, q = matrices((200, 301, 9), "cpu")
            (p,) = dalle_ext.powersgd_compress_([error], [grad], [q])
            (new,) = dalle_ext.powersgd_project([error], [p])
            found.append((p, new, *dalle_ext.powersgd_decompress_([error], [p], [new]), error))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def tall(kind, n, r, device):
    draw = torch.Generator().manual_seed(n * r)
    p = torch.randn(2, n, r, generator=draw)
    if kind == "zero":
        p.zero_()
    elif kind == "deficient":  # the last half of the columns repeats the first
        p[..., r - r // 2 :] = p[..., : r // 2]
    elif kind == "tiny":
        p *= 1e-25
    elif kind == "ill":  # condition 1e6
        p = p @ torch.diag(torch.logspace(0, -6, r)) if r > 1 else p
    return p.to(device)


@pytest.mark.parametrize("kind", ["plain", "zero", "deficient", "tiny", "ill"])
@pytest.mark.parametrize(("n", "r"), [(1, 1), (40, 1), (33, 33), (70, 16), (129, 40)])
def test_orthogonalize(kind, n, r, device):
    p = tall(kind, n, r, device)
    q = dalle_ext.orthogonalize(p)
    assert q.shape == p.shape and q.is_contiguous()
    eye = torch.eye(r, device=device).double()
    assert (q.double().mT @ q.double() - eye).abs().max() <= 2e-6
    start = p.double()
    start.diagonal(dim1=-2, dim2=-1).add_(1e-6)
    left = start - q.double() @ (q.double().mT @ start)  # what the span misses
    assert left.norm() <= 2e-6 * start.norm()
    assert torch.equal(q, dalle_ext.orthogonalize(p))


@pytest.mark.parametrize("kind", ["plain", "deficient"])
@pytest.mark.parametrize(
    ("n", "r"),
    [
        (160, 112),
        *(
            pytest.param(n, r, marks=pytest.mark.night("emulated"))
            for n, r in ((1000, 896), (1024, 1024))
        ),
    ],
)
def test_orthogonalize_at_a_size_of_the_paper(kind, n, r, device, backend):
    if backend == "emulated" and (r > 896 or (r > 112 and kind == "plain")):
        pytest.skip("emulated: too many columns for its pace")
    p = tall(kind, n, r, device)
    q = dalle_ext.orthogonalize(p).double()
    assert (q.mT @ q - torch.eye(r, device=device)).abs().max() <= 2e-6
    start = p.double()
    start.diagonal(dim1=-2, dim2=-1).add_(1e-6)
    assert (start - q @ (q.mT @ start)).norm() <= 2e-6 * start.norm()


def test_orthogonalize_has_lapacks_signs(device):
    p = tall("plain", 70, 16, device)
    wanted = torch.linalg.qr(p.cpu()).Q
    torch.testing.assert_close(dalle_ext.orthogonalize(p, eps=0.0).cpu(), wanted, rtol=0, atol=1e-4)


def test_orthogonalize_compiles():
    run = torch.compile(
        lambda p: dalle_ext.orthogonalize(p) * 2, fullgraph=True, backend="aot_eager"
    )
    p = tall("plain", 40, 4, "cpu")
    assert torch.equal(run(p), dalle_ext.orthogonalize(p) * 2)
    assert dalle_ext.orthogonalize(torch.zeros(0, 4, 2)).shape == (0, 4, 2)


def bad(op="powersgd_compress_", shape=(6, 8, 2), **changes):
    error, grad, q = matrices(shape, "cpu")
    given = {"errors": [error], "grads": [grad], "qs": [q]} | changes
    return getattr(dalle_ext, op)(**given)


BAD = {
    "powersgd_compress_: errors must hold a matrix, got none": lambda: bad(errors=[]),
    "powersgd_compress_: grads must be 1 tensors, got 0": lambda: bad(grads=[]),
    "powersgd_compress_: errors must be int16 codes, got torch.float32": lambda: bad(
        errors=[torch.ones(6, 8)]
    ),
    r"powersgd_compress_: errors must be contiguous matrices, got shape \(6, 8\)": lambda: bad(
        errors=[torch.zeros(8, 6, dtype=torch.int16).t()]
    ),
    r"powersgd_compress_: grads must be \(6, 8\) on cpu, got \(6, 7\)": lambda: bad(
        grads=[torch.ones(6, 7)]
    ),
    "powersgd_compress_: grads must be float32, float16 or bfloat16, got torch.int64": lambda: bad(
        grads=[torch.ones(6, 8).long()]
    ),
    r"powersgd_compress_: qs must be \(8, r\) on cpu, got \(6, 2\)": lambda: bad(
        qs=[torch.ones(6, 2)]
    ),
    "powersgd_compress_: rank must be 1 or more and at most 6, got 7": lambda: bad(
        qs=[torch.ones(8, 7)]
    ),
    "powersgd_compress_: error_scale must be above 0 and finite, got 0": lambda: bad(error_scale=0),
    "powersgd_compress_: scale must be one float32": lambda: bad(scale=torch.ones(2)),
    "powersgd_compress_: skip must be one float32": lambda: bad(skip=torch.ones(2)),
    "powersgd_decompress_: machines must be 1 or more, got 0": lambda: (
        dalle_ext.powersgd_decompress_(
            [torch.zeros(6, 8, dtype=torch.int16)],
            [torch.ones(6, 2)],
            [torch.ones(8, 2)],
            machines=0,
        )  # fmt: skip
    ),
    "orthogonalize: P must be float32, got torch.float64": lambda: dalle_ext.orthogonalize(
        torch.ones(4, 2).double()
    ),
    r"orthogonalize: P must be \(..., n, r\) with n >= r >= 1, got \(2, 4\)": lambda: (
        dalle_ext.orthogonalize(torch.ones(2, 4))
    ),
    "orthogonalize: eps must be above 0 and finite, got nan": lambda: dalle_ext.orthogonalize(
        torch.ones(4, 2), float("nan")
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gets_one_line(message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        BAD[message]()
