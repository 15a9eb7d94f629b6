"""Derivatives of functions of a loss, of any order, on every road to the first: right, and as accurate as native's.

The gradient that flows into loss ** 2 depends on the logits again, and so may the target. A formula for the second
derivative that differentiates its saved arguments themselves counts those paths twice, without an error.
"""

import contextlib
import logging
from functools import partial

import pytest
import torch
from support import LOSSES, each, each_dtype, each_reduction, moved, unit
from torch._dynamo import compiled_autograd
from torch.autograd import gradcheck, gradgradcheck

import fusedloss

FUNCTIONS = {
    "squared": lambda value, x: value.square().sum(),
    "logarithm": lambda value, x: (value + 10).log().sum(),
    "focal": lambda value, x: ((1 - torch.exp(-value)) ** 2 * value).sum(),
    "times the model": lambda value, x: (value * x.sigmoid().mean()).sum(),
    "to the power of itself": lambda value, x: (value.square() + 1).pow(value / 4).sum(),
}
ROADS = {"in forward": {"grad_in_forward": True}, "in backward": {"grad_in_forward": False}, "auto": {}}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
each_road = pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)


def on(road, loss, reduction):
    """The options of a road, if the loss has it."""
    if loss.module == "NLLLoss" or (reduction == "none" and road.get("grad_in_forward")):
        if road:
            pytest.skip("the only road is the other one")
        return {}
    return road


def sample(loss, device, *shape):
    input, target = loss.sample(*shape, dtype=torch.float64, device=device)
    if loss.target == "index":
        target.flatten()[0] = -100
    return input.requires_grad_(), target


@each_function
@each_road
@each_reduction
@each()
def test_functions_of_a_loss(loss, reduction, road, function, device):
    input, target = sample(loss, device, 3, 4)
    options = {"reduction": reduction, **on(road, loss, reduction)}

    def scene(x):
        return function(loss.ours(x, target, **options), x)

    assert gradcheck(scene, [input])
    assert gradgradcheck(scene, [input])


ADDED = [{"z_loss": 0.1}, {"logit_scale": 0.7}, {"logit_softcap": 2.0}, {"label_smoothing": 0.2}]
ADDED += [{"denominator": 5}, {"sample_weight": torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)}]


@pytest.mark.parametrize("options", ADDED, ids=str)
@each("cross_entropy", "cross_entropy_soft")
def test_functions_of_a_loss_with_options(loss, options, device):
    input, target = sample(loss, device, 3, 4)
    options = moved(options, device)

    def scene(x):
        value, lse = loss.ours(x, target, return_lse=True, **options)
        return value.square() + loss.ours(x, target, **options) * (lse * value).sin().sum()

    assert gradgradcheck(scene, [input])


@each_reduction
@each("cross_entropy_soft", "bce_with_logits", "bce")
def test_a_target_that_depends_on_the_input(loss, reduction, device):
    """As in an entropy, or where a model distils itself."""
    input, _ = sample(loss, device, 3, 4)

    def scene(x):
        target = x.softmax(1) if loss.target == "soft" else torch.sigmoid(3 * x - 1)
        return loss.ours(x, target, reduction=reduction).square().sum()

    assert gradcheck(scene, [input])
    assert gradgradcheck(scene, [input])


def test_a_target_alone_that_requires_grad(device):
    """The lse does not depend on it, and is none of the outputs to be differentiated."""
    input, target = LOSSES["cross_entropy_soft"].sample(3, 4, dtype=torch.float64, device=device)

    def scene(q):
        value, lse = fusedloss.cross_entropy(input, q.square(), return_lse=True)
        return value.square() * lse.sum()

    assert gradcheck(scene, [target.requires_grad_()])
    assert gradgradcheck(scene, [target])


@each_road
@each("cross_entropy", "cross_entropy_soft", "bce_with_logits", "bce")
def test_third_derivatives(loss, road, device):
    input, target = sample(loss, device, 2, 3)

    def penalty(x):
        (grad,) = torch.autograd.grad(loss.ours(x, target, **road).square(), x, create_graph=True)
        return grad.square().sum()

    assert gradgradcheck(penalty, [input])


@each_road
@each()
def test_the_graph_need_not_be_kept(loss, road, device):
    """The last derivative frees the graph, which the formula must not walk by itself before that."""
    input, target = sample(loss, device, 3, 4)
    options = on(road, loss, "mean")

    def second(function):
        hidden = input * 0.75
        (first,) = torch.autograd.grad(
            function(hidden, target).square() + hidden.sum().square(), input, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), input)[0]

    torch.testing.assert_close(second(partial(loss.ours, **options)), second(loss.native))


@pytest.mark.filterwarnings("ignore")
@each_road
@each()
def test_compiled_autograd(loss, road, device):
    """The last backward through a compiler, which calls it with Python's lock held."""
    logging.disable(logging.WARNING)
    input, target = sample(loss, device, 3, 4)
    options = on(road, loss, "mean")
    gradients = []
    for compiles in (False, True):
        torch._dynamo.reset()
        leaf = input.detach().requires_grad_()
        (first,) = torch.autograd.grad(loss.ours(leaf * 0.75, target, **options).square(), leaf, create_graph=True)
        compiler = compiled_autograd._enable(partial(torch.compile, backend="eager"))
        with compiler if compiles else contextlib.nullcontext():
            first.square().sum().backward()
        gradients.append(leaf.grad)
    logging.disable(logging.NOTSET)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# --- Accuracy ----------------------------------------------------------------------------------------------


def hessian_product(function, input, direction):
    leaf = input.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    return torch.autograd.grad(first, leaf, direction)[0]


def masses(dtype):
    """Cross entropies whose second derivatives are easily lost: (scale of the logits, target, options)."""
    index, probabilities = (LOSSES[n].sample(64, 10, dtype=dtype)[1] for n in ("cross_entropy", "cross_entropy_soft"))
    weight = torch.tensor([1.0, -1.0, 2.0, 0.5, -0.3, 0.0, 1.0, 4.0, 1e-3, 1.0], dtype=dtype)
    return {
        "plain": (1.0, index, {}),
        "sum": (1.0, index, {"reduction": "sum"}),
        "unlikely and likely targets": (8.0, index, {}),
        "weights of both signs": (1.0, index, {"weight": weight}),
        "weights, smoothing": (4.0, index, {"weight": weight.abs(), "label_smoothing": 0.1}),
        "confident, smoothing": (8.0, index, {"label_smoothing": 0.1}),
        "probabilities": (4.0, probabilities, {}),
        "advantages": (1.0, torch.nn.functional.one_hot(index, 10) * torch.randn(64, 1).to(dtype), {}),
        "minus the probabilities": (1.0, -probabilities, {"reduction": "sum"}),
    }


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@each_road
@pytest.mark.parametrize("name", masses(torch.float32))
@each_dtype
def test_accuracy(dtype, name, road, autocast):
    """No larger an error than native's, row by row: a likely target's row is small and must not hide in the others."""
    scale, target, options = masses(dtype)[name]
    input = (torch.randn(64, 10) * scale).to(dtype)
    direction = torch.randn(64, 10).to(dtype)
    options = {"reduction": "mean", **options}
    narrow = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16

    def product(loss, input, direction, **options):
        with torch.autocast("cpu", narrow, enabled=autocast and dtype in (torch.bfloat16, torch.float16)):
            return hessian_product(
                lambda x: loss(x, target.to(x.dtype) if target.is_floating_point() else target, **options),
                input,
                direction,
            )

    wide = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    native = torch.nn.functional.cross_entropy
    truth = product(native, input.double(), direction.double(), **wide)
    errors = [
        (product(loss, input, direction, **kind).double() - truth).norm(dim=1)
        for loss, kind in ((native, options), (fusedloss.cross_entropy, options | road))
    ]
    luck = unit(1.0, dtype) * truth.norm(dim=1) + torch.finfo(dtype).tiny * torch.finfo(dtype).eps * 10
    assert (errors[1] <= 2 * errors[0] + luck).all(), (errors[1] / (2 * errors[0] + luck)).max()


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@each_road
@each_reduction
@each_dtype
@each("bce_with_logits", "bce", "nll")
def test_accuracy_of_the_others(loss, dtype, reduction, road, autocast):
    narrow = dtype in (torch.bfloat16, torch.float16)
    if loss.module == "BCELoss" and dtype == torch.float16 and road.get("grad_in_forward"):
        pytest.skip("float16 probabilities have no gradient in forward")
    input, target = loss.sample(64, 10, dtype=dtype)
    direction = torch.randn(64, 10).to(dtype)

    def product(function, input, direction, **options):
        def scene(x):
            y = target.to(x.dtype) if target.is_floating_point() else target
            with torch.autocast("cpu", dtype if narrow else torch.bfloat16, enabled=autocast and narrow):
                return (function(x, y, reduction=reduction, **options).sum() / 8).square()

        return hessian_product(scene, input, direction).double()

    truth = product(loss.native, input.double(), direction.double())
    native = product(loss.native, input, direction)
    ours = product(loss.ours, input, direction, **on(road, loss, reduction))
    luck = unit(1.0, dtype) * truth.norm()
    assert (ours - truth).norm() <= 2 * (native - truth).norm() + luck


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("vectorize", [False, True], ids=["", "vectorized"])
@each()
def test_hessians(loss, vectorize, device):
    input, target = loss.sample(4, 3, dtype=torch.float64, device=device)
    ours, native = (
        torch.autograd.functional.hessian(lambda x, f=f: f(x, target).square(), input, vectorize=vectorize)
        for f in (loss.ours, loss.native)
    )
    torch.testing.assert_close(ours, native)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_reduction
@each()
def test_second_derivatives_of_a_batch_of_grad_outputs(loss, reduction, device):
    input, target = loss.sample(4, 3, dtype=torch.float64, device=device)

    def second(function):
        leaf = input.clone().requires_grad_()
        value = function(leaf, target, reduction=reduction)
        seeds = torch.stack([torch.ones_like(value), torch.full_like(value, -2)])
        (first,) = torch.autograd.grad(value.square(), leaf, seeds, is_grads_batched=True, create_graph=True)
        return torch.autograd.grad((first.square() * torch.arange(1, 3).view(2, 1, 1)).sum(), leaf)[0]

    torch.testing.assert_close(second(loss.ours), second(loss.native))
