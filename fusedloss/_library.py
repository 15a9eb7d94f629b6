"""Loads the compiled operators, once, with a clear word when that cannot work."""

import torch

try:
    from fusedloss import _C
except ImportError as error:
    raise ImportError(
        f"fusedloss's compiled part does not load beside torch {torch.__version__}: {error}. "
        "It is built for one minor version of torch; rebuild it with `pip install --no-build-isolation .` "
        "(or `python setup.py build_ext --inplace` in a checkout)."
    ) from error

ops = torch.ops.fusedloss


def build_info() -> dict:
    """What this build was made of: versions, compiler, instruction sets, CUDA architectures (empty without CUDA)."""
    return _C.build_info()
