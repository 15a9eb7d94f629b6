"""The losses as modules: torch.nn's own classes with another forward.

Subclasses, so that isinstance, repr, state_dict, pickling and the constructor's behaviour are native's. What fusedloss
adds is keyword-only. Its defaults are class attributes: a native module whose class is exchanged for one of these
(fusedloss.replace_losses), or one that was pickled earlier, works without being constructed again. TorchScript leaves
their forward to Python: a scripted model may hold and call them, and can be saved if it does not call them. It reads
the types of the attributes, and knows no Literal.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fusedloss import functional
from fusedloss.backend import Backend
from fusedloss.functional import GradInForward, Reduction

_Loss = TypeVar("_Loss", bound=type[nn.Module])
_NOT_OF_A_MODULE = {"input", "target", "size_average", "reduce"}


def _calls(function: Callable) -> Callable[[_Loss], _Loss]:
    """Makes a module of a class: forward hands the function what the module has under the names of its arguments.

    The constructor also stores its keyword-only arguments, which native's does not know. Forward is made from text, as
    if it were written out: a loop over the names would add a quarter to the time of a small call.
    """
    names = [name for name in inspect.signature(function).parameters if name not in _NOT_OF_A_MODULE]
    options = ", ".join(f"{name}=self.{name}" for name in names)
    forward = eval(f"lambda self, input, target: functional.{function.__name__}(input, target, {options})")
    forward.__annotations__ = {name: function.__annotations__[name] for name in ("input", "target", "return")}

    def complete(loss):
        constructor = loss.__init__
        added = constructor.__kwdefaults__

        @functools.wraps(constructor)
        def __init__(self, *arguments, **options):
            constructor(self, *arguments, **options)
            for name, default in added.items():
                setattr(self, name, options.get(name, default))

        loss.__init__, loss.forward = __init__, torch.jit.ignore(forward)
        return loss

    return complete


@_calls(functional.cross_entropy)
class CrossEntropyLoss(nn.CrossEntropyLoss):
    r"""Cross entropy between logits and targets; :class:`torch.nn.CrossEntropyLoss` in one pass.

    A call computes :func:`fusedloss.cross_entropy`, which has the formula and says more of each option:

    - input: logits, (C), (N, C) or (N, C, d1, d2, ...); float32, float64, bfloat16 or float16, any strides.
    - target: class indices of shape (), (N) or (N, d1, d2, ...) in int64, int32 or uint8; or probabilities in the shape
      of the input and any of its types.
    - output: the loss, a scalar or, unreduced, of the shape of the input without C; with ``return_lse`` the pair
      (loss, lse).

    Args:
        weight: (C), a weight for each class; a buffer.
        size_average, reduce: deprecated, as in native torch.
        ignore_index: class indices equal to it give no loss and no gradient; any int64. Not for probabilities.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: the mean over the weights of the targets that count.
        label_smoothing: at most 1; the part of the mass spread evenly over the classes.
        z_loss: adds ``z_loss * lse ** 2`` to the loss of each position that counts.
        logit_softcap: replaces the logits by ``cap * tanh(logits / cap)`` first.
        return_lse: also return lse, the logarithm of the sum of the logits' exponentials, differentiable.
        grad_in_forward: whether forward also writes the gradient; ``"auto"``: where that is sure to pay.
        grad_scale: the grad_output that backward will be called with, a number or a tensor of one element.
        inplace: write the gradient over the storage of the input, which must not be used afterwards.
        backend: the kernels: ``"cpu"``, ``"cuda"``, ``"triton"``, or None: those for the device of the input.

    The constructor checks none of them and stores all under their names, but for the deprecated two, which become
    ``reduction``. They may be changed between calls.

    Raises:
        IndexError: a class index is outside [0, C) and not ``ignore_index`` (CPU).
        ValueError: the batch sizes differ, ``reduction`` is unknown, or the gradient cannot be written where
            ``grad_in_forward=True`` or ``inplace=True`` asks for it.
        RuntimeError: other shapes, types or devices do not fit.
        NotImplementedError: the input is not a floating-point tensor of a supported type, or there are no kernels for
            its device.
    """

    z_loss: float = 0.0
    logit_softcap: float | None = None
    return_lse: bool = False
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
        z_loss: float = 0.0,
        logit_softcap: float | None = None,
        return_lse: bool = False,
        grad_in_forward: GradInForward = "auto",
        grad_scale: float | Tensor | None = None,
        inplace: bool = False,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)


@_calls(functional.nll_loss)
class NLLLoss(nn.NLLLoss):
    r"""Negative log likelihood of log-probabilities; :class:`torch.nn.NLLLoss`.

    A call computes :func:`fusedloss.nll_loss`:

    - input: log-probabilities, (C), (N, C) or (N, C, d1, d2, ...); float32, float64, bfloat16 or float16.
    - target: class indices of shape (), (N) or (N, d1, d2, ...) in int64, int32 or uint8.
    - output: the loss, a scalar or, unreduced, of the shape of the target.

    Args:
        weight: (C), a weight for each class, in the type of the input; a buffer.
        size_average, reduce: deprecated, as in native torch.
        ignore_index: targets equal to it give no loss and no gradient; any int64.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: the mean over the weights of the targets that count.
        backend: as in :class:`CrossEntropyLoss`.

    They become attributes as those of :class:`CrossEntropyLoss` do.

    Raises:
        IndexError: a target is outside [0, C) and not ``ignore_index`` (CPU).
        ValueError, RuntimeError, NotImplementedError: as :class:`CrossEntropyLoss`.
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

    Args:
        weight: broadcasts to the shape of the input; multiplies the loss; a buffer.
        size_average, reduce: deprecated, as in native torch.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: the mean over the elements that are not ignored.
        pos_weight: broadcasts to the shape of the input; multiplies the loss of the positive part; a buffer.
        ignore_index: elements whose target equals it give no loss and no gradient and do not count in the mean.
        grad_in_forward, grad_scale, inplace, backend: as in :class:`CrossEntropyLoss`.

    They become attributes as those of :class:`CrossEntropyLoss` do.

    Raises:
        ValueError: the target has another shape, or ``reduction`` is unknown.
        RuntimeError: ``weight`` or ``pos_weight`` does not broadcast or requires grad; devices differ.
        NotImplementedError: as :class:`CrossEntropyLoss`.
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
        grad_in_forward: GradInForward = "auto",
        grad_scale: float | Tensor | None = None,
        inplace: bool = False,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)


@_calls(functional.binary_cross_entropy)
class BCELoss(nn.BCELoss):
    r"""Binary cross entropy on probabilities; :class:`torch.nn.BCELoss`.

    A call computes :func:`fusedloss.binary_cross_entropy`:

    - input: probabilities of any shape; float32, float64, bfloat16 or float16, any strides.
    - target: of the same shape and type, in [0, 1]; or integer or bool.
    - output: the loss, a scalar or, unreduced, of the shape of the input.

    Args:
        weight: broadcasts to the shape of the input; multiplies the loss; a buffer.
        size_average, reduce: deprecated, as in native torch.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: the mean over the elements that are not ignored.
        ignore_index: elements whose target equals it give no loss and no gradient and do not count in the mean.
        grad_in_forward, grad_scale, backend: as in :class:`CrossEntropyLoss`.

    They become attributes as those of :class:`CrossEntropyLoss` do.

    Raises:
        ValueError: the target has another shape, or ``reduction`` is unknown.
        RuntimeError: the input or the target is outside [0, 1] or NaN (CPU), or of another type; ``weight`` does not
            broadcast or requires grad; devices differ.
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
        grad_in_forward: GradInForward = "auto",
        grad_scale: float | Tensor | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
