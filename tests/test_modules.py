"""The modules are native's own classes, extended: by type, signature, state, repr and warnings."""

import copy
import inspect
import linecache
import pickle
import warnings

import pytest
import torch
from support import LOSSES, each, each_reduction
from torch import nn

import fusedloss

ADDITIONS = {
    "CrossEntropyLoss": {"z_loss": 0.5, "logit_softcap": 2.0},
    "NLLLoss": {},
    "BCELoss": {"ignore_index": 1},
    "BCEWithLogitsLoss": {"ignore_index": 1},
}
each_module = pytest.mark.parametrize("name", ADDITIONS)


def configured(name, device, **options):
    """A module with a weight and every addition switched on."""
    weight = torch.tensor([0.5, 2.0, 1.0], device=device)
    extra = {"pos_weight": weight} if name == "BCEWithLogitsLoss" else {}
    return getattr(fusedloss, name)(weight, **extra, **ADDITIONS[name], **options)


def example(name, device):
    input, target = next(loss for loss in LOSSES.values() if loss.module == name).sample(4, 3, device=device)
    return input, target.round() if target.is_floating_point() else target


def parameters(function):
    return list(inspect.signature(function).parameters.values())


def same_signature_but_for_keywords(ours, native):
    """The leading parameters agree in name, kind and default; what follows is keyword-only and optional."""
    leading, added = parameters(ours)[: len(parameters(native))], parameters(ours)[len(parameters(native)) :]
    for our, their in zip(leading, parameters(native), strict=True):
        assert (our.name, our.kind, our.default) == (their.name, their.kind, their.default)
    for parameter in added:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty


@each()
def test_function_signature(loss):
    same_signature_but_for_keywords(loss.ours, loss.native)
    assert getattr(fusedloss, loss.function) is loss.ours


@each_module
def test_module_signature(name):
    same_signature_but_for_keywords(getattr(fusedloss, name), getattr(nn, name))


@each_reduction
@each()
def test_module_computes_the_function(loss, reduction, device):
    input, target = loss.sample(4, 3, device=device)
    module = getattr(fusedloss, loss.module)(reduction=reduction)
    assert torch.equal(module(input, target), loss.ours(input, target, reduction=reduction))


@each_module
def test_module_passes_its_options_on(name, device):
    module, (input, target) = configured(name, device, reduction="sum"), example(name, device)
    function = next(loss.ours for loss in LOSSES.values() if loss.module == name)
    options = {"pos_weight": module.pos_weight} if name == "BCEWithLogitsLoss" else {}
    expected = function(input, target, module.weight, reduction="sum", **options, **ADDITIONS[name])
    assert torch.equal(module(input, target), expected)
    assert not torch.equal(module(input, target), getattr(fusedloss, name)(reduction="sum")(input, target))


def test_cross_entropy_module_passes_native_options_on(device):
    input, target = example("CrossEntropyLoss", device)
    options = {"ignore_index": 1, "label_smoothing": 0.1}
    loss, lse = fusedloss.CrossEntropyLoss(**options, return_lse=True)(input, target)
    torch.testing.assert_close(loss, nn.CrossEntropyLoss(**options)(input, target))
    torch.testing.assert_close(lse, input.logsumexp(1))


@each_module
def test_module_is_a_native_module(name):
    ours, native = getattr(fusedloss, name)(), getattr(nn, name)()
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(native)
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(native))


@each_module
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_the_same_loss(name, clone, device):
    module, (input, target) = configured(name, device), example(name, device)
    twin = clone(module)
    assert type(twin) is type(module)
    assert torch.equal(twin(input, target), module(input, target))
    assert twin.weight is not module.weight


@each_module
def test_state_is_exchanged_with_native(name):
    ours, native = getattr(fusedloss, name)(torch.ones(3)), getattr(nn, name)(torch.full((3,), 2.0))
    assert ours.state_dict().keys() == native.state_dict().keys()
    ours.load_state_dict(native.state_dict())
    assert ours.weight.tolist() == [2.0, 2.0, 2.0]
    ours.weight.fill_(3.0)
    native.load_state_dict(ours.state_dict())
    assert native.weight.tolist() == [3.0, 3.0, 3.0]


@each_module
def test_buffers_follow_the_module(name, device):
    module = configured(name, "cpu").to(device).double()
    assert {(buffer.dtype, buffer.device.type) for buffer in module.buffers()} == {(torch.float64, device)}


def warned(function, *arguments, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = function(*arguments, **options)
    return value, [(warning.category, str(warning.message)) for warning in caught]


LEGACY = [
    {"size_average": size_average, "reduce": reduce}
    for size_average in (None, True, False)
    for reduce in (None, True, False)
]


@each()
@pytest.mark.parametrize("options", [*LEGACY, {"reduction": "elementwise_mean"}], ids=str)
def test_legacy_options_warn_and_act_as_natively(loss, options, device):
    input, target = loss.sample(4, 3, device=device)
    (ours, our_warnings), (native, their_warnings) = (
        warned(function, input, target, **options) for function in (loss.ours, loss.native)
    )
    torch.testing.assert_close(ours, native)
    assert our_warnings == their_warnings


@each_module
@pytest.mark.parametrize("options", LEGACY, ids=str)
def test_legacy_module_options_warn_and_act_as_natively(name, options):
    (ours, our_warnings), (native, their_warnings) = (
        warned(getattr(package, name), **options) for package in (fusedloss, nn)
    )
    assert ours.reduction == native.reduction
    assert our_warnings == their_warnings


@each_module
def test_no_other_source_passes_for_that_of_forward(name, monkeypatch):
    """From 3.13 on Python has what -c gave it as the file "<string>", and what is evaluated has that name, too."""
    monkeypatch.setitem(linecache.cache, "<string>", (4, None, ["x = 1\n"], "<string>"))
    with pytest.raises(OSError, match="could not get source code"):
        inspect.getsource(getattr(fusedloss, name).forward)


def test_build_info_names_the_build():
    info = fusedloss.build_info()
    assert {"version", "torch", "compiler", "cpu_capabilities", "cuda", "git_revision"} <= info.keys()
    assert torch.__version__.startswith(str(info["torch"]).split("+")[0])
