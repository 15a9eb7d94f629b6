"""NaN, infinity, nothing at all, and the ends of every range: values and gradients as native gives them."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import (
    LOSSES,
    compare,
    differentiate,
    each,
    each_bce_loss,
    each_dtype,
    each_index_loss,
    each_reduction,
)

import fusedloss

INF, NAN = math.inf, math.nan
LOGITS = {
    "NaN at the target": [NAN, 0.0, 1.0],
    "NaN elsewhere": [0.0, NAN, 1.0],
    "+inf at the target": [INF, 0.0, 1.0],
    "+inf elsewhere": [0.0, INF, 1.0],
    "+inf twice": [INF, INF, 1.0],
    "-inf at the target": [-INF, 0.0, 1.0],
    "-inf elsewhere": [0.0, -INF, 1.0],
    "-inf but for the target": [0.0, -INF, -INF],
    "-inf everywhere": [-INF, -INF, -INF],
    "both infinities": [-INF, INF, 0.0],
    "NaN and +inf": [INF, NAN, 0.0],
    "NaN and -inf": [-INF, NAN, -INF],
}
each_logits = pytest.mark.parametrize("row", LOGITS.values(), ids=LOGITS)
each_extra = pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"weight": [0.5, 2.0, 1.0]}],
    ids=["plain", "smoothed", "weighted"],
)


each_weight = pytest.mark.parametrize(
    ("loss", "name"),
    [
        (LOSSES["bce"], "weight"),
        (LOSSES["bce_with_logits"], "weight"),
        (LOSSES["bce_with_logits"], "pos_weight"),
    ],
    ids=["bce", "bce_with_logits", "bce_with_logits pos_weight"],
)


def as_tensors(options, dtype, device):
    return {
        name: torch.tensor(value, dtype=dtype, device=device) if isinstance(value, list) else value
        for name, value in options.items()
    }


def surrounded(row, dtype, device):
    """The row between two ordinary ones: its NaN must stay its own."""
    return torch.tensor([[0.5, -1.0, 2.0], row, [1.0, 0.0, -0.5]], dtype=dtype, device=device)


@each_dtype
@each_logits
@each_extra
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_special_logits_of_cross_entropy(row, options, reduction, dtype, device):
    input, target = surrounded(row, dtype, device), torch.tensor([1, 0, 2], device=device)
    compare(LOSSES["cross_entropy"], input, target, reduction=reduction, **as_tensors(options, dtype, device))


@each_logits
@pytest.mark.parametrize("share", [[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]], ids=["one hot", "spread"])
@each_extra
def test_special_logits_with_probability_targets(row, share, options, device):
    input, target = surrounded(row, torch.float32, device), torch.tensor([share] * 3, device=device)
    compare(LOSSES["cross_entropy_soft"], input, target, reduction="none", **as_tensors(options, None, device))


@each_logits
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_special_log_probabilities(row, reduction, device):
    input, target = surrounded(row, torch.float32, device), torch.tensor([1, 0, 2], device=device)
    compare(LOSSES["nll"], input, target, reduction=reduction)


@each_dtype
@pytest.mark.parametrize("value", [INF, -INF, NAN, "largest", "smallest"])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
@each_reduction
def test_special_logits_of_bce(value, label, reduction, dtype, device):
    ends = {"largest": torch.finfo(dtype).max, "smallest": torch.finfo(dtype).min}
    input = torch.tensor([0.5, ends.get(value, value), -1.0], dtype=dtype, device=device)
    target = torch.tensor([1.0, label, 0.0], dtype=dtype, device=device)
    compare(LOSSES["bce_with_logits"], input, target, reduction=reduction)


@each_dtype
@pytest.mark.parametrize("sign", [1, -1])
@each("cross_entropy", "cross_entropy_soft")
def test_logits_at_the_largest_number(loss, sign, dtype, device):
    input, target = loss.sample(4, 3, dtype=dtype, device=device)
    input[1] = sign * torch.finfo(dtype).max
    input[2, 0] = sign * torch.finfo(dtype).max
    compare(loss, input, target, reduction="none")


@each_dtype
@pytest.mark.parametrize("probability", [0.0, 1.0, "denormal", "smallest"])
@pytest.mark.parametrize("label", [0.0, 0.5, 1.0])
def test_probabilities_at_the_ends(probability, label, dtype, device):
    """log is clamped at -100, and the gradient's divisor at 1e-12."""
    info = torch.finfo(dtype)
    ends = {"denormal": info.tiny * info.eps, "smallest": info.tiny}
    input = torch.tensor([0.5, ends.get(probability, probability)], dtype=dtype, device=device)
    target = torch.full_like(input, label)
    compare(LOSSES["bce"], input, target, reduction="none")
    compare(LOSSES["bce"], input, target)


def test_log_of_probability_zero_is_clamped(device):
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    assert fusedloss.binary_cross_entropy(zero, one) == 100
    assert fusedloss.binary_cross_entropy(one, zero) == 100
    assert fusedloss.binary_cross_entropy(one, one) == 0


@each_reduction
@pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN])
@each_weight
def test_special_bce_weights(loss, name, value, reduction, device):
    weight = torch.tensor([1.0, value, 2.0], device=device)
    compare(loss, *loss.sample(4, 3, device=device), reduction=reduction, **{name: weight})


@each_reduction
@pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN])
@each("cross_entropy", "cross_entropy_soft", "nll")
def test_special_class_weights(loss, value, reduction, device):
    weight = torch.tensor([1.0, value, 2.0], device=device)
    compare(loss, *loss.sample(4, 3, device=device), reduction=reduction, weight=weight)


@each_reduction
@each("cross_entropy", "cross_entropy_soft", "nll")
def test_classes_whose_weights_are_all_zero(loss, reduction, device):
    """The mean and its gradient are 0 / 0 for class indices."""
    compare(loss, *loss.sample(4, 3, device=device), reduction=reduction, weight=torch.zeros(3, device=device))


EMPTY = {"no rows": (0, 3), "no positions": (2, 3, 0), "no pixels": (2, 3, 0, 5), "neither": (0, 3, 4, 5)}


@each_dtype
@each_reduction
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@each()
def test_nothing_to_average(loss, shape, reduction, dtype, device):
    compare(loss, *loss.sample(*shape, dtype=dtype, device=device), reduction=reduction)


@each_reduction
@pytest.mark.parametrize("shape", [(4, 0), (0, 0)], ids=str)
@each("cross_entropy", "cross_entropy_soft", "nll")
def test_no_classes(loss, shape, reduction, device):
    """Every class index is out of range then, unless it is ignored."""
    input = torch.empty(shape, device=device)
    target = torch.full(shape[:1] + shape[2:], -100, device=device) if loss.target == "index" else input.clone()
    compare(loss, input, target, reduction=reduction)


@each_dtype
@each_reduction
@pytest.mark.parametrize("options", [{}, {"weight": [0.5, 2.0, 1.0]}], ids=["plain", "weighted"])
@each_index_loss
def test_everything_ignored(loss, options, reduction, dtype, device):
    """The mean of nothing is NaN; its gradient, like the others', is 0."""
    input, target = loss.sample(4, 3, dtype=dtype, device=device)
    options = as_tensors(options, dtype, device)
    _, grad = compare(loss, input, torch.full_like(target, -100), reduction=reduction, **options)
    assert grad.eq(0).all()


@pytest.mark.parametrize(("reduction", "expected"), [("none", 0.0), ("sum", 0.0), ("mean", NAN)])
@each_bce_loss
def test_every_element_ignored(loss, reduction, expected, device):
    input, _ = loss.sample(4, 3, device=device)
    target = torch.full((4, 3), 255, dtype=torch.uint8, device=device)
    value, grad = differentiate(loss.ours, input, target, reduction=reduction, ignore_index=255)
    torch.testing.assert_close(value, torch.full_like(value, expected), equal_nan=True)
    assert grad.eq(0).all()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
def test_an_ignored_row_of_nan_has_no_gradient(value, options, device):
    """Ours differs on purpose: native multiplies by zero and gets NaN, ours is exactly 0."""
    input, target = LOSSES["cross_entropy"].sample(4, 3, device=device)
    input[1], target[1] = value, -100
    loss, grad = differentiate(fusedloss.cross_entropy, input, target, **options)
    kept = [0, 2, 3]
    expected = differentiate(fusedloss.cross_entropy, input[kept], target[kept], **options)
    torch.testing.assert_close([loss, grad[kept]], expected)
    assert grad[1].eq(0).all()


@each_bce_loss
def test_an_ignored_element_may_hold_anything(loss, device):
    """NaN, or what binary_cross_entropy refuses elsewhere; and its weight may be infinite."""
    input, target = loss.sample(4, 3, device=device)
    weight = torch.ones(4, 3, device=device)
    kept = torch.ones(4, 3, dtype=torch.bool, device=device)
    kept[1] = False
    expected = differentiate(loss.ours, input[kept], target[kept])
    input[1], target[1], weight[1] = torch.tensor([NAN, INF, 7.0], device=device), 255, INF
    loss_value, grad, grad_target = differentiate(loss.ours, input, target, weight=weight, ignore_index=255)
    torch.testing.assert_close([loss_value, grad[kept], grad_target[kept]], expected)
    assert grad[1].eq(0).all()
    assert grad_target[1].eq(0).all()


@each_reduction
def test_additions_to_nothing(reduction, device):
    """The mean over no rows is NaN and the sum 0, with z_loss as without."""
    input, target = LOSSES["cross_entropy"].sample(0, 3, device=device)
    loss, lse = fusedloss.cross_entropy(input, target, reduction=reduction, z_loss=0.1, return_lse=True)
    expected = torch.nn.functional.cross_entropy(input, target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert lse.shape == (0,)


def test_lse_of_an_ignored_row(device):
    """The loss leaves the row out; its log-sum-exp exists all the same, and so does that one's gradient."""
    input, target = LOSSES["cross_entropy"].sample(4, 3, device=device)
    target[1] = -100
    input.requires_grad_()
    _, lse = fusedloss.cross_entropy(input, target, return_lse=True)
    torch.testing.assert_close(lse, input.logsumexp(1))
    (grad,) = torch.autograd.grad(lse.sum(), input)
    torch.testing.assert_close(grad, input.softmax(1))


@pytest.mark.parametrize("smoothing", [-1.0, NAN])
@each("cross_entropy", "cross_entropy_soft")
def test_label_smoothing_that_is_not_positive_is_none(loss, smoothing, device):
    compare(loss, *loss.sample(4, 3, device=device), label_smoothing=smoothing)


@pytest.mark.parametrize("index", [255, 3, -1, 2**31, 2**62, -(2**63)])
@each_index_loss
def test_ignore_index_may_be_any_number(loss, index, device):
    """Also one that is no class: the weight of class 255 must not be looked up."""
    input, target = loss.sample(4, 3, device=device)
    target[1:3] = index
    weight = torch.rand(3, device=device)
    compare(loss, input, target, ignore_index=index, weight=weight)


@pytest.mark.parametrize("pos_weight", [0.0, 0.3, 1.0, 2.5, INF])
def test_the_targets_gradient_at_infinite_logits_is_natives(pos_weight, device):
    input = torch.tensor([-INF, INF, -90.0, 90.0, -3.0, 0.0, NAN], dtype=torch.float64, device=device)
    options = {"pos_weight": torch.tensor(pos_weight, dtype=torch.float64, device=device)}
    found = []
    for loss in (fusedloss.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits):
        target = torch.full_like(input, 0.5, requires_grad=True)
        found += torch.autograd.grad(loss(input, target, reduction="sum", **options), target)
    torch.testing.assert_close(*found, equal_nan=True)
