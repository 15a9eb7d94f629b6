"""Under autocast: native's result dtype, the accuracy of float32, and gradients in the logits' dtype."""

import pytest
import torch
from support import LOSSES, differentiate, each, judge, moved, short, widen

HALVES = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("dtype", HALVES, ids=short)


def autocast(loss, device, dtype=torch.bfloat16):
    if loss.module == "BCELoss" and device == "cuda":
        pytest.skip("CUDA autocast refuses binary_cross_entropy, natively too: see test_cuda")
    return torch.autocast(device, dtype=dtype)


@each_half
@pytest.mark.parametrize("cast", HALVES, ids=lambda dtype: f"autocast to {short(dtype)}")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each()
def test_half_precision_logits(loss, reduction, cast, dtype, device):
    input, target = loss.sample(33, 10, dtype=dtype, device=device)
    truth = differentiate(loss.reference, input.double(), widen(target), reduction=reduction)
    with autocast(loss, device, cast):
        ours, native = (differentiate(f, input, target, reduction=reduction) for f in (loss.ours, loss.native))
    for trio in zip(ours, native, truth, strict=True):
        judge(*trio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
@each()
def test_wide_logits_are_left_alone(loss, dtype, device):
    input, target = loss.sample(33, 10, dtype=dtype, device=device)
    expected = differentiate(loss.ours, input, target)
    with autocast(loss, device):
        actual, native = differentiate(loss.ours, input, target), differentiate(loss.native, input, target)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert [tensor.dtype for tensor in actual] == [tensor.dtype for tensor in native]


@each_half
@each()
def test_a_float32_weight_for_half_precision_logits(loss, dtype, device):
    """Refused outside autocast, welcome inside: that is where a mixed-precision model needs it."""
    input, target = loss.sample(33, 10, dtype=dtype, device=device)
    weight = torch.rand(10, device=device)
    truth = differentiate(loss.reference, input.double(), widen(target), weight=weight.double())
    with autocast(loss, device):
        ours, native = (differentiate(f, input, target, weight=weight) for f in (loss.ours, loss.native))
    for trio in zip(ours, native, truth, strict=True):
        judge(*trio)


@each("cross_entropy", "nll")
def test_a_float32_weight_for_float64_logits_is_refused(loss, device):
    input, target = loss.sample(4, 3, dtype=torch.float64, device=device)
    with autocast(loss, device), pytest.raises(RuntimeError, match="weight"):
        loss.ours(input, target, torch.rand(3, device=device))


@each_half
@each("cross_entropy_soft", "bce_with_logits", "bce")
def test_a_float32_target_for_half_precision_logits(loss, dtype, device):
    input, target = loss.sample(33, 10, dtype=dtype, device=device)
    target = target.float()
    truth = differentiate(loss.reference, input.double(), target.double())
    with autocast(loss, device):
        ours, native = (differentiate(f, input, target) for f in (loss.ours, loss.native))
    for trio in zip(ours, native, truth, strict=True):
        judge(*trio)


ADDED = [{"z_loss": 0.1}, {"logit_scale": 0.7}, {"logit_softcap": 2.0}, {"return_lse": True}, {"return_entropy": True}]
ADDED += [{"denominator": 20, "sample_weight": torch.linspace(0, 2, 33)}]


@each_half
@pytest.mark.parametrize("options", ADDED, ids=str)
def test_additions_are_computed_in_float32(options, dtype, device):
    loss = LOSSES["cross_entropy"]
    input, target = loss.sample(33, 10, dtype=dtype, device=device)
    options = moved(options, device)
    truth = differentiate(loss.reference, input.double(), target, **options)
    wide = differentiate(loss.reference, input.float(), target, **options)
    with autocast(loss, device):
        ours = differentiate(loss.ours, input, target, **options)
    for our, theirs, true in zip(ours, wide, truth, strict=True):
        judge(our, theirs.to(our.dtype), true)
    assert {tensor.dtype for tensor in ours[:-1]} == {torch.float32}


@each_half
@each("bce_with_logits", "bce")
def test_integer_targets(loss, dtype, device):
    input, target = loss.sample(33, 10, dtype=dtype, device=device)
    target = target.round()
    with autocast(loss, device):
        expected = differentiate(loss.ours, input, target, **loss.separate)[:2]
        actual = differentiate(loss.ours, input, target.byte(), **loss.separate)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@each()
def test_a_model_trains_under_autocast(loss, device):
    """The gradient of a float32 parameter through bfloat16 logits is native's."""
    features, target = torch.randn(8, 4).to(device), loss.sample(8, 3, device=device)[1]
    layer = torch.nn.Linear(4, 3).to(device)
    activation = {"NLLLoss": torch.nn.LogSoftmax(1), "BCELoss": torch.nn.Sigmoid()}.get(
        loss.module, torch.nn.Identity()
    )

    def gradient(function):
        with autocast(loss, device):
            value = function(activation(layer(features)), target)
        return torch.autograd.grad(value, layer.weight)[0]

    torch.testing.assert_close(gradient(loss.ours), gradient(loss.native), rtol=1e-2, atol=1e-3)


@each_half
@each("cross_entropy", "bce_with_logits")
def test_double_backward_with_a_float32_weight(loss, dtype, device):
    input, target = loss.sample(8, 5, dtype=dtype, device=device)
    weight = torch.rand(5, device=device)

    def second_derivative(function):
        leaf = input.clone().requires_grad_()
        with autocast(loss, device):
            value = function(leaf, target, weight=weight, reduction="sum")
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        return torch.autograd.grad(first.float().square().sum(), leaf)[0]

    actual, expected = second_derivative(loss.ours), second_derivative(loss.native)
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-3)
