"""LinearCrossEntropyLoss: native's module where torch has it, by state and behaviour, and what is added to it."""

import copy
import inspect
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from support import each_reduction
from torch import nn
from torch.overrides import TorchFunctionMode

import fusedloss
from fusedloss import native
from fusedloss.modules import LinearCrossEntropyLoss

needs_native = pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch before 2.13 has none")
D, C, N = 5, 4, 6
WEIGHT = [0.5, 2.0, 1.0, 0.25]
ADDED = {
    "z_loss": 0.1,
    "logit_scale": 0.5,
    "logit_softcap": 2.0,
    "return_lse": True,
    "return_entropy": True,
    "return_argmax": True,
    "memory": 2**20,
    "skip_ignored": False,
    "process_group": None,
    "reduce_input_grad": False,
    "backend": "cpu",
}
CONFIGURATIONS = {
    "plain": {},
    "bias": {"bias": True},
    "one position": {"out_features": (1,), "bias": True},
    "positions": {"out_features": (2, 3)},
    "positions and bias": {"out_features": (3, 2), "bias": True},
    "class weights": {"weight": WEIGHT},
    "ignored": {"ignore_index": 1, "weight": WEIGHT, "out_features": (2,)},
    "smoothed": {"label_smoothing": 0.1, "bias": True},
}
each_configuration = pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


def built(kind, dtype=torch.float64, seed=1, **options):
    """A module whose parameters are those of any other kind with the same options."""
    if options.get("weight") is not None:
        options["weight"] = torch.tensor(options["weight"], dtype=dtype)
    torch.manual_seed(seed)
    return kind(D, C, dtype=dtype, **options)


def pair(**options):
    """Our module and native's."""
    return built(LinearCrossEntropyLoss, **options), built(nn.LinearCrossEntropyLoss, **options)


def sample(module, probabilities=False, dtype=torch.float64):
    """(input, target) with an index that is ignored by default, and one that is where the module says so."""
    generator = torch.Generator().manual_seed(2)
    input = torch.randn(N, D, dtype=torch.float64, generator=generator).to(dtype)
    if probabilities:
        logits = torch.randn(N, C, *module.out_features, dtype=torch.float64, generator=generator)
        return input, logits.softmax(1).to(dtype)
    target = torch.randint(C, (N, *module.out_features), generator=generator)
    target[0], target[1] = -100 if module.ignore_index is None else module.ignore_index, 1
    return input, target


def expected(module, input, target, **options):
    """What a module is to compute, of plain torch, in float64."""
    linear, positions = module.linear, module.out_features
    logits = F.linear(input.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
    logits = logits.unflatten(-1, (C, *positions)) if positions else logits.movedim(-1, min(1, logits.dim() - 1))
    weight = None if module.weight is None else module.weight.double()
    given = {"reduction": module.reduction, "label_smoothing": module.label_smoothing, **options}
    ignored = -100 if module.ignore_index is None else module.ignore_index
    return fusedloss.reference.cross_entropy(logits, target, weight, ignored, **given)


def differentiated(module, input, target, **options):
    """The loss, or what else a call returns, and the gradients of the input and all parameters."""
    input = input.detach().requires_grad_()
    outputs = module(input, target, **options)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.is_floating_point()]
    seeds = [torch.linspace(0.5, 2.0, y.numel(), dtype=y.dtype).reshape(y.shape) for y in outputs]
    return outputs, torch.autograd.grad(outputs, [input, *module.parameters()], seeds)


def parameters(function):
    found = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in found]


# Against native's module.


@needs_native
def test_the_constructor_has_native_s_arguments_and_the_function_s():
    of_native, ours = parameters(nn.LinearCrossEntropyLoss), parameters(LinearCrossEntropyLoss)
    assert ours[: len(of_native)] == of_native
    function = inspect.signature(fusedloss.linear_cross_entropy).parameters
    assert [name for name, _, _ in ours[len(of_native) :]] == [name for name in function if name in ADDED]
    assert ours[len(of_native) :] == [item for item in parameters(fusedloss.linear_cross_entropy) if item[0] in ADDED]


@needs_native
@pytest.mark.parametrize("kind", [LinearCrossEntropyLoss, native.SubstituteLinearCrossEntropyLoss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@each_configuration
def test_it_is_constructed_as_native_s(options, dtype, kind):
    """Bit by bit, and the random numbers that follow too."""
    theirs = built(nn.LinearCrossEntropyLoss, dtype, reduction="sum", **options)
    after = torch.rand(3)
    module = built(kind, dtype, reduction="sum", **options)
    assert torch.equal(torch.rand(3), after)
    assert list(module.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for name, value in theirs.state_dict().items():
        assert module.state_dict()[name].dtype == dtype
        assert torch.equal(module.state_dict()[name], value)
    assert module.extra_repr() == theirs.extra_repr()
    assert module.__constants__ == theirs.__constants__
    assert [name for name in vars(module) if name not in ADDED] == list(vars(theirs))
    for name in ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing", "options", "training"):
        assert getattr(module, name) == getattr(theirs, name)


@needs_native
def test_the_substitute_has_native_s_signature():
    assert parameters(native.SubstituteLinearCrossEntropyLoss) == parameters(nn.LinearCrossEntropyLoss)
    assert issubclass(native.SubstituteLinearCrossEntropyLoss, nn.LinearCrossEntropyLoss.__base__)


WRONG = {
    "class weights": {"weight": torch.ones(C + 1)},
    "dimensions of class weights": {"weight": torch.ones(1, C)},
    "negative smoothing": {"label_smoothing": -0.1},
    "smoothing": {"label_smoothing": 1.5},
    "both": {"weight": torch.ones(2), "label_smoothing": 2.0},
    "unknown": {"nonsense": 1},
    "out_features": {"out_features": 3},
}


@needs_native
@pytest.mark.parametrize("kind", [LinearCrossEntropyLoss, native.SubstituteLinearCrossEntropyLoss])
@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_the_constructor_raises_as_native_s(options, kind):
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        nn.LinearCrossEntropyLoss(D, C, **options)
    with pytest.raises(theirs.type) as ours:
        kind(D, C, **options)
    assert type(ours.value) is type(theirs.value)
    if theirs.type is RuntimeError:
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("arguments", [(), (D,), (D, C, (2,))], ids=str)
def test_what_follows_the_two_sizes_has_a_name(arguments):
    with pytest.raises(TypeError):
        LinearCrossEntropyLoss(*arguments)


@needs_native
@pytest.mark.parametrize("options", [{}, {"bias": True, "out_features": (2, 3), "reduction": "sum"}], ids=str)
def test_it_is_a_native_module(options):
    ours, theirs = pair(**options)
    assert isinstance(ours, nn.LinearCrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(theirs))


@needs_native
@each_reduction
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@each_configuration
def test_values_and_gradients_are_native_s(options, probabilities, reduction):
    if probabilities:
        options = {**options, "ignore_index": None}
    ours, theirs = (
        built(k, reduction=reduction, **options) for k in (LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss)
    )
    input, target = sample(ours, probabilities)
    actual, wanted = differentiated(ours, input, target), differentiated(theirs, input, target)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)
    assert actual[1][1].shape == ours.linear.weight.shape


@needs_native
@each_reduction
@pytest.mark.parametrize("options", [{}, {"bias": True, "weight": WEIGHT}, {"label_smoothing": 0.1}], ids=str)
def test_one_sample(options, reduction):
    ours, theirs = (
        built(k, reduction=reduction, **options) for k in (LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss)
    )
    (input, probabilities), index = sample(ours, True), torch.tensor(2)
    for target in (index, probabilities[2]):
        actual, wanted = (differentiated(module, input[2], target) for module in (ours, theirs))
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)


@needs_native
def test_an_ignored_class_beside_probabilities_raises_as_natively():
    ours, theirs = pair(ignore_index=1)
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match="ignore_index"):
            module(*sample(module, probabilities=True))


@needs_native
@each_reduction
@pytest.mark.parametrize("asked", [{}, {"batch_chunk_size": 2}, {"allow_retain_graph": True}], ids=str)
def test_native_s_options_change_nothing_but_memory(asked, reduction):
    chunked = nn.LinearCrossEntropyOptions(**asked)
    ours = built(LinearCrossEntropyLoss, bias=True, weight=WEIGHT, reduction=reduction, options=chunked)
    theirs = built(nn.LinearCrossEntropyLoss, bias=True, weight=WEIGHT, reduction=reduction)
    assert ours.options is chunked
    assert f"options={chunked}" in repr(ours)
    actual, wanted = (differentiated(module, *sample(ours)) for module in (ours, theirs))
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)


# What it computes, with or without native's.


@each_reduction
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@each_configuration
def test_values_are_a_linear_layer_s_cross_entropy(options, probabilities, reduction, device):
    options = {**options, "ignore_index": None} if probabilities else options
    module = built(LinearCrossEntropyLoss, reduction=reduction, **options)
    input, target = sample(module, probabilities)
    wanted = expected(module, input, target)
    torch.testing.assert_close(module.to(device)(input.to(device), target.to(device)).cpu(), wanted)


@pytest.mark.parametrize("options", [{}, {"bias": True, "weight": WEIGHT, "ignore_index": 2}], ids=str)
def test_batches_of_sequences(options):
    """Which native refuses: (batch, sequence, D) beside (batch, sequence)."""
    module = built(LinearCrossEntropyLoss, reduction="none", **options)
    input, target = sample(module)
    losses, gradients = differentiated(module, input.unflatten(0, (2, 3)), target.unflatten(0, (2, 3)))
    flat_losses, flat_gradients = differentiated(module, input, target)
    assert losses[0].shape == (2, 3)
    torch.testing.assert_close(losses[0].flatten(), flat_losses[0])
    torch.testing.assert_close(gradients[0].flatten(0, 1), flat_gradients[0])
    torch.testing.assert_close(gradients[1:], flat_gradients[1:])


def test_a_call_takes_what_changes_with_every_batch():
    module = built(LinearCrossEntropyLoss, bias=True, z_loss=0.1)
    input, target = sample(module)
    weights = torch.linspace(0.0, 2.0, N, dtype=torch.float64)
    for of_a_call in ({"denominator": 7}, {"sample_weight": weights}, {"denominator": 7.5, "sample_weight": weights}):
        value = module(input, target, **of_a_call)
        torch.testing.assert_close(value, expected(module, input, target, z_loss=0.1, **of_a_call))
        assert not torch.isclose(value, module(input, target))
    with pytest.raises(TypeError):
        module(input, target, 7)
    with pytest.raises(TypeError, match="denominator"):
        LinearCrossEntropyLoss(D, C, denominator=7)


@pytest.mark.parametrize("positions", [(), (2, 3)], ids=str)
def test_the_function_is_handed_all_that_a_module_has(positions, monkeypatch):
    calls, weights, chunked = [], torch.ones(N), object()
    function = fusedloss.linear_cross_entropy

    def recorded(*arguments, **options):
        call = inspect.signature(function).bind(*arguments, **options)
        calls.append(call.arguments)
        return torch.zeros(())

    module = LinearCrossEntropyLoss(
        D,
        C,
        out_features=positions,
        bias=True,
        reduction="sum",
        weight=torch.tensor(WEIGHT),
        ignore_index=3,
        label_smoothing=0.1,
        options=chunked,
        **ADDED,
    )
    assert {name: getattr(module, name) for name in ADDED} == ADDED
    assert vars(module).items() >= ADDED.items()
    monkeypatch.setattr(fusedloss.functional, "linear_cross_entropy", recorded)
    input, target = torch.zeros(N, D), torch.zeros(N, *positions, dtype=torch.int64)
    assert module(input, target, denominator=3, sample_weight=weights) == 0
    (call,) = calls
    linear_weight, linear_bias = call.pop("linear_weight"), call.pop("linear_bias")
    assert {name: call.pop(name) for name in ADDED} == ADDED
    assert call.pop("input") is input
    assert call.pop("target") is target
    assert call.pop("weight") is module.weight
    assert call.pop("options") is chunked
    assert call.pop("sample_weight") is weights
    assert call.pop("num_classes") == C
    assert call == {"reduction": "sum", "ignore_index": 3, "label_smoothing": 0.1, "denominator": 3}
    if positions:
        assert linear_weight.shape == (C, *positions, D)
        assert linear_bias.shape == (C, *positions)
        assert linear_weight.data_ptr() == module.linear.weight.data_ptr()
    else:
        assert linear_weight is module.linear.weight
        assert linear_bias is module.linear.bias


@pytest.mark.parametrize("added", [{"z_loss": 0.1}, {"logit_scale": 0.5}, {"logit_softcap": 0.7}], ids=str)
@pytest.mark.parametrize("options", [{}, {"out_features": (2, 3), "bias": True}], ids=str)
def test_additions_are_computed(options, added):
    module = built(LinearCrossEntropyLoss, **options, **added)
    input, target = sample(module)
    torch.testing.assert_close(module(input, target), expected(module, input, target, **added))
    plain = built(LinearCrossEntropyLoss, **options)
    assert not torch.isclose(module(input, target), plain(input, target))
    for name, value in added.items():
        setattr(plain, name, value)
    assert torch.equal(plain(input, target), module(input, target))


@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
def test_answers(positions):
    asked = {"return_lse": True, "return_entropy": True, "return_argmax": True}
    module = built(LinearCrossEntropyLoss, out_features=positions, bias=True, **asked)
    input, target = sample(module)
    answers, wanted = module(input, target), expected(module, input, target, **asked)
    torch.testing.assert_close(answers, wanted)
    assert [answer.shape for answer in answers] == [(), *[target.shape] * 3]


# State.


def test_defaults_are_the_class_s():
    """So that a module works that was pickled, or whose class was exchanged, without having them."""
    function = inspect.signature(fusedloss.linear_cross_entropy).parameters
    module = built(LinearCrossEntropyLoss, bias=True)
    input, target = sample(module)
    value = module(input, target)
    for name in ADDED:
        assert getattr(module, name) == getattr(LinearCrossEntropyLoss, name) == function[name].default
        delattr(module, name)
    assert torch.equal(module(input, target), value)


CONFIGURED = {"weight": WEIGHT, "bias": True, "out_features": (2,), "ignore_index": 1, "z_loss": 0.1}


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_the_same_loss(clone):
    module = built(LinearCrossEntropyLoss, **CONFIGURED)
    twin = clone(module)
    assert type(twin) is LinearCrossEntropyLoss
    assert twin.linear.weight is not module.linear.weight
    for actual, wanted in zip(*(differentiated(m, *sample(module)) for m in (twin, module)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    assert repr(twin) == repr(module)


@needs_native
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"weight": WEIGHT, "out_features": (2,)}], ids=str)
def test_state_is_exchanged_with_native(options):
    ours, theirs = built(LinearCrossEntropyLoss, **options), built(nn.LinearCrossEntropyLoss, seed=3, **options)
    names = ["weight"] * ("weight" in options) + ["linear.weight"] + ["linear.bias"] * ("bias" in options)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == names
    input, target = sample(ours)
    wanted = theirs(input, target)
    assert not torch.isclose(ours(input, target), wanted)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(input, target), wanted)
    other = built(LinearCrossEntropyLoss, seed=4, **options)
    theirs.load_state_dict(other.state_dict())
    torch.testing.assert_close(theirs(input, target), other(input, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_class_weights_follow_the_module(dtype, device):
    module = built(LinearCrossEntropyLoss, **CONFIGURED).to(device, dtype)
    state = [*module.parameters(), *module.buffers()]
    assert {(tensor.dtype, tensor.device.type) for tensor in state} == {(dtype, device)}
    assert len(state) == 3
    input, target = sample(module, dtype=dtype)
    value = module(input.to(device), target.to(device)).detach().cpu()
    wanted = expected(module.cpu(), input, target, z_loss=0.1).detach()
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=0)


def test_a_weight_may_be_tied_to_an_embedding():
    embedding = nn.Embedding(C, D, dtype=torch.float64)
    module = built(LinearCrossEntropyLoss)
    module.linear.weight = embedding.weight
    indices, target = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 2, 1, 0])
    module(embedding(indices), target).backward()
    actual, embedding.weight.grad = embedding.weight.grad, None
    F.cross_entropy(embedding(indices) @ embedding.weight.T, target).backward()
    torch.testing.assert_close(actual, embedding.weight.grad)


def test_it_learns():
    """Steps of an optimizer over the module's parameters go where those of the two layers go that it is."""
    module, linear = built(LinearCrossEntropyLoss, bias=True), nn.Linear(D, C, dtype=torch.float64)
    linear.load_state_dict(module.linear.state_dict())
    input, target = sample(module)
    losses = []
    for parts, loss in ((module, module), (linear, lambda x, t: F.cross_entropy(linear(x), t))):
        optimizer = torch.optim.AdamW(parts.parameters(), lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            value = loss(input, target)
            value.backward()
            optimizer.step()
        losses.append(value.item())
    assert math.isclose(*losses, rel_tol=1e-9)
    torch.testing.assert_close(module.linear.state_dict(), linear.state_dict())


# In place of native's.


class Head(nn.Module):
    """A model with native's loss, or another."""

    def __init__(self, loss):
        super().__init__()
        self.body, self.loss = nn.Linear(D, D, dtype=torch.float64), loss

    def forward(self, input, target):
        return self.loss(self.body(input), target)


@needs_native
@each_configuration
def test_a_model_s_loss_is_replaced(options):
    model = Head(built(nn.LinearCrossEntropyLoss, **options))
    input, target = sample(model.loss)
    wanted, tensors, text = differentiated(model, input, target), dict(model.named_parameters()), repr(model)
    buffers, before = dict(model.named_buffers()), vars(model.loss).copy()
    assert fusedloss.replace_losses(model) is model
    assert type(model.loss) is LinearCrossEntropyLoss
    assert all(tensor is tensors.pop(name) for name, tensor in model.named_parameters())
    assert all(tensor is buffers.pop(name) for name, tensor in model.named_buffers())
    assert not tensors
    assert not buffers
    assert vars(model.loss) == before
    assert repr(model) == text
    torch.testing.assert_close(differentiated(model, input, target), wanted, rtol=1e-12, atol=1e-14)
    model.loss.z_loss = 0.1
    torch.testing.assert_close(
        model(input, target), expected(model.loss, model.body(input), target, z_loss=0.1), rtol=1e-12, atol=1e-14
    )


@needs_native
def test_a_subclass_of_native_s_keeps_its_forward():
    class Doubled(nn.LinearCrossEntropyLoss):
        def forward(self, input, target):
            return 2 * super().forward(input, target)

    model = Head(built(Doubled))
    assert type(fusedloss.replace_losses(model).loss) is Doubled


def takes_int32(loss, *arguments):
    """What only ours does: shows which one is called."""
    *tensors, target = arguments
    try:
        return torch.isfinite(loss(*tensors, target.int())).item()
    except RuntimeError:
        return False


@needs_native
@each_configuration
def test_native_s_module_computes_ours_while_patched(options):
    module = built(nn.LinearCrossEntropyLoss, **options)
    input, target = sample(module)
    wanted = differentiated(module, input, target)
    with fusedloss.patch():
        torch.testing.assert_close(differentiated(module, input, target), wanted, rtol=1e-12, atol=1e-14)
        assert takes_int32(module, input, target)
        assert type(module) is nn.LinearCrossEntropyLoss
    assert not takes_int32(module, input, target)


@needs_native
def test_native_s_function_is_ours_while_patched():
    module = built(LinearCrossEntropyLoss, bias=True)
    arguments = sample(module)[0], module.linear.weight, sample(module)[1]
    wanted = F.linear_cross_entropy(*arguments, linear_bias=module.linear.bias)
    with fusedloss.patch():
        assert takes_int32(F.linear_cross_entropy, *arguments)
        torch.testing.assert_close(F.linear_cross_entropy(*arguments, linear_bias=module.linear.bias), wanted)
        assert F.linear_cross_entropy(*arguments, backend="cpu", return_lse=True)[1].shape == (N,)
        chunked = nn.LinearCrossEntropyLoss(D, C, options=nn.LinearCrossEntropyOptions(), dtype=torch.float64)
        assert takes_int32(chunked, *sample(module))
    assert not takes_int32(F.linear_cross_entropy, *arguments)


@needs_native
@pytest.mark.parametrize("options", [{}, {"out_features": (2, 3), "bias": True}], ids=str)
def test_what_is_routed_to_native_reaches_it_while_patched(options):
    module = built(nn.LinearCrossEntropyLoss, **options)
    input, target = sample(module)
    state = {name: tensor.detach() for name, tensor in module.named_parameters()}

    def loss(parameters, input):
        return torch.func.functional_call(module, parameters, (input, target))

    wanted = torch.func.grad(loss, argnums=(0, 1))(state, input)
    with fusedloss.patch():
        torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(state, input), wanted)


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args, kwargs))
        return function(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("patched", [False, True])
def test_arguments_are_passed_as_native_passes_them(patched):
    """Three by position, native's options by name, and ours where they are used."""
    module = built(LinearCrossEntropyLoss, bias=True)
    arguments = sample(module)[0], module.linear.weight, sample(module)[1]

    def watched(function, **options):
        with Watch() as watch:
            function(*arguments, **options)
        return next(call for call in watch.calls if call[0] is function)

    _, native_args, native_kwargs = watched(F.linear_cross_entropy, linear_bias=module.linear.bias)
    with fusedloss.patch() if patched else torch.enable_grad():
        function = F.linear_cross_entropy if patched else fusedloss.linear_cross_entropy
        _, args, kwargs = watched(function, linear_bias=module.linear.bias)
        _, _, more = watched(function, linear_bias=module.linear.bias, z_loss=0.5, memory=2**20)
    assert len(args) == len(native_args) == 3
    assert all(ours is theirs for ours, theirs in zip(args, native_args, strict=True))
    assert list(kwargs.items()) == list(native_kwargs.items())
    assert more == {**native_kwargs, "z_loss": 0.5, "memory": 2**20}


class Wrapper:
    """No Tensor, and nothing like one."""

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def bare(value):
            return value.value if isinstance(value, Wrapper) else value

        args, kwargs = map(bare, args), {name: bare(value) for name, value in (kwargs or {}).items()}
        return Wrapper((function, function(*args, **kwargs)))


@pytest.mark.parametrize("wrapped", ["input", "linear_weight", "target", "linear_bias", "weight", "sample_weight"])
def test_every_tensor_may_override_the_function(wrapped):
    module = built(LinearCrossEntropyLoss, bias=True, weight=WEIGHT)
    input, target = sample(module)
    arguments = {"input": input, "linear_weight": module.linear.weight, "target": target}
    arguments |= {"linear_bias": module.linear.bias, "weight": module.weight, "sample_weight": torch.ones(N)}
    wanted = fusedloss.linear_cross_entropy(**arguments)
    arguments[wrapped] = Wrapper(arguments[wrapped])
    function, value = fusedloss.linear_cross_entropy(**arguments).value
    assert function is fusedloss.linear_cross_entropy
    assert torch.equal(value, wanted)
    if wrapped in ("input", "target"):
        function, value = module(arguments["input"], arguments["target"]).value
        assert function is fusedloss.linear_cross_entropy
        torch.testing.assert_close(value, wanted)


class Plain(torch.Tensor):
    pass


@needs_native
def test_a_subclass_of_its_own():
    """Values, gradients and the type of the result are those of native's."""
    results = []
    for kind in (LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss):
        module = built(kind, bias=True)
        input, target = sample(module)
        leaf = input.requires_grad_()
        value = module(leaf.as_subclass(Plain), target)
        value.backward()
        grads = [leaf.grad, module.linear.weight.grad, module.linear.bias.grad]
        results.append((type(value), [x.detach().as_subclass(torch.Tensor) for x in (value, *grads)]))
    assert results[0][0] is results[1][0] is Plain
    torch.testing.assert_close(results[0][1], results[1][1])


# What takes modules apart.


@pytest.mark.parametrize("options", [{}, {"bias": True, "out_features": (2, 3), "weight": WEIGHT}], ids=str)
def test_fx_traces_a_module(options):
    model = Head(built(LinearCrossEntropyLoss, **options))
    input, target = sample(model.loss)
    traced = torch.fx.symbolic_trace(model)
    assert fusedloss.linear_cross_entropy in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(input, target), model(input, target))


@pytest.mark.parametrize("options", [{}, {"bias": True, "out_features": (2, 3), "weight": WEIGHT}], ids=str)
def test_a_compiled_module(options):
    torch.compiler.reset()
    model = Head(built(LinearCrossEntropyLoss, **options))
    input, target = sample(model.loss)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted = differentiated(model, input, target)
    input = input.requires_grad_()
    value = compiled(input, target)
    gradients = torch.autograd.grad(value, [input, *model.parameters()], torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(([value], gradients), wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("options", [{}, {"bias": True, "out_features": (2, 3), "weight": WEIGHT}], ids=str)
def test_a_scripted_model_holds_and_calls_it(options):
    model = Head(built(LinearCrossEntropyLoss, **options))
    input, target = sample(model.loss)
    assert torch.equal(torch.jit.script(model)(input, target), model(input, target))


def test_an_exported_module():
    model = Head(built(LinearCrossEntropyLoss, bias=True))
    arguments = sample(model.loss)
    program = torch.export.export(model, arguments)
    torch.testing.assert_close(program.module()(*arguments), model(*arguments))


OLD_TORCH = """
import copy, pickle
import torch
for holder, name in ((torch.nn, "LinearCrossEntropyLoss"), (torch.nn.functional, "linear_cross_entropy")):
    if hasattr(holder, name):
        delattr(holder, name)
import fusedloss
from fusedloss import native

assert "linear_cross_entropy" not in native.__all__
kind = fusedloss.LinearCrossEntropyLoss
assert kind.__base__ is native.LinearCrossEntropyLoss is native.SubstituteLinearCrossEntropyLoss
torch.manual_seed(1)
module = kind(5, 4, out_features=(2,), bias=True, weight=torch.ones(4).double(), z_loss=0.1, dtype=torch.float64)
print(module)
print(list(module.state_dict()))
x, t = torch.eye(5, dtype=torch.float64)[:3], torch.tensor([[0, 1], [2, 3], [1, -100]])
with fusedloss.patch():
    assert not hasattr(torch.nn.functional, "linear_cross_entropy")
    value = module(x, t)
assert not hasattr(torch.nn.functional, "linear_cross_entropy")
for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fusedloss.replace_losses(module)):
    assert type(twin) is kind and torch.equal(twin(x, t), value)
value.backward()
print(repr(value.item()), repr(module.linear.weight.grad.norm().item()))
"""


def test_a_torch_without_native_s():
    done = subprocess.run([sys.executable, "-c", OLD_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *text, state, numbers = done.stdout.splitlines()
    torch.manual_seed(1)
    weight = torch.ones(4).double()
    module = LinearCrossEntropyLoss(5, 4, out_features=(2,), bias=True, weight=weight, z_loss=0.1, dtype=torch.float64)
    assert "\n".join(text) == repr(module)
    assert state == str(list(module.state_dict()))
    value = module(torch.eye(5, dtype=torch.float64)[:3], torch.tensor([[0, 1], [2, 3], [1, -100]]))
    value.backward()
    assert [float(number) for number in numbers.split()] == [value.item(), module.linear.weight.grad.norm().item()]


def test_what_a_class_says_of_itself():
    """Native's arguments and ours, each once, and none of those that belong to a call or to the linear layer."""
    text = inspect.cleandoc(LinearCrossEntropyLoss.__doc__)
    entries = re.findall(r"^    (\w[^:]*):", text[text.index("Args:\n") : text.index("Raises:")], re.MULTILINE)
    names = re.findall(r"\w+", " ".join(entries))
    assert sorted(names) == sorted(set(names))
    of_function = inspect.signature(fusedloss.linear_cross_entropy).parameters
    taken = {"input", "target", "linear_weight", "linear_bias", "denominator", "sample_weight"}
    of_linear = {"in_features", "num_classes", "out_features", "bias", "device", "dtype"}
    assert set(names) == of_linear | (of_function.keys() - taken)
