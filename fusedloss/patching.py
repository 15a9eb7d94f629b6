"""For code that cannot be edited: fused losses in place of torch's, by name or inside a module tree."""

import dataclasses
import functools
import inspect
import operator
import pkgutil
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.overrides import has_torch_function

from fusedloss import calls, functional, modules, native
from fusedloss.arguments import hand_over

_FUSED = {
    nn.CrossEntropyLoss: modules.CrossEntropyLoss,
    nn.NLLLoss: modules.NLLLoss,
    nn.BCEWithLogitsLoss: modules.BCEWithLogitsLoss,
    nn.BCELoss: modules.BCELoss,
    native.LinearCrossEntropyLoss: modules.LinearCrossEntropyLoss,  # nobody has one where torch has none
}


class _StandIn:
    """What torch.nn.functional has in the place of a native loss while it is patched.

    To whoever asks, it is native's function. It passes for a function of the same name and signature. It equals
    native's, so that tables of functions find it: those of fx, of subclasses and modes with __torch_function__.
    TorchScript compiles native's instead. It is pickled as the name torch.nn.functional.NAME, which is native's where
    nothing is patched. And kept for longer than the patch, it calls native's.
    """

    __name__: str

    def __init__(self, name: str) -> None:
        self.native, self.fused = getattr(native, name), getattr(functional, name)
        functools.update_wrapper(self, self.native)
        for name in ("__code__", "__defaults__", "__kwdefaults__", "__globals__", "__closure__"):  # a function has them
            setattr(self, name, getattr(self.native, name))

    def __call__(self, *arguments, **options):
        if not _patched:
            loss = self.native(*arguments, **options)
            return calls.by_native(self.__name__, "taken from a patch that has ended", loss)
        if has_torch_function((*arguments, *options.values())):
            call = inspect.signature(self.fused).bind(*arguments, **options)
            call.apply_defaults()
            return hand_over(self, *call.arguments.values())
        return self.fused(*arguments, **options)

    @property  # type: ignore[misc]  # other objects may be given another class
    def __class__(self):
        return types.FunctionType

    def __prepare_scriptable__(self):
        return self.native

    def __get__(self, instance, owner=None):
        return self if instance is None else types.MethodType(self, instance)

    def __eq__(self, other) -> bool:
        return other is self or other is self.native

    def __hash__(self) -> int:
        return hash(self.native)

    def __repr__(self) -> str:
        return f"<fusedloss's {self.__name__} in torch.nn.functional>"

    def __reduce__(self):
        return pkgutil.resolve_name, (f"torch.nn.functional:{self.__name__}",)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


_STAND_INS = {name: _StandIn(name) for name in native.__all__}
_STAND_IN_FOR = {stand_in.native: stand_in for stand_in in _STAND_INS.values()}
_lock = threading.RLock()
_changed: dict[tuple[int, Any], "_Place"] = {}  # by the holder's id and the key
_patched = False  # whether there are any; a compiler can watch this, and not a dict


class patch:
    """Makes the losses of torch.nn.functional ours, and with them torch.nn's modules.

    The losses are cross_entropy, nll_loss, binary_cross_entropy_with_logits, binary_cross_entropy and, where torch has
    it (2.13), linear_cross_entropy.

    ``fusedloss.patch()`` stays in force until :func:`unpatch`; ``with fusedloss.patch(): ...`` until the block ends.
    Blocks may nest and overlap, in threads or not: torch.nn.functional has its own losses again when the last one ends.
    It acts on the whole process, all its threads included. What other code puts in the place of a loss meanwhile stays
    there.

    Code that has copied a name, as ``from torch.nn.functional import cross_entropy`` does, keeps native's function,
    unless its module is among ``modules``. There the patch exchanges module-level names, attributes of classes and of
    objects, default arguments and closures of functions, and what dicts, lists, tuples, partials and static methods
    hold of these. It follows what the names of the module lead to: functions, classes and objects of classes that are
    defined in one of the ``modules``, and dicts, lists and partials wherever they come from. Each gets native's
    function back when the last patch of it ends.

    Out of reach are local variables of what runs, keys of dicts and members of sets, objects that no name leads to or
    that keep their attributes in slots, bound methods and what C functions hold, modules that TorchScript has compiled
    or traced, exported programs, and the operators of torch.ops.aten. What torch.compile has compiled is compiled
    again, but for default arguments of methods, which it does not look at before torch.compiler.reset().

    Functions and models can be pickled and copied as without it. Meanwhile native's functions call themselves
    ``fusedloss.native``'s, which is where they can be found.

    Args:
        modules: modules, or names of imported ones; each with those of its submodules that are imported when the patch
            begins. What is imported later finds ours in torch.nn.functional.

    Raises:
        TypeError: ``modules`` is one string, or holds what is neither a module nor a string.
        ModuleNotFoundError: a module of such a name has not been imported.
        ValueError: a module is torch's or fusedloss's own.
    """

    def __init__(self, modules: Iterable[types.ModuleType | str] = ()) -> None:
        self._modules = _with_submodules(modules)
        self._blocks = 0
        self._begin()

    def __enter__(self) -> "patch":
        with _lock:
            self._blocks += 1
            self._begin()
        return self

    def __exit__(self, *exception) -> None:
        with _lock:
            self._blocks -= 1
            if self._blocks == 0:
                _end({self})

    def _begin(self) -> None:
        with _lock:
            for place in [*_places_of_torch(), *_places_in(self._modules)]:
                known = _changed.setdefault((id(place.holder), place.key), place)
                if known is place:
                    place.write(place.ours)
                known.patches.add(self)
            _note_change()


def unpatch() -> None:
    """Puts native's losses back, in torch.nn.functional and elsewhere, however often :class:`patch` was called."""
    with _lock:
        _end({patch for place in _changed.values() for patch in place.patches})


def _end(patches) -> None:
    with _lock:
        for at, place in list(_changed.items()):
            place.patches -= patches
            if not place.patches:
                del _changed[at]
                place.put_back()
        _note_change()


def _note_change() -> None:
    global _patched
    _patched = bool(_changed)
    # Pickle looks for a function where its module is said to be, and must find the same one.
    for stand_in in _STAND_INS.values():
        stand_in.native.__module__ = native.__name__ if _patched else nn.functional.__name__


@dataclasses.dataclass
class _Place:
    """What a holder has under a key, native's function or what is made of it; and the patches that want ours there."""

    holder: Any
    key: Any
    found: Any
    ours: Any
    patches: set[patch] = dataclasses.field(default_factory=set)

    def write(self, value) -> None:
        write = next(write for kind, write in _WRITE.items() if issubclass(type(self.holder), kind))
        write(self.holder, self.key, value)

    def put_back(self) -> None:
        if any(value is self.ours and key == self.key for key, value in _held(self.holder)):
            self.write(self.found)


def _write_partial(partial, key, value):
    state = {"func": partial.func, "args": partial.args, "keywords": partial.keywords, key: value}
    functools.partial.__setstate__(partial, (*state.values(), vars(partial)))


# How holders are written to. Methods that subclasses have overridden, as lazy ones do, may import or compute.
_WRITE: dict[type, Callable] = {
    dict: dict.__setitem__,
    list: list.__setitem__,
    type: type.__setattr__,
    types.FunctionType: setattr,
    types.CellType: setattr,
    functools.partial: _write_partial,
}
# And the attributes that others are looked into by; of objects of other classes it is their __dict__.
_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    types.FunctionType: ("__defaults__", "__kwdefaults__", "__closure__", "__dict__"),
    types.CellType: ("cell_contents",),
    functools.partial: ("func", "args", "keywords", "__dict__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset", "fdel"),
    functools.partialmethod: ("__dict__",),
    functools.cached_property: ("__dict__",),
}


def _places_of_torch() -> Iterator[_Place]:
    names = vars(nn.functional)
    for name, stand_in in _STAND_INS.items():
        found = names[name]
        yield _Place(names, name, stand_in.native if found is stand_in else found, stand_in)


def _places_in(modules) -> Iterator[_Place]:
    """What is to be changed in modules, and what is changed there already."""
    names = {module.__name__ for module in modules}
    holders: list[Any] = [vars(module) for module in modules]
    seen: dict[int, Any] = {}  # kept, so that no other object gets the same id
    while holders:
        holder = holders.pop()
        if id(holder) in seen:
            continue
        seen[id(holder)] = holder
        writable = issubclass(type(holder), tuple(_WRITE))
        for key, value in _held(holder):
            if _is_of(names, value):
                holders.append(value)
            ours = _made_ours(value)
            if writable and (ours is not value or (id(holder), key) in _changed):
                yield _Place(holder, key, value, ours)


def _is_of(names, value) -> bool:
    """Whether a value is looked into."""
    kind = type(value)  # its __class__ may be another
    if kind is types.FunctionType:
        return not names.isdisjoint([value.__module__, value.__globals__.get("__name__")])
    if issubclass(kind, type):
        return value.__module__ in names
    return issubclass(kind, (dict, list, tuple, *_ATTRIBUTES)) or kind.__module__ in names


def _held(holder) -> list[tuple[Any, Any]]:
    """Pairs of keys, or names of attributes, and values."""
    kind = type(holder)
    if issubclass(kind, dict):
        return list(dict.items(holder))
    if issubclass(kind, (list, tuple)):
        return list(enumerate(holder))
    if issubclass(kind, type):
        return list(vars(holder).items())
    attributes = next((names for of, names in _ATTRIBUTES.items() if issubclass(kind, of)), ("__dict__",))
    try:
        return [(name, getattr(holder, name)) for name in attributes if hasattr(holder, name)]
    except ValueError:  # an empty cell
        return []


def _made_ours(value):
    """What takes the place of a value: of native's function the stand-in, of what cannot be changed one made of it."""
    kind = type(value)
    if kind is types.FunctionType:
        return _STAND_IN_FOR.get(value, value)
    if issubclass(kind, (staticmethod, classmethod)):
        ours = _made_ours(value.__func__)
        return value if ours is value.__func__ else kind(ours)
    if issubclass(kind, tuple):
        made = [_made_ours(item) for item in value]
        return value if all(map(operator.is_, made, value)) else tuple.__new__(kind, made)
    return value


def _with_submodules(modules) -> list[types.ModuleType]:
    """The modules that are meant, each once, and those below them."""
    if isinstance(modules, (str, types.ModuleType)):
        raise TypeError(f"patch: modules must be a list of modules or of their names, got {modules!r}")
    found: dict[str, types.ModuleType] = {}
    for module in modules:
        if not isinstance(module, (str, types.ModuleType)):
            raise TypeError(f"patch: modules must hold modules or their names, got {type(module).__name__}: {module!r}")
        name = module if isinstance(module, str) else module.__name__
        if name.partition(".")[0] in ("torch", "fusedloss"):
            raise ValueError(f"patch: {name} is out of its reach; what it calls by name of torch.nn.functional is not")
        root = sys.modules.get(name) if isinstance(module, str) else module
        if root is None:
            raise ModuleNotFoundError(f"patch: no module named {name!r} has been imported", name=name)
        below = {other: each for other, each in list(sys.modules.items()) if other.startswith(f"{name}.")}
        found |= {name: root} | {other: each for other, each in below.items() if isinstance(each, types.ModuleType)}
    return list(found.values())


def replace_losses(module: nn.Module) -> nn.Module:
    """Makes every native loss in a module tree, the root included, ours; returns the module.

    Modules keep their identity, options, buffers and hooks: only their class is exchanged. Subclasses of the native
    losses are left alone, since their own forward would be lost.
    """
    for child in module.modules():
        fused = _FUSED.get(type(child))
        if fused is not None:
            child.__class__ = fused
    return module
