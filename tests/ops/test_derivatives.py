"""Derivatives that an operator does not support are refused, however they are requested."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jacfwd, jvp, linearize, vmap
from torch.utils.checkpoint import checkpoint

import dalle_ext

PATTERN = dalle_ext.AttentionPattern("row", text_len=2, grid=(2, 3))
X = torch.linspace(-1, 1, 8 * 4).sin().view(1, 1, 8, 4)


def attention(x):
    return dalle_ext.sparse_attention(x, x * 2, x + 1, PATTERN)


def sample(x):
    return dalle_ext.gumbel_softmax(x, 0.7, seed=3).sample


def kl(x):
    return dalle_ext.gumbel_softmax(x, 0.7, seed=3).kl


def scaled(x):
    return dalle_ext.scale_gradient(x, 2.0, dtype=torch.float32).grad


def unscaled(x):
    return dalle_ext.unscale_gradient(x, x, 2.0)


def orthogonal(x):
    return dalle_ext.orthogonalize(x[0, 0])


def dual(function, x):
    with forward_ad.dual_level(), torch.no_grad():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


WAYS = {
    "jvp": lambda f: jvp(f, (X,), (X,)),
    "jacfwd": lambda f: jacfwd(f)(X),
    "linearize": lambda f: linearize(f, X),
    "dual_level": lambda f: dual(f, X),
    "jvp around jvp": lambda f: jvp(lambda x: jvp(lambda y: f(x) * y, (X,), (X,))[0], (X,), (X,)),
    "jvp around vmap": lambda f: jvp(lambda x: vmap(lambda y: f(x) * y)(X), (X,), (X,)),
    "vmap around jvp": lambda f: vmap(lambda t: jvp(f, (X,), (t,))[1])(torch.stack([X, X])),
    "jacobian": lambda f: torch.autograd.functional.jacobian(
        f, X, strategy="forward-mode", vectorize=True
    ),
}


@pytest.mark.parametrize("function", [attention, sample, kl, scaled, unscaled, orthogonal])
@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_is_refused(way, function):
    """Without the guard each of these gave zeros."""
    with pytest.raises((NotImplementedError, TypeError), match="derivative that the|a gradient"):
        WAYS[way](function)


@pytest.mark.parametrize("function", [attention, sample, kl])
def test_forward_mode_through_a_backward_is_refused(function):
    x = X.clone().requires_grad_()
    out = function(x)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="tensors must be without a deriv"):
            torch.autograd.grad(out, x, grad)


@pytest.mark.parametrize("function", [attention, sample, kl])
def test_the_definitions_carry_forward_mode_on(function):
    with dalle_ext.use_reference():
        forward = jvp(function, (X.double(),), (X.double(),))[1]
    x = X.double().requires_grad_()
    with dalle_ext.use_reference():
        jacobian = torch.autograd.functional.jacobian(function, x)
    torch.testing.assert_close(forward, (jacobian * X.double()).sum((-4, -3, -2, -1)))


WANTING = torch.tensor(0.5, requires_grad=True)
REFUSED = {
    "orthogonalize: P": lambda v: dalle_ext.orthogonalize((X * v)[0, 0]),
    "sparse_attention: scale": lambda v: dalle_ext.sparse_attention(X, X, X, PATTERN, v),
    "gumbel_softmax: tau": lambda v: dalle_ext.gumbel_softmax(X, v),
    "scale_gradient: scale": lambda v: dalle_ext.scale_gradient(X, v),
    "scale_gradient: grad": lambda v: dalle_ext.scale_gradient(X * v, 2.0),
    "unscale_gradient: scale": lambda v: dalle_ext.unscale_gradient(X, X, v),
    "unscale_gradient: stream": lambda v: dalle_ext.unscale_gradient(X * v, X, 2.0),
}


@pytest.mark.parametrize("argument", REFUSED)
@pytest.mark.parametrize("reference", [False, True])
def test_numbers_that_want_a_gradient_are_refused(argument, reference):
    with dalle_ext.use_reference(reference):
        with pytest.raises(TypeError, match=f"^{argument} must not require a gradient"):
            REFUSED[argument](WANTING)
        with pytest.raises(TypeError, match=f"^{argument} must not require a gradient"):
            jvp(REFUSED[argument], (WANTING.detach(),), (WANTING.detach(),))
        REFUSED[argument](WANTING.detach())
        with torch.no_grad():
            REFUSED[argument](WANTING)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), torch.ones(2), "half"])
def test_a_scale_is_a_finite_number(scale):
    with pytest.raises(ValueError, match="^sparse_attention: scale must be a finite number, got"):
        dalle_ext.sparse_attention(X, X, X, PATTERN, scale)


@pytest.mark.parametrize("function", [attention, sample, kl], ids=lambda f: f.__name__)
def test_a_gradient_penalty_is_refused_and_no_zero(function):
    """The incoming gradient is a constant: torch's `once_differentiable` would be silent."""
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(function(x).square().sum(), x)
    assert torch.equal(grad, plain)
    with pytest.raises(NotImplementedError, match="must be differentiated once"):
        torch.autograd.grad(grad.square().sum() + 0 * x.sum(), x)
    (again,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="must be differentiated once"):
        torch.autograd.grad(again.square().sum() + 0 * x.sum(), x)


@pytest.mark.parametrize("function", [attention, sample, kl], ids=lambda f: f.__name__)
@pytest.mark.parametrize("create_graph", [False, True])
def test_activation_checkpointing_changes_no_gradient(function, create_graph):
    """It lets a backward pass read `ctx.saved_tensors` once only."""
    x = X.clone().requires_grad_()
    recomputed = checkpoint(function, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(recomputed.square().sum(), x, create_graph=create_graph)
    (plain,) = torch.autograd.grad(function(x).square().sum(), x)
    assert torch.equal(grad, plain)
