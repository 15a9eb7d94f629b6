"""The gradient written in forward: when it is, that nothing can tell but the clock, grad_scale and inplace."""

import re
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
    bounded = loss.module != "BCELoss"
    assert in_forward(loss.ours(input, target)) == (not half)
    assert in_forward(loss.ours(input, target, reduction="sum")) == (not half)
    assert not in_forward(loss.ours(input, target, reduction="none"))
    assert not in_forward(loss.ours(input, target, grad_in_forward=False))
    assert in_forward(loss.ours(input, target, grad_scale=1024.0)) == (bounded or not half)
    if bounded or not half:
        assert in_forward(loss.ours(input, target, grad_in_forward=True))
    else:
        with pytest.raises(ValueError, match="grad_in_forward=True needs another type than float16"):
            loss.ours(input, target, grad_in_forward=True)
    if target.is_floating_point():
        assert not in_forward(loss.ours(input, target.requires_grad_()))


@pytest.mark.parametrize("name", ["return_lse", "return_entropy", "return_argmax"])
def test_auto_leaves_what_else_is_differentiable_to_backward(name, device):
    input, target = LOSSES["cross_entropy"].sample(4, 3, device=device)
    loss, _ = fusedloss.cross_entropy(input.requires_grad_(), target, **{name: True})
    assert in_forward(loss) == (name == "return_argmax")


def test_auto_knows_weights_of_samples_and_a_denominator(device):
    input, target = LOSSES["cross_entropy"].sample(4, 3, device=device)
    options = {"sample_weight": torch.rand(4, device=device), "denominator": 7}
    assert in_forward(fusedloss.cross_entropy(input.requires_grad_(), target, **options))


@each("cross_entropy", "bce_with_logits", "bce")
def test_it_can_be_asked_for_where_a_compiler_traces(loss, device):
    input, target = loss.sample(8, 5, device=device)
    step = partial(loss.ours, target=target.round(), grad_in_forward=True, grad_scale=0.5)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(differentiate(compiled, input, None), differentiate(step, input, None))


IMPOSSIBLE = {
    "reduction": {"reduction": "none"},
    "lse": {"return_lse": True},
    "entropy": {"return_entropy": True},
    "off": {"grad_in_forward": False},
}


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
    if loss.module == "BCELoss" and dtype == torch.float16:
        pytest.skip("float16 is refused: see the rule of auto")
    input, target = loss.sample(33, 10, dtype=dtype, device=device)
    input.requires_grad_()
    for scale in (4.0, torch.tensor(4.0, device=device), torch.tensor([4.0], dtype=torch.float64, device=device)):
        value = loss.ours(input, target, grad_scale=scale)
        assert torch.equal(value, loss.ours(input, target))
        (grad,) = torch.autograd.grad(value, input, torch.tensor(4.0, dtype=value.dtype, device=device))
        expected = torch.autograd.grad(4 * loss.ours(input, target, grad_in_forward=True), input)[0]
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(grad, expected, rtol=0, atol=4 * smallest)


HINTS = [65536.0, 2.0**20, 1e-6, 1.458e-303, -3.0]
HINTS += [torch.tensor(value) for value in (0.0, torch.inf, -torch.inf, torch.nan, 1e-40)]


@pytest.mark.parametrize("hint", HINTS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@each_dtype
@each_loss
def test_no_result_depends_on_the_hint(loss, dtype, reduction, hint, device):
    """Whatever is announced, and whatever then comes: a GradScaler may shrink its scale, or a caller be wrong."""
    input, target = loss.sample(33, 10, dtype=dtype, device=device)
    hint = moved(hint, device)

    def gradient(grad_output, **options):
        leaf = input.detach().requires_grad_()
        with torch.autocast(device, torch.float16, enabled=dtype == torch.float16 and device == "cpu"):
            value = loss.ours(leaf, target, reduction=reduction, **options)
        return torch.autograd.grad(value, leaf, value.new_tensor(grad_output))[0].double()

    for grad_output in (1.0, -1024.0):
        expected = gradient(grad_output, grad_in_forward=False)
        error = (gradient(grad_output, grad_scale=hint) - expected).norm() / expected.norm()
        assert error <= 4 * torch.finfo(dtype).eps


OPTIONS_WITH_A_RANGE = {
    "weights": ("cross_entropy", {"weight": torch.full((10,), 1e4)}),
    "z loss": ("cross_entropy", {"z_loss": 1e3}),
    "ignored": ("cross_entropy", {"ignore_index": 3}),
    "large probabilities": ("cross_entropy_soft", {}),
    "weights of both signs": ("cross_entropy", {"weight": torch.linspace(-3, 1, 10)}),
    "positive weights": ("bce_with_logits", {"weight": torch.full((10,), 100.0), "pos_weight": torch.tensor(300.0)}),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("name", "options"), OPTIONS_WITH_A_RANGE.values(), ids=OPTIONS_WITH_A_RANGE)
def test_float16_gradients_stay_in_range_until_backward(name, options, reduction, device):
    """The largest of a gradient that is written in forward is bounded, whatever its weights; backward has the rest."""
    loss = LOSSES[name]
    input, target = moved(loss.sample(33, 10), device)
    if name == "cross_entropy_soft":
        target = target * 1e4
    options = moved(options, device) | {"reduction": reduction}
    leaf = input.half().requires_grad_()
    expected = torch.autograd.grad(
        loss.reference(wide := leaf.detach().float().requires_grad_(), target, **options), wide
    )[0]
    with torch.autocast(device, torch.float16):
        value = loss.ours(leaf, target, grad_scale=65536.0, **options)
    assert in_forward(value)
    factor = 1000 / expected.abs().max()
    (grad,) = torch.autograd.grad(value, leaf, factor)
    torch.testing.assert_close(grad.float(), expected * factor, rtol=2e-3, atol=1e-3)


ROADS = {"last": {}, "kept graph": {"retain_graph": True}}


@pytest.mark.parametrize("factor", [1 / 3, 1 / 7, 65536.0], ids=str)
@pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)
@pytest.mark.parametrize("layout", ["dense", "gaps", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@each("cross_entropy", "bce_with_logits")
def test_a_factor_is_not_rounded_before_it_multiplies(loss, dtype, layout, road, factor, device):
    """A bias, the same for all elements, that no averaging removes."""
    if layout == "compiled" and road:
        pytest.skip("compiled backward passes have donated their buffers")
    shape = (256, 64) if loss.target == "index" else (16, 16)  # a mean that float16 holds
    input, target = loss.sample(*shape, dtype=dtype, device=device)
    step = partial(loss.ours, target=target, grad_in_forward=True, inplace=layout == "gaps")
    if layout == "compiled":
        torch.compiler.reset()
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    leaf = input.requires_grad_()
    output = torch.cat([leaf, leaf.detach()], 1)[:, : shape[1]] if layout == "gaps" else leaf * 1
    with torch.autocast(device, dtype):
        value = step(output)
    (grad,) = torch.autograd.grad(value * factor, leaf, **road)
    wide = input.detach().double().requires_grad_()
    truth = (
        torch.autograd.grad(loss.native(wide, target.to(torch.float64 if target.is_floating_point() else None)), wide)[
            0
        ]
        * factor
    )
    bias = (grad.double() * truth).sum() / truth.square().sum() - 1
    assert abs(bias) < torch.finfo(dtype).eps / 8


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


@pytest.mark.parametrize("road", [True, False], ids=["in forward", "in backward"])
@each_loss
def test_checkpointing(loss, road, device):
    input, target = loss.sample(4, 3, device=device)
    step = partial(loss.ours, target=target, grad_in_forward=road)
    expected = differentiate(step, input, None)
    recomputed = partial(checkpoint, step, use_reentrant=False)
    torch.testing.assert_close(differentiate(recomputed, input, None), expected, rtol=0, atol=0)


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


def two_columns(x):
    return x[:, :4], x[:, 4:]


def two_stretches_of_rows(x):
    return x.narrow(0, 0, 3)[:, :4], x.narrow(0, 3, 3)[:, :4]


def every_other_column(x):
    return x[:, ::2], x[:, 1::2]


def three_quarters(x):
    return x[:3, :4].T.T, x[3:, 4:], x[3:, :4]


@pytest.mark.parametrize("views", [two_columns, two_stretches_of_rows, every_other_column, three_quarters])
@each_inplace_loss
def test_views_that_share_no_memory_each_hold_their_gradient(loss, views, device):
    """Though they share a version counter."""
    input = loss.sample(6, 8, device=device)[0]
    targets = [loss.sample(*part.shape, device=device)[1] for part in views(input)]

    def gradient(**options):
        leaf, output = leaf_and_output(input)
        total = sum(
            (k + 1) * loss.ours(x, t, **options) for k, (x, t) in enumerate(zip(views(output), targets, strict=True))
        )
        return torch.autograd.grad(total, leaf)[0]

    torch.testing.assert_close(gradient(inplace=True), gradient())


@each_inplace_loss
def test_a_view_that_is_overwritten_keeps_its_place_in_the_graph(loss, device):
    input = loss.sample(6, 8, device=device)[0]
    target = loss.sample(6, 4, device=device)[1]
    gradients = []
    for inplace in (False, True):
        _, output = leaf_and_output(input)
        view = output[:, 2:6]
        value = loss.ours(view, target, inplace=inplace)
        gradients.append(torch.autograd.grad(value * 2, [view, output]))
    torch.testing.assert_close(*gradients)


@each_inplace_loss
def test_views_that_overlap_are_refused(loss, device):
    input = loss.sample(6, 8, device=device)[0]
    target = loss.sample(6, 5, device=device)[1]
    _, output = leaf_and_output(input)
    value = loss.ours(output[:, :5], target, inplace=True)
    before = output.clone()
    with pytest.raises(RuntimeError, match="overlaps another which holds the gradient of a loss"):
        loss.ours(output[:, 3:], target, inplace=True)
    assert torch.equal(output, before)
    value.backward()  # then the memory is free
    loss.ours(output.detach()[:, 3:].requires_grad_() * 1, target, inplace=True)


@pytest.mark.parametrize("keep", [torch.Tensor.detach, torch.Tensor.numpy], ids=["detach", "numpy"])
@each_inplace_loss
def test_views_that_overlap_are_refused_where_hooks_keep_the_memory(loss, keep):
    input = loss.sample(6, 8)[0]
    target = loss.sample(6, 5)[1]
    _, output = leaf_and_output(input)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: keep(x.detach()), torch.as_tensor):
        value = loss.ours(output[:, :5], target, inplace=True)
        with pytest.raises(RuntimeError, match="overlaps another which holds the gradient of a loss"):
            loss.ours(output[:, 3:], target, inplace=True)
    with torch.no_grad():
        output.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_negated_view_is_not_overwritten():
    logits = torch.randn(4, 3, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace=True cannot overwrite a view that negates"):
        fusedloss.cross_entropy((logits * 1).conj().imag, torch.zeros(4, dtype=torch.long), inplace=True)


@pytest.mark.parametrize("columns", [slice(0, 4), slice(4, 8)], ids=["its own", "its neighbour's"])
@each_inplace_loss
def test_writing_beside_a_loss_is_not_taken_for_a_loss(loss, columns, device):
    """Two losses over one counter allow for each other, and for nothing else."""
    input = loss.sample(6, 8, device=device)[0]
    target = loss.sample(6, 4, device=device)[1]
    _, output = leaf_and_output(input)
    total = loss.ours(output[:, :4], target, inplace=True) + loss.ours(output[:, 4:], target, inplace=True)
    with torch.no_grad():
        output[:, columns].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@each_inplace_loss
def test_a_buffer_can_be_overwritten_again_after_backward(loss, device):
    """Memory that lives longer than a step: the second step's logits lie where the first's did."""
    input, target = loss.sample(6, 4, device=device)
    expected = torch.autograd.grad(loss.native(input.requires_grad_(), target), input)[0]
    buffer = torch.empty_like(input)
    for _ in range(3):
        leaf = input.detach().requires_grad_()
        output = Into.apply(leaf, buffer)
        torch.testing.assert_close(torch.autograd.grad(loss.ours(output, target, inplace=True), leaf)[0], expected)


class Into(torch.autograd.Function):
    """A layer that writes its output into memory of its own."""

    @staticmethod
    def forward(ctx, input, buffer):
        return buffer.detach().copy_(input)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


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
    for overlapping in (lambda x: x[:1].expand(4, 3), lambda x: x.flatten()[:6].unfold(0, 3, 1)):
        with pytest.raises(RuntimeError, match="several elements lie at one place in memory, got shape"):
            loss.ours(overlapping(leaf_and_output(input)[1]), target, inplace=True)


@each("cross_entropy_soft", "bce_with_logits")
def test_an_input_that_shares_memory_with_the_target_is_refused(loss, device):
    output = leaf_and_output(torch.rand(4, 3, device=device))[1]
    with pytest.raises(RuntimeError, match="overlaps target in memory"):
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


@each_inplace_loss
def test_second_derivatives_of_an_overwritten_input_are_refused(loss, device):
    with pytest.raises(RuntimeError, match="double backward needs the input that inplace=True has overwritten"):
        second_derivative(loss.ours, *loss.sample(4, 3, device=device), inplace=True)


def test_a_compiled_call_ignores_inplace(device):
    """The compiler plans the memory; the operator's schema promises it that the input is only read."""
    input, target = LOSSES["cross_entropy"].sample(8, 5, device=device)
    step = torch.compile(partial(fusedloss.cross_entropy, inplace=True), backend="aot_eager", fullgraph=True)
    expected = differentiate(fusedloss.cross_entropy, input, target)
    torch.testing.assert_close(differentiate(lambda x, t: step(x * 1, t), input, target), expected)
