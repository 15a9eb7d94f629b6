"""functorch transforms and forward-mode AD go to native on purpose: the results are native's to the bit."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support import LOSSES, each, each_reduction
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fusedloss


def jvp_along_ones(function, input, target):
    return jvp(lambda x: function(x, target), (input,), (torch.ones_like(input),))


def vjp_of_ones(function, input, target):
    value, pullback = vjp(lambda x: function(x, target), input)
    return value, pullback(torch.ones_like(value))


TRANSFORMS = {
    "grad": lambda f, x, y: grad(f)(x, y),
    "grad of grad": lambda f, x, y: grad(lambda x: grad(f)(x, y).square().sum())(x),
    "vmap": lambda f, x, y: vmap(f)(x, y),
    "per-sample gradients": lambda f, x, y: vmap(grad(f))(x, y),
    "grad of a vmapped loss": lambda f, x, y: grad(lambda x: vmap(f)(x, y).sum())(x),
    "jvp": jvp_along_ones,
    "vjp": vjp_of_ones,
    "jacrev": lambda f, x, y: jacrev(f)(x, y),
    "jacfwd": lambda f, x, y: jacfwd(f)(x, y),
    "hessian": lambda f, x, y: hessian(f)(x, y),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@each()
def test_transform(loss, transform, device):
    input, target = loss.sample(4, 3, device=device)
    ours, native = transform(loss.ours, input, target), transform(loss.native, input, target)
    torch.testing.assert_close(ours, native, rtol=0, atol=0)


@each_reduction
@each()
def test_forward_mode(loss, reduction, device):
    input, target = loss.sample(4, 3, device=device)

    def tangent(function):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(input, torch.ones_like(input))
            return tuple(forward_ad.unpack_dual(function(dual, target, reduction=reduction)))

    torch.testing.assert_close(tangent(loss.ours), tangent(loss.native), rtol=0, atol=0)


@each()
def test_inside_a_dual_level_without_tangents(loss, device):
    input, target = loss.sample(4, 3, device=device)
    with forward_ad.dual_level():
        value = loss.ours(input, target)
    torch.testing.assert_close(value, loss.native(input, target))


ADDITIONS = [
    {"z_loss": 0.1},
    {"logit_softcap": 2.0},
    {"z_loss": 0.1, "logit_softcap": 2.0, "label_smoothing": 0.1},
    {"logit_scale": 0.7, "denominator": 5},
]


@pytest.mark.parametrize("options", ADDITIONS, ids=str)
@pytest.mark.parametrize("name", ["grad", "per-sample gradients", "jvp", "hessian"])
@each("cross_entropy", "cross_entropy_soft")
def test_transform_of_additions(loss, name, options, device):
    input, target = loss.sample(4, 3, dtype=torch.float64, device=device)
    ours, reference = (
        TRANSFORMS[name](lambda x, y, f=f: f(x, y, **options), input, target) for f in (loss.ours, loss.reference)
    )
    torch.testing.assert_close(ours, reference)


@each("bce_with_logits", "bce")
def test_transform_with_ignored_elements(loss, device):
    input, target = loss.sample(4, 3, device=device)
    target = target.round()
    expected = torch.autograd.grad(loss.ours(input.requires_grad_(), target, ignore_index=1), input)[0]
    actual = grad(lambda x: loss.ours(x, target, ignore_index=1))(input.detach())
    torch.testing.assert_close(actual, expected)


def test_lse_under_a_transform(device):
    input, target = LOSSES["cross_entropy"].sample(4, 3, device=device)
    gradient, lse = grad(lambda x: fusedloss.cross_entropy(x, target, return_lse=True), has_aux=True)(input)
    torch.testing.assert_close(lse, input.logsumexp(1))
    torch.testing.assert_close(gradient, grad(torch.nn.functional.cross_entropy)(input, target))


@pytest.mark.parametrize("name", ["per-sample gradients", "jvp"])
def test_log_probabilities_under_a_transform(name, device):
    input, target = LOSSES["cross_entropy"].sample(4, 3, dtype=torch.float64, device=device)
    for part in (0, 1):
        ours, expected = (
            TRANSFORMS[name](lambda x, y, f=f: f(x, y, return_entropy=True)[part].sum(), input, target)  # noqa: B023
            for f in (fusedloss.token_log_probs, fusedloss.reference.token_log_probs)
        )
        torch.testing.assert_close(ours, expected)


@each()
def test_incoming_gradients_may_be_batched(loss, device):
    """torch.autograd.functional.jacobian(vectorize=True) maps over the backward of a graph built outside."""
    input, target = loss.sample(4, 3, device=device)

    def jacobian(function):
        return torch.autograd.functional.jacobian(
            lambda x: function(x, target, reduction="none"), input, vectorize=True
        )

    torch.testing.assert_close(jacobian(loss.ours), jacobian(loss.native))


@each("cross_entropy_soft")
def test_a_weight_that_wants_a_gradient(loss, device):
    """Probability targets have a gradient to the weight in native: ours goes there for it."""
    input, target = loss.sample(4, 3, device=device)
    weight = torch.rand(3, requires_grad=True, device=device)
    ours, native = (torch.autograd.grad(f(input, target, weight), weight) for f in (loss.ours, loss.native))
    torch.testing.assert_close(ours, native, rtol=0, atol=0)
