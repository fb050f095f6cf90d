"""Derivatives that an operator does not support are refused, however they are requested."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jacfwd, jvp, linearize, vmap
from torch.utils.checkpoint import checkpoint

import dalle_ext

PATTERN = dalle_ext.AttentionPattern("row", text_len=2, grid=(2, 3))
SLOT = torch.tensor(1)
X = torch.linspace(-1, 1, 8 * 4).sin().view(1, 1, 8, 4)


def attention(x):
    return dalle_ext.sparse_attention(x, x * 2, x + 1, PATTERN)


def packed_attention(x):
    qkv = torch.stack([x[:, 0], x[:, 0] * 2, x[:, 0] + 1], 2).unsqueeze(3)  # (1, 8, 3, 1, 4)
    return dalle_ext.sparse_attention_qkvpacked(qkv, PATTERN)


def sample(x):
    return dalle_ext.gumbel_softmax(x, 0.7, dim=-1, seed=3).sample


def kl(x):
    return dalle_ext.gumbel_softmax(x, 0.7, dim=-1, seed=3).kl


def scaled(x):
    return dalle_ext.scale_gradient(x, 2.0, dtype=torch.float32).grad


def unscaled(x):
    return dalle_ext.unscale_gradient(x, x, 2.0)


def orthogonal(x):
    return dalle_ext.orthogonalize(x[0, 0])


def packed(x):
    return dalle_ext.unpack(dalle_ext.pack(x, "1-6-9"), "1-6-9")


def packed_and_counted(x):
    codes = dalle_ext.pack_counted(x, "1-6-9").codes
    return dalle_ext.unpack(dalle_ext.sum_codes(codes, "1-6-9").codes, "1-6-9")


def errors():
    return [torch.zeros(8, 4, dtype=torch.int16)]


def compressed(x):
    return dalle_ext.powersgd_compress_(errors(), [x[0, 0]], [torch.ones(4, 2)])[0]


def compressed_by(x):
    return dalle_ext.powersgd_compress_(errors(), [X[0, 0]], [x[0, 0, :4, :2]])[0]


def projected(x):
    return dalle_ext.powersgd_project(errors(), [x[0, 0, :, :2]])[0]


def decompressed(x):
    return dalle_ext.powersgd_decompress_(errors(), [x[0, 0, :, :2]], [torch.ones(4, 2)])[0]


def decoded(x):
    rule = dalle_ext.AttentionPattern("row", text_len=8, grid=(2, 3))
    cache = dalle_ext.DecodeCache(rule, X, X, 1)
    return dalle_ext.decode_attention(x[:, :, :1], X[:, :, :1], X[:, :, :1], cache, SLOT)


def decoded_with(x):
    rule = dalle_ext.AttentionPattern("row", text_len=8, grid=(2, 3))
    return dalle_ext.DecodeCache(rule, x, X, 1).text_keys


def unscaled_in_place(x):
    return dalle_ext.unscale_gradients_([x.clone()], 2.0).sum_squares


def counted(x):
    return dalle_ext.unscale_gradients_([x], 2.0, check_only=True).sum_squares


def unscaled_by(x):
    return dalle_ext.unscale_gradients_([X.clone()], x.flatten()[:1].abs()).sum_squares


def with_scales_updated(x):
    scales, none = x.flatten()[:2] + 2, torch.zeros(2, dtype=torch.int64)
    dalle_ext.update_scales_(scales, none.clone(), none)
    return scales


def stepped(x):
    parameter = torch.nn.Parameter(torch.ones_like(X))
    optimizer = dalle_ext.AdamW16([parameter], lr=1e-3)
    parameter.grad = x + 0
    optimizer.step()
    return parameter.detach() * 1


DIFFERENTIABLE = [attention, packed_attention, sample, kl]
IN_PLACE = [unscaled_in_place, counted, unscaled_by, with_scales_updated, stepped]
FUNCTIONS = [scaled, unscaled, orthogonal, compressed, compressed_by, projected, decompressed]
FUNCTIONS += [decoded, decoded_with]
PACKING = [packed, packed_and_counted]
EVERY = [*DIFFERENTIABLE, *FUNCTIONS, *IN_PLACE, *PACKING]


def test_every_public_function_is_here():
    """But those of integers and of arrays, which have no derivative."""
    source = "".join(inspect.getsource(function) for function in EVERY)
    public = {name for name in dalle_ext.__all__ if name.islower()} | {"AdamW16"}
    others = {"area_resize", "build_info", "local_part", "use_reference"}
    assert {n for n in public if f"dalle_ext.{n}(" not in source} == others


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


@pytest.mark.parametrize("function", EVERY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_is_refused(way, function):
    """Without the guard each of these gave zeros."""
    lines = "derivative that the|a gradient|a forward-mode tangent|one of a transform"
    with pytest.raises((NotImplementedError, TypeError), match=lines) as caught:
        WAYS[way](function)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [*FUNCTIONS, *IN_PLACE, *PACKING], ids=lambda f: f.__name__)
def test_forward_mode_is_refused_by_definitions_that_no_gradient_flows_through(function):
    with dalle_ext.use_reference(), pytest.raises(TypeError, match="a gradient|-mode tangent, got"):
        jvp(function, (X,), (X,))


def loss_of(function):
    return lambda x: function(x).square().sum()


LOSSES = {  # of functions of one X
    "vmap": lambda f: loss_of(vmap(f))(torch.stack([X, X]).requires_grad_()).backward(),
    "vmap of a sum": lambda f: (
        vmap(lambda x: x.sum() + loss_of(f)(x))(torch.stack([X, X]).requires_grad_())
        .sum()
        .backward()
    ),
    "grad": lambda f: torch.func.grad(loss_of(f))(X),
    "vmap of grad": lambda f: vmap(torch.func.grad(loss_of(f)))(torch.stack([X, X])),
    "grad of vmap": lambda f: torch.func.grad(loss_of(vmap(f)))(torch.stack([X, X])),
    "vjp": lambda f: torch.func.vjp(f, X),
    "jacrev": lambda f: torch.func.jacrev(f)(X),
}


@pytest.mark.parametrize(
    "function", [*DIFFERENTIABLE, *FUNCTIONS, *IN_PLACE], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("way", LOSSES)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_no_transform_loses_a_gradient(way, function):
    """Every one raises, where it does not give autograd's gradient."""
    with pytest.raises((NotImplementedError, TypeError)) as caught:
        LOSSES[way](function)
    line = str(caught.value)
    assert re.match(r"(\w+): \w+ must (not require a gradient|be )", line) and "\n" not in line


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_no_function_without_a_gradient_takes_what_wants_one(function):
    with pytest.raises(TypeError, match="must not require a gradient"):
        function(X.clone().requires_grad_())
    with torch.no_grad():
        function(X.clone().requires_grad_())
    assert torch.equal(function(X), function(X.clone().requires_grad_().detach()))


@pytest.mark.parametrize("function", DIFFERENTIABLE, ids=lambda f: f.__name__)
def test_transforms_of_the_definitions_give_the_gradient(function):
    x = X.clone().requires_grad_()
    loss_of(function)(x).backward()
    with dalle_ext.use_reference():
        torch.testing.assert_close(torch.func.grad(loss_of(function))(X), x.grad)
        both = torch.stack([X, X]).requires_grad_()
        loss_of(vmap(function))(both).backward()
    torch.testing.assert_close(both.grad, torch.stack([x.grad, x.grad]))


@pytest.mark.parametrize("function", DIFFERENTIABLE, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_without_a_gradient_works(function):
    found = vmap(function)(torch.stack([X, X + 1]))
    torch.testing.assert_close(found, torch.stack([function(X), function(X + 1)]))


@pytest.mark.parametrize("function", [attention, packed_attention, sample, kl])
def test_forward_mode_through_a_backward_is_refused(function):
    x = X.clone().requires_grad_()
    out = function(x)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="tensors must be without a deriv"):
            torch.autograd.grad(out, x, grad)


@pytest.mark.parametrize("function", [attention, packed_attention, sample, kl])
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


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), torch.ones(2, 2), "half"])
def test_a_scale_is_a_finite_number(scale):
    cache = dalle_ext.DecodeCache(PATTERN, *X.new_zeros(2, 1, 1, PATTERN.text_len, 4), 1)
    new = X.new_zeros(1, 1, 1, 4)
    for name, call in {
        "sparse_attention": lambda: dalle_ext.sparse_attention(X, X, X, PATTERN, scale),
        "decode_attention": lambda: dalle_ext.decode_attention(
            new, new, new, cache, torch.tensor(0), scale=scale
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: scale must be a finite number, got .*$"):
            call()


@pytest.mark.parametrize(
    "function", [attention, packed_attention, sample, kl], ids=lambda f: f.__name__
)
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


@pytest.mark.parametrize(
    "function", [attention, packed_attention, sample, kl], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("create_graph", [False, True])
def test_activation_checkpointing_changes_no_gradient(function, create_graph):
    """It lets a backward pass read `ctx.saved_tensors` once only."""
    x = X.clone().requires_grad_()
    recomputed = checkpoint(function, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(recomputed.square().sum(), x, create_graph=create_graph)
    (plain,) = torch.autograd.grad(function(x).square().sum(), x)
    assert torch.equal(grad, plain)
