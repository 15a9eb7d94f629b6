"""Who competes: a table of functions that make, for a case, the callable (input, target, **options) that runs it.

What a contestant's user has to do in each call, such as converting a target, is a part of that callable and thus of
its time. What is done once, such as compiling, is not.
"""

from collections.abc import Callable
from functools import partial

import torch

import fusedloss
from benchmarks.cases import Case


def ours(case: Case) -> Callable:
    return partial(getattr(fusedloss.functional, case.loss), **case.ours)


def native(case: Case) -> Callable:
    function = getattr(torch.nn.functional, case.loss)
    if case.target == "uint8 labels":  # native's binary losses take no integers
        return lambda input, target, **options: function(input, target.to(input.dtype), **options)
    return function


def compiled(case: Case) -> Callable:
    """Anew for each case: compiled code holds its shapes, its strides and the number of threads."""
    torch._dynamo.reset()
    return torch.compile(native(case), dynamic=False)


CONTESTANTS = {"fusedloss": ours, "native": native, "compiled": compiled}
