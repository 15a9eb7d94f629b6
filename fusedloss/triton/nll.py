"""Negative log likelihood: one log-probability is read for each position. Backward writes the whole gradient, zeros and
the targets' entries, in one launch."""

import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.class_loss import class_of, entries, positions_of, store_entries, tile_of, view_of
from fusedloss.triton.launch import accumulate_type, ceil_div, kernel, next_power_of_2, start
from fusedloss.triton.reduce import Parts, finish

_BLOCK = 1024  # positions of a program in forward
_ENTRIES = 4096  # of a tile in backward


@kernel
def _forward(
    log_probs,
    target,
    weight,
    loss,
    parts,
    total_loss,
    total_divisor,
    positions: tl.int64,
    classes: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    class_stride: tl.int64,
    inner_stride: tl.int64,
    target_stride: tl.int64,
    ignore_index: tl.int64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_MEAN: tl.constexpr,
    ALONE: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = position < positions
    index, counts = class_of(target, target_stride, position, live, ignore_index, classes)
    at = position // inner * outer_stride + position % inner * inner_stride + index.to(tl.int64) * class_stride
    log_probability = tl.load(log_probs + at, mask=counts, other=0.0).to(ACC)
    weights = tl.where(counts, 1.0, 0.0).to(ACC)
    if weight is not None:
        weights = tl.load(weight + index, mask=counts, other=0.0)
    losses = tl.where(counts, math.nll_loss(log_probability, weights), 0.0)
    if loss is not None:
        tl.store(loss + position, math.converted(losses, loss), mask=live)
    loss_sum = tl.sum(losses.to(tl.float64), 0)
    finish(parts, total_loss, total_divisor, loss_sum, tl.sum(weights.to(tl.float64), 0), IS_MEAN, ALONE)


@kernel
def _backward(
    grad_log_probs,
    target,
    weight,
    grad_loss,
    divisor,
    positions: tl.int64,
    classes: tl.int64,
    inner: tl.int64,
    outer_stride: tl.int64,
    class_stride: tl.int64,
    inner_stride: tl.int64,
    target_stride: tl.int64,
    ignore_index: tl.int64,
    grad_loss_stride: tl.int64,
    chunks: tl.int64,
    tile: tl.constexpr,
    ACC: tl.constexpr,
):
    chunk = (tl.program_id(0) % chunks).to(tl.int32)
    position, live = positions_of(tl.program_id(0) // chunks, positions, tile)
    index, counts = class_of(target, target_stride, position, live, ignore_index, classes)
    g = math.number(1.0, tl.float64)
    if divisor is not None:
        g = 1.0 / tl.load(divisor)
    if grad_loss is not None:
        g = g * tl.load(grad_loss + position * grad_loss_stride, mask=live, other=0.0).to(tl.float64)
    weights = tl.where(counts, 1.0, 0.0).to(ACC)
    if weight is not None:
        weights = tl.load(weight + index, mask=counts, other=0.0)
    on_target = math.nll_grad(g.to(ACC), weights)
    view = view_of(grad_log_probs, position, inner, classes, outer_stride, class_stride, inner_stride, tile)
    rows, head, _, _ = view
    entry = entries(chunk * (tile.chunk * tile.lanes), tile)
    is_target = (entry - head[:, None, None] == index[:, None, None]) & counts[:, None, None]
    store_entries(view, entry, live, tl.where(is_target, on_target[:, None, None], 0.0), tile)


def _geometry(entries, wide):
    lanes = min(next_power_of_2(entries), _ENTRIES)
    return (_ENTRIES // lanes, *((1, lanes) if wide else (lanes, 1)), 4, False)


def launch(args, pass_name):
    """Starts the kernels of a pass."""
    shape, target, flow = args.shape, args.target, args.flow
    sizes = shape.positions, shape.classes, shape.inner
    if pass_name == "backward":
        grad = args.grad_log_probs
        if grad.data is None:
            return
        tile = tile_of(shape, [grad], _geometry)
        start(
            _backward,
            tile.blocks(shape) * tile.chunks(shape),
            *(grad.data, target.index.data, args.weight, flow.grad_loss.data, flow.divisor),
            *(*sizes, grad.outer_stride, grad.class_stride, grad.inner_stride),
            *(target.index.stride, target.ignore_index, flow.grad_loss.stride, tile.chunks(shape)),
            tile=tile,
            ACC=accumulate_type(grad.data),
        )
        return
    log_probs = args.log_probs
    programs = max(ceil_div(shape.positions, _BLOCK), 1)
    parts = Parts(args.total, programs, args.device)
    start(
        _forward,
        programs,
        *(log_probs.data, target.index.data, args.weight, args.loss.data, *parts.pointers),
        *(*sizes, log_probs.outer_stride, log_probs.class_stride, log_probs.inner_stride),
        *(target.index.stride, target.ignore_index),
        ACC=accumulate_type(log_probs.data),
        BLOCK=_BLOCK,
        IS_MEAN=args.total.is_mean,
        ALONE=parts.alone,
    )
    parts.add_up()
