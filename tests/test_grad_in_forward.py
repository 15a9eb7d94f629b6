"""The gradient written in forward: when it is, that nothing can tell but the clock, grad_scale and inplace."""

import re
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from support import LOSSES, differentiate, each, each_dtype, moved, short
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fusedloss

each_loss = each("cross_entropy", "cross_entropy_soft", "bce_with_logits", "bce")
each_inplace_loss = each("cross_entropy", "cross_entropy_soft", "bce_with_logits")


def in_forward(loss):
    return "WithGrad" in loss.grad_fn.name()


def leaf_and_output(input):
    """A leaf, and a layer's output with its values, which may be overwritten."""
    leaf = input.detach().clone().requires_grad_()
    return leaf, leaf.clone()


# --- When --------------------------------------------------------------------------------------------------


@each_dtype
@each_loss
def test_the_rule_of_auto(loss, dtype, device):
    input, target = loss.sample(4, 3, dtype=dtype, device=device)
    input.requires_grad_()
    half = dtype == torch.float16
    assert in_forward(loss.ours(input, target)) == (not half)
    assert in_forward(loss.ours(input, target, reduction="sum")) == (not half)
    assert not in_forward(loss.ours(input, target, reduction="none"))
    assert not in_forward(loss.ours(input, target, grad_in_forward=False))
    assert in_forward(loss.ours(input, target, grad_scale=1024.0))
    assert in_forward(loss.ours(input, target, grad_in_forward=True))
    if target.is_floating_point():
        assert not in_forward(loss.ours(input, target.requires_grad_()))


def test_auto_leaves_a_differentiable_lse_to_backward(device):
    input, target = LOSSES["cross_entropy"].sample(4, 3, device=device)
    assert not in_forward(fusedloss.cross_entropy(input.requires_grad_(), target, return_lse=True)[0])


@each("cross_entropy", "bce_with_logits", "bce")
def test_it_can_be_asked_for_where_a_compiler_traces(loss, device):
    input, target = loss.sample(8, 5, device=device)
    step = partial(loss.ours, target=target.round(), grad_in_forward=True, grad_scale=0.5)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(differentiate(compiled, input, None), differentiate(step, input, None))


IMPOSSIBLE = {"reduction": {"reduction": "none"}, "lse": {"return_lse": True}, "off": {"grad_in_forward": False}}


@pytest.mark.parametrize("options", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_written_in_forward_is_refused(options, device):
    input, target = LOSSES["cross_entropy"].sample(4, 3, device=device)
    input = leaf_and_output(input)[1]
    if "grad_in_forward" not in options:
        with pytest.raises(ValueError, match="grad_in_forward=True needs reduction"):
            fusedloss.cross_entropy(input, target, grad_in_forward=True, **options)
    with pytest.raises(ValueError, match="inplace=True writes the gradient over the input in forward"):
        fusedloss.cross_entropy(input, target, inplace=True, **options)


@each_loss
def test_arguments_are_checked(loss, device):
    input, target = loss.sample(4, 3, device=device)
    input.requires_grad_()
    with pytest.raises(ValueError, match="grad_in_forward must be 'auto', True or False, got 'yes'"):
        loss.ours(input, target, grad_in_forward="yes")
    for bad in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"grad_scale must be finite and not 0, got {bad}"):
            loss.ours(input, target, grad_scale=bad)
    with pytest.raises(TypeError, match="grad_scale must be a float, got str: '2'"):
        loss.ours(input, target, grad_scale="2")
    with pytest.raises(RuntimeError, match=r"grad_scale must be one floating-point number.*\[2\]"):
        loss.ours(input, target, grad_scale=torch.ones(2, device=device))


# --- Nothing can tell --------------------------------------------------------------------------------------


@each_loss
def test_every_backward_gives_its_own_gradient(loss, device):
    """Whatever grad_outputs came before it, and whatever the caller has done to the gradients they gave."""
    input, target = loss.sample(4, 3, device=device)
    input.requires_grad_()
    value = loss.ours(input, target)
    expected = torch.autograd.grad(loss.native(input, target), input)[0]
    for factor in (2.0, 1.0, -3.0, 1.0):
        (grad,) = torch.autograd.grad(value, input, torch.tensor(factor, device=device), retain_graph=True)
        torch.testing.assert_close(grad, factor * expected)
        grad.fill_(7)
    torch.testing.assert_close(torch.autograd.grad(value, input, torch.tensor(5.0, device=device))[0], 5 * expected)


@each_dtype
@each_loss
def test_a_known_grad_output_changes_nothing(loss, dtype, device):
    """A power of two scales every bit alike, but for the smallest numbers."""
    input, target = loss.sample(33, 10, dtype=dtype, device=device)
    input.requires_grad_()
    for scale in (4.0, torch.tensor(4.0, device=device), torch.tensor([4.0], dtype=torch.float64, device=device)):
        value = loss.ours(input, target, grad_scale=scale)
        assert torch.equal(value, loss.ours(input, target))
        (grad,) = torch.autograd.grad(value, input, torch.tensor(4.0, dtype=value.dtype, device=device))
        expected = torch.autograd.grad(4 * loss.ours(input, target, grad_in_forward=True), input)[0]
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(grad, expected, rtol=0, atol=4 * smallest)


def test_the_scale_of_a_grad_scaler_keeps_small_float16_gradients(device):
    """Some 1e-8 large: unscaled they are 0 in float16."""
    input = torch.zeros(1000, 1000, dtype=torch.float16, device=device)
    target = torch.zeros(1000, dtype=torch.long, device=device)
    scale = torch.tensor(2.0**10, device=device)
    leaf = input.requires_grad_()
    with torch.autocast(device, dtype=torch.float16):
        loss = fusedloss.cross_entropy(leaf, target, grad_scale=scale)
    (loss * scale).backward()
    expected = torch.full((1000,), 2.0**10 * 1e-6, device=device)
    torch.testing.assert_close(leaf.grad[:, 1].float(), expected, rtol=1e-3, atol=0)


DERIVATIVES = {
    "plain": {},
    "weight, smoothing": {"weight": torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), "label_smoothing": 0.1},
    "sum, scaled": {"reduction": "sum", "grad_scale": 0.25},
    "z_loss, softcap": {"z_loss": 0.1, "logit_softcap": 2.0},
}


@pytest.mark.parametrize("options", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4)], ids=str)
@each("cross_entropy", "cross_entropy_soft")
def test_derivatives_of_cross_entropy(loss, shape, options, device):
    """The second are taken at logits recovered from the gradient, where it tells them."""
    input, target = loss.sample(*shape, dtype=torch.float64, device=device)
    if loss.target == "index":
        target.view(-1)[1] = -100
    step = partial(loss.ours, target=target, **moved(options, device))
    assert in_forward(step(input.requires_grad_()))
    assert gradcheck(step, (input,))
    assert gradgradcheck(step, (input,))


@each("bce_with_logits", "bce")
def test_derivatives_of_binary_cross_entropy(loss, device):
    input, target = loss.sample(4, 3, dtype=torch.float64, device=device)
    options = {"weight": torch.rand(3, dtype=torch.float64, device=device), "ignore_index": 1, "grad_scale": 0.25}
    step = partial(loss.ours, target=target.round(), **options)
    assert in_forward(step(input.requires_grad_()))
    assert gradcheck(step, (input,))
    assert gradgradcheck(step, (input,))


def test_the_logits_can_be_freed_before_backward(device):
    leaf, output = leaf_and_output(LOSSES["cross_entropy"].sample(4, 3, device=device)[0])
    loss = fusedloss.cross_entropy(output, torch.tensor([0, 1, 2, 0], device=device))
    alive = weakref.ref(output)
    del output
    assert alive() is None
    loss.backward()
    assert leaf.grad is not None


@each_loss
def test_the_gradient_is_handed_over_without_a_copy(loss, device):
    input, target = loss.sample(256, 100, device=device)
    value = loss.ours(input.requires_grad_(), target)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value.backward()
        allocated = torch.cuda.max_memory_allocated() - before
    else:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            value.backward()
        allocated = sum(max(event.cpu_memory_usage, 0) for event in profile.function_events)
    assert input.grad is not None
    assert allocated < input.nbytes


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages")
def test_a_large_gradient_asks_for_huge_pages():
    input = torch.randn(4096, 1000, requires_grad=True)
    fusedloss.cross_entropy(input, torch.zeros(4096, dtype=torch.long)).backward()
    middle = input.grad[2048].data_ptr()
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]
    ranges = [[int(address, 16) for address in mapping.split()[0].split("-")] for mapping in mappings]
    (mapping,) = [m for m, (first, last) in zip(mappings, ranges, strict=True) if first <= middle < last]
    assert " hg" in re.search("VmFlags:(.*)", mapping)[1]


@each_loss
def test_checkpointing(loss, device):
    input, target = loss.sample(4, 3, device=device)
    expected = differentiate(partial(loss.ours, target=target), input, None)
    step = partial(checkpoint, loss.ours, target=target, use_reentrant=False)
    torch.testing.assert_close(differentiate(step, input, None), expected, rtol=0, atol=0)


# --- inplace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (5, 2500), (2, 3, 4, 5), (128, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=short)
@each_inplace_loss
def test_the_gradient_takes_the_place_of_the_input(loss, shape, dtype, device):
    input, target = loss.sample(*shape, dtype=dtype, device=device)
    expected_leaf, leaf = input.clone().requires_grad_(), input.clone().requires_grad_()
    expected = loss.ours(expected_leaf, target)
    expected.backward()
    output = leaf.clone()
    places = []
    output.register_hook(lambda grad: places.append(grad.data_ptr()))
    value = loss.ours(output, target, inplace=True)
    assert torch.equal(value, expected)
    assert torch.equal(output, expected_leaf.grad)
    value.backward()
    assert places == [output.data_ptr()]
    assert torch.equal(leaf.grad, expected_leaf.grad)


def test_inplace_takes_any_strides(device):
    input, target = LOSSES["cross_entropy"].sample(4, 3, 5, 6, device=device)
    leaf = input.requires_grad_()
    expected = torch.autograd.grad(fusedloss.cross_entropy(leaf, target), leaf)[0]
    for change in (
        lambda x: x.clone(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3).clone(memory_format=torch.contiguous_format).transpose(0, 3),
        lambda x: torch.cat([x, x], 3)[..., :6],
    ):
        output = change(leaf)
        fusedloss.cross_entropy(output, target, inplace=True)
        torch.testing.assert_close(output, expected)


@each_inplace_loss
def test_a_conflicting_use_of_an_overwritten_input_raises(loss, device):
    """Something saved it before the loss: with the gradient in its place, that gradient would be silently wrong."""
    input, target = loss.sample(4, 3, device=device)
    _, output = leaf_and_output(input)
    other = output.square().sum()
    value = loss.ours(output, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (value + other).backward()


@each_inplace_loss
def test_writing_to_the_gradient_before_backward_raises(loss, device):
    input, target = loss.sample(4, 3, device=device)
    _, output = leaf_and_output(input)
    value = loss.ours(output, target, inplace=True)
    with torch.no_grad():
        output.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@each_inplace_loss
def test_without_a_gradient_the_input_is_only_read(loss, device):
    input, target = loss.sample(4, 3, device=device)
    before = input.clone()
    loss.ours(input, target, inplace=True)
    with torch.no_grad():
        loss.ours(input.requires_grad_(), target, inplace=True)
    assert torch.equal(input, before)
    assert input._version == 0


def test_an_invalid_target_leaves_the_input_as_it_is():
    _, output = leaf_and_output(torch.randn(4, 3))
    before = output.detach().clone()
    with pytest.raises(IndexError, match="target 3 at position 2"):
        fusedloss.cross_entropy(output, torch.tensor([0, 1, 3, 0]), inplace=True)
    assert torch.equal(output, before)


@each_inplace_loss
def test_an_input_that_must_not_be_overwritten_is_refused(loss, device):
    input, target = loss.sample(4, 3, device=device)
    with pytest.raises(RuntimeError, match="cannot overwrite an input that is a leaf"):
        loss.ours(input.requires_grad_(), target, inplace=True)
    with pytest.raises(RuntimeError, match="or a view of one"):
        loss.ours(input.view(4, 3), target, inplace=True)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        loss.ours(input[:1].expand(4, 3), target, inplace=True)


@each("cross_entropy_soft", "bce_with_logits")
def test_an_input_that_shares_memory_with_the_target_is_refused(loss, device):
    output = leaf_and_output(torch.rand(4, 3, device=device))[1]
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        loss.ours(output, output.detach(), inplace=True)


@each_inplace_loss
def test_every_backward_of_an_overwritten_input_gives_its_own_gradient(loss, device):
    input, target = loss.sample(4, 3, device=device)
    expected_leaf = input.clone().requires_grad_()
    expected = torch.autograd.grad(loss.native(expected_leaf, target), expected_leaf)[0]
    leaf, output = leaf_and_output(input)
    value = loss.ours(output, target, inplace=True)
    for factor in (2.0, 1.0, -3.0):
        (grad,) = torch.autograd.grad(value, leaf, torch.tensor(factor, device=device), retain_graph=True)
        torch.testing.assert_close(grad, factor * expected)


def second_derivative(loss, input, target, **options):
    leaf = input.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf * 1.5, target, **options), leaf, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), leaf)[0]


@each("cross_entropy", "cross_entropy_soft")
def test_second_derivatives_of_overwritten_logits(loss, device):
    input, target = loss.sample(4, 3, dtype=torch.float64, device=device)
    actual = second_derivative(loss.ours, input, target, inplace=True)
    torch.testing.assert_close(actual, second_derivative(loss.native, input, target))


@pytest.mark.parametrize(("name", "options"), [("cross_entropy", {"z_loss": 0.1}), ("bce_with_logits", {})])
def test_second_derivatives_that_need_what_was_overwritten_are_refused(name, options, device):
    loss = LOSSES[name]
    with pytest.raises(RuntimeError, match="inplace=True has overwritten"):
        second_derivative(loss.ours, *loss.sample(4, 3, device=device), inplace=True, **options)


def test_a_compiled_call_ignores_inplace(device):
    """The compiler plans the memory; the operator's schema promises it that the input is only read."""
    input, target = LOSSES["cross_entropy"].sample(8, 5, device=device)
    step = torch.compile(partial(fusedloss.cross_entropy, inplace=True), backend="aot_eager", fullgraph=True)
    expected = differentiate(fusedloss.cross_entropy, input, target)
    torch.testing.assert_close(differentiate(lambda x, t: step(x * 1, t), input, target), expected)
