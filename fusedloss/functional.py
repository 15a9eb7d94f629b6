"""The losses as functions, with the signatures and behaviour of torch.nn.functional.

Each function checks what an operator's schema cannot, and calls one operator. What is routed to native torch instead
(fusedloss/reference.py), because fused kernels have nothing to offer there:

- calls under functorch transforms (torch.func.grad, vmap, jvp, ...), forward-mode AD and TorchScript's tracer,
- cross entropy with probability targets whose class weight requires a gradient.

An argument is first compared by its very class. One quick comparison tells an ordinary call from all that isinstance
would let pass and that needs a closer look: DTensors among tensors, bools and a compiler's symbols among integers.
"""

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args, overload

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad
from torch.nn import _reduction as native_reduction
from torch.overrides import has_torch_function_variadic
from typing_extensions import Unpack

from fusedloss import calls, dtensor, reference, vocab_parallel
from fusedloss.arguments import as_finite, as_float, as_int, as_positive, check_bool, check_tensors, hand_over
from fusedloss.backend import Backend, namespace, operators

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The loss, alone or before what else was asked for. Spelled out: TorchScript knows no tuple of any length.
Answers = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]
Reduction = Literal["none", "mean", "sum"]
GradInForward = bool | Literal["auto"]
REDUCTIONS = get_args(Reduction)  # in the order of the operators' numbers
_CODES = {name: code for code, name in enumerate(REDUCTIONS)}
_NO_ANSWERS = (False, False, False)
_GRADIENT_OPTIONS = (False, None, None, False)  # where they have their defaults


class TrainingOptions(TypedDict, total=False):
    """What all losses add that may write their gradient in forward."""

    grad_in_forward: GradInForward
    grad_scale: float | Tensor | None
    backend: Backend | None


class CrossEntropyOptions(TrainingOptions, total=False):
    """What cross_entropy adds to native's arguments, but for return_*, on which its overloads differ."""

    z_loss: float
    logit_scale: float
    logit_softcap: float | None
    inplace: bool
    process_group: "ProcessGroup | None"
    num_classes: int | None


class CrossEntropyCall(CrossEntropyOptions, total=False):
    """And what changes with every batch: a module takes it when it is called."""

    denominator: float | Tensor | None
    sample_weight: Tensor | None


class LinearOptions(TypedDict, total=False):
    """What linear_cross_entropy adds to native's arguments, but for return_*, on which its overloads differ."""

    z_loss: float
    logit_scale: float
    logit_softcap: float | None
    memory: int | Literal["auto"]
    skip_ignored: bool | None
    process_group: "ProcessGroup | None"
    reduce_input_grad: bool
    backend: Backend | None


class LinearCall(LinearOptions, total=False):
    """All that may follow the three tensors of linear_cross_entropy, but for return_*."""

    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: Reduction
    ignore_index: int | None
    label_smoothing: float
    options: Any
    num_classes: int | None
    denominator: float | Tensor | None
    sample_weight: Tensor | None


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[False] = ...,
    **options: Unpack[CrossEntropyCall],
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    return_lse: Literal[True],
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[False] = ...,
    **options: Unpack[CrossEntropyCall],
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[True],
    return_argmax: Literal[False] = ...,
    **options: Unpack[CrossEntropyCall],
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[True],
    **options: Unpack[CrossEntropyCall],
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    return_lse: Literal[True],
    return_entropy: Literal[True],
    return_argmax: Literal[False] = ...,
    **options: Unpack[CrossEntropyCall],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    return_lse: Literal[True],
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[True],
    **options: Unpack[CrossEntropyCall],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[True],
    return_argmax: Literal[True],
    **options: Unpack[CrossEntropyCall],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    return_lse: Literal[True],
    return_entropy: Literal[True],
    return_argmax: Literal[True],
    **options: Unpack[CrossEntropyCall],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    *,
    return_lse: bool = ...,
    return_entropy: bool = ...,
    return_argmax: bool = ...,
    **options: Unpack[CrossEntropyCall],
) -> Answers: ...


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    denominator: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    grad_in_forward: GradInForward = "auto",
    grad_scale: float | Tensor | None = None,
    inplace: bool = False,
    process_group: "ProcessGroup | None" = None,
    num_classes: int | None = None,
    backend: Backend | None = None,
) -> Answers:
    r"""Cross entropy between logits and targets; :func:`torch.nn.functional.cross_entropy` in one pass.

    For a position with logits :math:`x`, :math:`\mathrm{lse} = \log \sum_c \exp x_c` and target masses :math:`a`,
    the loss is :math:`\sum_c a_c (\mathrm{lse} - x_c) + z\,\mathrm{lse}^2`. A class index :math:`t` puts the mass
    :math:`w_t` on class :math:`t`, probabilities :math:`q` put :math:`w_c q_c` on class :math:`c`, and label
    smoothing moves a part of it to all classes.

    The entropy of a position is that of its softmax, :math:`-\sum_c p_c \log p_c`, formed as
    :math:`\log \sum_c \exp(x_c - m) + \sum_c p_c (m - x_c)` with :math:`m = \max_c x_c`: of two terms that are 0 or
    more, so that it has all its digits where one class has almost all of the probability.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, d2, ...); float32, float64, bfloat16 or float16, any strides.
        target: class indices of shape (), (N) or (N, d1, d2, ...) in int64, int32 or uint8; or probabilities in the
            shape of ``input`` and any of its types.
        weight: (C), a weight for each class; with class indices in the type of ``input``.
        size_average, reduce: deprecated, as in native torch.
        ignore_index: class indices equal to it give no loss and no gradient; any int64. Not for probabilities.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: the mean over the weights of the targets that count, or over
            all positions for probabilities.
        label_smoothing: at most 1; the part of the mass spread evenly over the classes (arXiv:1512.00567).
        z_loss: adds ``z_loss * lse ** 2`` to the loss of each position that counts (arXiv:2204.02311, section 5).
        logit_scale: multiplies the logits first; positive: an inverse temperature.
        logit_softcap: replaces the (scaled) logits by ``cap * tanh(logits / cap)`` (arXiv:2408.00118, section 2).
        denominator: with ``reduction="mean"``, what the sum of the losses is divided by instead of by what counts: a
            positive number, or a real tensor of one element, on the device of ``input``, where it stays. The number of
            targets in all ranks and accumulation steps, for example. Where nothing counts the loss is 0, in its place
            in the graph, and the gradient 0.
        sample_weight: of the shape of the unreduced loss, in any floating-point type; multiplies the whole loss of a
            position, and its share of what the mean is divided by: the sum of class weight times sample weight over
            the positions that count, or for probabilities of the sample weights.
        return_lse: also return lse, differentiable, for every position, ignored or not; float32, or float64 for
            float64 logits.
        return_entropy: also return the entropy, likewise.
        return_argmax: also return the class of the largest logit, for every position, as int64: the first of several,
            and NaN is larger than any number, as for :func:`torch.argmax`. Not differentiable.
        grad_in_forward: whether forward also writes the gradient, so that ``input`` is read once. ``"auto"``: where the
            loss is reduced, nothing but ``input`` requires grad, ``return_lse`` and ``return_entropy`` are off, no
            compiler traces the call, no hooks take what is saved (checkpoints, offloading), and, for float16,
            ``grad_scale`` is given. Right for every grad_output; another one than ``grad_scale`` costs backward a pass
            over the gradient, and in half precision one more rounding.
        grad_scale: the grad_output that backward will be called with, a number or a tensor of one element (such as
            1 / accumulation steps, or a GradScaler's scale): then no pass is needed. A hint: where it turns out wrong,
            or would make the gradient overflow or vanish, nothing but that pass follows.
        inplace: write the gradient over the storage of ``input``, which must not be used afterwards; autograd raises
            where something else needs its former values, as second derivatives do. Several views of one tensor may be
            overwritten if they share no memory. Without a gradient to write, ``input`` is only read.
        process_group: of ranks that share the classes: ``input`` holds those of this rank, split as
            :func:`torch.chunk` splits ``num_classes``, and so do probabilities. All other tensors, and what is
            returned, are of all classes and the same on all ranks. One collective in forward, none in backward.
        num_classes: of all ranks together; None: those of ``input`` times the number of ranks.
        backend: the kernels: ``"cpu"``, ``"cuda"``, ``"triton"``, or None: those for the device of ``input``, CUDA's
            before Triton's (:mod:`fusedloss.backend`).

    Returns:
        The loss in the type of ``input`` (promoted with probabilities' and weight's; float32 under autocast), a
        scalar or, unreduced, of the shape of ``input`` without C. With ``return_*``, a tuple of the loss and what was
        asked for, in the order lse, entropy, argmax.

    Raises:
        IndexError: a class index is outside [0, C) and not ``ignore_index`` (CPU); ``return_argmax`` without classes.
        ValueError: the batch sizes differ, ``reduction`` is unknown, ``sample_weight`` has another shape,
            ``denominator`` is not positive or beside another reduction than ``"mean"``, ``logit_scale`` or
            ``logit_softcap`` is not positive, or the gradient is asked for in forward (by ``grad_in_forward=True`` or
            ``inplace=True``) where it cannot be written there.
        RuntimeError: other shapes or types do not fit, ``label_smoothing`` is above 1, tensors are on different
            devices, ``weight`` requires grad beside class indices, or ``sample_weight`` or ``denominator`` does,
            ``inplace=True`` with a leaf or with an input that overlaps itself, another argument or another loss's
            gradient.
        NotImplementedError: ``input`` is not a floating-point tensor of a supported type, or there are no kernels for
            its device.
    """
    if has_torch_function_variadic(input, target, weight, denominator, sample_weight, grad_scale):
        return hand_over(cross_entropy, *locals().values())
    if not (
        (input.__class__ is target.__class__ is Tensor)
        and (weight is None or weight.__class__ is Tensor)
        and (sample_weight is None or sample_weight.__class__ is Tensor)
    ):
        backend = _checked_tensors("cross_entropy", backend, input, target, weight, sample_weight=sample_weight)
    if ignore_index.__class__ is not int or ignore_index != -100:
        ignore_index = as_int("cross_entropy", "ignore_index", ignore_index)
    if label_smoothing.__class__ is not float:
        label_smoothing = as_float("cross_entropy", "label_smoothing", label_smoothing)
    if z_loss.__class__ is not float or z_loss != 0.0:
        z_loss = as_finite("cross_entropy", "z_loss", z_loss)
    if logit_scale.__class__ is not float or logit_scale != 1.0:
        logit_scale = as_positive("cross_entropy", "logit_scale", logit_scale)
    if logit_softcap is not None:
        logit_softcap = as_positive("cross_entropy", "logit_softcap", logit_softcap)
    answers = (return_lse, return_entropy, return_argmax)
    if answers != _NO_ANSWERS:
        for name, value in zip(("return_lse", "return_entropy", "return_argmax"), answers, strict=True):
            check_bool("cross_entropy", name, value)
    code = _reduction_code(reduction, size_average, reduce)
    if denominator is not None:
        denominator = _denominator("cross_entropy", denominator, code, input)
    options = _gradient_options("cross_entropy", input, grad_in_forward, grad_scale, inplace)
    kernels = operators(backend, input)
    if process_group is not None or num_classes is not None:
        kernels = _shared("cross_entropy", kernels, process_group, num_classes, input, weight, target)
    if _native_road() or (weight is not None and weight.requires_grad and target.is_floating_point()):
        added: dict[str, Any] = {
            "z_loss": z_loss,
            "logit_scale": logit_scale,
            "logit_softcap": logit_softcap,
            "denominator": denominator,
            "sample_weight": sample_weight,
            "return_lse": return_lse,
            "return_entropy": return_entropy,
            "return_argmax": return_argmax,
        }
        of_native = (input, target, weight, ignore_index, REDUCTIONS[code], label_smoothing)
        return _by_native("cross_entropy", reference.cross_entropy(*of_native, **added))
    upcast, in_forward, grad_scale, inplace = options
    # One by one: unpacked from tuples they would take longer.
    outputs = kernels.cross_entropy.default(
        input,
        target,
        weight,
        sample_weight,
        denominator,
        code,
        ignore_index,
        label_smoothing,
        z_loss,
        logit_scale,
        logit_softcap or 0.0,
        return_lse,
        return_entropy,
        return_argmax,
        upcast,
        in_forward,
        grad_scale,
        inplace,
        False,
    )
    return outputs[0] if answers == _NO_ANSWERS else (outputs[0], *itertools.compress(outputs[1:4], answers))


@overload
def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
    process_group: "ProcessGroup | None" = ...,
    num_classes: int | None = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[True],
    process_group: "ProcessGroup | None" = ...,
    num_classes: int | None = ...,
    backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    return_entropy: bool,
    process_group: "ProcessGroup | None" = ...,
    num_classes: int | None = ...,
    backend: Backend | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    process_group: "ProcessGroup | None" = None,
    num_classes: int | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probabilities of the target classes, :math:`x_t - \mathrm{lse}`, from logits in one pass.

    What reinforcement learning of language models needs of every token: the negative of :func:`cross_entropy`,
    unreduced and in float32. A row's results are bitwise the same whatever else is in the batch, given the same memory
    layout and ``return_entropy``; docs/options.md says what that asks of each backend.

    Args:
        logits: (C), (N, C) or (N, C, d1, d2, ...); float32, float64, bfloat16 or float16, any strides. Logits of shape
            (batch, sequence, C) are passed as ``logits.flatten(0, 1)`` with ``target.flatten()``: views of them.
        target: class indices of shape (), (N) or (N, d1, d2, ...) in int64, int32 or uint8.
        ignore_index: targets equal to it have the log-probability 0, and no gradient; any int64.
        logit_scale: multiplies the logits first; positive: an inverse temperature.
        logit_softcap: replaces the (scaled) logits by ``cap * tanh(logits / cap)``.
        return_entropy: also return the entropy of each position's softmax, ignored or not.
        process_group, num_classes, backend: as in :func:`cross_entropy`.

    Returns:
        The log-probabilities in float32 (float64 for float64 logits), of the shape of ``logits`` without C,
        differentiable; with ``return_entropy`` the pair (log-probabilities, entropies) of such tensors.

    Raises:
        IndexError: a target is outside [0, C) and not ``ignore_index`` (CPU).
        ValueError: the batch sizes differ, or ``logit_scale`` or ``logit_softcap`` is not positive.
        RuntimeError, NotImplementedError: as :func:`cross_entropy`; ``target`` holds probabilities.
    """
    if has_torch_function_variadic(logits, target):
        return hand_over(token_log_probs, *locals().values())
    if not logits.__class__ is target.__class__ is Tensor:
        backend = _checked_tensors("token_log_probs", backend, logits, target, None)
    if target.is_floating_point():
        kind = f"{target.dtype} of shape {list(target.shape)}"
        raise RuntimeError(f"token_log_probs: target must hold class indices, got {kind}")
    if ignore_index.__class__ is not int or ignore_index != -100:
        ignore_index = as_int("token_log_probs", "ignore_index", ignore_index)
    if logit_scale.__class__ is not float or logit_scale != 1.0:
        logit_scale = as_positive("token_log_probs", "logit_scale", logit_scale)
    if logit_softcap is not None:
        logit_softcap = as_positive("token_log_probs", "logit_softcap", logit_softcap)
    check_bool("token_log_probs", "return_entropy", return_entropy)
    kernels = operators(backend, logits)
    if process_group is not None or num_classes is not None:
        kernels = _shared("token_log_probs", kernels, process_group, num_classes, logits, None, target)
    if _native_road():
        found = reference.token_log_probs(
            logits,
            target,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            return_entropy=return_entropy,
        )
        return _by_native("cross_entropy", found)
    of_rows = (_CODES["none"], ignore_index, 0.0, 0.0, logit_scale, logit_softcap or 0.0)
    upcast = True  # a loss of half-precision logits is float32
    outputs = kernels.cross_entropy.default(
        logits, target, None, None, None, *of_rows, False, return_entropy, False, upcast, *_GRADIENT_OPTIONS[1:], False
    )
    log_probs = 0.0 - outputs[0]  # not its negative, which would be -0 where it is ignored
    return (log_probs, outputs[2]) if return_entropy else log_probs


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[False] = ...,
    **options: Unpack[LinearCall],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[True],
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[False] = ...,
    **options: Unpack[LinearCall],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[True],
    return_argmax: Literal[False] = ...,
    **options: Unpack[LinearCall],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[True],
    **options: Unpack[LinearCall],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[True],
    return_entropy: Literal[True],
    return_argmax: Literal[False] = ...,
    **options: Unpack[LinearCall],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[True],
    return_entropy: Literal[False] = ...,
    return_argmax: Literal[True],
    **options: Unpack[LinearCall],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_entropy: Literal[True],
    return_argmax: Literal[True],
    **options: Unpack[LinearCall],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_lse: Literal[True],
    return_entropy: Literal[True],
    return_argmax: Literal[True],
    **options: Unpack[LinearCall],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_lse: bool = ...,
    return_entropy: bool = ...,
    return_argmax: bool = ...,
    **options: Unpack[LinearCall],
) -> Answers: ...


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    denominator: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
    memory: int | Literal["auto"] = "auto",
    skip_ignored: bool | None = None,
    process_group: "ProcessGroup | None" = None,
    num_classes: int | None = None,
    reduce_input_grad: bool = True,
    backend: Backend | None = None,
) -> Answers:
    r"""Cross entropy of the logits of a linear layer; :func:`torch.nn.functional.linear_cross_entropy`.

    The same as :func:`cross_entropy` of ``torch.nn.functional.linear(input, linear_weight, linear_bias)``, without the
    memory of the logits and their copies: they are made once, or a chunk of them at a time, and turned into their
    gradient where they lie. docs/linear.md says which plan is taken when.

    Args:
        input: of the linear layer, (D), (N, D) or (N1, N2, ..., D); float32, float64, bfloat16 or float16.
        linear_weight: (C, D); or (C, d1, ..., D) beside an input of shape (N, D), for logits of shape (N, C, d1, ...).
            Of the type of ``input``, unless autocast gives both another.
        target: class indices of the shape of ``input`` without D, and behind it d1, ..., in int64, int32 or uint8; or
            probabilities in the shape of the logits.
        linear_bias: of the shape of ``linear_weight`` without D.
        weight, reduction, label_smoothing, z_loss, logit_scale, logit_softcap: as for :func:`cross_entropy`.
        denominator, sample_weight, return_lse, return_entropy, return_argmax, backend: as for :func:`cross_entropy`.
        ignore_index: as for :func:`cross_entropy`; None stands for -100, and is what probabilities need.
        options: ``torch.nn.LinearCrossEntropyOptions``, of which ``batch_chunk_size`` is the number of rows whose
            logits are made at a time. What its other fields ask for is always so here: sums are kept in float32 or
            wider, and backward may be called again.
        memory: bytes of scratch that may be used beside the arguments and their gradients, or ``"auto"``: what the
            quickest plan takes. Where it is too little for any plan, the one that takes least is run.
        skip_ignored: whether rows without a target that counts are left out of the matrix products. True: always, which
            makes the host wait for a GPU once. False: never. None: on a CPU always; on a GPU where the products take
            longer than waiting does, and no graph is being captured or compiled.
        process_group, num_classes: as for :func:`cross_entropy`, where ``linear_weight`` and ``linear_bias`` hold the
            rows of this rank's classes, and ``input`` is the same on all ranks. Backward sums the gradient of ``input``
            over the ranks: a second collective.
        reduce_input_grad: whether it does. False: the gradient of ``input`` is this rank's part of the sum, for callers
            that reduce it themselves, as sequence parallelism does.

    Returns:
        The loss, or a tuple of it and what was asked for, as :func:`cross_entropy` does of the logits. Under autocast
        the products are in its type, the loss is float32, and the gradient of a float32 ``linear_weight`` is not
        rounded to half precision where the library's products can do without (CUDA).

    Raises:
        RuntimeError: shapes or types do not fit; ``ignore_index`` is given beside probabilities.
        TypeError: ``options`` or ``memory`` is of another type.
        ValueError: ``memory`` or ``batch_chunk_size`` is not positive, or ``target`` has another batch size.
        IndexError, NotImplementedError: as :func:`cross_entropy`; a tensor is a DTensor.
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight, denominator, sample_weight):
        return hand_over(linear_cross_entropy, *locals().values())
    name = "linear_cross_entropy"
    of_layer = {"linear_bias": linear_bias, "weight": weight, "sample_weight": sample_weight}
    if _has_dtensors(name, input, linear_weight, target, **of_layer):
        _check_no_group(name, process_group, num_classes, reduce_input_grad, linear_weight)
        return dtensor.linear(
            linear_cross_entropy,
            *(input, linear_weight, target),
            **of_layer,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            z_loss=z_loss,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            denominator=denominator,
            return_lse=return_lse,
            return_entropy=return_entropy,
            return_argmax=return_argmax,
            memory=memory,
            skip_ignored=skip_ignored,
            backend=backend,
        )
    rows = _LinearRows(name, input, linear_weight, target, linear_bias, sample_weight, process_group)
    if ignore_index is not None:
        if rows.has_probabilities:
            raise RuntimeError(f"{name}: ignore_index must be None beside probabilities, got {ignore_index}")
        ignore_index = as_int(name, "ignore_index", ignore_index)
    else:
        ignore_index = -100
    label_smoothing = as_float(name, "label_smoothing", label_smoothing)
    z_loss = as_finite(name, "z_loss", z_loss)
    logit_scale = as_positive(name, "logit_scale", logit_scale)
    if logit_softcap is not None:
        logit_softcap = as_positive(name, "logit_softcap", logit_softcap)
    answers = (return_lse, return_entropy, return_argmax)
    for of_answer, value in zip(("return_lse", "return_entropy", "return_argmax"), answers, strict=True):
        check_bool(name, of_answer, value)
    code = _reduction_code(reduction)
    if denominator is not None:
        denominator = _denominator(name, denominator, code, input)
    linear = _linear_options(name, memory, options, skip_ignored, input, linear_weight)
    check_bool(name, "reduce_input_grad", reduce_input_grad)
    kernels = operators(backend, input)
    if process_group is not None or num_classes is not None:
        of_group = (process_group, num_classes)
        kernels = _shared(name, kernels, *of_group, linear_weight, weight, target, linear=True, sums=reduce_input_grad)
    weights = (weight, rows.sample_weight, denominator)
    of_loss = (code, ignore_index, label_smoothing, z_loss, logit_scale, logit_softcap or 0.0)
    if _native_road() or (weight is not None and weight.requires_grad and rows.has_probabilities):
        outputs = reference.linear_cross_entropy(
            rows.input,
            linear_weight,
            rows.target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=REDUCTIONS[code],
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            denominator=denominator,
            sample_weight=rows.sample_weight,
            return_lse=return_lse,
            return_entropy=return_entropy,
            return_argmax=return_argmax,
        )
        _by_native("linear_cross_entropy", outputs)
        wanted = outputs if isinstance(outputs, tuple) else (outputs,)
    else:
        outputs = kernels.linear_cross_entropy.default(
            rows.input,
            linear_weight,
            rows.target,
            linear_bias,
            *weights,
            *of_loss,
            *answers,
            False,
            None,
            *linear,
            False,
        )
        wanted = (outputs[0], *itertools.compress(outputs[1:4], answers))
    loss = wanted[0] if code != _CODES["none"] else rows.unflattened(wanted[0])
    return loss if answers == _NO_ANSWERS else (loss, *map(rows.unflattened, wanted[1:]))


@overload
def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    ignore_index: int = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
    memory: int | Literal["auto"] = ...,
    skip_ignored: bool | None = ...,
    process_group: "ProcessGroup | None" = ...,
    num_classes: int | None = ...,
    reduce_input_grad: bool = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    ignore_index: int = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[True],
    memory: int | Literal["auto"] = ...,
    skip_ignored: bool | None = ...,
    process_group: "ProcessGroup | None" = ...,
    num_classes: int | None = ...,
    reduce_input_grad: bool = ...,
    backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    ignore_index: int = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    return_entropy: bool,
    memory: int | Literal["auto"] = ...,
    skip_ignored: bool | None = ...,
    process_group: "ProcessGroup | None" = ...,
    num_classes: int | None = ...,
    reduce_input_grad: bool = ...,
    backend: Backend | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    memory: int | Literal["auto"] = "auto",
    skip_ignored: bool | None = None,
    process_group: "ProcessGroup | None" = None,
    num_classes: int | None = None,
    reduce_input_grad: bool = True,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probabilities of the target classes, from the input of the linear layer that makes their logits.

    :func:`token_log_probs` of ``torch.nn.functional.linear(input, linear_weight, linear_bias)``, whose logits are made
    a chunk at a time, and again for the gradient.

    Args:
        input, linear_weight, linear_bias, memory, skip_ignored: as for :func:`linear_cross_entropy`.
        process_group, num_classes, reduce_input_grad: likewise.
        target: class indices of the shape of ``input`` without D, in int64, int32 or uint8.
        ignore_index, logit_scale, logit_softcap, return_entropy, backend: as for :func:`token_log_probs`.

    Returns:
        The log-probabilities in float32 (float64 for float64 logits), of the shape of ``target``, differentiable; with
        ``return_entropy`` the pair (log-probabilities, entropies) of such tensors.

    Raises:
        RuntimeError, ValueError, IndexError, NotImplementedError: as :func:`linear_cross_entropy`; ``target`` holds
            probabilities.
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias):
        return hand_over(linear_token_log_probs, *locals().values())
    name = "linear_token_log_probs"
    if _has_dtensors(name, input, linear_weight, target, linear_bias=linear_bias):
        _check_no_group(name, process_group, num_classes, reduce_input_grad, linear_weight)
        return dtensor.linear(
            linear_token_log_probs,
            *(input, linear_weight, target),
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            return_entropy=return_entropy,
            memory=memory,
            skip_ignored=skip_ignored,
            backend=backend,
        )
    if target.is_floating_point():
        kind = f"{target.dtype} of shape {list(target.shape)}"
        raise RuntimeError(f"{name}: target must hold class indices, got {kind}")
    rows = _LinearRows(name, input, linear_weight, target, linear_bias, None, process_group)
    ignore_index = as_int(name, "ignore_index", ignore_index)
    logit_scale = as_positive(name, "logit_scale", logit_scale)
    if logit_softcap is not None:
        logit_softcap = as_positive(name, "logit_softcap", logit_softcap)
    check_bool(name, "return_entropy", return_entropy)
    linear = _linear_options(name, memory, None, skip_ignored, input, linear_weight)
    check_bool(name, "reduce_input_grad", reduce_input_grad)
    kernels = operators(backend, input)
    if process_group is not None or num_classes is not None:
        of_group = (process_group, num_classes)
        kernels = _shared(name, kernels, *of_group, linear_weight, None, target, linear=True, sums=reduce_input_grad)
    if _native_road():
        logits = reference.linear_logits(rows.input, linear_weight, linear_bias)
        found = reference.token_log_probs(
            logits,
            rows.target,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            return_entropy=return_entropy,
        )
        _by_native("linear_cross_entropy", found)
        log_probs, *entropy = found if return_entropy else (found,)
    else:
        of_rows = (_CODES["none"], ignore_index, 0.0, 0.0, logit_scale, logit_softcap or 0.0)
        upcast = True  # a loss of half-precision logits is float32
        outputs = kernels.linear_cross_entropy.default(
            *(rows.input, linear_weight, rows.target, linear_bias, None, None, None),
            *(*of_rows, False, return_entropy, False, upcast, None, *linear, False),
        )
        log_probs, entropy = 0.0 - outputs[0], [outputs[2]] if return_entropy else []
    log_probs = rows.unflattened(log_probs)
    return (log_probs, rows.unflattened(entropy[0])) if return_entropy else log_probs


class _LinearRows:
    """The tensors of a linear layer's loss with one dimension of rows, as its operators take them."""

    def __init__(self, loss, input, linear_weight, target, linear_bias, sample_weight, process_group):
        if input.dim() == 0:
            raise RuntimeError(f"{loss}: input must have a dimension of in_features, got shape []")
        if linear_weight.dim() < 2:
            raise RuntimeError(
                f"{loss}: linear_weight must have at least two dimensions, got shape {list(linear_weight.shape)}"
            )
        if input.shape[-1] != linear_weight.shape[-1]:
            raise RuntimeError(
                f"{loss}: input and linear_weight must have the same last dimension (in_features), "
                f"got shapes {list(input.shape)} and {list(linear_weight.shape)}"
            )
        if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
            raise RuntimeError(
                f"{loss}: linear_bias must have the shape {list(linear_weight.shape[:-1])} "
                f"(linear_weight's without the last dimension), got {list(linear_bias.shape)}"
            )
        self.leading = input.shape[:-1]
        if linear_weight.dim() > 2 and len(self.leading) != 1:
            raise RuntimeError(
                f"{loss}: linear_weight of shape {list(linear_weight.shape)} makes K-dimensional logits, "
                f"which need an input of shape (N, {input.shape[-1]}), got {list(input.shape)}"
            )
        self.has_probabilities = target.shape == (*self.leading, *linear_weight.shape[:-1])
        if process_group is not None:  # of which a rank may have one class
            self.has_probabilities &= target.is_floating_point()
        self.input, self.target, self.sample_weight = input, target, sample_weight
        if len(self.leading) == 1:
            return
        if len(self.leading) == 0:
            # As beside logits of shape (C): one index, in a tensor of one or no dimension.
            one = self.has_probabilities or (target.numel() == 1 and target.dim() <= 1)
            if not one:
                raise (ValueError if target.dim() == 1 else RuntimeError)(
                    f"{loss}: target must be one class index for input of shape {list(input.shape)}, "
                    f"got shape {list(target.shape)}"
                )
        elif not self.has_probabilities and target.shape != self.leading:
            raise RuntimeError(
                f"{loss}: target must have the shape {list(self.leading)} (input's without in_features) or that of the "
                f"logits, got {list(target.shape)}"
            )
        if sample_weight is not None and sample_weight.shape != self.leading:
            raise ValueError(
                f"{loss}: sample_weight must have the shape {list(self.leading)}, got {list(sample_weight.shape)}"
            )
        count = math.prod(self.leading)
        self.input = input.reshape(count, input.shape[-1])
        self.target = target.reshape(count, linear_weight.shape[0]) if self.has_probabilities else target.reshape(count)
        if sample_weight is not None:
            self.sample_weight = sample_weight.reshape(count)

    def unflattened(self, of_rows):
        return of_rows if len(self.leading) == 1 else of_rows.reshape(self.leading)


_NO_GROUP = (
    "{}: process_group is for tensors that hold this rank's classes; the placements of DTensors say who shares them"
)


def _check_no_group(loss, process_group, num_classes, reduce_input_grad, linear_weight):
    if process_group is not None:
        raise ValueError(_NO_GROUP.format(loss))
    if num_classes is not None:
        vocab_parallel.classes_of(loss, None, num_classes, linear_weight, "linear_weight")
    if not reduce_input_grad:
        raise ValueError(f"{loss}: reduce_input_grad=False is not for DTensors, whose gradients lie as they do")


def _has_dtensors(loss, input, linear_weight, target, **others):
    given = {name: value for name, value in others.items() if value is not None}
    tensors = {"input": input, "linear_weight": linear_weight, "target": target, **given}
    check_tensors(TypeError, loss, **tensors)
    return any(map(dtensor.is_dtensor, tensors.values()))


def _linear_options(loss, memory, options, skip_ignored, input, linear_weight):
    """The operator's arguments from memory on."""
    skips = _skips(loss, skip_ignored, input, linear_weight)
    # What is exported has no training step to speed up.
    grad_in_forward = False if torch.compiler.is_exporting() else None
    return (_memory(loss, memory), _chunk(loss, options), skips, grad_in_forward)


def _memory(loss, memory):
    if isinstance(memory, str) and memory == "auto":
        return None
    if isinstance(memory, str):
        raise ValueError(f"{loss}: memory must be 'auto' or a number of bytes, got {memory!r}")
    return _positive_int(loss, "memory", memory)


def _chunk(loss, options):
    """Rows of logits at a time, of native's options, which older versions of torch lack."""
    if options is None:
        return None
    if not hasattr(options, "batch_chunk_size"):
        raise TypeError(f"{loss}: options must be LinearCrossEntropyOptions, got {type(options).__name__}: {options!r}")
    size = options.batch_chunk_size
    return None if size is None else _positive_int(loss, "options.batch_chunk_size", size)


def _positive_int(loss, name, value):
    value = as_int(loss, name, value)
    if value < 1:
        raise ValueError(f"{loss}: {name} must be positive, got {value}")
    return value


# Multiplications of one of the three products from which on a GPU takes a millisecond or so for them all.
_WORTH_A_WAIT = 2**37


def _skips(loss, skip_ignored, input, linear_weight):
    if skip_ignored is not None:
        check_bool(loss, "skip_ignored", skip_ignored)
        return skip_ignored
    if input.is_cpu or input.is_meta:
        return None
    if torch.compiler.is_compiling() or (input.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return input.numel() * (linear_weight.numel() // max(linear_weight.shape[-1], 1)) >= _WORTH_A_WAIT


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    *,
    backend: Backend | None = None,
) -> Tensor:
    r"""Negative log likelihood of log-probabilities; :func:`torch.nn.functional.nll_loss`.

    The loss of a position is :math:`-w_t x_t`. Only the targets' entries of ``input`` are read.

    Args:
        input: log-probabilities, (C), (N, C) or (N, C, d1, d2, ...); float32, float64, bfloat16 or float16.
        target: class indices of shape (), (N) or (N, d1, d2, ...) in int64, int32 or uint8.
        weight: (C), a weight for each class, in the type of ``input``.
        size_average, reduce: deprecated, as in native torch.
        ignore_index: targets equal to it give no loss and no gradient; any int64.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: the mean over the weights of the targets that count.
        backend: as in :func:`cross_entropy`.

    Returns:
        The loss in the type of ``input`` (float32 under autocast), a scalar or of the shape of ``target``.

    Raises:
        IndexError: a target is outside [0, C) and not ``ignore_index`` (CPU).
        ValueError, RuntimeError, NotImplementedError: as :func:`cross_entropy`.
    """
    if has_torch_function_variadic(input, target, weight):
        return hand_over(nll_loss, *locals().values())
    if not (input.__class__ is target.__class__ is Tensor and (weight is None or weight.__class__ is Tensor)):
        backend = _checked_tensors("nll_loss", backend, input, target, weight)
    if ignore_index.__class__ is not int or ignore_index != -100:
        ignore_index = as_int("nll_loss", "ignore_index", ignore_index)
    code = _reduction_code(reduction, size_average, reduce)
    kernels = operators(backend, input)
    if _native_road():
        return _by_native("nll_loss", reference.nll_loss(input, target, weight, ignore_index, REDUCTIONS[code]))
    return kernels.nll.default(input, target, weight, code, ignore_index, False)[0]


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
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
) -> Tensor:
    r"""Binary cross entropy on logits; :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    The loss of an element is
    :math:`w\,[(1 - t)\,\mathrm{softplus}(x) + P\,t\,\mathrm{softplus}(-x)]` with the positive weight :math:`P`.

    Args:
        input: logits of any shape; float32, float64, bfloat16 or float16, any strides.
        target: of the same shape; any floating-point type, or integer or bool.
        weight: broadcasts to the shape of ``input``; multiplies the loss.
        size_average, reduce: deprecated, as in native torch.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: the mean over the elements that are not ignored.
        pos_weight: broadcasts to the shape of ``input``; multiplies the loss of the positive part.
        ignore_index: elements whose target equals it give no loss and no gradient and do not count in the mean.
        grad_in_forward, grad_scale, inplace, backend: as in :func:`cross_entropy`.

    Returns:
        The loss in the type of a floating-point ``target``, else of ``input`` (float32 under autocast).

    Raises:
        ValueError: ``target`` has another shape, or ``reduction`` is unknown.
        RuntimeError: ``weight`` or ``pos_weight`` does not broadcast or requires grad; devices differ.
        NotImplementedError: ``input`` is not a floating-point tensor of a supported type.
    """
    if has_torch_function_variadic(input, target, weight, pos_weight, grad_scale):
        return hand_over(binary_cross_entropy_with_logits, *locals().values())
    if not (
        (input.__class__ is target.__class__ is Tensor)
        and (weight is None or weight.__class__ is Tensor)
        and (pos_weight is None or pos_weight.__class__ is Tensor)
    ):
        backend = _checked_tensors("binary_cross_entropy_with_logits", backend, input, target, weight, pos_weight)
    if ignore_index is not None:
        ignore_index = as_int("binary_cross_entropy_with_logits", "ignore_index", ignore_index)
    code = _reduction_code(reduction, size_average, reduce)
    options = _gradient_options("binary_cross_entropy_with_logits", input, grad_in_forward, grad_scale, inplace)
    kernels = operators(backend, input)
    if _native_road():
        of_native = (input, target, weight, REDUCTIONS[code], pos_weight)
        loss = reference.binary_cross_entropy_with_logits(*of_native, ignore_index=ignore_index)
        return _by_native("binary_cross_entropy_with_logits", loss)
    return kernels.bce_with_logits.default(input, target, weight, pos_weight, code, ignore_index, *options)[0]


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    *,
    ignore_index: int | None = None,
    grad_in_forward: GradInForward = "auto",
    grad_scale: float | Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Binary cross entropy on probabilities; :func:`torch.nn.functional.binary_cross_entropy`.

    The loss of an element is :math:`-w\,[t \log p + (1 - t) \log(1 - p)]`, logarithms no smaller than -100.

    Args:
        input: probabilities of any shape; float32, float64, bfloat16 or float16, any strides.
        target: of the same shape and type, in [0, 1]; or integer or bool.
        weight: broadcasts to the shape of ``input``; multiplies the loss.
        size_average, reduce: deprecated, as in native torch.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: the mean over the elements that are not ignored.
        ignore_index: elements whose target equals it give no loss and no gradient and do not count in the mean.
        grad_in_forward, grad_scale, backend: as in :func:`cross_entropy`; in float16, whose range the gradient exceeds,
            it is never written in forward.

    Returns:
        The loss in the type of ``input`` (float32 under CPU autocast; CUDA autocast refuses, as native does).

    Raises:
        ValueError: ``target`` has another shape, or ``reduction`` is unknown.
        RuntimeError: ``input`` or ``target`` is outside [0, 1] or NaN (CPU), or of another type; ``weight`` does
            not broadcast or requires grad; devices differ.
    """
    if has_torch_function_variadic(input, target, weight, grad_scale):
        return hand_over(binary_cross_entropy, *locals().values())
    if not (input.__class__ is target.__class__ is Tensor and (weight is None or weight.__class__ is Tensor)):
        backend = _checked_tensors("binary_cross_entropy", backend, input, target, weight)
    if ignore_index is not None:
        ignore_index = as_int("binary_cross_entropy", "ignore_index", ignore_index)
    code = _reduction_code(reduction, size_average, reduce)
    options = _gradient_options("binary_cross_entropy", input, grad_in_forward, grad_scale)[:3]
    kernels = operators(backend, input)
    if _native_road():
        loss = reference.binary_cross_entropy(input, target, weight, REDUCTIONS[code], ignore_index=ignore_index)
        return _by_native("binary_cross_entropy", loss)
    return kernels.bce.default(input, target, weight, code, ignore_index, *options)[0]


def _native_road() -> bool:
    """Whether the call is of a kind that only native operators serve.

    A C++ autograd Function refuses functorch transforms and forward-mode AD; and what TorchScript traces is for
    runtimes without these operators (ONNX's older exporter).
    """
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0 or _get_tracing_state() is not None


def _by_native(loss, outputs):
    """Outputs of the native road, whose call is counted by the reason to take it."""
    if _are_functorch_transforms_active():
        reason = "a transform of torch.func"
    elif forward_ad._current_level >= 0:
        reason = "forward-mode AD"
    elif _get_tracing_state() is not None:
        reason = "torch.jit.trace"
    else:
        reason = "a weight that requires grad beside probabilities"
    return calls.by_native(loss, reason, outputs)


def _shared(loss, kernels, process_group, num_classes, holder, weight, target, linear=False, sums=True):
    """The operators of a call whose classes a process group shares; `holder` holds this rank's classes."""
    argument = "linear_weight" if linear else "logits" if loss == "token_log_probs" else "input"
    if process_group is not None and isinstance(kernels, dtensor.Sharded):
        raise ValueError(_NO_GROUP.format(loss))
    if holder.dim() == 0:
        return kernels  # which refuse it
    classes = vocab_parallel.classes_of(loss, process_group, num_classes, holder, argument)
    if classes is None:
        return kernels
    if _native_road() or (weight is not None and weight.requires_grad and target.is_floating_point()):
        raise NotImplementedError(
            f"{loss}: classes that a process group shares are supported neither under torch.func's transforms, "
            "forward-mode AD and torch.jit.trace, nor beside a weight that requires grad"
        )
    return vocab_parallel.SharedClasses(kernels, loss, classes, sums)


def _reduction_code(reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> int:
    if size_average is not None or reduce is not None:
        reduction = native_reduction.legacy_get_string(size_average, reduce)
    code = _CODES.get(reduction) if reduction.__class__ is str else None
    # Native's function raises for an unknown reduction, and warns of one that it has renamed.
    return native_reduction.get_enum(reduction) if code is None else code


def _denominator(loss, denominator, code, input) -> Tensor:
    """As a tensor, which stays on its device."""
    if code != _CODES["mean"]:
        raise ValueError(f"{loss}: denominator needs reduction='mean', got reduction={REDUCTIONS[code]!r}")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1 or denominator.is_complex() or denominator.dtype == torch.bool:
            kind = f"{denominator.dtype} of shape {list(denominator.shape)}"
            raise RuntimeError(f"{loss}: denominator must be one real number, got {kind}")
        return denominator
    if isinstance(denominator, bool):
        raise TypeError(f"{loss}: denominator must be a number or a tensor of one element, got {denominator}")
    number = as_positive(loss, "denominator", denominator)
    return torch.full((), number * 1.0, dtype=torch.float64, device=input.device)


def _gradient_options(loss, input, grad_in_forward, grad_scale, inplace=False) -> tuple:
    """The operators' last arguments, from upcast to inplace."""
    if grad_scale is None and grad_in_forward == "auto" and inplace is False:
        return _GRADIENT_OPTIONS
    is_auto = isinstance(grad_in_forward, str) and grad_in_forward == "auto"
    if not is_auto and not isinstance(grad_in_forward, bool):
        raise ValueError(f"{loss}: grad_in_forward must be 'auto', True or False, got {grad_in_forward!r}")
    check_bool(loss, "inplace", inplace)
    if isinstance(grad_scale, Tensor):
        if grad_scale.numel() != 1 or not grad_scale.is_floating_point():
            kind = f"{grad_scale.dtype} of shape {list(grad_scale.shape)}"
            raise RuntimeError(f"{loss}: grad_scale must be one floating-point number, got {kind}")
    elif grad_scale is not None:
        grad_scale = as_float(loss, "grad_scale", grad_scale)
        if grad_scale == 0 or not math.isfinite(grad_scale):
            raise ValueError(f"{loss}: grad_scale must be finite and not 0, got {grad_scale}")
    if torch.compiler.is_exporting():  # what is exported has no training step to speed up
        return _GRADIENT_OPTIONS
    if grad_scale is not None and not isinstance(grad_scale, Tensor):
        grad_scale = torch.full((), grad_scale * 1.0, dtype=torch.float64, device=input.device)
    return (False, None if is_auto else grad_in_forward, grad_scale, inplace)


def _checked_tensors(loss, backend, input, target, weight, pos_weight=None, sample_weight=None):
    """Raises for what is no tensor; returns the backend, or what takes its place where a tensor is a DTensor."""
    # Native's binary losses call a method of these two before they look at them.
    check_tensors(AttributeError if loss.startswith("binary") else TypeError, loss, input=input, target=target)
    if weight is not None:
        check_tensors(TypeError, loss, weight=weight)
    if pos_weight is not None:
        check_tensors(TypeError, loss, pos_weight=pos_weight)
    if sample_weight is not None:
        check_tensors(TypeError, loss, sample_weight=sample_weight)
    if any(map(dtensor.is_dtensor, (input, target, weight, pos_weight, sample_weight))):
        return dtensor.Sharded(functools.partial(namespace, backend))
    return backend
