"""Loads the compiled operators, once, with a clear word when that cannot work."""

from pathlib import Path
from types import SimpleNamespace

import torch

_VERSION = Path(__file__).with_name("_C.torch")  # setup.py leaves it beside the library


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


_PARENT = Path(__file__).parents[1]
if (_PARENT / "setup.py").exists():
    _BUILD = (
        f"build it in place, by `python setup.py build_ext --inplace`. These are the sources, in {_PARENT}: "
        "to import a fusedloss that is installed, start Python from another folder"
    )
else:
    _BUILD = "build it in a clone, by `pip install --no-build-isolation --force-reinstall --no-deps .`"

# Before it is loaded: beside another torch the library lacks symbols, or misreads torch's classes.
_beside = _VERSION.read_text().strip() if _VERSION.exists() else torch.__version__
if _minor(_beside) != _minor(torch.__version__):
    raise ImportError(
        f"fusedloss is built beside torch {_beside}, and this is torch {torch.__version__}: "
        f"install a wheel of it that is built for torch {_minor(torch.__version__)}, or {_BUILD}"
    )
try:
    from fusedloss import _C
except ImportError as error:
    raise ImportError(
        f"fusedloss's compiled part does not load beside torch {torch.__version__}: {error}. To mend it, {_BUILD}"
    ) from error

ops = torch.ops.fusedloss


class DirectOperators:
    """A namespace of torch.ops whose losses are called as C++ calls them (csrc/module.cpp), where nobody compiles."""

    def __init__(self, namespace: str) -> None:
        self._all = getattr(torch.ops, namespace)
        losses = {name: loss for name, loss in vars(getattr(_C, namespace)).items() if not name.startswith("_")}
        self.__dict__ |= {name: SimpleNamespace(default=loss) for name, loss in losses.items()}

    def __getattr__(self, name: str):
        return getattr(self._all, name)


def build_info() -> dict:
    """What this build was made of: versions, compiler, instruction sets, CUDA architectures (empty without CUDA)."""
    return _C.build_info()
