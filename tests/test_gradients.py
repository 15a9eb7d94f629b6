"""First and second derivatives against finite differences in float64, and graphs that are walked twice."""

import pytest
import torch
from support import LOSSES, differentiate, each, each_reduction, eighths
from torch.autograd import gradcheck, gradgradcheck

import fusedloss

SHAPES = {"batch": (4, 3), "no batch": (3,), "sequence": (2, 3, 2)}
OPTIONS = {
    "cross_entropy": [
        {},
        {"weight": [0.5, 2.0, 1.0], "label_smoothing": 0.3},
        {"z_loss": 0.1},
        {"logit_softcap": 1.5},
        {"return_lse": True},
        {"weight": [0.5, 2.0, 1.0], "label_smoothing": 0.3, "z_loss": 0.1, "logit_softcap": 1.5},
        {"z_loss": 0.1, "logit_softcap": 1.5, "return_lse": True},
        {"logit_scale": 0.7, "return_entropy": True, "return_argmax": True},
        {"logit_scale": 2.0, "logit_softcap": 1.5, "return_lse": True, "return_entropy": True},
    ],
    "nll": [{}, {"weight": [0.5, 2.0, 1.0]}],
    "bce_with_logits": [{}, {"weight": [0.5]}, {"pos_weight": [3.0]}, {"weight": [0.5], "pos_weight": [3.0]}],
    "bce": [{}, {"weight": [0.5]}],
}
OPTIONS["cross_entropy_soft"] = OPTIONS["cross_entropy"]
each_case = pytest.mark.parametrize(
    ("loss", "options"),
    [
        pytest.param(LOSSES[name], options, id=f"{name} {' '.join(options)}".strip())
        for name in OPTIONS
        for options in OPTIONS[name]
    ],
)


def case(loss, shape, options, reduction, device):
    """A function of the floating tensors alone, and those tensors; one index target of several is ignored."""
    input, target = loss.sample(*shape, dtype=torch.float64, device=device)
    options = options | {name: input.new_tensor(options[name]) for name in ("weight", "pos_weight") if name in options}
    if loss.target != "index":
        return lambda *pair: loss.ours(*pair, reduction=reduction, **options), [input, target]
    if target.numel() > 1:
        target.flatten()[0] = -100
    return lambda input: loss.ours(input, target, reduction=reduction, **options), [input]


@each_case
@each_reduction
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_derivatives_match_finite_differences(loss, options, reduction, shape, device):
    function, leaves = case(loss, shape, options, reduction, device)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@each("bce_with_logits", "bce")
@each_reduction
def test_derivatives_with_ignored_elements_match_finite_differences(loss, reduction, device):
    input, _ = loss.sample(4, 3, dtype=torch.float64, device=device)
    target = torch.tensor([[0, 1, 255]] * 4, dtype=torch.uint8, device=device)

    def function(input):
        return loss.ours(input, target, reduction=reduction, ignore_index=255)

    assert gradcheck(function, [input.requires_grad_()])
    assert gradgradcheck(function, [input])


@each_reduction
@each()
def test_backward_can_be_repeated_with_any_incoming_gradient(loss, reduction, device):
    input, target = loss.sample(33, 5, device=device)
    input.requires_grad_()
    result = loss.ours(input, target, reduction=reduction)
    first = eighths(result.shape, device=device)
    for incoming in (first, 2 * first, torch.zeros_like(first), first):
        (grad,) = torch.autograd.grad(result, input, incoming, retain_graph=True)
        expected = differentiate(loss.native, input, target, incoming, reduction=reduction)[1]
        torch.testing.assert_close(grad, expected)


@each_reduction
@each()
def test_a_gradient_penalty_trains(loss, reduction, device):
    """The gradient of the squared gradient, as with native."""
    input, target = loss.sample(4, 3, device=device)

    def penalty(function):
        leaf = input.detach().requires_grad_()
        value = function(leaf, target, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        # The leaf itself is added for nll_loss: it is linear, its gradient depends on nothing.
        return torch.autograd.grad(grad.square().sum() + leaf.square().sum(), leaf)[0]

    torch.testing.assert_close(penalty(loss.ours), penalty(loss.native))


@each("cross_entropy_soft", "bce_with_logits", "bce")
@pytest.mark.parametrize("wanted", ["input", "target", "both"])
def test_any_of_the_tensors_may_want_a_gradient(loss, wanted, device):
    pair = dict(zip(("input", "target"), loss.sample(4, 3, device=device), strict=True))
    leaves = [pair[name].requires_grad_() for name in pair if wanted in (name, "both")]
    ours = torch.autograd.grad(loss.ours(**pair), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(loss.native(**pair), leaves))


@each("cross_entropy", "cross_entropy_soft")
def test_loss_and_lse_may_be_differentiated_apart(loss, device):
    """The gradient of one output alone, then of both at once: they add up."""
    input, target = loss.sample(4, 3, device=device)
    input.requires_grad_()
    value, lse = fusedloss.cross_entropy(input, target, reduction="none", return_lse=True)
    one, other, both = (
        torch.autograd.grad(sum(out.sum() for out in outs), input, retain_graph=True)[0]
        for outs in ([value], [lse], [value, lse])
    )
    expected = differentiate(loss.native, input, target, torch.ones_like(value), reduction="none")[1]
    torch.testing.assert_close(one, expected)
    torch.testing.assert_close(other, input.softmax(1))
    torch.testing.assert_close(both, one + other)


@each()
def test_no_graph_without_a_leaf_that_wants_one(loss, device):
    input, target = loss.sample(4, 3, device=device)
    assert not loss.ours(input, target).requires_grad
    with torch.no_grad():
        assert not loss.ours(input.requires_grad_(), target).requires_grad
    assert loss.ours(input, target).requires_grad
