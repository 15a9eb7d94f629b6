"""Numbers in all the guises that native takes them in, for native's options and for ours; and checks on every road."""

import enum
import fractions
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import each, each_index_loss
from torch import nn
from torch.autograd import forward_ad

import fusedloss


class Index:
    def __index__(self):
        return 1


class Number:
    def __float__(self):
        return 0.1


class Text(str):
    pass


Token = enum.IntEnum("Token", {"one": 1})

INTEGERS = [
    *(1, Token.one, Index(), np.int64(1), np.int32(1), np.uint8(1), np.array(1)),
    *(torch.tensor(1), torch.tensor(1, dtype=torch.int32), torch.tensor([1])),
    *(True, np.True_, 1.0, np.float32(1), torch.tensor(1.0), "1", None, [1], 1 + 0j, fractions.Fraction(1)),
    *(np.array([1, 2]), torch.tensor([1, 2]), -(2**63), 2**63 - 1, 2**63, -(2**63) - 1),
]
FLOATS = [
    *(0, 1, 0.1, True, False, Token.one, np.float32(0.1), np.float16(0.1), np.float64(0.1), np.int64(1), np.False_),
    *(torch.tensor(0.1), torch.tensor(0.1).double(), torch.tensor(0.1).bfloat16(), torch.tensor(1), torch.tensor(True)),
    *(torch.tensor(0.1, requires_grad=True), nn.Parameter(torch.tensor(0.1)), torch.tensor([0.1]), np.array(0.1)),
    *(Index(), Number(), "0.1", np.str_("0.1"), None, [0.1], 0.1 + 0j, fractions.Fraction(1, 10), math.nan, -0.5),
]
REDUCTIONS = [Text("sum"), np.str_("none"), "SUM", "", 1, b"sum", [], {}, set(), None, ("sum",), torch.tensor(1)]
LEGACY = [0, 1, "no", "", [], 2.5, np.False_, torch.tensor(False), torch.tensor([True, False])]


def outcome(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except Exception as error:
        return type(error)


def same_outcome(loss, **options):
    input, target = loss.sample(4, 3)
    ours, native = outcome(loss.ours, input, target, **options), outcome(loss.native, input, target, **options)
    assert isinstance(ours, type) == isinstance(native, type), (ours, native)
    if isinstance(native, type):
        assert ours is native
    else:
        torch.testing.assert_close(ours, native, equal_nan=True)


def each_value(values):
    def name(value):  # without an address: the workers of pytest-xdist do not start if their tests' names differ
        return re.sub(r"\n| <.* at 0x\w+>", "", f"{type(value).__name__} {value}")

    return pytest.mark.parametrize("value", values, ids=name)


@each_value(INTEGERS)
@each_index_loss
def test_ignore_index(loss, value):
    same_outcome(loss, ignore_index=value)
    module = getattr(fusedloss, loss.module), getattr(nn, loss.module)
    input, target = loss.sample(4, 3)
    ours, native = (outcome(kind(ignore_index=value), input, target) for kind in module)
    assert (ours is native) if isinstance(native, type) else torch.allclose(ours, native)


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
@each_value(FLOATS)
@each("cross_entropy", "cross_entropy_soft")
def test_label_smoothing(loss, value):
    same_outcome(loss, label_smoothing=value)


@each_value(REDUCTIONS)
@each()
def test_reduction(loss, value):
    same_outcome(loss, reduction=value)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("option", ["size_average", "reduce"])
@each_value(LEGACY)
@each()
def test_legacy_options(loss, option, value):
    same_outcome(loss, **{option: value})


def in_dual_level(function, input):
    with forward_ad.dual_level():
        return function(input)


def traced(function, input):
    return torch.jit.trace(function, input)(input)


# Every road that a call can take; the plain one first. Each returns the value of the function.
ROADS = {
    "plain": lambda function, input: function(input),
    "autograd": lambda function, input: function(input.requires_grad_()).detach(),
    "torch.func.grad": lambda function, input: torch.func.grad_and_value(function)(input)[1],
    "torch.func.vmap": lambda function, input: torch.func.vmap(function)(input[None])[0],
    "forward mode": in_dual_level,
    "torch.jit.trace": traced,
}
each_road = pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)
NUMBERS = [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor(0.5).double()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@each_value(NUMBERS)
@pytest.mark.parametrize("option", ["z_loss", "logit_scale", "logit_softcap", "denominator"])
@each_road
@each("cross_entropy", "cross_entropy_soft")
def test_numbers_of_added_options(loss, road, option, value):
    input, target = loss.sample(4, 3)
    expected = loss.reference(input, target, **{option: 0.5})
    torch.testing.assert_close(road(lambda x: loss.ours(x, target, **{option: value}), input), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@each_value([1, Token.one, Index(), np.int64(1), np.uint8(1), torch.tensor(1)])
@each_road
@each("bce_with_logits", "bce")
def test_added_ignore_index(loss, road, value):
    input, target = loss.sample(4, 3)
    target = target.round()
    expected = loss.reference(input, target, ignore_index=1)
    torch.testing.assert_close(road(lambda x: loss.ours(x, target, ignore_index=value), input), expected)


@each_value([2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2.0).double()])
@each("cross_entropy", "cross_entropy_soft", "bce_with_logits", "bce")
def test_numbers_of_grad_scale(loss, value):
    input, target = loss.sample(4, 3)
    input.requires_grad_()
    (ours,) = torch.autograd.grad(2 * loss.ours(input, target, grad_scale=value), input)
    (expected,) = torch.autograd.grad(2 * loss.native(input, target), input)
    torch.testing.assert_close(ours, expected)


OF_ALL = {
    "backend": [("nonsense", ValueError), ([], ValueError), (1, ValueError), ("cuda", Exception)],
    "reduction": [("nonsense", ValueError), ([], ValueError)],
}
OF_GRADIENTS = {
    "grad_in_forward": [("yes", ValueError), (1, ValueError), (None, ValueError), ([], ValueError)],
    "grad_scale": [
        *((0, ValueError), (math.inf, ValueError), (math.nan, ValueError), ("2", TypeError), ([1.0], TypeError)),
        *((torch.ones(2), RuntimeError), (torch.tensor(1), RuntimeError)),
    ],
}
INPLACE = {"inplace": [(1, TypeError), ("yes", TypeError), (None, TypeError), (np.True_, TypeError)]}
IGNORED = {
    "ignore_index": [(True, TypeError), (1.0, TypeError), ("1", TypeError), ([], TypeError), (2**63, ValueError)]
}
OF_CROSS_ENTROPY = {
    "z_loss": [(math.inf, ValueError), (math.nan, ValueError), ("1", TypeError), (None, TypeError), ([], TypeError)],
    "logit_softcap": [
        *((-1, ValueError), (0, ValueError), (0.0, ValueError), (math.inf, ValueError), (math.nan, ValueError)),
        *(("1", TypeError), ([1.0], TypeError), (torch.ones(2), TypeError)),
    ],
    "logit_scale": [
        *((-1, ValueError), (0, ValueError), (math.inf, ValueError), (math.nan, ValueError)),
        *(("1", TypeError), (None, TypeError), (torch.ones(2), TypeError)),
    ],
    "return_lse": [(1, TypeError), (None, TypeError), ("yes", TypeError)],
    "return_entropy": [(1, TypeError), (None, TypeError), ("yes", TypeError)],
    "return_argmax": [(1, TypeError), (None, TypeError), ("yes", TypeError)],
}
BAD = {
    "CrossEntropyLoss": OF_ALL | OF_GRADIENTS | INPLACE | IGNORED | OF_CROSS_ENTROPY,
    "NLLLoss": OF_ALL | IGNORED,
    "BCEWithLogitsLoss": OF_ALL | OF_GRADIENTS | INPLACE | IGNORED,
    "BCELoss": OF_ALL | OF_GRADIENTS | IGNORED,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@each_road
@each()
def test_bad_values_are_refused_on_every_road(loss, road):
    """With an error that names the argument."""
    input, target = loss.sample(4, 3)
    for name, rows in BAD[loss.module].items():
        for value, error in rows:
            with pytest.raises(error, match=name if name != "backend" else "backend|no kernels"):
                road(lambda x, name=name, value=value: loss.ours(x, target, **{name: value}), input.clone())


@each()
def test_a_renamed_reduction_is_warned_of_once_on_every_road(loss):
    input, target = loss.sample(4, 3)
    for road in (ROADS["plain"], ROADS["torch.func.grad"]):
        with pytest.warns(UserWarning, match="elementwise_mean") as caught:
            value = road(lambda x: loss.ours(x, target, reduction="elementwise_mean"), input)
        assert len(caught) == 1
        torch.testing.assert_close(value, loss.native(input, target))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@each()
def test_torchscript_traces_native_operators(loss, tmp_path):
    """Loaded where nobody has imported fusedloss, the graph must run."""
    input, target = loss.sample(4, 3)
    graph = torch.jit.trace(loss.ours, (input, target))
    kinds = {node.kind() for node in graph.inlined_graph.nodes()}  # its text names files, in a folder called anything
    assert [kind for kind in kinds if "aten::" in kind]
    assert [kind for kind in kinds if "fusedloss" in kind] == []
    other = loss.sample(6, 3)
    graph.save(str(tmp_path / "graph.pt"))
    graph = torch.jit.load(tmp_path / "graph.pt")
    torch.testing.assert_close(graph(*other), loss.native(*other))
    leaf = other[0].requires_grad_()
    ours, native = (torch.autograd.grad(f(leaf, other[1]), leaf) for f in (graph, loss.native))
    torch.testing.assert_close(ours, native)


class Holder(nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.linear, self.criterion = nn.Linear(3, 3), criterion

    def forward(self, x):
        return self.linear(x)


class Caller(Holder):
    def forward(self, x, y):
        return self.criterion(self.linear(x).sigmoid(), y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("replaced", [False, True])
@each()
def test_a_scripted_model_may_hold_a_criterion(loss, replaced, tmp_path):
    weight = torch.tensor([0.5, 1.0, 2.0])
    criterion = getattr(nn if replaced else fusedloss, loss.module)(weight, reduction="sum")
    model = fusedloss.replace_losses(Holder(criterion))
    assert type(model.criterion) is getattr(fusedloss, loss.module)
    x = torch.randn(4, 3)
    for kind in ("script", "freeze"):
        scripted = torch.jit.script(model.eval())
        scripted = torch.jit.freeze(scripted) if kind == "freeze" else scripted
        assert torch.equal(scripted(x), model(x))
        scripted.save(tmp_path / "model.pt")
        assert torch.equal(torch.jit.load(tmp_path / "model.pt")(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each()
def test_a_scripted_model_calls_python_for_its_criterion(loss, tmp_path):
    model = Caller(getattr(fusedloss, loss.module)(torch.tensor([0.5, 1.0, 2.0]), reduction="sum"))
    target, x = loss.sample(4, 3)[1], torch.randn(4, 3)
    scripted = torch.jit.script(model)
    results = []
    for module in (scripted, model):
        value = module(x, target)
        results.append((value.detach(), *torch.autograd.grad(value, list(module.parameters()))))
    torch.testing.assert_close(*results)
    with pytest.raises(RuntimeError, match="Could not export Python function"):
        scripted.save(tmp_path / "model.pt")


def test_native_is_asked_at_all():
    """The outcomes above are compared; some are values and some are errors."""
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    outcomes = [outcome(F.cross_entropy, x, y, ignore_index=value) for value in INTEGERS]
    assert 0 < sum(isinstance(value, type) for value in outcomes) < len(outcomes)
