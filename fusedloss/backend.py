"""Which kernels run: those compiled for the CPU or for CUDA, or Triton's. A backend is a namespace of operators.

A call that names no backend takes the compiled kernels where there are some for the tensor's device, else Triton, else
it raises; it never falls back to native torch. The argument ``backend`` of a call, or :class:`use_backend`, names one.
"""

import functools
import importlib.util
import re
from typing import Literal, get_args

import torch
from torch.compiler import is_dynamo_compiling

from fusedloss import native
from fusedloss._library import DirectOperators, build_info, ops
from fusedloss.dtensor import Sharded

Backend = Literal["cpu", "cuda", "triton"]
NAMES = get_args(Backend)
NAMESPACES = ("fusedloss", "fusedloss_triton")

_triton_ops = torch.ops.fusedloss_triton
_direct = DirectOperators("fusedloss")
_DIRECT = {ops: _direct, _triton_ops: DirectOperators("fusedloss_triton")}
# Of the process: threads that others start for it (DataParallel's, autograd's) are to do as it does. And torch.compile
# sees a global change, but no variable of a thread.
_override: Backend | None = None


class use_backend:
    """Makes a backend the choice of all calls that name none, in all threads, while a ``with`` block runs.

    Args:
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, or None: the choice by the tensor's device.

    Raises:
        ValueError: there is no such backend. Whether it can take a tensor is seen when it is given one.
    """

    def __init__(self, backend: Backend | None) -> None:
        _check_name(backend)
        self._backend = backend
        self._outer: list[Backend | None] = []

    def __enter__(self) -> "use_backend":
        global _override
        self._outer.append(_override)
        _override = self._backend
        return self

    def __exit__(self, *exception) -> None:
        global _override
        _override = self._outer.pop()


def backends() -> dict[str, str]:
    """The backends' names, each with an empty string if it can be used here, or the reason why it cannot."""
    return {"cpu": "", "cuda": _missing_cuda(), "triton": _missing_triton() or _missing_driver()}


def operators(backend: Backend | Sharded | None, input: torch.Tensor):
    """The operators for a call that names `backend`, or None: called directly, where no compiler is at work."""
    if backend is None and _override is None and (input.is_cpu or input.is_meta):
        return ops if is_dynamo_compiling() else _direct
    if isinstance(backend, Sharded):
        return backend
    kernels = namespace(backend, input)
    return kernels if is_dynamo_compiling() else _DIRECT[kernels]


def namespace(backend: Backend | None, input: torch.Tensor):
    """The same, in torch.ops: with their schemas, by which they take arguments by name and fill in the others."""
    if backend is None:
        backend = _override
    if backend is None and (input.is_cpu or input.is_meta):
        return ops
    _check_name(backend)
    return _triton_ops if _is_triton(backend, input.device) else ops


@native.assume_constant_result
def _is_triton(backend, device):
    return _decide(backend, device)


@functools.cache
def _decide(backend, device):
    """Whether Triton's kernels are to run, or the compiled ones; raises where neither can."""
    on_cuda = device.type == "cuda"
    missing_cuda = (_missing_cuda() or _not_compiled_for(device)) if on_cuda else ""
    if backend is None:
        if on_cuda and not missing_cuda:
            return False
        if device.type not in ("cuda", "xpu"):
            _require(device, "there are some for CPU, CUDA and XPU devices")
        _require(device, "; ".join([missing_cuda] * on_cuda + [_missing_triton()]) if _missing_triton() else "")
        return True
    if backend == "triton":
        _require(device, _missing_triton())
        if device.type == "cpu" and not _interprets():
            raise RuntimeError(
                "backend='triton' needs tensors of a GPU, got one on cpu. (Where TRITON_INTERPRET=1 is set before the "
                "first import of triton, its kernels are interpreted on the CPU, for tests.)"
            )
        return True
    if device.type not in (backend, "meta"):
        raise RuntimeError(f"backend={backend!r} needs tensors on {backend}, got one on {device}")
    _require(device, missing_cuda)
    return False


def _check_name(backend):
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))} or None, got {backend!r}")


def _require(device, missing):
    if missing:
        raise NotImplementedError(f"fusedloss has no kernels for tensors on {device}: {missing}")


def _missing_cuda():
    if not build_info()["cuda"]:
        return "it is built without CUDA kernels (build it with FUSEDLOSS_CUDA=1 where there is a CUDA toolkit)"
    if torch.version.hip:
        return "its CUDA kernels do not run on AMD GPUs"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


def _not_compiled_for(device):
    """Why the CUDA kernels of this build do not run on a device; empty if they do."""
    major, minor = torch.cuda.get_device_capability(device)
    for arch, ptx in re.findall(r"(\d+\.\d+)a?(\+PTX)?", build_info()["cuda"]):
        of_arch = tuple(map(int, arch.split(".")))
        binary = of_arch[0] == major and of_arch[1] <= minor
        if binary or (ptx and of_arch <= (major, minor)):
            return ""
    return f"its CUDA kernels are built for {build_info()['cuda']}, not for compute capability {major}.{minor}"


@functools.cache
def _missing_triton():
    """Loads the Triton kernels, once; says why that is impossible."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'fusedloss[triton]', or pip install triton)"
    try:
        importlib.import_module("fusedloss.triton")
    except Exception as error:  # of whatever kind: an old or broken Triton
        return f"the Triton kernels cannot be imported: {type(error).__name__}: {error}"
    return ""


def _interprets():
    from fusedloss.triton.launch import INTERPRETED

    return INTERPRETED


def _missing_driver():
    if _interprets():
        return ""
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except Exception:  # no driver, or one without a device
        return "there is no GPU that Triton has a driver for"
    return ""
