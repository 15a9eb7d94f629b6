"""__torch_function__: whoever overrides it is handed the function that was called, before anything is checked."""

import copy
import pickle

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from support import each
from torch import nn
from torch.overrides import TorchFunctionMode

import fusedloss


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


class Tagged(torch.Tensor):
    """Pairs of subclasses are allowed for the functions of a table."""

    allowed = ()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        types = (torch.Tensor,) if function in cls.allowed else types
        return super().__torch_function__(function, types, args, kwargs or {})


class Image(Tagged):
    pass


class Category(Tagged):
    pass


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args, kwargs))
        return function(*args, **(kwargs or {}))


class Model(nn.Module):
    def __init__(self, loss, **options):
        super().__init__()
        self.linear, self.loss, self.options = nn.Linear(3, 3), loss, options

    def forward(self, x, y):
        return self.loss(self.linear(x).sigmoid(), y, **self.options)


@each()
def test_a_wrapper_is_handed_the_function_and_its_arguments(loss):
    input, target = loss.sample(4, 3)
    for arguments in [(Wrapper(input), target), (input, Wrapper(target)), (Wrapper(input), Wrapper(target))]:
        function, value = loss.ours(*arguments, reduction="sum").value
        assert function is loss.ours
        assert torch.equal(value, loss.ours(input, target, reduction="sum"))


def overridable(loss):
    extra = {"NLLLoss": [], "BCEWithLogitsLoss": ["pos_weight", "grad_scale"]}
    return ["weight", *extra.get(loss.module, ["grad_scale"])]


@each()
def test_every_argument_that_can_be_a_tensor_counts(loss):
    input, target = loss.sample(4, 3)
    for name in overridable(loss):
        tensor = torch.tensor(0.5) if name == "grad_scale" else torch.ones(3)
        function, value = loss.ours(input, target, **{name: Wrapper(tensor)}).value
        assert function is loss.ours
        assert torch.equal(value, loss.ours(input, target, **{name: tensor}))


@each()
def test_overrides_come_before_checks(loss):
    class Everything:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function, args, kwargs

    thing = Everything()
    function, args, kwargs = loss.ours(thing, "no tensor", weight=[1], reduction=7)
    assert function is loss.ours
    assert args == (thing, "no tensor")
    assert kwargs["weight"] == [1]
    assert kwargs["reduction"] == 7


@each()
def test_arguments_are_passed_as_native_passes_them(loss):
    """A handler that was written for native's function serves for ours; additions are passed where they are used."""
    input, target = loss.sample(4, 3)
    with Watch() as ours:
        loss.ours(input, target)
        loss.ours(input, target, backend="cpu")
    with Watch() as native:
        loss.native(input, target)
    (function, args, kwargs), (_, _, more) = (call for call in ours.calls if call[0] is loss.ours)
    _, native_args, native_kwargs = native.calls[0]
    assert function is loss.ours
    assert args[0] is input
    assert args[1] is target
    assert len(args) == len(native_args)
    assert list(kwargs.items()) == list(native_kwargs.items())
    assert more == {**native_kwargs, "backend": "cpu"}


@each()
def test_a_subclass_of_its_own(loss):
    """Values, gradients and the type of the result are those of native's function."""

    class Plain(torch.Tensor):
        pass

    input, target = loss.sample(4, 3)
    results = []
    for function in (loss.ours, loss.native):
        leaf = input.detach().requires_grad_()
        value = function(leaf.as_subclass(Plain), target)
        value.backward()
        results.append((type(value), value.detach().as_subclass(torch.Tensor), leaf.grad.as_subclass(torch.Tensor)))
    assert results[0][0] is results[1][0] is Plain
    torch.testing.assert_close(results[0][1:], results[1][1:])


@pytest.mark.parametrize("patched", [False, True])
@each("cross_entropy", "nll", "bce_with_logits", "bce")
def test_a_table_of_functions(loss, patched, monkeypatch):
    """The table is older than the patch, and names native's function."""
    input, target = loss.sample(4, 3)
    monkeypatch.setattr(Tagged, "allowed", [loss.native if patched else loss.ours])
    expected = loss.native(input, target)
    if patched:
        with fusedloss.patch():
            value = getattr(F, loss.function)(input.as_subclass(Image), target.as_subclass(Category))
    else:
        value = loss.ours(input.as_subclass(Image), target.as_subclass(Category))
    assert isinstance(value, Tagged)
    torch.testing.assert_close(value.as_subclass(torch.Tensor), expected)


@each()
def test_a_mode_sees_what_is_called_while_patched(loss):
    input, target = loss.sample(4, 3)
    with fusedloss.patch(), Watch() as watch:
        function = getattr(F, loss.function)
        value = function(input, target)
        assert watch.calls[0][0] is function
    assert watch.calls[0][0] == loss.native
    torch.testing.assert_close(value, loss.native(input, target))


def test_a_mode_does_not_take_the_patch_away():
    """As torch.set_default_device, which is one; native refuses such a target."""
    target = torch.tensor([0, 1], dtype=torch.int32)
    with fusedloss.patch(), torch.device("cpu"):
        value = F.cross_entropy(torch.zeros(2, 3), target)
    torch.testing.assert_close(value, torch.tensor(3.0).log())


@each()
def test_fx_traces_a_function(loss):
    (_, target), input = loss.sample(4, 3), torch.randn(4, 3)
    model = Model(loss.ours, reduction="sum")
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [loss.ours]
    assert torch.equal(traced(input, target), model(input, target))
    again = pickle.loads(pickle.dumps(traced))
    assert torch.equal(again(input, target), model(input, target))


@each()
def test_fx_traces_a_module(loss):
    """Through its forward, with its buffers: fx takes the modules of torch.nn alone for leaves."""
    (_, target), input = loss.sample(4, 3), torch.randn(4, 3)
    model = Model(getattr(fusedloss, loss.module)(torch.tensor([0.5, 1.0, 2.0]), reduction="sum"))
    traced = torch.fx.symbolic_trace(model)
    assert loss.ours in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(input, target), model(input, target))


class Native(nn.Module):
    """A model that knows nothing of fusedloss."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(3, 3), function

    def forward(self, x, y):
        return getattr(F, self.function)(self.linear(x).sigmoid(), y, reduction="sum")


@each("cross_entropy", "nll", "bce_with_logits", "bce")
def test_fx_traces_native_code_as_before_while_patched(loss):
    (_, target), input = loss.sample(4, 3), torch.randn(4, 3)
    model = Native(loss.function)
    before, expected = torch.fx.symbolic_trace(model), model(input, target)
    with fusedloss.patch():
        traced = torch.fx.symbolic_trace(model)
        saved = pickle.dumps(traced)
        torch.testing.assert_close(traced(input, target), expected)
        torch.testing.assert_close(pickle.loads(saved)(input, target), expected)
    assert traced.code == before.code
    for graph in (traced, copy.deepcopy(traced), pickle.loads(saved)):
        assert torch.equal(graph(input, target), expected)
    assert b"fusedloss" not in saved
    assert [node.target for node in traced.graph.nodes] == [node.target for node in before.graph.nodes]


def test_parameters_are_tensors_without_overrides():
    logits, target = nn.Parameter(torch.zeros(2, 3)), torch.tensor([0, 1])
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    torch.testing.assert_close(fusedloss.cross_entropy(logits, target, weight).detach(), torch.tensor(3.0).log())


@each()
def test_a_compiled_call_with_a_subclass(loss):
    class Plain(torch.Tensor):
        pass

    torch.compiler.reset()
    input, target = loss.sample(4, 3)
    compiled = torch.compile(loss.ours, backend="aot_eager")
    if torch.__version__.startswith("2.11."):  # asks the subclass again and again
        with pytest.raises(TypeError, match="no implementation found"):
            compiled(input.as_subclass(Plain), target)
        return
    value = compiled(input.as_subclass(Plain), target)
    torch.testing.assert_close(value.as_subclass(torch.Tensor), loss.native(input, target))
