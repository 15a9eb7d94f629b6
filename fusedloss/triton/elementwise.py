"""Losses of one element: a stream of blocks. A loss is three functions of math.py: in_domain, evaluate (loss and slope)
and target_grad. Operands may each have a type and strides of their own; those that lie as the elements do have none.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.arguments import Pass
from fusedloss.triton.launch import accumulate_type, ceil_div, index_type, kernel, start, workspace
from fusedloss.triton.portable import converted, number
from fusedloss.triton.reduce import Parts, Totals, store_sums, sum_of_parts

# Up to this many elements every program counts for itself those that are not ignored; more take longer than a launch.
COUNTED_INLINE = 4096
BLOCK = 2048
_COUNT_PROGRAMS = 256


class Loss(NamedTuple):
    in_domain: triton.JITFunction
    evaluate: triton.JITFunction
    target_grad: triton.JITFunction


LOSSES = {
    "bce": Loss(math.bce_in_domain, math.bce_evaluate, math.bce_target_grad),
    "bce_with_logits": Loss(
        math.bce_with_logits_in_domain,
        math.bce_with_logits_evaluate,
        math.bce_with_logits_target_grad,
    ),
}


@dataclass(frozen=True)
class Options:
    """What a kernel is compiled for, beside the loss and the types and strides of its tensors."""

    acc: tl.dtype
    index: tl.dtype  # of an element's number
    ignores: bool
    divides: bool  # forward has a gradient, of a mean
    is_mean: bool


class Operand(NamedTuple):
    data: tl.tensor
    strides: tuple | None  # None: it lies as the elements do


_ABSENT = Operand(None, None)


class Operands(NamedTuple):
    """grad_loss: of each element."""

    input: Operand
    target: Operand
    weight: Operand
    pos_weight: Operand
    grad_loss: Operand
    loss: Operand
    grad_input: Operand
    grad_target: Operand


class Scale(NamedTuple):
    """What multiplies the gradients of all losses; None is 1. counted: the divisor's parts, from a launch before."""

    grad_loss: tl.tensor
    divisor: tl.tensor
    counted: tl.tensor


@triton.jit
def _places(operand, element, sizes):
    if operand.strides is None:
        return operand.data + element
    else:
        dims: tl.constexpr = len(sizes)
        at = tl.zeros(element.shape, tl.int64)
        rest = element
        for d in tl.static_range(dims):
            size = sizes[dims - 1 - d]
            at += (rest % size).to(tl.int64) * operand.strides[dims - 1 - d]
            rest = rest // size
        return operand.data + at


@triton.jit
def _load(operand, element, exists, sizes, acc: tl.constexpr):
    """In the accumulate type; 1 where the operand is absent."""
    if operand.data is None:
        return tl.full(element.shape, 1.0, acc)
    elif exists is None:
        return tl.load(_places(operand, element, sizes)).to(acc)
    else:
        return tl.load(_places(operand, element, sizes), mask=exists, other=0).to(acc)


@triton.jit
def _store(operand, element, exists, values, sizes):
    if operand.data is not None:
        tl.store(_places(operand, element, sizes), converted(values, operand.data), mask=exists)


@triton.jit
def _elements(loss, operands, element, exists, scale, ignored, sizes, acc: tl.constexpr):
    """The elements of a block; exists is None where all do. (sum of their losses, how many count)"""
    x = _load(operands.input, element, exists, sizes, acc)
    t = _load(operands.target, element, exists, sizes, acc)
    w = _load(operands.weight, element, exists, sizes, acc)
    p = _load(operands.pos_weight, element, exists, sizes, acc)
    counts = tl.full(element.shape, True, tl.int1)
    if ignored is not None:
        counts = t != ignored
    if exists is not None:
        counts = counts & exists
    in_domain = loss.in_domain(x) & loss.in_domain(t)
    tl.device_assert(in_domain | ~counts, "fusedloss: input and target must be between 0 and 1")
    losses, slope = loss.evaluate(x, t, p)
    losses = tl.where(counts, w * losses, 0.0)
    _store(operands.loss, element, exists, losses, sizes)
    g = _load(operands.grad_loss, element, exists, sizes, acc) * scale
    _store(operands.grad_input, element, exists, tl.where(counts, g * w * slope, 0.0), sizes)
    target_grads = tl.where(counts, loss.target_grad(x, t, p, g * w), 0.0)
    _store(operands.grad_target, element, exists, target_grads, sizes)
    return tl.sum(losses.to(tl.float64), 0), tl.sum(counts.to(tl.int32), 0).to(tl.float64)


@triton.jit
def _count(target, begin, step, numel, ignored, sizes, o: tl.constexpr):
    """The elements that are not ignored, in every step'th block from `begin` on."""
    sums = tl.zeros((1024,), tl.float64)
    for block in range(begin, tl.cdiv(numel, 1024), step):
        element = block * 1024 + tl.arange(0, 1024).to(o.index)
        t = _load(target, element, element < numel, sizes, o.acc)
        sums += tl.where((element < numel) & (t != ignored), 1.0, 0.0)
    return tl.sum(sums, 0)


@kernel
def _count_kernel(target: Operand, parts, sizes, numel: tl.int64, ignore_index: tl.int64, o: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64)
    sum = _count(target, program, step, numel, ignore_index.to(o.acc), sizes, o)
    tl.store(parts + program, sum)


@kernel
def _elementwise(
    loss: Loss,
    operands: Operands,
    scale: Scale,
    total: Totals,
    sizes,
    numel: tl.int64,
    ignore_index: tl.int64,
    counted_parts: tl.int64,
    o: tl.constexpr,
    SIZE: tl.constexpr,
):
    ignored = None
    if o.ignores:
        ignored = ignore_index.to(o.acc)
    factor = number(1.0, tl.float64)
    if scale.divisor is not None:
        factor = 1.0 / tl.load(scale.divisor)
    if o.divides:
        if scale.counted is not None:
            factor = 1.0 / sum_of_parts(scale.counted, counted_parts, 1024)
        elif o.ignores:
            factor = 1.0 / _count(operands.target, 0, 1, numel, ignored, sizes, o)
        else:
            factor = 1.0 / numel.to(tl.float64)
    if scale.grad_loss is not None:
        factor = factor * tl.load(scale.grad_loss).to(tl.float64)
    factor = factor.to(o.acc)

    block = tl.program_id(0)
    element = block.to(o.index) * SIZE + tl.arange(0, SIZE).to(o.index)
    # A block that is full has no mask, so that 16 bytes are moved at once whatever the number of elements.
    if (block.to(tl.int64) + 1) * SIZE <= numel:
        losses, count = _elements(loss, operands, element, None, factor, ignored, sizes, o.acc)
    else:
        losses, count = _elements(loss, operands, element, element < numel, factor, ignored, sizes, o.acc)
    store_sums(total, losses, count, o.is_mean)


def _operand(tensor):
    return _ABSENT if tensor is None else Operand(tensor.data, None if tensor.linear else tensor.strides)


def _start_count(args, options):
    """(parts of the number of elements that are not ignored, how many parts)"""
    programs = min(_COUNT_PROGRAMS, ceil_div(args.shape.numel, 1024))
    parts = workspace(args.device, programs)
    numbers = args.shape.sizes, args.shape.numel, args.ignore_index
    start(_count_kernel, programs, _operand(args.target), parts, *numbers, o=options)
    return parts, programs


def launch(loss, args, which):
    """Starts the kernels of a pass."""
    numel, grad_loss = args.shape.numel, args.grad_loss
    options = Options(
        acc=accumulate_type(args.input.data),
        index=index_type(numel),
        ignores=args.has_ignore_index,
        divides=which is Pass.forward_with_gradient and args.total.is_mean,
        is_mean=args.total.is_mean,
    )
    counted, counted_parts = None, 0
    if options.divides and options.ignores and numel > COUNTED_INLINE:
        counted, counted_parts = _start_count(args, options)
    # One number for all losses, which have no need to load it one by one.
    one = grad_loss is not None and not any(grad_loss.strides)
    inputs = args.input, args.target, args.weight, args.pos_weight, None if one else grad_loss
    operands = Operands(*map(_operand, (*inputs, args.loss, args.grad_input, args.grad_target)))
    scale = Scale(grad_loss.data if one else None, args.grad_divisor, counted)
    programs = ceil_div(numel, BLOCK)
    parts = Parts(args.total, programs if which is Pass.backward else max(programs, 1), args.device)
    numbers = args.shape.sizes, numel, args.ignore_index, counted_parts
    start(_elementwise, parts.programs, loss, operands, scale, parts.totals, *numbers, o=options, SIZE=BLOCK)
    parts.add_up()
