"""For code that cannot be edited: fused losses in place of torch's, by name or inside a module tree."""

from torch import nn

from fusedloss import functional, modules

_NAMES = ("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy")
_NATIVE = {name: getattr(nn.functional, name) for name in _NAMES}
_FUSED = {
    nn.CrossEntropyLoss: modules.CrossEntropyLoss,
    nn.NLLLoss: modules.NLLLoss,
    nn.BCEWithLogitsLoss: modules.BCEWithLogitsLoss,
    nn.BCELoss: modules.BCELoss,
}


def _install(functions: dict) -> dict:
    """Puts functions into torch.nn.functional and returns what was there."""
    previous = {name: getattr(nn.functional, name) for name in functions}
    for name, function in functions.items():
        setattr(nn.functional, name, function)
    return previous


class patch:
    """Makes the four losses of torch.nn.functional ours, and with them torch.nn's modules.

    ``fusedloss.patch()`` stays in force until :func:`unpatch`; ``with fusedloss.patch(): ...`` until the block ends,
    which restores what it found, so blocks nest. Names that other code has already imported from torch.nn.functional
    are out of reach. It acts on the whole process, all its threads included.
    """

    def __init__(self) -> None:
        self._previous = _install({name: getattr(functional, name) for name in _NAMES})

    def __enter__(self) -> "patch":
        return self

    def __exit__(self, *exception) -> None:
        _install(self._previous)


def unpatch() -> None:
    """Gives torch.nn.functional its own losses back, however often :class:`patch` was called."""
    _install(_NATIVE)


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
