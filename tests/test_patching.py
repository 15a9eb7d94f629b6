"""patch() makes torch.nn.functional's losses ours, unpatch() native again; replace_losses swaps modules."""

import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys
import threading
import unittest.mock

import pytest
import torch
import torch.nn.functional as F
from support import LOSSES, each
from torch import nn

import fusedloss

LINEAR = ["linear_cross_entropy"] if hasattr(F, "linear_cross_entropy") else []  # since torch 2.13
NAMES = sorted({loss.function for loss in LOSSES.values()}) + LINEAR
NATIVE = {name: getattr(F, name) for name in NAMES}
each_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def native_again():
    yield
    fusedloss.unpatch()
    for name, function in NATIVE.items():
        setattr(F, name, function)


def is_patched():
    """All functions are ours, or none is."""
    ours = [getattr(F, name) is not NATIVE[name] for name in NAMES]
    assert all(ours) or not any(ours)
    return all(ours)


def accepts_int32():
    """What only ours does: shows which one a native module calls."""
    try:
        return nn.CrossEntropyLoss()(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)) > 0
    except RuntimeError:
        return False


def test_patch_and_unpatch():
    fusedloss.patch()
    assert is_patched()
    assert accepts_int32()
    fusedloss.unpatch()
    assert not is_patched()
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


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)], ids=str)
def test_blocks_may_end_in_any_order(order):
    blocks = [fusedloss.patch().__enter__() for _ in order]
    for position in order:
        assert accepts_int32()
        blocks[position].__exit__(None, None, None)
    assert not is_patched()


def test_one_patch_for_several_blocks():
    patch = fusedloss.patch()
    for _ in range(2):
        with patch:
            with patch:
                assert is_patched()
            assert is_patched()
        assert not is_patched()


def test_unpatching_ends_blocks_too():
    with fusedloss.patch(), fusedloss.patch():
        fusedloss.unpatch()
        assert not is_patched()
        with fusedloss.patch():
            assert is_patched()
        assert not is_patched()
    assert not is_patched()
    assert not accepts_int32()


def test_blocks_in_threads():
    """Whoever is within a block finds it in force; in the end nothing is."""
    wrong = []

    def work(seed):
        for turn in range(100):
            with fusedloss.patch():
                if not is_patched() or ((seed + turn) % 10 == 0 and not accepts_int32()):
                    wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not is_patched()


def doubled(function):
    """What somebody else puts into torch.nn.functional."""

    @functools.wraps(function)
    def replacement(*arguments, **options):
        return 2 * function(*arguments, **options)

    return replacement


@each_name
def test_what_others_install_meanwhile_stays(name, monkeypatch):
    arguments = sample(name)
    expected = NATIVE[name](*arguments)
    with fusedloss.patch():
        theirs = doubled(getattr(F, name))
        monkeypatch.setattr(F, name, theirs)
        torch.testing.assert_close(getattr(F, name)(*arguments), 2 * expected)
        with fusedloss.patch():
            assert getattr(F, name) is theirs
    assert getattr(F, name) is theirs
    assert torch.equal(theirs(*arguments), 2 * expected)


@each_name
def test_what_others_have_installed_before_is_put_back(name, monkeypatch):
    theirs = doubled(NATIVE[name])
    monkeypatch.setattr(F, name, theirs)
    arguments = sample(name)
    with fusedloss.patch():
        torch.testing.assert_close(getattr(F, name)(*arguments), NATIVE[name](*arguments))
    assert getattr(F, name) is theirs


@each_name
def test_others_may_put_back_what_they_found_too_late(name):
    with fusedloss.patch():
        found = getattr(F, name)
    setattr(F, name, found)
    arguments = sample(name)
    assert torch.equal(getattr(F, name)(*arguments), NATIVE[name](*arguments))
    with fusedloss.patch():
        pass
    assert getattr(F, name) is NATIVE[name]


def sample(name):
    """The arguments of a call."""
    if name in LINEAR:
        return torch.randn(4, 2), torch.randn(3, 2), torch.randint(3, (4,))
    return next(loss for loss in LOSSES.values() if loss.function == name).sample(4, 3)


def kept(function):
    """An object that holds a loss, as it stands in a model; and the way to it."""
    holder = nn.Linear(2, 2)
    holder.loss = function
    return {
        "itself": (function, lambda loaded: loaded),
        "a partial": (functools.partial(function, reduction="sum"), lambda loaded: loaded.func),
        "a list": ([function, function], lambda loaded: loaded[1]),
        "a module": (holder, lambda loaded: loaded.loss),
    }


def saved_by_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return lambda: torch.load(io.BytesIO(file.getvalue()), weights_only=False)


PICKLERS = {
    **{f"protocol {n}": lambda thing, n=n: functools.partial(pickle.loads, pickle.dumps(thing, n)) for n in range(6)},
    "torch.save": saved_by_torch,
}


@pytest.mark.parametrize("save", PICKLERS.values(), ids=PICKLERS)
@each_name
def test_functions_are_pickled_while_patched(name, save):
    """Native's from before the patch stay native's; the name in torch.nn.functional stays that name."""
    with fusedloss.patch():
        current = getattr(F, name)
        for thing, find in kept(NATIVE[name]).values():
            load = save(thing)
            assert find(load()) is NATIVE[name]
        loads = [(save(thing), find) for thing, find in kept(current).values()]
        assert loads[0][0]() is current
    assert [find(load()) is NATIVE[name] for load, find in loads] == [True] * len(loads)


@pytest.mark.parametrize("save", PICKLERS.values(), ids=PICKLERS)
@each_name
def test_functions_are_pickled_when_the_patch_is_over(name, save):
    with fusedloss.patch():
        current = getattr(F, name)
    for thing, find in kept(current).values():
        assert find(save(thing)()) is NATIVE[name]
    assert NATIVE[name].__module__ == "torch.nn.functional"


@each_name
def test_what_is_pickled_while_patched_loads_in_a_process_that_is_not(name):
    with fusedloss.patch():
        data = pickle.dumps([getattr(F, name), NATIVE[name]])
        only_by_name = pickle.dumps(getattr(F, name))
    assert b"fusedloss" not in only_by_name
    program = f"import pickle; print([f.__name__ for f in pickle.loads({data!r})]); import torch.nn.functional as F; "
    program += f"assert pickle.loads({data!r}) == [F.{name}] * 2"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str([name] * 2), done.stderr


@each_name
def test_copies_while_patched(name):
    with fusedloss.patch():
        for function in (getattr(F, name), NATIVE[name]):
            assert copy.copy(function) is copy.deepcopy(function) is function
            for thing, find in kept(function).values():
                assert find(copy.deepcopy(thing)) is function
        model = copy.deepcopy(nn.Sequential(nn.Linear(3, 3), nn.CrossEntropyLoss()))
        assert type(pickle.loads(pickle.dumps(model))[1]) is nn.CrossEntropyLoss


@each_name
def test_it_passes_for_native_s_function(name):
    with fusedloss.patch():
        current = getattr(F, name)
    assert inspect.isfunction(current)
    assert inspect.signature(current) == inspect.signature(NATIVE[name])
    assert (current.__name__, current.__module__, current.__doc__) == (
        name,
        "torch.nn.functional",
        NATIVE[name].__doc__,
    )
    assert current == NATIVE[name]
    assert {NATIVE[name]: 1}[current] == 1
    holder = type("Holder", (), {"loss": current, "static": staticmethod(current)})()
    arguments = sample(name)
    assert torch.equal(holder.static(*arguments), NATIVE[name](*arguments))
    assert holder.loss.__self__ is holder


@each_name
def test_it_takes_what_ours_takes(name):
    arguments = sample(name)
    with fusedloss.patch():
        assert torch.equal(getattr(F, name)(*arguments, backend="cpu"), getattr(fusedloss, name)(*arguments))
        with pytest.raises(TypeError, match="nonsense"):
            getattr(F, name)(*arguments, nonsense=1)


@each_name
def test_it_is_native_s_when_the_patch_is_over(name):
    with fusedloss.patch():
        current = getattr(F, name)
    arguments = sample(name)
    assert torch.equal(current(*arguments), NATIVE[name](*arguments))
    with pytest.raises(TypeError, match="backend"):
        current(*arguments, backend="cpu")


class Scripted(nn.Module):
    def forward(self, x, y):
        return F.cross_entropy(x, y, label_smoothing=0.1)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_native_code_is_scripted_while_patched(tmp_path):
    """As native's, since the compiled graph may run anywhere."""
    input, target = sample("cross_entropy")
    with fusedloss.patch():
        for module in (Scripted(), nn.CrossEntropyLoss(label_smoothing=0.1)):
            torch.jit.script(module).save(tmp_path / "model.pt")
            value = torch.jit.load(tmp_path / "model.pt")(input, target)
            assert torch.equal(value, NATIVE["cross_entropy"](input, target, label_smoothing=0.1))


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


INTROSPECTION = {
    "compiled": lambda function: torch.compile(function, backend="eager"),
    "decorated": lambda function: torch.no_grad()(function),
    "mocked": lambda function: unittest.mock.Mock(wraps=function),
    "specified": lambda function: inspect.getfullargspec(function) and function,
    "closed over": lambda function: inspect.getclosurevars(function) and function,
}


@pytest.mark.parametrize("look", INTROSPECTION.values(), ids=INTROSPECTION)
def test_what_takes_functions_apart_finds_one(look):
    torch.compiler.reset()
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0], dtype=torch.int32)
    with fusedloss.patch():
        value = look(F.cross_entropy)(logits, target)
    torch.testing.assert_close(value, fusedloss.cross_entropy(logits, target))
