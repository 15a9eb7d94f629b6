"""What torch's argument parser does for native's functions: overrides, then numbers as whatever stands for one.

Errors are of the types that native raises, name the argument and show its value.
"""

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from fusedloss import native

try:
    from numpy import bool_, number

    _NUMPY_SCALARS: tuple[Any, ...] = (number, bool_)
except ImportError:  # torch does without it
    _NUMPY_SCALARS = ()
_FLOATS: tuple[Any, ...] = (int, float, torch.SymFloat, torch.SymInt)


def hand_over(function, *arguments):
    """Calls __torch_function__ with a function and its arguments, which come in the order of its signature.

    They are passed on as native passes them, so that what was written for native's function serves for this one: by
    position what has no default, the others by name. What native does not know is left out where it has its default.
    """
    signature = getattr(function, "fused", function)  # of fusedloss.patch()'s stand-in for it
    of_native = getattr(getattr(native, signature.__name__, None), "__kwdefaults__", None) or {}
    added = {name: default for name, default in signature.__kwdefaults__.items() if name not in of_native}
    without_default = signature.__code__.co_argcount - len(signature.__defaults__ or ())
    names = signature.__code__.co_varnames[without_default : len(arguments)]
    named = {
        name: value
        for name, value in zip(names, arguments[without_default:], strict=True)
        if not (name in added and type(value) is type(added[name]) and value == added[name])
    }
    return handle_torch_function(function, arguments, *arguments[:without_default], **named)


def check_tensors(error: type[Exception], loss: str, **arguments) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise error(_message(loss, name, "be a Tensor", value))


def as_int(loss: str, name: str, value) -> int:
    """An int of whatever has an __index__ (an int, a numpy scalar, a tensor of one integer), but for bool."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError(_message(loss, name, "be an int", value))
    if may_be_symbol(value):
        return value  # what is done with one would tie the graph to what it stands for now
    try:
        index = operator.index(value)
    except TypeError:
        raise TypeError(_message(loss, name, "be an int", value)) from None
    if not -(2**63) <= index < 2**63:
        raise ValueError(_message(loss, name, "fit in 64 bits", value))
    return index


def may_be_symbol(value) -> bool:
    """Whether an int may be a compiler's, whose value is not known yet. While one traces, it passes for any int."""
    return isinstance(value, torch.SymInt) or (torch.compiler.is_dynamo_compiling() and isinstance(value, int))


def as_float(loss: str, name: str, value) -> float:
    """A float of a number, a numpy scalar, or a tensor of no dimensions that does not require grad."""
    if isinstance(value, _FLOATS):
        return value
    if isinstance(value, _NUMPY_SCALARS) or (isinstance(value, Tensor) and not (value.dim() or value.requires_grad)):
        return float(value)
    raise TypeError(_message(loss, name, "be a float", value))


def as_finite(loss: str, name: str, value) -> float:
    value = as_float(loss, name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(_message(loss, name, "be finite", value))
    return value


def as_positive(loss: str, name: str, value) -> float:
    value = as_finite(loss, name, value)
    if not value > 0:
        raise ValueError(f"{loss}: {name} must be positive, got {value}")
    return value


def check_bool(loss: str, name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(_message(loss, name, "be a bool", value))


def _message(loss, name, requirement, value) -> str:
    return f"{loss}: {name} must {requirement}, got {type(value).__name__}: {value!r}"
