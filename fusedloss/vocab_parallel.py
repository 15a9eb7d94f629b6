"""Cross entropy whose classes are shared between the ranks of a process group: a vocabulary in tensor parallelism.

Each rank takes the statistics of its rows over its own classes, with the kernels that whole rows have. One all_gather
brings them to all ranks, which merge them in the order of the ranks, so that results are bitwise the same everywhere;
and from the merged statistics each rank has the gradient of its own logits, without another collective. The rules by
which parts of a row are merged are the kernels' own between lanes and blocks, written for parts that are finished: by
the chain rule -log p(c) = -log p(c | part) - log P(part), in which nothing cancels, since no term is negative.

Classes are split as torch.chunk splits them: ceil(C / ranks) for each, fewer or none for the last. Collectives are
functional ones, so that compilers trace them.
"""

import math
import struct
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fusedloss import reference
from fusedloss.arguments import as_int

_NONE, _MEAN, _SUM = 0, 1, 2


class Classes(NamedTuple):
    """Which classes a rank holds: those from ``first`` on, of ``all``; and whom it shares them with."""

    group: Any
    name: str
    ranks: int
    first: int
    all: int


def classes_of(loss: str, process_group, num_classes: int | None, holder: Tensor, argument: str) -> Classes | None:
    """The classes of this rank, of which an argument holds logits, or rows of a weight; None where it has them all.

    Raises:
        ValueError: this rank is none of the group's, or has another number of classes than torch.chunk gives it.
        TypeError: ``process_group`` is something else.
    """
    if num_classes is not None:
        num_classes = as_int(loss, "num_classes", num_classes)
    local = holder.shape[0 if argument == "linear_weight" else reference.class_dimension(holder)]
    if process_group is None:
        if num_classes != local:
            raise ValueError(
                f"{loss}: num_classes must be the number of classes of {argument} where there is no process_group, "
                f"{local}, got {num_classes}"
            )
        return None
    rank, ranks = _rank_in(loss, process_group)
    if num_classes is None:
        num_classes = ranks * local
    first, expected = _chunk(num_classes, rank, ranks)
    classes = Classes(process_group, process_group.group_name, ranks, first, num_classes)
    if local != expected:
        if ranks > 1 and not _agreed.get(process_group) and not torch.compiler.is_compiling() and not holder.is_meta:
            _compare(loss, classes, None, holder)  # the others are about to make their first call
        raise ValueError(
            f"{loss}: {argument} must hold {expected} of num_classes={num_classes} classes on rank {rank} of {ranks}, "
            f"which is how torch.chunk splits them, got {local}"
        )
    return classes if ranks > 1 else None


def local_classes(loss: str, process_group, num_classes: int) -> int:
    """How many of the classes this rank holds."""
    return _chunk(num_classes, *_rank_in(loss, process_group))[1]


def _chunk(num_classes, rank, ranks):
    """(the first class, how many) of a rank."""
    step = -(-num_classes // ranks)
    first = min(rank * step, num_classes)
    return first, min(step, num_classes - first)


def _rank_in(loss, process_group):
    dist = torch.distributed
    if not dist.is_available():
        raise RuntimeError(f"{loss}: process_group needs torch.distributed, which this build of torch lacks")
    if process_group is not dist.GroupMember.NON_GROUP_MEMBER:
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f"{loss}: process_group must be a ProcessGroup, got {type(process_group).__name__}")
        if (rank := dist.get_rank(process_group)) >= 0:
            return rank, dist.get_world_size(process_group)
    raise ValueError(f"{loss}: process_group does not contain this rank, {dist.get_rank()}")


class SharedClasses:
    """Stands for a namespace of operators where the classes are shared."""

    def __init__(self, kernels, loss: str, classes: Classes, reduce_input_grad: bool = True):
        self.cross_entropy = _Operator(_cross_entropy, kernels, loss, classes)
        self.linear_cross_entropy = _Operator(_linear_cross_entropy, kernels, loss, classes, reduce_input_grad)


class _Operator:
    def __init__(self, function, *of_call):
        self._function, self._of_call = function, of_call

    def default(self, *arguments, **named):
        return self._function(*self._of_call, *arguments, **named)


# --- What the ranks exchange -----------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What the ranks of a group have to have in common, for a call to have one meaning."""

    num_classes: int
    positions: int
    dtype: int
    reduction: int
    ignore_index: int
    label_smoothing: int
    answers: int

    @staticmethod
    def of(classes, shape, dtype, options, answers):
        reduction, ignore_index, label_smoothing = options[:3]
        number = _TYPES.index(dtype) if dtype in _TYPES else -1
        (smoothing,) = struct.unpack("q", struct.pack("d", label_smoothing))
        wanted = sum(asked << i for i, asked in enumerate(answers))
        return Kind(classes.all, math.prod(shape), number, reduction, ignore_index, smoothing, wanted)


# The kinds of calls that the ranks of each group have been found to agree on.
_agreed: WeakKeyDictionary[Any, set] = WeakKeyDictionary()
_MOST_AGREED = 4096
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COMPARED = (
    "num_classes",
    "number of positions",
    "type of input",
    "reduction",
    "ignore_index",
    "label_smoothing",
    "return_*",
    "target",
)
_SENT, _MARK = 13, 0x46757365644C6F73  # no statistics are as long; no other message begins so


def _exchanged(loss, classes, of_kind, target, statistics):
    """(the statistics of all ranks, (ranks, planes, positions...); what ``statistics()`` returns beside this rank's)

    Before the first call of a kind that a group sees, the ranks compare what they have, and tell of an error: ranks
    that exchange tensors of different sizes would wait for each other, or read what is not theirs.
    """
    is_real = target.__class__ in (Tensor, torch.nn.Parameter) and not target.is_meta
    if torch.compiler.is_compiling() or not is_real:
        packed, made = statistics()
        return _all_gather(packed, classes), made
    kind, known = Kind.of(classes, *of_kind), _agreed.setdefault(classes.group, set())
    try:
        packed, made = statistics()
    except Exception:
        if kind not in known:  # else the others do not ask
            _compare(loss, classes, None, target)
        raise
    if kind not in known:
        _compare(loss, classes, kind, target)
        if len(known) >= _MOST_AGREED:
            known.clear()
        known.add(kind)
    return _all_gather(packed, classes), made


def _all_gather(tensor, classes):
    """(ranks, *tensor.shape)"""
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(tensor.unsqueeze(0), classes.ranks, classes.name)
    return torch.ops._c10d_functional.wait_tensor(gathered)


def _compare(loss, classes, kind, target):
    """Raises where the ranks do not agree, or one of them has no kind: it has raised an error."""
    failed = kind is None
    mine = torch.zeros(_SENT, dtype=torch.int64, device=target.device)
    for i, number in enumerate([_MARK, failed, *(kind or ())]):  # a tensor of a list would have a device waited for
        mine[i].fill_(number)
    if not failed and not target.is_floating_point():
        index = target.flatten().long()
        place = torch.arange(index.numel(), device=index.device) * 0x5DEECE66D + 0x2545F4914F6CDD1D
        mine[len(_COMPARED) + 1].copy_(((index + 1) * (place ^ (place >> 17))).sum())
    every = _all_gather(mine, classes)
    if failed:
        return
    if every.device.type != "cpu":  # nothing is read back from a device
        message = f"{loss}: the ranks of process_group must have the same {', '.join(_COMPARED)}"
        torch._assert_async((every == every[0]).all(), message)
        return
    marks, failures, *compared = every[:, : len(_COMPARED) + 2].T.tolist()
    if any(mark != _MARK for mark in marks):
        raise RuntimeError(f"{loss}: the ranks of process_group make different calls")
    if any(failures):
        raise RuntimeError(f"{loss}: rank {failures.index(1)} of process_group has raised an error")
    for name, values in zip(_COMPARED, compared, strict=True):
        if len(set(values)) > 1:
            plain = name in ("num_classes", "number of positions", "ignore_index")
            found = f"got {values}" if plain else "ranks differ"
            raise RuntimeError(f"{loss}: all ranks of process_group must have the same {name}; {found}")


# --- Merge -----------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What is known of whole rows, merged from the parts of all ranks: each of the positions' shape."""

    row_max: Tensor
    log_sum: Tensor
    mass: Tensor
    loss: Tensor  # float64, without a z loss
    lse: Tensor
    gap: Tensor | None
    entropy: Tensor | None
    argmax: Tensor | None


def merge(parts: Tensor, return_entropy: bool = False, return_argmax: bool = False) -> Rows:
    """The statistics of whole rows, from those of their parts, (parts, planes, positions...).

    A part's lse is kept in two, its maximum and the logarithm of its sum, so that large logits do not cost it digits.
    """
    wide = parts[:, : 4 + return_entropy].double()
    part_max, log_sum, loss, mass, *gap = wide.unbind(1)
    max = part_max.amax(0)
    shift = max.masked_fill(max == -torch.inf, 0)
    lses = (part_max - shift) + log_sum  # relative to the row's maximum
    row_log_sum = torch.logsumexp(lses, 0)
    surprise = row_log_sum - lses  # -log of the part's probability
    # Without mass an impossible part adds nothing; with it, all of its loss is that it is impossible.
    loss = torch.where(part_max == -torch.inf, 0.0, loss) + torch.where(mass == 0, 0.0, mass * surprise)
    lse = torch.where(max == torch.inf, max, max + row_log_sum)
    row_gap = entropy = argmax = None
    if return_entropy:
        p = (-surprise).exp()
        row_gap = torch.where(p == 0, 0.0, p * (gap[0] + (shift - part_max))).sum(0)
        entropy = row_log_sum + row_gap
        row_gap = row_gap.to(parts.dtype)
    if return_argmax:
        largest = parts[:, -2].argmax(0, keepdim=True)  # of equal ones the first, and NaN before all
        bits = torch.int64 if parts.dtype == torch.float64 else torch.int32
        argmax = parts[:, -1].contiguous().view(bits).gather(0, largest)[0].long()
    saved = max.to(parts.dtype), row_log_sum.to(parts.dtype), mass.sum(0).to(parts.dtype)
    return Rows(*saved, loss.sum(0), lse, row_gap, entropy, argmax)


def _reduced(rows, target, weight, sample_weight, denominator, reduction, ignore_index, z_loss):
    """(the loss in float64, the divisor of the mean)"""
    indices = None if target.is_floating_point() else target.long()
    counts, weights = reference.counts(indices, weight, ignore_index, rows.loss, sample_weight)
    loss = rows.loss if z_loss == 0 else rows.loss + z_loss * rows.lse.square()
    if sample_weight is not None:
        loss = loss * sample_weight
    loss = torch.where(counts, loss, 0.0)
    divisor = weights.sum() if denominator is None else denominator.reshape(()).double()
    if reduction == _NONE:
        return loss, divisor
    if reduction == _SUM:
        return loss.sum(), divisor
    return (loss.sum() / divisor if denominator is None else reference.mean_over(loss, divisor)), divisor


def _loss_type(logits_type, target, weight, upcast):
    def of(dtype):
        return torch.float32 if upcast and dtype in (torch.float16, torch.bfloat16) else dtype

    dtype = of(logits_type)
    if target.is_floating_point():
        for other in (target, weight):
            dtype = dtype if other is None else torch.promote_types(dtype, of(other.dtype))
    return dtype


# --- Losses ----------------------------------------------------------------------------------------------------------


def _cross_entropy(
    kernels,
    loss,
    classes,
    logits,
    target,
    weight,
    sample_weight,
    denominator,
    reduction,
    ignore_index,
    label_smoothing,
    z_loss,
    logit_scale,
    logit_softcap,
    return_lse,
    return_entropy,
    return_argmax,
    upcast=False,
    grad_in_forward=None,
    grad_scale=None,
    inplace=False,
    statistics=False,
):
    """The operator cross_entropy, of shared classes."""
    single = logits.dim() == 1
    if single:  # one index would pass for the probabilities of one class
        logits = logits.unsqueeze(0)
        if target.is_floating_point():
            target = target.unsqueeze(0)
        elif target.numel() == 1 and target.dim() <= 1:
            target = target.reshape(1)
        sample_weight = None if sample_weight is None else sample_weight.reshape(1)
    _check_argmax(loss, classes, return_argmax)
    upcast = upcast or reference.autocasts(logits.device.type)
    options = (reduction, ignore_index, label_smoothing, z_loss, logit_scale, logit_softcap)
    shard = (classes.first, classes.all)
    answers = (return_lse, return_entropy, return_argmax)
    of_positions = (target, weight, sample_weight, denominator)
    of_kind = (logits.shape[:1] + logits.shape[2:], logits.dtype, options, answers)

    def statistics_here():
        arguments = (*of_positions, *options, *shard, *answers, upcast)
        return kernels.cross_entropy_shard.default(logits, *arguments), None

    with torch.no_grad():
        parts, _ = _exchanged(loss, classes, of_kind, target, statistics_here)
        rows = merge(parts, return_entropy, return_argmax)
        value, divisor = _reduced(rows, *of_positions, reduction, ignore_index, z_loss)
        value = value.to(_loss_type(logits.dtype, target, weight, upcast))
        lse, entropy = _returned(logits, rows, return_lse, return_entropy)
    statistics = (rows.row_max, rows.log_sum, rows.gap, rows.mass, divisor)
    training = (upcast, grad_in_forward, grad_scale, inplace, False)
    value, lse, entropy = kernels.cross_entropy_from_shards.default(
        logits, *of_positions, *statistics, *options, *shard, value, lse, entropy, *training
    )
    found = [value, lse, entropy, rows.argmax]
    if single:
        found = [x if x is None or x.dim() == 0 else x.squeeze(0) for x in found]
    return *found, rows.row_max, rows.log_sum, rows.gap, divisor


def _returned(logits, rows, return_lse, return_entropy):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return rows.lse.to(dtype) if return_lse else None, rows.entropy.to(dtype) if return_entropy else None


def _check_argmax(loss, classes, return_argmax):
    if return_argmax and classes.all == 0:
        raise IndexError(f"{loss}: return_argmax needs classes, got num_classes=0")


class _Linear(NamedTuple):
    """What a call of a linear layer and its loss says beside its tensors."""

    kernels: Any
    loss: str
    classes: Classes
    reduce_input_grad: bool
    options: tuple  # of the loss
    answers: tuple[bool, bool, bool]
    upcast: bool
    product_type: torch.dtype | None
    memory: int | None
    chunk: int | None
    skip_ignored: bool | None
    keeps_logits: bool

    @property
    def shard(self):
        return self.classes.first, self.classes.all

    @property
    def products(self):
        return self.upcast, self.product_type, self.memory, self.chunk, self.skip_ignored


def _linear_cross_entropy(
    kernels,
    loss,
    classes,
    reduce_input_grad,
    input,
    linear_weight,
    target,
    linear_bias,
    weight,
    sample_weight,
    denominator,
    reduction,
    ignore_index,
    label_smoothing,
    z_loss,
    logit_scale,
    logit_softcap,
    return_lse,
    return_entropy,
    return_argmax,
    upcast=False,
    product_type=None,
    memory=None,
    chunk=None,
    skip_ignored=None,
    grad_in_forward=None,
    statistics=False,
):
    """The operator linear_cross_entropy, of shared classes."""
    for name, value in {"weight": weight, "sample_weight": sample_weight, "denominator": denominator}.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{loss}: {name} is not differentiable, but requires grad; pass {name}.detach()")
    if reference.autocasts(input.device.type):
        upcast, product_type = True, torch.get_autocast_dtype(input.device.type)
    _check_argmax(loss, classes, return_argmax)
    input = _cast(input, product_type)
    answers = (return_lse, return_entropy, return_argmax)
    trains = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (input, linear_weight, linear_bias)
    )
    if trains and torch.compiler.is_compiling() and not _COMPILES_GRADIENTS:
        raise NotImplementedError(f"{loss}: a compiled step with process_group needs torch 2.12 or newer")
    keeps = trains and reduction != _NONE and not return_lse and not return_entropy and grad_in_forward is not False
    keeps = keeps and not target.requires_grad and _fits(classes, input, linear_weight, memory, chunk)
    if torch.compiler.is_compiling() and keeps:
        skip_ignored = False  # a compiler is to know the shape of the logits that are kept
    call = _Linear(
        *(kernels, loss, classes, reduce_input_grad),
        (reduction, ignore_index, label_smoothing, z_loss, logit_scale, logit_softcap),
        *(answers, upcast, product_type, memory, chunk, skip_ignored, keeps),
    )
    of_positions = (target, weight, sample_weight, denominator)
    value, *found = _LinearFunction.apply(input, linear_weight, linear_bias, *of_positions, call)
    lse, entropy, argmax = (found.pop(0) if wanted else None for wanted in answers)
    return value, lse, entropy, argmax


def _cast(tensor, dtype):
    if tensor is None or dtype is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _fits(classes, input, linear_weight, memory, chunk):
    """Whether all logits of a rank may be kept. By itself they are: in parts they would be made twice.

    All ranks decide alike, by the most classes that one of them has.
    """
    rows = input.shape[0]
    if chunk is not None:
        return rows <= chunk
    logits = _chunk(classes.all, 0, classes.ranks)[1] * math.prod(linear_weight.shape[1:-1])
    return memory is None or rows * logits * input.element_size() <= memory


def _computed_rows(call, target, positions):
    """The rows that have a target which counts, where the others are left out; None: all are computed."""
    skips = target.is_cpu if call.skip_ignored is None else call.skip_ignored
    if not skips or target.is_floating_point() or any(call.answers) or list(target.shape) != positions:
        return None
    counts = target.long() != call.options[1]
    rows = (counts.flatten(1).any(1) if counts.dim() > 1 else counts).nonzero().flatten()
    return None if rows.shape[0] == target.shape[0] else rows


def _rows(tensor, computed):
    return tensor if tensor is None or computed is None else tensor[computed]


# 2.11's compiler has zeros for the gradient that comes in.
_COMPILES_GRADIENTS = not torch.__version__.startswith("2.11.")


class _LinearFunction(torch.autograd.Function):
    """A linear layer and its loss, of this rank's classes. The logits are kept as their gradient, or made again.

    Backward has the gradient of the input summed over the ranks while it makes that of the weight.
    """

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, sample_weight, denominator, call):
        kernels, loss, classes = call.kernels, call.loss, call.classes
        cast_weight, cast_bias = _cast(linear_weight, call.product_type), _cast(linear_bias, call.product_type)
        positions = [input.shape[0], *linear_weight.shape[1:-1]]
        of_positions = (target, weight, sample_weight, denominator)
        given = (*call.options, *call.shard, *call.answers)
        of_kind = (positions, input.dtype, call.options, call.answers)

        def made_again():
            arguments = (cast_bias, *of_positions[1:], *given, *call.products)
            return kernels.linear_cross_entropy_shard.default(input, cast_weight, target, *arguments), None

        def kept():
            """The statistics of all rows, and the logits of those that are computed, and which these are."""
            computed = _computed_rows(call, target, positions)
            if computed is not None:  # errors are of all rows
                none = input.new_empty((input.shape[0], 0, *linear_weight.shape[1:-1]))
                kernels.cross_entropy_shard.default(none, *of_positions, *given, call.upcast)
            bias = None if cast_bias is None else cast_bias.flatten()
            logits = torch.nn.functional.linear(_rows(input, computed), cast_weight.flatten(0, -2), bias)
            logits = logits.view(logits.shape[0], *cast_weight.shape[:-1])
            of_computed = (_rows(target, computed), weight, _rows(sample_weight, computed), denominator)
            packed = kernels.cross_entropy_shard.default(logits, *of_computed, *given, call.upcast)
            if computed is not None:  # ranks may have other plans, and send as much
                packed = packed.new_zeros((packed.shape[0], *positions)).index_copy_(1, computed, packed)
            return packed, (logits, computed)

        return_lse, return_entropy, return_argmax = call.answers
        parts, made = _exchanged(loss, classes, of_kind, target, kept if call.keeps_logits else made_again)
        rows = merge(parts, return_entropy, return_argmax)
        reduction, ignore_index, _, z_loss = call.options[:4]
        value, divisor = _reduced(rows, *of_positions, reduction, ignore_index, z_loss)
        value = value.to(_loss_type(input.dtype, target, weight, call.upcast))
        statistics = (rows.row_max, rows.log_sum, rows.gap, rows.mass, divisor)
        if made is not None:
            logits, computed = made
            scale = None
            if logits.dtype == torch.float16:
                scale = torch.empty((), dtype=torch.float64, device=logits.device)
            # A compiler plans memory itself.
            grad_logits = torch.empty_like(logits) if torch.compiler.is_compiling() else logits
            of_rows = [_rows(x, computed) for x in (rows.row_max, rows.log_sum, rows.gap, rows.mass)]
            of_computed = (_rows(target, computed), weight, _rows(sample_weight, computed), denominator)
            kernels.cross_entropy_from_shards_grad_.default(
                *(logits, *of_computed, *of_rows, divisor, *call.options, *call.shard, None, grad_logits, scale)
            )
            kept_tensors = (input, cast_weight, target, grad_logits, computed, scale)
        else:
            kept_tensors = (input, cast_weight, target, cast_bias, weight, sample_weight, denominator, *statistics)
        ctx.save_for_backward(linear_weight, *kept_tensors)
        ctx.call, ctx.weight_type = call, linear_weight.dtype
        ctx.set_materialize_grads(False)
        lse, entropy = _returned(input, rows, return_lse, return_entropy)
        if rows.argmax is not None:
            ctx.mark_non_differentiable(rows.argmax)
        return value, *(x for x in (lse, entropy, rows.argmax) if x is not None)

    @staticmethod
    def backward(ctx, *grads):
        with torch.no_grad():
            results = _LinearFunction._gradients(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(
            None if grad is None else _FirstDerivative.apply(grad, ctx.call.loss, *sources) for grad in results
        )

    @staticmethod
    def _gradients(ctx, grad_loss, *grads):
        call = ctx.call
        of_input, of_weight, of_bias, of_target = ctx.needs_input_grad[:4]
        grads = list(grads)
        grad_lse, grad_entropy, _ = (grads.pop(0) if wanted else None for wanted in call.answers)
        if call.keeps_logits:
            _, input, weight, target, grad_logits, computed, scale = ctx.saved_tensors
            rows = target.new_empty(0, dtype=torch.int64) if computed is None else computed

            def gradients(*wanted):
                return call.kernels.linear_cross_entropy_gradients.default(
                    *(grad_loss, grad_logits, rows, scale, input, weight, target, call.options[1], ctx.weight_type),
                    *(wanted, _accumulate_type(input.dtype)),
                )

            grad_input = _begin_sum(call, gradients(True, False, False)[0]) if of_input else None
            _, grad_weight, grad_bias = gradients(False, of_weight, of_bias)
            grad_target = None
        else:
            _, input, weight, target, bias, *tensors = ctx.saved_tensors
            if grad_loss is None:
                shape = () if call.options[0] != _NONE else tensors[3].shape
                grad_loss = tensors[3].new_zeros(shape)
            found = call.kernels.linear_cross_entropy_shard_backward.default(
                *(grad_loss, grad_lse, grad_entropy, input, weight, target, bias, *tensors, *call.options),
                *(*call.shard, ctx.weight_type, (of_input, of_weight, of_target, of_bias), *call.products),
            )
            grad_input, grad_weight, grad_target, grad_bias = found
            grad_input = _begin_sum(call, grad_input) if of_input else None
        if of_input:
            grad_input = _end_sum(call, grad_input).to(input.dtype)
        return (
            grad_input,
            grad_weight if of_weight else None,
            grad_bias if of_bias else None,
            grad_target if of_target else None,
            *[None] * 4,
        )


class _FirstDerivative(torch.autograd.Function):
    """A gradient that is not differentiable: without this it would pass for one that depends on nothing."""

    @staticmethod
    def forward(ctx, grad, loss, *sources):
        ctx.loss = loss
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"{ctx.loss}: second derivatives of a loss whose classes are shared between ranks are not supported"
        )


def _accumulate_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _begin_sum(call, grad_input):
    """The gradient of the input is a sum over all classes."""
    if not call.reduce_input_grad:
        return grad_input
    return torch.ops._c10d_functional.all_reduce(grad_input.contiguous(), "sum", call.classes.name)


def _end_sum(call, grad_input):
    return torch.ops._c10d_functional.wait_tensor(grad_input) if call.reduce_input_grad else grad_input
