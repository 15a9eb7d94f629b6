"""Losses of one element: a stream of blocks. A loss is three functions of math.py: in_domain, evaluate (loss and slope)
and target_grad. Operands may each have a type and strides of their own; those that lie as the elements do have none.
"""

import triton
import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.launch import accumulate_type, ceil_div, index_type, kernel, start, workspace
from fusedloss.triton.reduce import Parts, finish, sum_of_parts

# Up to this many elements every program counts for itself those that are not ignored; more take longer than a launch.
COUNTED_INLINE = 4096
BLOCK = 2048
_COUNT_PROGRAMS = 256

_LOSSES = {
    "bce": (math.bce_in_domain, math.bce_evaluate, math.bce_target_grad),
    "bce_with_logits": (
        math.bce_with_logits_in_domain,
        math.bce_with_logits_evaluate,
        math.bce_with_logits_target_grad,
    ),
}


@triton.jit
def _places(operand, element, sizes, DIMS: tl.constexpr):
    data, strides = operand
    if strides is None:
        return data + element
    else:
        at = tl.zeros(element.shape, tl.int64)
        rest = element
        for d in tl.static_range(DIMS):
            size = sizes[DIMS - 1 - d]
            at += (rest % size).to(tl.int64) * strides[DIMS - 1 - d]
            rest = rest // size
        return data + at


@triton.jit
def _load(operand, element, exists, sizes, ACC: tl.constexpr, DIMS: tl.constexpr):
    """In the accumulate type; 1 where the operand is absent."""
    data, strides = operand
    if data is None:
        return tl.full(element.shape, 1.0, ACC)
    elif exists is None:
        return tl.load(_places(operand, element, sizes, DIMS)).to(ACC)
    else:
        return tl.load(_places(operand, element, sizes, DIMS), mask=exists, other=0).to(ACC)


@triton.jit
def _store(operand, element, exists, values, sizes, DIMS: tl.constexpr):
    data, strides = operand
    if data is not None:
        tl.store(_places(operand, element, sizes, DIMS), math.converted(values, data), mask=exists)


@triton.jit
def _elements(
    input,
    target,
    weight,
    pos_weight,
    grad_loss,
    loss,
    grad_input,
    grad_target,
    element,
    exists,
    scale,
    ignored,
    sizes,
    IN_DOMAIN: tl.constexpr,
    EVALUATE: tl.constexpr,
    TARGET_GRAD: tl.constexpr,
    ACC: tl.constexpr,
    DIMS: tl.constexpr,
):
    """The elements of a block; exists is None where all do. (sum of their losses, how many count)"""
    x = _load(input, element, exists, sizes, ACC, DIMS)
    t = _load(target, element, exists, sizes, ACC, DIMS)
    w = _load(weight, element, exists, sizes, ACC, DIMS)
    p = _load(pos_weight, element, exists, sizes, ACC, DIMS)
    counts = tl.full(element.shape, True, tl.int1)
    if ignored is not None:
        counts = t != ignored
    if exists is not None:
        counts = counts & exists
    tl.device_assert((IN_DOMAIN(x) & IN_DOMAIN(t)) | ~counts, "fusedloss: input and target must be between 0 and 1")
    losses, slope = EVALUATE(x, t, p)
    losses = tl.where(counts, w * losses, 0.0)
    _store(loss, element, exists, losses, sizes, DIMS)
    g = _load(grad_loss, element, exists, sizes, ACC, DIMS) * scale
    _store(grad_input, element, exists, tl.where(counts, g * w * slope, 0.0), sizes, DIMS)
    target_grads = tl.where(counts, TARGET_GRAD(x, t, p, g * w), 0.0)
    _store(grad_target, element, exists, target_grads, sizes, DIMS)
    return tl.sum(losses.to(tl.float64), 0), tl.sum(counts.to(tl.int32), 0).to(tl.float64)


@triton.jit
def _count(target, begin, step, numel, ignored, sizes, ACC: tl.constexpr, INDEX: tl.constexpr, DIMS: tl.constexpr):
    """The elements that are not ignored, in every step'th block from `begin` on."""
    sums = tl.zeros((1024,), tl.float64)
    for block in range(begin, tl.cdiv(numel, 1024), step):
        element = block * 1024 + tl.arange(0, 1024).to(INDEX)
        t = _load(target, element, element < numel, sizes, ACC, DIMS)
        sums += tl.where((element < numel) & (t != ignored), 1.0, 0.0)
    return tl.sum(sums, 0)


@kernel
def _count_kernel(
    target,
    target_strides,
    parts,
    sizes,
    numel: tl.int64,
    ignore_index: tl.int64,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    DIMS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64)
    ignored = ignore_index.to(ACC)
    sum = _count((target, target_strides), program, step, numel, ignored, sizes, ACC, INDEX, DIMS)
    tl.store(parts + program, sum)


@kernel
def _elementwise(
    input,
    target,
    weight,
    pos_weight,
    grad_loss,
    loss,
    grad_input,
    grad_target,
    input_strides,
    target_strides,
    weight_strides,
    pos_weight_strides,
    grad_loss_strides,
    loss_strides,
    grad_input_strides,
    grad_target_strides,
    sizes,
    one_grad_loss,
    divisor,
    counted,
    parts,
    total_loss,
    total_divisor,
    numel: tl.int64,
    ignore_index: tl.int64,
    counted_parts: tl.int64,
    IN_DOMAIN: tl.constexpr,
    EVALUATE: tl.constexpr,
    TARGET_GRAD: tl.constexpr,
    IGNORES: tl.constexpr,
    COUNTS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    ALONE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    DIMS: tl.constexpr,
    SIZE: tl.constexpr,
):
    ignored = None
    if IGNORES:
        ignored = ignore_index.to(ACC)
    of_target = (target, target_strides)
    # What flows into all losses alike.
    scale = math.number(1.0, tl.float64)
    if divisor is not None:
        scale = 1.0 / tl.load(divisor)
    if COUNTS:  # forward divides by it
        if counted is not None:
            scale = 1.0 / sum_of_parts(counted, counted_parts, 1024)
        elif IGNORES:
            scale = 1.0 / _count(of_target, 0, 1, numel, ignored, sizes, ACC, INDEX, DIMS)
        else:
            scale = 1.0 / numel.to(tl.float64)
    if one_grad_loss is not None:
        scale = scale * tl.load(one_grad_loss).to(tl.float64)

    block = tl.program_id(0)
    element = block.to(INDEX) * SIZE + tl.arange(0, SIZE).to(INDEX)
    operands = (
        (input, input_strides),
        of_target,
        (weight, weight_strides),
        (pos_weight, pos_weight_strides),
        (grad_loss, grad_loss_strides),
        (loss, loss_strides),
        (grad_input, grad_input_strides),
        (grad_target, grad_target_strides),
    )
    # A block that is full has no mask, so that 16 bytes are moved at once whatever the number of elements.
    if (block.to(tl.int64) + 1) * SIZE <= numel:
        losses, count = _elements(
            *operands, element, None, scale.to(ACC), ignored, sizes, IN_DOMAIN, EVALUATE, TARGET_GRAD, ACC, DIMS
        )
    else:
        losses, count = _elements(
            *operands,
            element,
            element < numel,
            scale.to(ACC),
            ignored,
            sizes,
            IN_DOMAIN,
            EVALUATE,
            TARGET_GRAD,
            ACC,
            DIMS,
        )
    finish(parts, total_loss, total_divisor, losses, count, IS_MEAN, ALONE)


def launch(name, args, pass_name):
    """Starts the kernels of a pass."""
    in_domain, evaluate, target_grad = _LOSSES[name]
    shape, total, flow = args.shape, args.total, args.flow
    numel = shape.numel
    backward = pass_name == "backward"
    # One number that flows into all losses, which have no need to load it one by one.
    one = flow.grad_loss.data is not None and not any(flow.grad_loss.strides)
    operands = [args.input, args.target, args.weight, args.pos_weight, flow.grad_loss, args.loss]
    operands += [args.grad_input, args.grad_target]
    data = [operand.data for operand in operands]
    if one:
        data[4] = None
    types = {"ACC": accumulate_type(args.input.data), "INDEX": index_type(numel), "DIMS": len(shape.sizes)}

    def strides(operand):
        return None if operand.linear or operand.data is None else operand.strides

    counts = pass_name == "forward_with_gradient" and total.is_mean
    counted, counted_parts = None, 0
    if counts and args.has_ignore_index and numel > COUNTED_INLINE:
        counted_parts = min(_COUNT_PROGRAMS, ceil_div(numel, 1024))
        counted = workspace(args.device, counted_parts)
        target = args.target
        start(
            _count_kernel,
            counted_parts,
            *(target.data, strides(target), counted, shape.sizes, numel, args.ignore_index),
            **types,
        )
    programs = ceil_div(numel, BLOCK) if backward else max(ceil_div(numel, BLOCK), 1)
    parts = Parts(total, programs, args.device)
    start(
        _elementwise,
        programs,
        *data,
        *map(strides, operands),
        *(shape.sizes, flow.grad_loss.data if one else None, flow.divisor, counted, *parts.pointers),
        *(numel, args.ignore_index, counted_parts),
        IN_DOMAIN=in_domain,
        EVALUATE=evaluate,
        TARGET_GRAD=target_grad,
        IGNORES=args.has_ignore_index,
        COUNTS=counts,
        IS_MEAN=total.is_mean,
        ALONE=parts.alone,
        SIZE=BLOCK,
        **types,
    )
    parts.add_up()
