"""Negative log likelihood: one log-probability is read for each position. Backward writes the whole gradient, zeros and
the targets' entries, in one launch."""

import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.arguments import Pass
from fusedloss.triton.class_loss import (
    Shape,
    Vector,
    View,
    class_of,
    classes_of,
    entries,
    load_positions,
    positions_of,
    shape_of,
    sizes_of,
    store_entries,
    tile_view,
    vector_of,
    view_of,
    weights_of,
)
from fusedloss.triton.geometry import TileShape, tile_of
from fusedloss.triton.launch import accumulate_type, ceil_div, kernel, next_power_of_2, shown, start
from fusedloss.triton.portable import converted, number
from fusedloss.triton.reduce import Parts, Totals, store_sums

_BLOCK = 1024  # positions of a program in forward
_ENTRIES = 4096  # of a tile in backward


@kernel
def _forward(
    shape: Shape,
    log_probs: View,
    target: Vector,
    weight,
    loss,
    total: Totals,
    ignore_index: tl.int64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_MEAN: tl.constexpr,
):
    sizes = sizes_of(shape)
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = position < sizes.positions
    index, counts = class_of(target, position, live, ignore_index, sizes.classes)
    at = position // sizes.inner * shown(log_probs.outer_stride) + position % sizes.inner * shown(
        log_probs.inner_stride
    )
    at += index.to(tl.int64) * shown(log_probs.class_stride)
    log_probability = tl.load(log_probs.data + at, mask=counts, other=0.0).to(ACC)
    weights = weights_of(weight, index, counts, ACC)
    losses = tl.where(counts, math.nll_loss(log_probability, weights), 0.0)
    if loss is not None:
        tl.store(loss + position, converted(losses, loss), mask=live)
    store_sums(total, tl.sum(losses.to(tl.float64), 0), tl.sum(weights.to(tl.float64), 0), IS_MEAN)


@kernel
def _backward(
    shape: Shape,
    grad_log_probs: View,
    target: Vector,
    weight,
    grad_loss: Vector,
    divisor,
    chunks: tl.int64,
    ignore_index: tl.int64,
    tile: tl.constexpr,
    ACC: tl.constexpr,
):
    sizes = sizes_of(shape)
    chunk = (tl.program_id(0) % chunks).to(tl.int32)
    position, live = positions_of(tl.program_id(0) // chunks, sizes.positions, tile)
    index, counts = class_of(target, position, live, ignore_index, sizes.classes)
    g = number(1.0, tl.float64)
    if divisor is not None:
        g = 1.0 / tl.load(divisor)
    if grad_loss is not None:
        g = g * load_positions(grad_loss, position, live).to(tl.float64)
    on_target = math.nll_grad(g.to(ACC), weights_of(weight, index, counts, ACC))
    view = tile_view(grad_log_probs, position, sizes, tile)
    entry = entries(chunk * (tile.chunk * tile.lanes), tile)
    is_target = (classes_of(view, entry) == index[:, None, None]) & counts[:, None, None]
    store_entries(view, entry, live, tl.where(is_target, on_target[:, None, None], 0.0), tile)


def _geometry(entries, wide):
    lanes = min(next_power_of_2(entries), _ENTRIES)
    return TileShape(_ENTRIES // lanes, *((1, lanes) if wide else (lanes, 1)), 4, False)


def launch(args, which):
    """Starts the kernels of a pass."""
    shape, target = args.shape, args.target
    if which is Pass.backward:
        grad = args.grad_log_probs
        if grad is None:
            return
        tile = tile_of(shape, [grad], _geometry)
        start(
            _backward,
            tile.blocks(shape) * tile.chunks(shape),
            *(shape_of(shape), view_of(grad), vector_of(target.index), args.weight),
            *(vector_of(args.grad_loss), args.grad_divisor, tile.chunks(shape), target.ignore_index),
            tile=tile,
            ACC=accumulate_type(grad.data),
        )
        return
    parts = Parts(args.total, max(ceil_div(shape.positions, _BLOCK), 1), args.device)
    start(
        _forward,
        parts.programs,
        *(shape_of(shape), view_of(args.log_probs), vector_of(target.index), args.weight),
        *(None if args.loss is None else args.loss.data, parts.totals, target.ignore_index),
        ACC=accumulate_type(args.log_probs.data),
        BLOCK=_BLOCK,
        IS_MEAN=args.total.is_mean,
    )
    parts.add_up()
