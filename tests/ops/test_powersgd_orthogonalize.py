"""Householder on every back end at the sizes at which its kernels differ, against float64."""

from __future__ import annotations

import pytest
import torch

import dalle_ext

# One for each number of rows that a block's registers hold, and more than they can.
SIZES = [(256, 20), (300, 9), (1100, 9), (2100, 17), (4100, 5), (8200, 10)]


def given(n, r, device, batch=1):
    draw = torch.Generator().manual_seed(n * r)
    return torch.randn(batch, n, r, generator=draw).to(device)


@pytest.mark.parametrize(("n", "r"), SIZES)
def test_every_length(n, r, device):
    """Orthonormal, of LAPACK's signs, and as near to float64's as LAPACK in float32 is."""
    p = given(n, r, device)
    q = dalle_ext.orthogonalize(p)
    eye = torch.eye(r, device=device).double()
    assert (q.double().mT @ q.double() - eye).abs().max() <= 1e-6
    start = p.double()
    start.diagonal(dim1=-2, dim2=-1).add_(1e-6)
    wanted = torch.linalg.qr(start).Q
    plain = torch.linalg.qr(start.float()).Q
    error, torchs = ((x.double() - wanted).abs().max() for x in (q, plain))
    assert error <= 2 * torchs + 1e-7


def test_a_batch_is_its_matrices(device, backend):
    """Bit for bit; but LAPACK's bits depend on where in memory a matrix begins."""
    p = given(70, 19, device, batch=5)
    whole = dalle_ext.orthogonalize(p)
    for one, q in zip(p, whole, strict=True):
        alone = dalle_ext.orthogonalize(one)
        torch.testing.assert_close(alone, q, rtol=0, atol=1e-6 if backend == "cpu" else 0)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e18, 1e30])
def test_scale_changes_nothing(factor, device):
    """No square leaves float's range: columns are scaled by powers of two first."""
    p = given(130, 12, device)
    wanted = dalle_ext.orthogonalize(p, eps=0.0)
    got = dalle_ext.orthogonalize(p * factor, eps=0.0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)


def test_columns_of_zeros_give_columns_of_the_identity(device):
    p = torch.zeros(1, 40, 12, device=device)
    p[..., 3] = given(40, 1, device)[..., 0]
    q = dalle_ext.orthogonalize(p, eps=0.0)[0].double()
    assert (q.mT @ q - torch.eye(12, device=device)).abs().max() <= 1e-6
    assert torch.equal(q[:3, :3].float(), torch.eye(3, device=device))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(value, device):
    p = given(70, 9, device)
    p[0, 30, 4] = value
    assert not dalle_ext.orthogonalize(p).isfinite().all()
