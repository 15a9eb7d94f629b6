"""patch() makes torch.nn.functional's losses ours, unpatch() native again; replace_losses swaps modules."""

import copy
import functools
import inspect
import io
import pickle
import re
import subprocess
import sys
import threading
import types
import unittest.mock

import pytest
import torch
import torch.nn.functional as F
from support import LOSSES, each
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

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


def test_what_is_pickled_while_patched_loads_in_a_process_that_is_not():
    with fusedloss.patch():
        data = pickle.dumps([[getattr(F, name), NATIVE[name]] for name in NAMES])
        only_by_name = pickle.dumps([getattr(F, name) for name in NAMES])
    assert b"fusedloss" not in only_by_name
    program = (
        f"import pickle; loaded = pickle.loads({data!r}); print([[f.__name__ for f in pair] for pair in loaded]); "
    )
    program += f"import torch.nn.functional as F; assert loaded == [[getattr(F, name)] * 2 for name in {NAMES}]"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str([[name] * 2 for name in NAMES]), done.stderr


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


COPIES = """
import collections, dataclasses, functools
from torch import nn
from torch.nn.functional import cross_entropy

named = cross_entropy
partial = functools.partial(cross_entropy, reduction="mean")
class Partial(functools.partial):
    __slots__ = ()
nested = Partial(Partial(cross_entropy, label_smoothing=0.0), reduction="mean")
def apply(x, y, loss): return loss(x, y)
by_keyword = functools.partial(apply, loss=cross_entropy)
by_position = functools.partial(lambda loss, x, y: loss(x, y), cross_entropy)
table = {"losses": [None, collections.OrderedDict(ce=cross_entropy)]}
class Lazy(dict):
    def items(self): raise NotImplementedError
    __getitem__ = __setitem__ = items
lazy = Lazy(ce=cross_entropy)
Named = collections.namedtuple("Named", "loss other")
pair = Named(cross_entropy, 1)

def in_default(x, y, loss=cross_entropy): return loss(x, y)
def in_keyword_default(x, y, *, loss=cross_entropy): return loss(x, y)
def closed_over(loss):
    def inner(x, y): return loss(x, y)
    return inner
closure = closed_over(cross_entropy)
@functools.lru_cache
def cached(): return closed_over(cross_entropy)
@functools.wraps(cross_entropy)
def wrapper(x, y, loss=cross_entropy): return loss(x, y)
def empty_cell():
    def inner(): return later
    return inner
    later = None
of_empty_cell = empty_cell()

class Criterion:
    static = staticmethod(cross_entropy)
    plain = cross_entropy
    partial = functools.partial(cross_entropy)
    def method(self, x, y, loss=cross_entropy): return loss(x, y)
    @classmethod
    def of_class(cls, x, y, loss=cross_entropy): return loss(x, y)
    @property
    def computed(self, loss=cross_entropy): return loss
    class Inner:
        static = staticmethod(cross_entropy)
class Module(nn.Module):
    def __init__(self, loss=cross_entropy):
        super().__init__()
        self.loss = loss
    def forward(self, x, y): return self.loss(x, y)
module = Module()
@dataclasses.dataclass
class Config:
    loss: object = cross_entropy
registry = {"a": Criterion(), "b": Config()}

def keyed(x, y): return next(iter({cross_entropy: 1}))(x, y)
keys = {cross_entropy: "ce"}
members = {cross_entropy}
bound = Criterion.plain.__get__(Criterion())
def local():
    loss = cross_entropy
    while True: yield loss
running = local()
next(running)
"""
# How code holds native's function, in a module that has the text above; each gives a function of logits and target.
REACHED = {
    "a name": lambda m: m.named,
    "another name": lambda m: m.cross_entropy,
    "a partial": lambda m: m.partial,
    "a nested partial of a subclass": lambda m: m.nested,
    "a keyword of a partial": lambda m: m.by_keyword,
    "an argument of a partial": lambda m: m.by_position,
    "a dict in a list in a dict": lambda m: m.table["losses"][1]["ce"],
    "a dict that computes its items": lambda m: dict.get(m.lazy, "ce"),
    "a named tuple": lambda m: m.pair.loss,
    "a default": lambda m: m.in_default,
    "a default by keyword": lambda m: m.in_keyword_default,
    "a closure": lambda m: m.closure,
    "a wrapper": lambda m: m.wrapper,
    "a static method": lambda m: m.Criterion.static,
    "a class attribute": lambda m: m.Criterion.plain,
    "a partial in a class": lambda m: m.Criterion.partial,
    "a method's default": lambda m: m.Criterion().method,
    "a class method's default": lambda m: m.Criterion.of_class,
    "a property's default": lambda m: m.Criterion().computed,
    "a class in a class": lambda m: m.Criterion.Inner.static,
    "a module that exists": lambda m: m.module,
    "a module that is made": lambda m: m.Module(),
    "a dataclass": lambda m: m.Config().loss,
    "an object": lambda m: m.registry["b"].loss,
}
OUT_OF_REACH = {
    "a key": lambda m: next(iter(m.keys)),
    "a member": lambda m: next(iter(m.members)),
    "a running function": lambda m: next(m.running),
    "a bound method": lambda m: m.bound.__func__,
    "a cache": lambda m: m.cached(),
}


@pytest.fixture
def copies(monkeypatch):
    """A module whose code has copied native's function."""
    module = types.ModuleType("copies")
    monkeypatch.setitem(sys.modules, "copies", module)
    exec(COPIES, vars(module))
    return module


def is_ours(loss):
    """Native's refuses int32."""
    logits, target = sample("cross_entropy")
    try:
        value = loss(logits, target.int())
    except (RuntimeError, AssertionError):  # of an exported program's guards
        assert torch.equal(loss(logits, target), NATIVE["cross_entropy"](logits, target))
        return False
    torch.testing.assert_close(value, NATIVE["cross_entropy"](logits, target))
    return True


class Subclass(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target)


def traced():
    return torch.jit.trace(lambda x, y: F.cross_entropy(x, y), sample("cross_entropy"))


def exported():
    return torch.export.export(nn.CrossEntropyLoss(), sample("cross_entropy")).module()


BY_NAME = {
    "F": lambda: lambda x, y: F.cross_entropy(x, y),
    "torch.nn.functional": lambda: lambda x, y: torch.nn.functional.cross_entropy(x, y),
    "nn.functional": lambda: {"ce": lambda x, y: nn.functional.cross_entropy(x, y)}["ce"],
    "a module": nn.CrossEntropyLoss,
    "a subclass": Subclass,
}
NOT_BY_NAME = {
    "a function": lambda: NATIVE["cross_entropy"],
    "scripted": lambda: torch.jit.script(nn.CrossEntropyLoss()),
    "traced": traced,
    "exported": exported,
    "torch._C._nn": lambda: functools.partial(torch._C._nn.cross_entropy_loss, reduction=1),
    "torch.ops.aten": lambda: torch.ops.aten.cross_entropy_loss,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [*BY_NAME.values(), *NOT_BY_NAME.values()], ids=[*BY_NAME, *NOT_BY_NAME])
def test_what_every_patch_reaches(make):
    loss = make()
    assert not is_ours(loss)
    with fusedloss.patch():
        assert is_ours(loss) == (make in BY_NAME.values())
    assert not is_ours(loss)


@pytest.mark.parametrize("find", REACHED.values(), ids=REACHED)
def test_what_a_patch_of_modules_reaches(copies, find):
    assert not is_ours(find(copies))
    with fusedloss.patch():
        assert not is_ours(find(copies))
    with fusedloss.patch(modules=["copies"]):
        assert is_ours(find(copies))
    assert not is_ours(find(copies))
    with fusedloss.patch(modules=[copies]):
        assert is_ours(find(copies))
        fusedloss.unpatch()
        assert not is_ours(find(copies))


@pytest.mark.parametrize("find", OUT_OF_REACH.values(), ids=OUT_OF_REACH)
def test_what_a_patch_of_modules_does_not_reach(copies, find):
    assert not is_ours(find(copies))
    with fusedloss.patch(modules=[copies]):
        assert not is_ours(find(copies))


def snapshot(module):
    """Everything that a patch may look into, by the very objects."""
    criterion = vars(module.Criterion)
    return [
        *vars(module).values(),
        *criterion.values(),
        *module.table["losses"][1].values(),
        *dict.values(module.lazy),
        *(getattr(p, name) for p in (module.partial, module.nested) for name in ("func", "args", "keywords")),
        *(module.by_keyword.keywords["loss"], *module.by_position.args),
        *(module.in_default.__defaults__, module.in_keyword_default.__kwdefaults__["loss"]),
        *(module.closure.__closure__[0].cell_contents, criterion["method"].__defaults__),
        *(module.module.loss, module.registry["b"].loss),
    ]


def test_everything_is_put_back(copies):
    before = snapshot(copies)
    with fusedloss.patch(modules=["copies"]):
        changed = [a is not b for a, b in zip(before, snapshot(copies), strict=True)]
    assert sum(changed) > 10
    assert all(a is b for a, b in zip(before, snapshot(copies), strict=True))


@each_name
def test_each_function_is_exchanged_in_modules(name, copies):
    copies.copied = functools.partial(NATIVE[name])
    arguments = sample(name)
    with fusedloss.patch(modules=[copies]):
        assert torch.equal(copies.copied(*arguments, backend="cpu"), getattr(fusedloss, name)(*arguments))
    assert copies.copied.func is NATIVE[name]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)], ids=str)
def test_patches_of_a_module_may_end_in_any_order(order, copies):
    """A module is native again when the last patch of it has ended, whatever other patches there are."""
    of_modules = [["copies"], [], [copies]]
    blocks = [fusedloss.patch(modules=modules).__enter__() for modules in of_modules]
    for i, position in enumerate(order):
        blocks[position].__exit__(None, None, None)
        left = order[i + 1 :]
        assert [is_ours(find(copies)) for find in REACHED.values()] == [0 in left or 2 in left] * len(REACHED)
        assert is_patched() == bool(left)


def test_one_patch_of_a_module_for_several_blocks(copies):
    patch = fusedloss.patch(modules=[copies])
    for _ in range(2):
        with patch, patch:
            assert is_ours(copies.named)
        assert not is_ours(copies.named)
        copies.later = NATIVE["cross_entropy"]
        with patch:
            assert is_ours(copies.later)


def test_what_others_put_into_a_module_meanwhile_stays(copies):
    theirs = doubled(NATIVE["cross_entropy"])
    with fusedloss.patch(modules=[copies]):
        copies.named = copies.table["losses"][1]["ce"] = copies.Criterion.plain = theirs
        copies.in_default.__defaults__ = (theirs,)
        del copies.pair
        copies.table["losses"].insert(0, "new")
        with fusedloss.patch(modules=[copies]):
            assert copies.named is theirs
    assert copies.named is copies.table["losses"][2]["ce"] is copies.Criterion.plain is theirs
    assert copies.in_default.__defaults__ == (theirs,)
    assert not hasattr(copies, "pair")
    assert copies.cross_entropy is NATIVE["cross_entropy"]


def test_a_module_that_is_run_again_meanwhile(copies):
    with fusedloss.patch(modules=[copies]):
        exec(COPIES, vars(copies))
        assert [is_ours(find(copies)) for find in REACHED.values()] == [True] * len(REACHED)
    assert [is_ours(find(copies)) for find in REACHED.values()] == [False] * len(REACHED)


def test_a_package_is_it_and_what_is_below_it(monkeypatch):
    modules = {name: types.ModuleType(name) for name in ("mine", "mine.below", "mine.below.deep", "mine_not")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        module.loss = NATIVE["cross_entropy"]
    monkeypatch.setitem(sys.modules, "mine.blocked", None)  # how an import is forbidden

    def ours():
        return [name for name, module in modules.items() if is_ours(module.loss)]

    for package in ("mine", modules["mine"]):
        with fusedloss.patch(modules=[package]):
            assert ours() == ["mine", "mine.below", "mine.below.deep"]
    with fusedloss.patch(modules=["mine.below", "mine_not"]):
        assert ours() == ["mine.below", "mine.below.deep", "mine_not"]
    assert ours() == []


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ("copies", TypeError, "got 'copies'"),
        (types, TypeError, "list of modules"),
        ([1], TypeError, "got int: 1"),
        (["copies", "no.such.module"], ModuleNotFoundError, "'no.such.module'"),
        ([""], ModuleNotFoundError, "''"),
        (["torch"], ValueError, "torch is"),
        (["torch.nn.functional"], ValueError, "torch.nn.functional is"),
        ([fusedloss], ValueError, "fusedloss is"),
        ([fusedloss.native], ValueError, "fusedloss.native is"),
    ],
    ids=str,
)
def test_modules_that_cannot_be_patched(modules, error, message, copies):
    with pytest.raises(error, match=re.escape(message)):
        fusedloss.patch(modules=modules)
    assert not is_patched()
    assert not is_ours(copies.named)


# Methods' defaults, which torch.compile does not look at again.
UNGUARDED = ["a method's default", "a property's default", "a module that is made", "a dataclass"]
UNGUARDED += ["a module that exists"] * torch.__version__.startswith("2.11.")  # nor there at attributes of modules


@pytest.mark.parametrize("name", ["an attribute of torch.nn.functional", *REACHED])
def test_compiled_code_follows_a_patch(name, copies):
    """What has been compiled before finds ours when the patch begins, and native's when it ends."""
    torch.compiler.reset()
    find = REACHED.get(name, lambda m: F.cross_entropy)
    ran = []

    def note(graph, _):
        fused = any("fusedloss" in str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(lambda *arguments: ran.append(fused) or graph(*arguments))

    compiled = torch.compile(lambda x, y: find(copies)(x, y), backend=aot_autograd(fw_compiler=note))
    logits, target = sample("cross_entropy")
    expected = NATIVE["cross_entropy"](logits, target)
    for _ in range(2):
        torch.testing.assert_close(compiled(logits, target), expected)
        with fusedloss.patch(modules=[copies]):
            if name in UNGUARDED:
                torch.compiler.reset()
            torch.testing.assert_close(compiled(logits, target), expected)
        if name in UNGUARDED:
            torch.compiler.reset()
    assert ran == [False, True] * 2


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
