"""Mistakes other implementations of these losses make, each ruled out by one test."""

import copy
import math

import pytest
import torch
from support import LOSSES, compare, differentiate, each, each_index_loss, each_reduction, short, widen

import fusedloss


@each_reduction
@each()
def test_the_caller_s_tensors_are_never_written(loss, reduction, device):
    """Not in forward, not in backward, not without a graph: what else was computed from them stays right."""
    tensors = [*loss.sample(33, 5, device=device), torch.rand(5, device=device)]
    before, versions = copy.deepcopy(tensors), [tensor._version for tensor in tensors]
    input, target, weight = tensors
    if loss.target == "index":
        target[0] = before[1][0] = -100
        versions[1] = target._version
    with torch.no_grad():
        loss.ours(input, target, weight, reduction=reduction)
    loss.ours(input.requires_grad_(), target, weight, reduction=reduction).sum().backward()
    torch.testing.assert_close([input.detach(), target, weight], before, rtol=0, atol=0)
    assert [tensor._version for tensor in tensors] == versions


@each("cross_entropy", "cross_entropy_soft")
def test_a_softmax_before_the_loss_keeps_its_gradient(loss, device):
    input, target = loss.sample(33, 5, device=device)

    def gradient(function):
        leaf = input.clone().requires_grad_()
        entropy = leaf.softmax(1).square().sum()
        return torch.autograd.grad(function(leaf, target) + entropy, leaf)

    torch.testing.assert_close(gradient(loss.ours), gradient(loss.native))


@each_reduction
@each()
def test_a_second_backward_gives_the_same_gradient(loss, reduction, device):
    """And is not scaled by the first one's incoming gradient."""
    input, target = loss.sample(33, 5, device=device)
    result = loss.ours(input.requires_grad_(), target, reduction=reduction)
    first, second = (
        torch.autograd.grad(result, input, torch.full_like(result, 2.0), retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_confident_prediction_keeps_its_gradient(device):
    """p - 1 for p = 0.9997: with p rounded to bfloat16 first, it would be 0."""
    input = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16, device=device)
    target = torch.tensor([0], device=device)
    _, grad = differentiate(fusedloss.cross_entropy, input, target, input.new_ones(()))
    expected = torch.tensor([[-1.0, 1.0]], device=device) * torch.tensor(-8.0, device=device).sigmoid()
    torch.testing.assert_close(grad.float(), expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@each_index_loss
@pytest.mark.parametrize("ignored", [0, 3, 8], ids=["none", "some", "all"])
def test_compiling_does_not_change_what_is_ignored(loss, ignored, device):
    input, target = loss.sample(8, 5, device=device)
    target[:ignored] = -100
    compiled = torch.compile(loss.ours, backend="aot_eager", fullgraph=True)
    actual = differentiate(compiled, input, target)
    expected = differentiate(loss.ours, input, target, **loss.separate)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("reduction", "expected"), [("none", 0.0), ("sum", 0.0), ("mean", math.nan)])
@each_index_loss
def test_the_mean_of_nothing_is_nan_and_its_gradient_zero(loss, reduction, expected, device):
    """All ignored: not 0, which would look like success, and no division error."""
    input, target = loss.sample(8, 5, device=device)
    value, grad = differentiate(loss.ours, input, target.fill_(-100), reduction=reduction)
    torch.testing.assert_close(value, torch.full_like(value, expected), equal_nan=True)
    assert grad.eq(0).all()


@pytest.mark.parametrize(("reduction", "expected"), [("none", 0.0), ("sum", 0.0), ("mean", math.nan)])
@each()
def test_an_empty_batch_has_an_empty_gradient(loss, reduction, expected, device):
    input, target = loss.sample(0, 5, device=device)
    value, grad, *_ = differentiate(loss.ours, input, target, reduction=reduction)
    torch.testing.assert_close(value, torch.full_like(value, expected), equal_nan=True)
    assert value.numel() == (reduction != "none")
    assert grad.shape == (0, 5)


@each_index_loss
def test_the_ignored_class_may_lie_beyond_the_weights(loss, device):
    """255 with 19 classes: segmentation's convention."""
    input, target = loss.sample(2, 19, 8, 8, device=device)
    target[:, ::2] = 255
    compare(loss, input, target, weight=torch.rand(19, device=device), ignore_index=255)


@pytest.mark.parametrize("value", [5, -1, 2**31, 2**32, -(2**63)])
@each_index_loss
def test_a_target_out_of_range_is_named(loss, value):
    """2**32 is 0 in 32 bits."""
    input, target = loss.sample(8, 5)
    target[3] = value
    with pytest.raises(IndexError, match=str(value)):
        loss.ours(input, target)


def test_label_smoothing_survives_underflow(device):
    """A logit 200 below the maximum has probability 0 in float32; its smoothed loss is 200 and its share."""
    input, target = torch.tensor([[0.0, -200.0]], device=device), torch.tensor([0], device=device)
    loss = fusedloss.cross_entropy(input, target, label_smoothing=0.5)
    torch.testing.assert_close(loss, torch.tensor(50.0, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@each("cross_entropy", "bce_with_logits")
def test_gradients_in_half_precision_are_rounded_once(loss, dtype, device):
    """Within a unit of the truth, each for itself: p - 1 is formed in float32, whose own error is added."""
    input, target = loss.sample(33, 100, dtype=dtype, device=device, scale=5.0)
    grad = differentiate(loss.ours, input, target, reduction="sum")[1].double()
    exact = differentiate(loss.reference, input.double(), widen(target), reduction="sum")[1]
    allowed = exact.abs() * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps
    assert ((grad - exact).abs() <= allowed).all()


COUNTS = {  # rows: why; their mean and sum are known exactly
    torch.bfloat16: (257, "256 + 1 is 256 in bfloat16"),
    torch.float16: (70_000, "beyond float16's largest number"),
    torch.float32: (2**24 + 2**23, "2**24 + 1 is 2**24 in float32: a running count would stop there"),
}


@pytest.mark.parametrize(("dtype", "rows"), [(dtype, rows) for dtype, (rows, _) in COUNTS.items()], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_mean_over_more_rows_than_the_dtype_counts(dtype, rows, weighted, device):
    """One row expanded takes no memory; each row loses exactly 1.5, so the mean does."""
    input = torch.tensor([[-1.5]], dtype=dtype, device=device).expand(rows, 1)
    target = torch.zeros((), dtype=torch.uint8, device=device).expand(rows)
    weight = torch.full((1,), 2.0, dtype=dtype, device=device) if weighted else None
    assert fusedloss.nll_loss(input, target, weight).item() == 1.5


@pytest.mark.parametrize(("dtype", "rows"), [(dtype, rows) for dtype, (rows, _) in COUNTS.items()], ids=str)
def test_ignored_elements_leave_an_exact_count(dtype, rows, device):
    """A logit of 32 with label 0 loses exactly 32: so does the mean over the half that is not ignored."""
    input = torch.full((), 32.0, dtype=dtype, device=device).expand(rows // 2, 2)
    target = torch.tensor([0, 255], dtype=torch.uint8, device=device).expand(rows // 2, 2)
    assert fusedloss.binary_cross_entropy_with_logits(input, target, ignore_index=255).item() == 32.0


def test_sum_of_half_precision_losses_is_rounded_once(device):
    """1000 bfloat16 losses: adding rounded ones loses the third digit."""
    input, target = LOSSES["cross_entropy"].sample(1000, 33, dtype=torch.bfloat16, device=device)
    truth = fusedloss.reference.cross_entropy(input.double(), target, reduction="sum")
    assert fusedloss.cross_entropy(input, target, reduction="sum") == truth.to(torch.bfloat16)


def test_lse_of_half_precision_logits_is_float32(device):
    """Rounded to the logits' dtype, it would give rows of probabilities that add up to 0.98 or 1.02."""
    input, target = LOSSES["cross_entropy"].sample(33, 1000, dtype=torch.bfloat16, device=device)
    _, lse = fusedloss.cross_entropy(input, target, return_lse=True)
    assert lse.dtype == torch.float32
    total = (input.double() - lse.double().unsqueeze(1)).exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def test_no_small_gradient_is_dropped(device):
    """A class of probability 1e-12 still gets its gradient, to float32's precision."""
    input = torch.tensor([[0.0, -27.631]], device=device)
    grad = differentiate(fusedloss.cross_entropy, input, torch.tensor([0], device=device), input.new_ones(()))[1]
    torch.testing.assert_close(grad[0, 1].double(), input[0, 1].double().sigmoid(), rtol=1e-6, atol=0)


def test_elements_far_into_memory(device):
    """The second row starts 2**31 elements after the first; the memory between is reserved, never touched."""
    try:
        memory = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space: {error}")
    rows = memory.as_strided((2, 8), (2**31, 1))
    for loss in LOSSES.values():
        input, target = loss.sample(2, 8, dtype=torch.bfloat16, device=device)
        rows.copy_(input)
        torch.testing.assert_close(
            differentiate(loss.ours, rows, target), differentiate(loss.ours, input, target), rtol=0, atol=0
        )


@each_index_loss
def test_images_under_deterministic_algorithms(loss, device):
    """Allowed, and bitwise the same every time."""
    input, target = loss.sample(4, 19, 32, 33, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (differentiate(loss.ours, input, target, reduction="sum") for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@each("cross_entropy", "cross_entropy_soft", "nll")
def test_rows_of_every_width(loss, offset, device):
    """1 to 70 classes: every length of tail after up to four vectors, from an odd address too."""
    for classes in range(1, 71):
        input, target = loss.sample(5, classes, device=device)
        shifted = torch.cat([input.new_zeros(offset), input.flatten()])[offset:].view_as(input)
        compare(loss, shifted, target, reduction="none")


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@each("cross_entropy", "cross_entropy_soft", "bce_with_logits")
def test_rows_of_every_width_are_overwritten_once(loss, offset, device):
    """A tail that is worked on twice, in place, starts from the gradient of the first time."""
    for classes in [*range(1, 71), 1025]:
        input, target = loss.sample(5, classes, device=device)
        expected = differentiate(lambda x, y: loss.ours(x, y, grad_in_forward=False), input, None, y=target)
        leaf = input.requires_grad_()
        output = torch.cat([input.new_zeros(offset), leaf.flatten()])[offset:].view_as(leaf)
        value = loss.ours(output, target, inplace=True)
        (grad,) = torch.autograd.grad(value, leaf, expected[0].new_tensor(-7.5 / 8))
        torch.testing.assert_close([value.detach(), grad], expected)


@each("bce_with_logits", "bce")
def test_an_ignored_element_does_not_count_in_the_mean(loss, device):
    input, target = loss.sample(8, 5, device=device)
    kept = torch.rand(8, 5, device=device) < 0.5
    marked = target.masked_fill(~kept, -1)
    value, grad, _ = differentiate(loss.ours, input, marked, ignore_index=-1)
    expected, expected_grad, _ = differentiate(loss.native, input[kept], target[kept])
    torch.testing.assert_close([value, grad[kept]], [expected, expected_grad])


@each()
def test_a_gradient_of_a_gradient_is_not_silently_lost(loss, device):
    """With create_graph the gradient itself has one wherever it depends on the input."""
    input, target = loss.sample(8, 5, device=device)
    value = loss.ours(input.requires_grad_(), target)
    (grad,) = torch.autograd.grad(value, input, create_graph=True)
    assert grad.requires_grad or loss.function == "nll_loss"
