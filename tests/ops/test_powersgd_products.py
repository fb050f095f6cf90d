"""PowerSGD's products: edges of tiles, split depths, the fast mode, and the work they do."""

from __future__ import annotations

import pytest
import torch

import dalle_ext
from dalle_ext.reference import powersgd as reference

SHAPES = [  # ends of tiles and slabs; a depth that is split in each direction; ranks beyond a tile
    (1, 1, 1),
    (5, 7, 2),
    (33, 97, 13),
    (130, 72, 5),
    (16, 260, 12),
    (260, 16, 12),
    (136, 144, 130),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def matrices(shape, device, dtype=torch.float32, seed=0):
    """Codes of an error buffer, a gradient, P, Q."""
    m, n, r = shape
    draw = torch.Generator().manual_seed(seed)
    error = dalle_ext.pack(torch.randn(m, n, generator=draw), "1-6-9")
    grad = torch.randn(m, n, generator=draw).to(dtype)
    p, q = (torch.randn(length, r, generator=draw) for length in (m, n))
    return error.to(device), grad.to(device), p.to(device), q.to(device)


def value(codes):
    return dalle_ext.unpack(codes, "1-6-9")


def moved(tensor):
    """The same in memory that begins at no multiple of 16 bytes."""
    room = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return room.copy_(tensor)


def rounded(x, bits):
    """With so many bits of mantissa, ties away from zero."""
    cut = 23 - bits
    return (x.view(torch.int32) + (1 << cut - 1) & -(1 << cut)).view(torch.float32)


def assert_close(got, a, b, plain):
    """At most twice as far from float64 as `plain` is."""
    exact = a.double() @ b.double()
    most = 2 * (plain.double() - exact).abs().max() + 2e-7 * exact.abs().max()
    assert (got.double() - exact).abs().max() <= most


@pytest.mark.parametrize("fast", [False, True])
def test_autocast_changes_no_definition(fast):
    found = []
    for on in (False, True):
        error, grad, p, q = matrices((33, 97, 13), "cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            first = reference.compress_(error, grad, q, None, 8.0, None, fast)
            second = reference.project(error, p, 8.0, fast)
            third = reference.decompress_(error, p, q, 0.5, None, fast)
        found.append((error, first, second, third))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fast", [False, True])
def test_products_against_float64(fast, shape, dtype, device):
    def halves(a, b):
        return a @ b if not fast else (a * 2048).half().float() @ b.half().float() / 2048

    error, grad, p, q = matrices(shape, device, dtype)
    wanted = error.clone()
    reference.compress_(wanted, grad, q, None, 1.0, None)
    (own,) = dalle_ext.powersgd_compress_([error], [grad], [q], fast=fast)
    apart = (value(error) - value(wanted)).abs()  # once, whatever the rank
    assert (apart <= 2**-8.9 * value(wanted).abs() + 1e-6).all()
    kept = value(error)
    assert_close(own, kept, q, halves(kept, q))
    (own,) = dalle_ext.powersgd_project([error], [p], fast=fast)
    assert_close(own, kept.t(), p, halves(kept.t(), p))
    (own,) = dalle_ext.powersgd_decompress_([error], [p], [q], machines=2, fast=fast)
    a, b = (rounded(p, 10), rounded(q, 10)) if fast else (p, q)
    assert_close(own, p, q.t(), a @ b.t())
    left = (kept - own / 2).clamp(-15.984375, 15.984375)
    assert ((value(error) - left).abs() <= 2**-9.9 * left.abs() + 1e-5).all()


@pytest.mark.parametrize("shape", [(33, 97, 13), (40, 136, 20)])
def test_fast_is_the_definition(shape, device, backend):
    if backend == "cpu":
        pytest.skip("cpu: fast changes nothing")
    error, grad, p, q = matrices(shape, device)
    other = error.clone()
    (own,) = dalle_ext.powersgd_compress_([error], [grad], [q], error_scale=0.5, fast=True)
    plain = [other.clone() for _ in range(2)]
    (exact,) = dalle_ext.powersgd_compress_(plain[:1], [grad], [q], error_scale=0.5)
    assert torch.equal(error, plain[0])  # the buffer does not know
    assert not torch.equal(own, exact)
    near = {"rtol": 0, "atol": 1e-4}  # of sums of about 100
    idle = torch.ones((), device=device)
    torch.testing.assert_close(
        own, reference.compress_(error, grad, q, None, 0.5, idle, True), **near
    )
    (own,) = dalle_ext.powersgd_project([error], [p], fast=True)
    torch.testing.assert_close(own, reference.project(error, p, 1.0, True), **near)
    (own,) = dalle_ext.powersgd_decompress_([error], [p], [q], fast=True, feedback=False)
    torch.testing.assert_close(own, reference.decompress_(error, p, q, 0, None, True), **near)


def test_fast_changes_nothing_on_the_cpu():
    error, grad, _, q = matrices((9, 24, 3), "cpu")
    other = error.clone()
    (own,) = dalle_ext.powersgd_compress_([error], [grad], [q], fast=True)
    (same,) = dalle_ext.powersgd_compress_([other], [grad], [q])
    assert torch.equal(own, same) and torch.equal(error, other)


def test_the_range_of_fast(device):
    """Every magnitude from 2^-26 on is exact, below it is off by 2^-36 at most; none overflows."""
    codes = torch.arange(1, 1 << 15, 37, dtype=torch.int16)
    codes[-1] = (1 << 15) - 1
    codes = torch.cat([codes, codes | -(1 << 15)])[None].to(device)
    one = torch.ones(1, 1, device=device)
    (own,) = dalle_ext.powersgd_project([codes], [one], fast=True)
    apart, exact = (own.t() - value(codes)).abs(), value(codes).abs() >= 2**-26
    assert (apart[exact] == 0).all() and apart.max() <= 2**-36
    (own,) = dalle_ext.powersgd_project([codes], [one])
    assert torch.equal(own.t(), value(codes))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_matrices_have_the_same_bits(dtype, fast, device):
    found = []
    for place in (torch.clone, moved):
        error, grad, p, q = (place(x) for x in matrices((40, 136, 12), device, dtype))
        (own,) = dalle_ext.powersgd_compress_([error], [grad], [q], fast=fast)
        (new,) = dalle_ext.powersgd_project([error], [p], fast=fast)
        (handed,) = dalle_ext.powersgd_decompress_([error], [p], [q], fast=fast)
        found.append((own, new, handed, error))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("fast", [False, True])
def test_a_group_is_its_matrices_one_by_one(fast, device):
    """Split depths among others, an empty matrix, every pass; and the same again."""
    shapes = [(5, 700, 3), (140, 9, 2), (0, 5, 2), (33, 40, 1), (600, 24, 20)]
    group = [matrices(s, device, DTYPES[i % 3], seed=i) for i, s in enumerate(shapes)]
    alone = [tuple(t.clone() for t in one) for one in group]
    errors, grads, ps, qs = (list(column) for column in zip(*group, strict=True))

    def run(errors, grads, ps, qs):
        own = dalle_ext.powersgd_compress_(errors, grads, qs, fast=fast)
        new = dalle_ext.powersgd_project(errors, ps, fast=fast)
        return zip(own, new, dalle_ext.powersgd_decompress_(errors, ps, qs, fast=fast), strict=True)

    for got, error, one in zip(run(errors, grads, ps, qs), errors, alone, strict=True):
        (wanted,) = run(*([tensor] for tensor in one))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert torch.equal(error, one[0])


def steps(length, size):
    return -(-length // size)


@pytest.mark.emulated
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(40, 136, 12), (33, 50, 9), (200, 136, 130), (24, 700, 24)])
def test_work(shape, fast, emulator, emulated_counts):
    """No product beyond the padding of tiles, no bank conflict, nothing copied twice."""
    m, n, r = shape
    error, grad, p, q = matrices(shape, "cpu")

    def count(run):
        before = emulated_counts()
        run()
        return emulated_counts() - before

    with emulator():
        compress = count(lambda: dalle_ext.powersgd_compress_([error], [grad], [q], fast=fast))
        project = count(lambda: dalle_ext.powersgd_project([error], [p], fast=fast))
        spread = count(lambda: dalle_ext.powersgd_decompress_([error], [p], [q], fast=fast))
    assert compress["conflicts"] == project["conflicts"] == spread["conflicts"] == 0
    ranks, chunks = steps(r, 8), steps(r, 128)
    for found, lines, depth in ((compress, m, n), (project, n, m)):
        # a warp has 32 lines; mma of 16 (fast) or 8 of the depth, those twice
        deep = steps(depth, 16) if fast else 2 * steps(depth, 8)
        assert found["mma"] == 2 * steps(lines, 32) * ranks * deep
    products = steps(r, 8) * (1 if fast else 3)
    assert spread["mma"] == 2 * steps(m, 32) * steps(n, 8) * products
    codes, vectors = 2 * m * n, n % 8 == 0
    factors = 4 * r * (n * steps(m, 128)), 4 * r * (m * steps(n, 128))
    assert compress["copied_bytes"] == factors[0] + vectors * (codes * chunks + 4 * m * n)
    assert project["copied_bytes"] == factors[1] + vectors * codes * chunks
    assert spread["copied_bytes"] == 4 * r * (m * steps(n, 128) + n * steps(m, 64))


@pytest.mark.parametrize("fast", [False, True])
def test_skip(fast, device):
    error, grad, p, q = matrices((24, 40, 4), device)
    before, on = error.clone(), torch.ones((), device=device)
    (own,) = dalle_ext.powersgd_compress_([error], [grad * float("nan")], [q], skip=on, fast=fast)
    dalle_ext.powersgd_decompress_([error], [p], [q], skip=on, fast=fast)
    assert torch.equal(error, before)
    torch.testing.assert_close(own, value(before) @ q, rtol=0, atol=0.05 if fast else 1e-4)


def test_the_reference_takes_fast():
    error, grad, _, q = matrices((9, 24, 3), "cpu")
    with dalle_ext.use_reference():
        (own,) = dalle_ext.powersgd_compress_([error], [grad], [q], fast=True)
    wanted = (value(error) * 2048).half().float() @ q.half().float() / 2048
    assert torch.equal(own, wanted)
