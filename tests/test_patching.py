"""patch() makes torch.nn.functional's losses ours, unpatch() native again; replace_losses swaps modules."""

import pytest
import torch
import torch.nn.functional as F
from support import LOSSES, each
from torch import nn

import fusedloss

NAMES = sorted({loss.function for loss in LOSSES.values()})


@pytest.fixture(autouse=True)
def native_again():
    yield
    while is_patched():
        fusedloss.unpatch()


def is_patched():
    """All four functions are ours, or none is."""
    ours = [getattr(F, name) is getattr(fusedloss.functional, name) for name in NAMES]
    assert all(ours) or not any(ours)
    return all(ours)


def accepts_int32():
    """What only ours does: shows which one a native module calls."""
    try:
        return nn.CrossEntropyLoss()(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)) > 0
    except RuntimeError:
        return False


def test_patch_and_unpatch():
    originals = [getattr(F, name) for name in NAMES]
    fusedloss.patch()
    assert is_patched()
    assert accepts_int32()
    fusedloss.unpatch()
    assert [getattr(F, name) for name in NAMES] == originals
    assert not accepts_int32()


def test_patch_as_a_context():
    with fusedloss.patch():
        assert is_patched()
    assert not is_patched()


def test_an_exception_leaves_the_context_clean():
    with pytest.raises(ZeroDivisionError), fusedloss.patch():
        raise ZeroDivisionError
    assert not is_patched()


def test_contexts_nest():
    with fusedloss.patch():
        with fusedloss.patch():
            assert is_patched()
        assert is_patched()
    assert not is_patched()


def test_a_context_inside_a_plain_patch_leaves_it_on():
    fusedloss.patch()
    with fusedloss.patch():
        assert is_patched()
    assert is_patched()
    fusedloss.unpatch()
    assert not is_patched()


def test_unpatching_what_is_not_patched_changes_nothing():
    fusedloss.unpatch()
    assert not is_patched()
    with fusedloss.patch():
        assert is_patched()
    assert not is_patched()


@each()
def test_patched_values_and_gradients(loss, device):
    input, target = loss.sample(4, 3, device=device)
    module = getattr(nn, loss.module)()
    expected = module(input.requires_grad_(), target)
    with fusedloss.patch():
        actual = module(input, target)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, input), torch.autograd.grad(expected, input))


@each()
def test_what_is_routed_to_native_still_reaches_native(loss, device):
    """A transform inside a patch must find the original function, not itself."""
    input, target = loss.sample(4, 3, device=device)
    expected = torch.func.grad(loss.native)(input, target)
    with fusedloss.patch():
        assert torch.equal(torch.func.grad(getattr(F, loss.function))(input, target), expected)


class Model(nn.Module):
    """Losses at several depths, one of them twice, one that is a user's own subclass."""

    class Own(nn.CrossEntropyLoss):
        def forward(self, input, target):
            return 2 * super().forward(input, target)

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.main = nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]), ignore_index=1, label_smoothing=0.1)
        self.others = nn.ModuleDict(
            {"nll": nn.NLLLoss(), "list": nn.ModuleList([nn.BCELoss(), nn.BCEWithLogitsLoss()])}
        )
        self.shared = self.main
        self.own = self.Own()


def test_losses_are_replaced_anywhere_in_the_tree():
    model = Model()
    modules, state = (
        list(model.modules()),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    before, text, weight = model.main.__dict__.copy(), repr(model), model.main.weight
    assert fusedloss.replace_losses(model) is model
    assert [type(module) for module in (model.main, model.others["nll"], *model.others["list"])] == [
        fusedloss.CrossEntropyLoss,
        fusedloss.NLLLoss,
        fusedloss.BCELoss,
        fusedloss.BCEWithLogitsLoss,
    ]
    assert list(model.modules()) == modules
    assert model.main is model.shared
    assert model.main.weight is weight
    assert before.items() <= model.main.__dict__.items()
    assert type(model.own) is Model.Own
    assert repr(model) == text
    torch.testing.assert_close(dict(model.state_dict()), state)


@each()
def test_a_root_is_replaced_and_computes_the_same(loss, device):
    input, target = loss.sample(4, 3, device=device)
    module = getattr(nn, loss.module)(torch.tensor([0.5, 2.0, 1.0], device=device), reduction="sum")
    expected = module(input, target)
    assert type(fusedloss.replace_losses(module)) is getattr(fusedloss, loss.module)
    torch.testing.assert_close(module(input, target), expected)


def test_replacing_twice_changes_nothing_more():
    model = fusedloss.replace_losses(Model())
    model.main.z_loss = 0.5
    assert fusedloss.replace_losses(model).main.z_loss == 0.5
