"""For code that cannot be edited: fused losses in place of torch's, by name or inside a module tree."""

import functools
import inspect
import pkgutil
import threading
import types
from collections.abc import Callable

from torch import nn
from torch.overrides import has_torch_function

from fusedloss import functional, modules, native
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
            return self.native(*arguments, **options)
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
_lock = threading.RLock()
_in_force: set["patch"] = set()
_patched = False  # whether there are any; a compiler can watch this, and not a set
_replaced: dict[str, Callable] = {}  # what the stand-ins have taken the place of


class patch:
    """Makes the losses of torch.nn.functional ours, and with them torch.nn's modules.

    The losses are cross_entropy, nll_loss, binary_cross_entropy_with_logits, binary_cross_entropy and, where torch has
    it (2.13), linear_cross_entropy.

    ``fusedloss.patch()`` stays in force until :func:`unpatch`; ``with fusedloss.patch(): ...`` until the block ends.
    Blocks may nest and overlap, in threads or not: torch.nn.functional has its own losses again when the last one ends.
    It acts on the whole process, all its threads included. Names that other code has already imported from
    torch.nn.functional are out of reach, and what other code puts there meanwhile stays there.

    Functions and models can be pickled and copied as without it. Meanwhile native's functions call themselves
    ``fusedloss.native``'s, which is where they can be found.
    """

    def __init__(self) -> None:
        self._blocks = 0
        _change(_in_force.add, self)

    def __enter__(self) -> "patch":
        with _lock:
            self._blocks += 1
            _change(_in_force.add, self)
        return self

    def __exit__(self, *exception) -> None:
        with _lock:
            self._blocks -= 1
            if self._blocks == 0:
                _change(_in_force.discard, self)


def unpatch() -> None:
    """Gives torch.nn.functional its own losses back, however often :class:`patch` was called, in blocks or not."""
    _change(_in_force.clear)


def _change(change, *arguments) -> None:
    """Changes what is in force, and torch.nn.functional with it."""
    global _patched
    with _lock:
        change(*arguments)
        if _patched == bool(_in_force):
            return
        _patched = bool(_in_force)
        for name, stand_in in _STAND_INS.items():
            found = getattr(nn.functional, name)
            if _patched:
                _replaced[name] = stand_in.native if found is stand_in else found
                setattr(nn.functional, name, stand_in)
            elif found is stand_in:
                setattr(nn.functional, name, _replaced[name])
            # Pickle looks for a function where its module is said to be, and must find the same one.
            stand_in.native.__module__ = native.__name__ if _patched else nn.functional.__name__


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
