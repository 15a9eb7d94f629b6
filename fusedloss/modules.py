"""The losses as modules: torch.nn's own classes with another forward.

Subclasses, so that isinstance, repr, state_dict, pickling and the constructor's behaviour are native's. What fusedloss
adds is keyword-only: the options of the function that a module calls. Their defaults are class attributes: a native
module whose class is exchanged for one of these (fusedloss.replace_losses), or one that was pickled earlier, works
without being constructed again. TorchScript leaves their forward to Python: a scripted model may hold and call them,
and can be saved if it does not call them. It reads the types of the attributes, and knows no Literal.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fusedloss import functional
from fusedloss.backend import Backend
from fusedloss.functional import CrossEntropyOptions, Reduction, TrainingOptions

_Loss = TypeVar("_Loss", bound=type[nn.Module])
_NOT_OF_A_MODULE = {"input", "target", "size_average", "reduce"}
_OF_A_CALL = ("denominator", "sample_weight")  # what changes with every batch
_STORED = """
The constructor checks none of them and stores all under their names, the class weights as buffers and the deprecated
two as ``reduction``. They may be changed between calls.

"""


def _calls(function: Callable) -> Callable[[_Loss], _Loss]:
    """Makes a module of a class: forward hands the function what the module has under the names of its arguments.

    The constructor also takes and stores the function's keyword-only arguments, which native's does not know, but for
    those that belong to a call; and the class's description goes on with the function's. Forward is made from text, as
    if it were written out: a loop over the names would add a quarter to the time of a small call.
    """
    of_function = inspect.signature(function).parameters
    added = {name: value for name, value in (function.__kwdefaults__ or {}).items() if name not in _OF_A_CALL}
    of_a_call = [name for name in _OF_A_CALL if name in of_function]
    stored = [name for name in of_function if name not in (*_NOT_OF_A_MODULE, *_OF_A_CALL)]
    arguments = ", ".join(["self, input, target", *["*"][: len(of_a_call)], *(f"{name}=None" for name in of_a_call)])
    options = ", ".join([f"{name}=self.{name}" for name in stored] + [f"{name}={name}" for name in of_a_call])
    forward = eval(f"lambda {arguments}: functional.{function.__name__}(input, target, {options})")
    names = ("input", "target", *of_a_call, "return")
    forward.__annotations__ = {name: function.__annotations__[name] for name in names}
    # What TorchScript sees: it has no place for keyword-only arguments, nor for the defaults of others.
    parameters = inspect.signature(forward).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    forward.__signature__ = inspect.Signature(positional, return_annotation=forward.__annotations__["return"])

    def complete(loss):
        constructor = loss.__init__
        own = inspect.signature(constructor)
        native = [own.parameters[name] for name in own.parameters if name not in ("options", *added)]
        signature = own.replace(parameters=[*native, *(of_function[name] for name in added)])

        @functools.wraps(constructor)
        def __init__(self, *arguments, **options):
            signature.bind(self, *arguments, **options)  # refuses what is nobody's option
            constructor(self, *arguments, **options)
            for name, default in added.items():
                setattr(self, name, options.get(name, default))

        __init__.__signature__ = signature
        loss.__init__, loss.forward = __init__, torch.jit.ignore(forward)
        if function.__doc__:  # python -OO leaves none
            loss.__doc__ = _description(loss.__doc__, function.__doc__)
        return loss

    return complete


def _description(of_class, of_function):
    """A class's docstring, with the function's on the arguments that are options, and on what is raised."""
    text = inspect.cleandoc(of_function)
    arguments = text[text.index("Args:\n") : text.index("\nReturns:")]
    arguments = re.sub(rf"    (input|target|{'|'.join(_OF_A_CALL)}): .*\n(     .*\n)*", "", arguments)
    return f"{inspect.cleandoc(of_class)}\n\n{arguments}{_STORED}{text[text.index('Raises:') :]}"


@_calls(functional.cross_entropy)
class CrossEntropyLoss(nn.CrossEntropyLoss):
    r"""Cross entropy between logits and targets; :class:`torch.nn.CrossEntropyLoss` in one pass.

    A call computes :func:`fusedloss.cross_entropy`, which has the formula:

    - input: logits, (C), (N, C) or (N, C, d1, d2, ...); float32, float64, bfloat16 or float16, any strides.
    - target: class indices of shape (), (N) or (N, d1, d2, ...) in int64, int32 or uint8; or probabilities in the shape
      of the input and any of its types.
    - denominator, sample_weight: what the mean is divided by, and a weight for each position; they change with every
      batch, and are keyword arguments of the call: ``criterion(logits, target, denominator=n, sample_weight=w)``.
    - output: the loss, a scalar or, unreduced, of the shape of the input without C; with ``return_*`` a tuple of the
      loss and what was asked for, in the order lse, entropy, argmax.
    """

    z_loss: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    return_lse: bool = False
    return_entropy: bool = False
    return_argmax: bool = False
    grad_in_forward: bool | str = "auto"
    grad_scale: float | Tensor | None = None
    inplace: bool = False
    backend: str | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        return_lse: bool = False,
        return_entropy: bool = False,
        return_argmax: bool = False,
        **options: Unpack[CrossEntropyOptions],
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)


@_calls(functional.nll_loss)
class NLLLoss(nn.NLLLoss):
    r"""Negative log likelihood of log-probabilities; :class:`torch.nn.NLLLoss`.

    A call computes :func:`fusedloss.nll_loss`:

    - input: log-probabilities, (C), (N, C) or (N, C, d1, d2, ...); float32, float64, bfloat16 or float16.
    - target: class indices of shape (), (N) or (N, d1, d2, ...) in int64, int32 or uint8.
    - output: the loss, a scalar or, unreduced, of the shape of the target.
    """

    backend: str | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        *,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction)


@_calls(functional.binary_cross_entropy_with_logits)
class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    r"""Binary cross entropy on logits; :class:`torch.nn.BCEWithLogitsLoss`.

    A call computes :func:`fusedloss.binary_cross_entropy_with_logits`:

    - input: logits of any shape; float32, float64, bfloat16 or float16, any strides.
    - target: of the same shape; any floating-point type, or integer or bool.
    - output: the loss, a scalar or, unreduced, of the shape of the input.
    """

    ignore_index: int | None = None
    grad_in_forward: bool | str = "auto"
    grad_scale: float | Tensor | None = None
    inplace: bool = False
    backend: str | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        pos_weight: Tensor | None = None,
        *,
        ignore_index: int | None = None,
        inplace: bool = False,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)


@_calls(functional.binary_cross_entropy)
class BCELoss(nn.BCELoss):
    r"""Binary cross entropy on probabilities; :class:`torch.nn.BCELoss`.

    A call computes :func:`fusedloss.binary_cross_entropy`:

    - input: probabilities of any shape; float32, float64, bfloat16 or float16, any strides.
    - target: of the same shape and type, in [0, 1]; or integer or bool.
    - output: the loss, a scalar or, unreduced, of the shape of the input.
    """

    ignore_index: int | None = None
    grad_in_forward: bool | str = "auto"
    grad_scale: float | Tensor | None = None
    backend: str | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        *,
        ignore_index: int | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
