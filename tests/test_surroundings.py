"""What surrounds a call must not change its gradient: dispatch modes, hooks of saved tensors, checkpoints, compiled
autograd, batches of grad_outputs, and what is written to the input after the loss."""

import contextlib
import logging
from functools import partial

import pytest
import torch
from support import each, each_reduction, short
from torch._dynamo import compiled_autograd
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


class Watch(TorchDispatchMode):
    """A user's mode, which lets everything pass."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


MODES = {"a user's": Watch, "flop counter": partial(FlopCounterMode, display=False)}
STRETCHES = {"forward": (True, False), "backward": (False, True), "both": (True, True)}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
each_stretch = pytest.mark.parametrize("stretch", STRETCHES.values(), ids=STRETCHES)


def chunks(loss, device):
    """(hidden states, targets) of four chunks, and the leaf of a head behind them."""
    hidden = torch.randn(16, 8, device=device)
    _, target = loss.sample(16, 12, device=device)
    head = torch.randn(8, 12, device=device, requires_grad=True)
    return list(zip(hidden.chunk(4), target.chunk(4), strict=True)), head


def head_and_loss(function, loss, hidden, head, target):
    logits = hidden @ head
    if loss.module in ("NLLLoss", "BCELoss"):
        logits = logits.log_softmax(1) if loss.module == "NLLLoss" else logits.sigmoid()
    return function(logits, target)


@each_mode
@each_stretch
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpoint"])
@each()
def test_a_mode_decides_nothing(loss, recompute, stretch, mode, device):
    pairs, head = chunks(loss, device)

    def gradient(function, modes):
        in_forward, in_backward = (mode() if wanted else contextlib.nullcontext() for wanted in modes)
        step = partial(head_and_loss, function, loss)
        with in_forward:
            parts = [
                checkpoint(step, h, head, t, use_reentrant=False) if recompute else step(h, head, t) for h, t in pairs
            ]
            total = sum(parts) / 3
        with in_backward:
            return torch.autograd.grad(total, head)[0]

    expected = gradient(loss.ours, (False, False))
    assert torch.equal(gradient(loss.ours, stretch), expected)
    torch.testing.assert_close(expected, gradient(loss.native, (False, False)))


@each("cross_entropy", "bce_with_logits", "bce")
def test_the_road_is_the_same_under_a_mode(loss, device):
    input, target = loss.sample(4, 3, device=device)
    names = []
    for mode in (contextlib.nullcontext(), Watch()):
        with mode:
            names.append(loss.ours(input.requires_grad_(), target).grad_fn.name())
    assert names[0] == names[1]


# --- Hooks of saved tensors --------------------------------------------------------------------------------


class Keep:
    """Hands out what it was given, and sees later whether somebody has written to it."""

    def __init__(self):
        self.kept = []

    def pack(self, tensor):
        self.kept.append((tensor, tensor.clone()))
        return tensor

    def unpack(self, tensor):
        return tensor

    def check(self):
        assert self.kept
        for tensor, copy in self.kept:
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0)


class KeepArrays(Keep):
    """Memory that is not torch's, of which it knows no other owner."""

    def pack(self, tensor):
        array = tensor.detach().cpu().numpy().copy()
        self.kept.append((torch.from_numpy(array), torch.from_numpy(array.copy())))
        return array, tensor.device

    def unpack(self, packed):
        return torch.from_numpy(packed[0]).to(packed[1])


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": True}], ids=["", "in forward"])
@pytest.mark.parametrize("hooks", [Keep, KeepArrays], ids=["tensors", "arrays"])
@each()
def test_nobody_writes_to_what_hooks_keep(loss, hooks, options, device):
    if loss.module == "NLLLoss" and options:
        pytest.skip("the only road is the other one")
    input, target = loss.sample(4, 3, device=device)
    keep = hooks()
    leaf = input.requires_grad_()
    with saved_tensors_hooks(keep.pack, keep.unpack):
        value = loss.ours(leaf * 1.0, target, **options)
    (grad,) = torch.autograd.grad(value * 3, leaf)
    keep.check()
    torch.testing.assert_close(grad, 3 * torch.autograd.grad(loss.native(leaf, target), leaf)[0])
    grad.fill_(7)
    keep.check()


@each("cross_entropy", "bce_with_logits")
def test_nobody_writes_to_an_overwritten_input_that_hooks_keep(loss, device):
    input, target = loss.sample(4, 3, device=device)
    keep = Keep()
    leaf = input.requires_grad_()
    with saved_tensors_hooks(keep.pack, keep.unpack):
        value = loss.ours(leaf * 1.0, target, inplace=True)
    (grad,) = torch.autograd.grad(value * 3, leaf)
    torch.testing.assert_close(grad, 3 * torch.autograd.grad(loss.native(leaf, target), leaf)[0])
    keep.check()


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@each("cross_entropy", "bce_with_logits")
def test_offloading(loss, inplace, device):
    input, target = loss.sample(4, 3, device=device)
    leaf = input.requires_grad_()
    with save_on_cpu():
        value = loss.ours(leaf * 1.0, target, inplace=inplace)
    (grad,) = torch.autograd.grad(value * 3, leaf)
    torch.testing.assert_close(grad, 3 * torch.autograd.grad(loss.native(leaf, target), leaf)[0])


@each("cross_entropy", "bce_with_logits", "bce")
def test_the_gradient_is_left_to_backward_where_hooks_take_what_is_saved(loss, device):
    """A checkpoint throws away what forward saves: a gradient would be written for nothing."""
    input, target = loss.sample(4, 3, device=device)
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert "WithGrad" not in loss.ours(input.requires_grad_(), target).grad_fn.name()
        assert "WithGrad" in loss.ours(input, target, grad_in_forward=True).grad_fn.name()


# --- Compiled autograd, batches of grad_outputs ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@each_reduction
@each()
def test_compiled_autograd(loss, reduction, device):
    """A loss computed eagerly; its backward, alone, through a compiler."""
    logging.disable(logging.WARNING)
    input, target = loss.sample(6, 5, device=device)
    gradients = []
    for compiles in (False, True):
        torch._dynamo.reset()
        leaf = input.clone().requires_grad_()
        value = (loss.ours(leaf * 1.0, target, reduction=reduction) * 2.5).sum()
        context = (
            compiled_autograd._enable(partial(torch.compile, backend="eager")) if compiles else contextlib.nullcontext()
        )
        with context:
            value.backward()
        gradients.append(leaf.grad)
    logging.disable(logging.NOTSET)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_reduction
@each()
def test_a_batch_of_grad_outputs(loss, reduction, device):
    input, target = loss.sample(4, 3, device=device)

    def gradients(function):
        value = function(input.requires_grad_(), target, reduction=reduction)
        seeds = torch.arange(1.0, 1 + 3 * value.numel(), device=device).view(3, *value.shape)
        batched = torch.autograd.grad(value, input, seeds, retain_graph=True, is_grads_batched=True)[0]
        return batched, torch.autograd.functional.jacobian(
            lambda x: function(x, target, reduction=reduction), input, vectorize=True
        )

    torch.testing.assert_close(gradients(loss.ours), gradients(loss.native))


# --- What is written after the loss ------------------------------------------------------------------------


@each_reduction
@each()
def test_an_input_that_is_changed_after_the_loss(loss, reduction, device):
    """Native raises, or gives the gradient of the input as it was; ours never that of what it has become."""
    input, target = loss.sample(4, 3, device=device)

    def gradient(function):
        leaf = input.clone().requires_grad_()
        hidden = leaf * 1.0
        value = function(hidden, target, reduction=reduction).sum()
        with torch.no_grad():
            hidden.zero_()
        return torch.autograd.grad(value * 2, leaf)[0]

    leaf = input.clone().requires_grad_()
    expected = torch.autograd.grad(2 * loss.native(leaf, target, reduction=reduction).sum(), leaf)[0]
    # On the road of an ordinary training step the input is not looked at again.
    if loss.module == "CrossEntropyLoss" and reduction != "none":
        torch.testing.assert_close(gradient(loss.ours), expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(loss.ours)


@pytest.mark.parametrize("context", ["checkpoint", "tensors", "arrays"])
@each_reduction
@each("cross_entropy", "cross_entropy_soft")
def test_logits_that_are_changed_where_hooks_keep_them(loss, reduction, context, device):
    """Autograd does not look at versions where hooks have been; a gradient of what they have become is no answer."""
    input, target = loss.sample(4, 3, device=device)
    leaf = input.requires_grad_()

    def changed(leaf):
        hidden = leaf * 1.0
        value = loss.ours(hidden, target, reduction=reduction).sum()
        with torch.no_grad():
            hidden.mul_(3)
        return value

    if context == "checkpoint":
        value = checkpoint(changed, leaf, use_reentrant=False)
    else:
        keep = Keep() if context == "tensors" else KeepArrays()
        with saved_tensors_hooks(keep.pack, keep.unpack):
            value = changed(leaf)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, leaf)


@each("cross_entropy", "cross_entropy_soft")
def test_logits_that_are_changed_between_the_derivatives(loss, device):
    input, target = loss.sample(4, 3, device=device)
    hidden = input.requires_grad_() * 1.0
    (first,) = torch.autograd.grad(loss.ours(hidden, target), input, create_graph=True)
    with torch.no_grad():
        hidden.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.square().sum(), input)


@each("cross_entropy", "cross_entropy_soft")
def test_second_derivatives_of_an_input_that_is_changed_raise(loss, device):
    input, target = loss.sample(4, 3, device=device)
    hidden = input.requires_grad_() * 1.0
    value = loss.ours(hidden, target)
    with torch.no_grad():
        hidden.zero_()
    with pytest.raises(RuntimeError, match="needs the input, which has been modified by an inplace"):
        torch.autograd.grad(value, input, create_graph=True)


@each("cross_entropy_soft", "bce_with_logits", "bce")
@pytest.mark.parametrize("of_inference", ["input", "target"])
def test_tensors_of_inference_mode_beside_one_that_requires_grad(loss, of_inference, device):
    """A teacher's probabilities; native saves some such tensors, and refuses others."""
    pair = dict(zip(("input", "target"), loss.sample(4, 3, device=device), strict=True))
    (leaf,) = (pair[name].requires_grad_() for name in pair if name != of_inference)
    expected = torch.autograd.grad(loss.native(**pair), leaf)
    with torch.inference_mode():
        pair[of_inference] = pair[of_inference].clone()
    torch.testing.assert_close(torch.autograd.grad(loss.ours(**pair), leaf), expected)


@each("cross_entropy", "nll")
def test_class_indices_and_weights_of_inference_mode(loss, device):
    input, target = loss.sample(4, 3, device=device)
    weight = torch.tensor([0.5, 2.0, 1.0], device=device)
    expected = torch.autograd.grad(loss.native(input.requires_grad_(), target, weight), input)
    with torch.inference_mode():
        target, weight = target.clone(), weight.clone()
    torch.testing.assert_close(torch.autograd.grad(loss.ours(input, target, weight), input), expected)


# --- Infinity and NaN flow back ----------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("road", ["in forward", "in backward", "inplace", "kept graph"])
@each("cross_entropy", "nll", "bce_with_logits", "bce")
def test_ignored_positions_stay_zero(loss, road, dtype, factor, device):
    if (loss.module == "NLLLoss" and road != "in backward") or (loss.module == "BCELoss" and road == "inplace"):
        pytest.skip("the loss has no such road")
    input, target = loss.sample(5, 3, dtype=dtype, device=device)
    target = target.round()
    target[1] = target[4] = -100
    options = {"ignore_index": -100}
    if loss.module != "NLLLoss":
        options |= {"grad_in_forward": road != "in backward"}
    if road == "inplace":
        options["inplace"] = True
    leaf = input.requires_grad_()
    value = loss.ours(leaf * 1.0, target, **options)
    (grad,) = torch.autograd.grad(value * factor, leaf, retain_graph=road == "kept graph")
    assert grad[[1, 4]].eq(0).all()
    kept = torch.autograd.grad(loss.native(leaf[[0, 2, 3]], target[[0, 2, 3]]) * factor, leaf)[0]
    # Where all of a row flows into it, native has inf - inf.
    assert torch.equal(grad[[0, 2, 3]].isfinite(), kept[[0, 2, 3]].isfinite())
