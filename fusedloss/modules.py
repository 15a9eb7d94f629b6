"""The losses as modules: torch.nn's own classes with another forward.

Subclasses, so that isinstance, repr, state_dict, pickling and the constructor's behaviour are native's. What fusedloss
adds is keyword-only: the options of the function that a module calls. Their defaults are class attributes: a native
module whose class is exchanged for one of these (fusedloss.replace_losses), or one that was pickled earlier, works
without being constructed again. TorchScript leaves their forward to Python: a scripted model may hold and call them,
and can be saved if it does not call them. It reads the types of the attributes, and knows no Literal.
"""

import copy
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fusedloss import functional, native
from fusedloss.backend import Backend
from fusedloss.functional import CrossEntropyOptions, LinearOptions, Reduction, TrainingOptions
from fusedloss.vocab_parallel import local_classes

_Loss = TypeVar("_Loss", bound=type[nn.Module])
_DEPRECATED = {"size_average", "reduce"}
_OF_A_CALL = ("denominator", "sample_weight")  # what changes with every batch


def _calls(function: Callable, **values: str) -> Callable[[_Loss], _Loss]:
    """Makes a module of a class: forward hands the function what the module has under the names of its arguments.

    Where an argument has another value, an expression of ``self`` says which. The constructor also takes and stores the
    function's keyword-only arguments, which native's does not know, but for those that belong to a call; and the
    class's description goes on with the function's. Forward is made from text, as if it were written out: a loop over
    the names would add a quarter to the time of a small call.
    """
    of_function = inspect.signature(function).parameters
    of_a_call = [name for name in _OF_A_CALL if name in of_function]
    of_forward = ("input", "target", *of_a_call)
    values = {name: name if name in of_forward else f"self.{name}" for name in of_function} | values
    by_position = [name for name in of_function if of_function[name].default is inspect.Parameter.empty]
    by_name = [name for name in of_function if name not in (*by_position, *_DEPRECATED)]
    options = ", ".join([values[name] for name in by_position] + [f"{name}={values[name]}" for name in by_name])
    arguments = ", ".join(["self, input, target", *["*"][: len(of_a_call)], *(f"{name}=None" for name in of_a_call)])
    text = f"lambda {arguments}: functional.{function.__name__}({options})"
    # Not "<string>", under which Python 3.13 finds what it was given by -c, and TorchScript would read that.
    forward = eval(compile(text, f"<forward of {function.__name__}>", "eval"))
    forward.__annotations__ = {name: function.__annotations__[name] for name in (*of_forward, "return")}
    # What TorchScript sees: it has no place for keyword-only arguments, nor for the defaults of others.
    parameters = inspect.signature(forward).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    forward.__signature__ = inspect.Signature(positional, return_annotation=forward.__annotations__["return"])

    def complete(loss):
        constructor, of_native = loss.__init__, inspect.signature(loss.__base__.__init__).parameters
        own = inspect.signature(constructor)
        stored = {name: parameter.default for name, parameter in of_function.items() if values[name] == f"self.{name}"}
        added = {name: stored[name] for name in function.__kwdefaults__ if name in stored and name not in of_native}
        parameters = [own.parameters[name] for name in of_native] + [of_function[name] for name in added]
        signature = own.replace(parameters=parameters)

        @functools.wraps(constructor)
        def __init__(self, *arguments, **options):
            signature.bind(self, *arguments, **options)  # refuses what is nobody's option
            constructor(self, *arguments, **options)
            for name, default in added.items():
                setattr(self, name, options.get(name, default))

        __init__.__signature__ = signature
        loss.__init__, loss.forward = __init__, torch.jit.ignore(forward)
        if "process_group" in stored:
            loss.__deepcopy__ = _deepcopy
        if function.__doc__:  # python -OO leaves none
            loss.__doc__ = _description(loss.__doc__, function.__doc__, stored)
        return loss

    return complete


def _description(of_class, of_function, stored):
    """A class's docstring, with the function's on the arguments that are options, and on what is raised.

    Where the class describes arguments of its constructor, it ends with them, and they come first.
    """
    of_class, text = inspect.cleandoc(of_class), inspect.cleandoc(of_function)
    stored = {name: default for name, default in stored.items() if f"\n    {name}: " not in of_class}
    entries = []
    for entry in re.findall(r"    \w.*\n(?:     .*\n)*", text[text.index("Args:\n") : text.index("\nReturns:")]):
        head, _, meaning = entry.partition(":")
        names = re.findall(r"\w+", head)
        kept = [name for name in names if name in stored]
        if kept and kept != names:
            entry = " ".join(f"{', '.join(kept)}:{meaning}".split())
            entry = textwrap.fill(entry, 120, initial_indent=" " * 4, subsequent_indent=" " * 8) + "\n"
        entries += [entry] if kept else []
    start = "\n" if "\nArgs:\n" in of_class else "\n\nArgs:\n"
    deprecated = " and the deprecated two as ``reduction``" if stored.keys() >= _DEPRECATED else ""
    closing = (
        "The constructor checks no more of them than native's does, and stores under their names what a call computes\n"
        f"with, the class weights as buffers{deprecated}. They may be changed between calls."
    )
    return f"{of_class}{start}{''.join(entries)}\n{closing}\n\n{text[text.index('Raises:') :]}"


def _deepcopy(module, memo):
    """A copy that shares the process group, of which there are no copies."""
    memo[id(module.process_group)] = module.process_group
    state, copied = copy.deepcopy(module.__getstate__(), memo), module.__class__.__new__(module.__class__)
    memo[id(module)] = copied
    copied.__setstate__(state)
    return copied


def _of_linear(module, parameter):
    """A parameter of a module's linear layer with the classes and out_features in dimensions of their own.

    Without out_features it has them as it is, and autograd a node less.
    """
    if parameter is None or not module.out_features:
        return parameter
    return parameter.unflatten(0, (-1, *module.out_features))


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
    process_group: Any = None
    num_classes: int | None = None
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


@_calls(
    functional.linear_cross_entropy,
    linear_weight="_of_linear(self, self.linear.weight)",
    linear_bias="_of_linear(self, self.linear.bias)",
)
class LinearCrossEntropyLoss(native.LinearCrossEntropyLoss):
    r"""Cross entropy between a linear layer's logits and targets; :class:`torch.nn.LinearCrossEntropyLoss`.

    A call computes :func:`fusedloss.linear_cross_entropy` with the layer's weight and bias, which are the module's
    parameters ``linear.weight`` and ``linear.bias``, initialised as those of :class:`torch.nn.Linear`:

    - input: (D) or (N, D); or, without ``out_features``, with more leading dimensions, as in (batch, sequence, D).
    - target: class indices of shape (), (N), (N, d1, ..., dK) or (batch, sequence); or probabilities in the shape of
      the logits, such as (N, C, d1, ..., dK).
    - denominator, sample_weight: what the mean is divided by, and a weight for each position; they change with every
      batch, and are keyword arguments of the call: ``criterion(input, target, denominator=n, sample_weight=w)``.
    - output: the loss, a scalar or, unreduced, of the shape of the target's positions; with ``return_*`` a tuple of
      the loss and what was asked for, in the order lse, entropy, argmax.

    Native torch has this class since 2.13, and this one is a subclass of it; with an older torch it is the same but for
    that.

    Args:
        in_features: D, the size of an input sample.
        num_classes: C, of all ranks where there is a ``process_group``: the layer then has the rows of this rank's
            classes alone, which each rank initialises from its own random numbers.
        out_features: (d1, ..., dK), the positions that a sample has logits for; none for one.
        bias: whether the layer has a bias.
        device, dtype: of the parameters.
    """

    z_loss: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    return_lse: bool = False
    return_entropy: bool = False
    return_argmax: bool = False
    memory: int | str = "auto"
    skip_ignored: bool | None = None
    process_group: Any = None
    reduce_input_grad: bool = True
    backend: str | None = None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        return_lse: bool = False,
        return_entropy: bool = False,
        return_argmax: bool = False,
        **added: Unpack[LinearOptions],
    ) -> None:
        process_group = added.get("process_group")
        if process_group is None:
            local, of_local = num_classes, weight
        else:
            local, of_local = local_classes("LinearCrossEntropyLoss", process_group, num_classes), None
        super().__init__(
            in_features,
            local,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
            reduction=reduction,
            weight=of_local,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        self.num_classes, self.weight = num_classes, weight
