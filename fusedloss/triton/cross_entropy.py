"""Cross entropy. The formulas are math.py's; the arguments are those of csrc/kernels/class_loss.h.

A program takes a tile of positions and classes. Where a tile holds whole rows, forward reads each logit once, and has
it at hand for the gradient. Longer rows are swept tile by tile, with a running maximum and sum for each lane; their
gradient takes a second sweep, which finds much of the row in the cache. Where there are too few rows to keep a GPU
busy, each is cut into slices with a program for each: their sums meet in a second launch, and the gradient is a third.

The sums of a row are a tuple: max; sum, of exp(x - max); and, where every class has mass, dense_loss, of
mass (max - x), and mass. csrc/kernels/cuda/row_sums.cuh has the same.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.class_loss import (
    class_of,
    count_before,
    entries,
    is_class,
    load_entries,
    mean_divisor,
    places_of,
    positions_of,
    store_entries,
    tile_of,
    view_of,
)
from fusedloss.triton.launch import (
    accumulate_type,
    ceil_div,
    kernel,
    multiprocessors,
    next_power_of_2,
    start,
    workspace,
)
from fusedloss.triton.reduce import Parts, add_up, finish


@dataclass(frozen=True)
class Options:
    """What a kernel is compiled for, beside the types of its tensors and the tile."""

    acc: tl.dtype
    rough: bool  # half precision: there is no time for an exact exponential, and no place where it would show
    dense: bool  # every class has mass
    probabilities: bool  # and is a target
    capped: bool
    has_z: bool
    every_lse: bool
    is_mean: bool
    with_gradient: bool


# --- Entries of a tile -----------------------------------------------------------------------------------------


@triton.jit
def _exp(x, o: tl.constexpr):
    if o.rough:
        return math.exp_roughly(x)
    else:
        return math.exp_nonpositive(x)


@triton.jit
def _capped(x, softcap, exists, o: tl.constexpr):
    """(value, slope), both from float64: what the cap rounds off, exp magnifies."""
    value, slope = math.soft_cap(x.to(tl.float64), softcap)
    return tl.where(exists, value.to(o.acc), x), slope.to(o.acc)


@triton.jit
def _values(view, entry, readable, softcap, tile: tl.constexpr, o: tl.constexpr):
    """(entries as the softmax sees them, the cap's slopes, whether they exist)"""
    x = load_entries(view, entry, readable, o.acc, tile)
    exists = is_class(view, entry, tile) & readable[:, None, None]
    slope = x
    if o.capped:
        x, slope = _capped(x, softcap, exists, o)
    return x, slope, exists


@triton.jit
def _q_view(probabilities, view, position, inner, outer_stride, class_stride, inner_stride, tile: tl.constexpr):
    """The view of probabilities; without any, that of the logits, which stands for the place of each class."""
    rows, head, logits_class_stride, classes = view
    if probabilities is None:
        return view
    else:
        return view_of(probabilities, position, inner, classes, outer_stride, class_stride, inner_stride, tile)


@triton.jit
def _masses(q_view, weight, entry, exists, smoothing, tile: tl.constexpr, o: tl.constexpr):
    """The mass that every class has: a class's weight, which the smoothing multiplies later, or a probability's."""
    rows, head, class_stride, classes = q_view
    if weight is None:
        masses = tl.where(exists, 1.0, 0.0).to(o.acc)
    else:
        masses = tl.load(weight + (entry - head[:, None, None]), mask=exists, other=0.0)
    if o.probabilities:
        keep, spread = smoothing
        q = tl.load(places_of(q_view, entry, tile), mask=exists, other=0.0).to(o.acc)
        masses = tl.where(exists, math.probability_mass(keep, spread, q, masses), 0.0)
    return masses


# --- Sums of a row ---------------------------------------------------------------------------------------------


@triton.jit
def _merge(sums, o: tl.constexpr):
    """Sums of parts, along the last of two axes."""
    max, sum, dense_loss, mass = sums
    row_max = tl.max(max, 1)
    row_sum = tl.sum(math.rescale(sum, max, row_max[:, None]), 1)
    if o.dense:
        apart = math.finite_shift(max) - math.finite_shift(row_max)[:, None]
        dense_loss += math.entry_loss_at_max(apart, mass.to(o.acc))
    return row_max, row_sum, tl.sum(dense_loss, 1), tl.sum(mass, 1)


@triton.jit
def _sweep(view, q_view, weight, begin, end, readable, smoothing, softcap, tile: tl.constexpr, o: tl.constexpr):
    """The sums of the entries [begin, end) of each row, tile by tile."""
    positions: tl.constexpr = tile.positions
    lanes: tl.constexpr = tile.lanes
    max = tl.full((positions, lanes), -float("inf"), o.acc)
    sum = tl.zeros((positions, lanes), o.acc)
    dense_loss = tl.zeros((positions, lanes), o.acc)
    mass = tl.zeros((positions, lanes), tl.float64)
    for first in range(begin, end, tile.chunk * tile.lanes):
        entry = entries(first, tile)
        x, slope, exists = _values(view, entry, readable, softcap, tile, o)
        new_max = math.larger(tl.max(x, 1), max)
        shifted = x - math.finite_shift(new_max)[:, None, :]
        sum = math.rescale(sum, max, new_max) + tl.sum(_exp(shifted, o), 1)
        if o.dense:
            masses = _masses(q_view, weight, entry, exists, smoothing, tile, o)
            apart = math.finite_shift(max) - math.finite_shift(new_max)
            dense_loss += math.entry_loss_at_max(apart, mass.to(o.acc))
            dense_loss += tl.sum(tl.where(exists, math.entry_loss_at_max(shifted, masses), 0.0), 1)
            mass += tl.sum(masses.to(tl.float64), 1)
        max = new_max
    return _merge((max, sum, dense_loss, mass), o)


@triton.jit
def _sums_of(x, exists, q_view, weight, entry, smoothing, tile: tl.constexpr, o: tl.constexpr):
    """The sums of rows that a tile holds whole."""
    max = math.larger(tl.max(tl.max(x, 2), 1), -float("inf"))
    shifted = x - math.finite_shift(max)[:, None, None]
    sum = tl.sum(tl.sum(_exp(shifted, o), 2), 1)
    dense_loss = sum
    mass = sum
    if o.dense:
        masses = _masses(q_view, weight, entry, exists, smoothing, tile, o)
        dense_loss = tl.sum(tl.sum(tl.where(exists, math.entry_loss_at_max(shifted, masses), 0.0), 2), 1)
        mass = tl.sum(tl.sum(masses.to(tl.float64), 2), 1)
    return max, sum, dense_loss, mass


# --- Rows ------------------------------------------------------------------------------------------------------
#
# The target of a row is a tuple (class index, whether the position counts, the mass on that class alone, its weight).


@triton.jit
def _smoothing(label_smoothing, classes, o: tl.constexpr):
    """(keep, spread)"""
    part = math.number(label_smoothing, tl.float64)
    return (1.0 - part).to(o.acc), (part / classes.to(tl.float64)).to(o.acc)


@triton.jit
def _target_of(target, target_stride, ignore_index, weight, position, live, classes, smoothing, o: tl.constexpr):
    keep, spread = smoothing
    if target is None:  # probabilities
        nothing = tl.zeros(position.shape, o.acc)
        return nothing.to(tl.int32), live, nothing, nothing + 1.0
    else:
        index, counts = class_of(target, target_stride, position, live, ignore_index, classes)
        if weight is None:
            class_weight = tl.where(counts, 1.0, 0.0).to(o.acc)
        else:
            class_weight = tl.load(weight + index, mask=counts, other=0.0)
        return index, counts, tl.where(counts, keep * class_weight, 0.0), class_weight


@triton.jit
def _target_logit(view, target, of_target, softcap, tile: tl.constexpr, o: tl.constexpr):
    index, counts, mass, class_weight = of_target
    if target is None:
        return mass
    else:
        rows, head, class_stride, classes = view
        x = tl.load(rows + (index + head).to(tl.int64) * class_stride, mask=counts, other=0.0).to(o.acc)
        if o.capped:
            x, slope = _capped(x, softcap, counts, o)
        return x


@triton.jit
def _finish_rows(
    position,
    live,
    target,
    of_target,
    target_logit,
    sums,
    smoothing,
    z_loss,
    classes,
    loss,
    lse,
    row_max,
    row_log_sum,
    o: tl.constexpr,
):
    """Writes what is wanted of finished rows. (sum of their losses, of the mean's divisor)"""
    index, counts, mass_on_target, class_weight = of_target
    keep, spread = smoothing
    max, sum, dense_loss, mass = sums
    log_sum = tl.log(sum)
    if target is None:
        losses = dense_loss + mass.to(o.acc) * log_sum
    else:
        losses = math.entry_loss(tl.where(counts, target_logit - max, 0.0), log_sum, mass_on_target)
        if o.dense:
            losses += spread * dense_loss + (spread * mass).to(o.acc) * log_sum
    if o.has_z:
        losses += math.z_term(math.log_sum_exp(max, log_sum), z_loss)
    counts = counts & (classes > 0)
    losses = tl.where(counts, losses, 0.0)
    if loss is not None:
        tl.store(loss + position, math.converted(losses, loss), mask=live)
    if row_max is not None:
        tl.store(row_max + position, max, mask=live)
        tl.store(row_log_sum + position, log_sum, mask=live)
    if lse is not None:
        tl.store(lse + position, math.log_sum_exp(max, log_sum), mask=live)
    return tl.sum(losses.to(tl.float64), 0), tl.sum(tl.where(counts, class_weight, 0.0).to(tl.float64), 0)


@triton.jit
def _flows(g, grad_lse, target, of_target, mass, max, log_sum, smoothing, z_loss, o: tl.constexpr):
    """(the factor of the softmax, and of the masses on the target and on all classes); mass: on all classes."""
    index, counts, mass_on_target, class_weight = of_target
    keep, spread = smoothing
    g = tl.where(counts, g, 0.0)
    if target is None:
        on_all = g
        total = mass
    else:
        on_all = g * spread
        total = mass_on_target
        if o.dense:
            total = mass_on_target + (spread * mass).to(o.acc)
    lse = math.log_sum_exp(max, log_sum) if o.has_z else max
    normaliser = math.normaliser_grad(g, grad_lse, tl.where(counts, total.to(o.acc), 0.0), lse, z_loss, o.has_z)
    return normaliser, g * mass_on_target, on_all


@triton.jit
def _entry_grads(
    x, slope, exists, shift, factor, flows, q_view, weight, entry, target, of_target, smoothing, tile, o: tl.constexpr
):
    index, counts, mass_on_target, class_weight = of_target
    normaliser, on_target, on_all = flows
    rows, head, class_stride, classes = q_view
    on_class = tl.zeros(x.shape, o.acc)
    if target is not None:
        on_class = tl.where(entry - head[:, None, None] == index[:, None, None], on_target[:, None, None], 0.0)
    if o.dense:
        masses = _masses(q_view, weight, entry, exists, smoothing, tile, o)
        on_class += on_all[:, None, None] * masses
    grads = math.logit_grad(_exp(x - shift[:, None, None], o), factor[:, None, None], on_class)
    if o.capped:
        grads *= slope
    return tl.where(exists, grads, 0.0)


# --- Kernels ---------------------------------------------------------------------------------------------------


@kernel
def _forward(
    logits,
    target,
    probabilities,
    weight,
    loss,
    lse,
    row_max,
    row_log_sum,
    grad_logits,
    grad_loss,
    counted,
    parts,
    total_loss,
    total_divisor,
    positions: tl.int64,
    classes: tl.int64,
    inner: tl.int64,
    logits_outer: tl.int64,
    logits_class: tl.int64,
    logits_inner: tl.int64,
    q_outer: tl.int64,
    q_class: tl.int64,
    q_inner: tl.int64,
    grad_outer: tl.int64,
    grad_class: tl.int64,
    grad_inner: tl.int64,
    target_stride: tl.int64,
    ignore_index: tl.int64,
    counted_parts: tl.int64,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    logit_softcap: tl.float64,
    tile: tl.constexpr,
    o: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Whole rows: their losses and statistics, and their gradient."""
    position, live = positions_of(tl.program_id(0), positions, tile)
    smoothing = _smoothing(label_smoothing, classes, o)
    softcap = math.number(logit_softcap, tl.float64)
    z = math.number(z_loss, o.acc)
    of_target = _target_of(target, target_stride, ignore_index, weight, position, live, classes, smoothing, o)
    index, counts, mass_on_target, class_weight = of_target
    readable = live & (counts | o.every_lse)
    view = view_of(logits, position, inner, classes, logits_outer, logits_class, logits_inner, tile)
    q_view = _q_view(probabilities, view, position, inner, q_outer, q_class, q_inner, tile)
    target_logit = _target_logit(view, target, of_target, softcap, tile, o)

    end = classes.to(tl.int32) + tile.shift
    if tile.sweeps:
        some = tl.max(readable.to(tl.int32), 0)
        sums = _sweep(view, q_view, weight, 0, end * some, readable, smoothing, softcap, tile, o)
    else:
        entry = entries(0, tile)
        x, slope, exists = _values(view, entry, readable, softcap, tile, o)
        sums = _sums_of(x, exists, q_view, weight, entry, smoothing, tile, o)
    max, sum, dense_loss, mass = sums
    losses, divisor = _finish_rows(
        position, live, target, of_target, target_logit, sums, smoothing, z, classes, loss, lse, row_max, row_log_sum, o
    )
    finish(parts, total_loss, total_divisor, losses, divisor, o.is_mean, ALONE)

    if o.with_gradient:
        g = math.number(1.0, tl.float64)
        if o.is_mean:
            if target is None:
                divisor = tl.where(classes > 0, positions, 0).to(tl.float64)
            else:
                divisor = mean_divisor(
                    counted, counted_parts, target, weight, target_stride, positions, ignore_index, classes
                )
            g = 1.0 / divisor
        if grad_loss is not None:
            g *= tl.load(grad_loss).to(tl.float64)
        flows = _flows(g.to(o.acc), 0.0, target, of_target, mass, max, tl.log(sum), smoothing, z, o)
        factor = math.divide(flows[0], sum)
        shift = math.finite_shift(max)
        grad_view = view_of(grad_logits, position, inner, classes, grad_outer, grad_class, grad_inner, tile)
        # The targets' logits have been read, by whichever thread, before the gradient may take their place.
        tl.debug_barrier()
        if tile.sweeps:
            for first in range(0, end, tile.chunk * tile.lanes):
                entry = entries(first, tile)
                x, slope, exists = _values(view, entry, readable, softcap, tile, o)
                grads = _entry_grads(
                    x, slope, exists, shift, factor, flows, q_view, weight, entry, target, of_target, smoothing, tile, o
                )
                store_entries(grad_view, entry, live, grads, tile)
        else:
            grads = _entry_grads(
                x, slope, exists, shift, factor, flows, q_view, weight, entry, target, of_target, smoothing, tile, o
            )
            store_entries(grad_view, entry, live, grads, tile)


@kernel
def _slices(
    logits,
    target,
    probabilities,
    weight,
    parts,
    mass_parts,
    positions: tl.int64,
    classes: tl.int64,
    inner: tl.int64,
    logits_outer: tl.int64,
    logits_class: tl.int64,
    logits_inner: tl.int64,
    q_outer: tl.int64,
    q_class: tl.int64,
    q_inner: tl.int64,
    target_stride: tl.int64,
    ignore_index: tl.int64,
    slices: tl.int64,
    slice_chunks: tl.int64,
    label_smoothing: tl.float64,
    logit_softcap: tl.float64,
    tile: tl.constexpr,
    o: tl.constexpr,
):
    """The sums of a slice of each row: parts is (3, slices, positions), mass_parts (slices, positions)."""
    slice = tl.program_id(0) % slices
    position, live = positions_of(tl.program_id(0) // slices, positions, tile)
    smoothing = _smoothing(label_smoothing, classes, o)
    softcap = math.number(logit_softcap, tl.float64)
    of_target = _target_of(target, target_stride, ignore_index, weight, position, live, classes, smoothing, o)
    index, counts, mass_on_target, class_weight = of_target
    readable = live & (counts | o.every_lse)
    view = view_of(logits, position, inner, classes, logits_outer, logits_class, logits_inner, tile)
    q_view = _q_view(probabilities, view, position, inner, q_outer, q_class, q_inner, tile)
    begin = (slice * slice_chunks).to(tl.int32) * (tile.chunk * tile.lanes)
    end = tl.minimum(begin + slice_chunks.to(tl.int32) * (tile.chunk * tile.lanes), classes.to(tl.int32) + tile.shift)
    max, sum, dense_loss, mass = _sweep(view, q_view, weight, begin, end, readable, smoothing, softcap, tile, o)
    at = slice * positions + position
    tl.store(parts + at, max, mask=live)
    tl.store(parts + slices * positions + at, sum, mask=live)
    if o.dense:
        tl.store(parts + 2 * slices * positions + at, dense_loss, mask=live)
        tl.store(mass_parts + at, mass, mask=live)


@kernel
def _finish(
    logits,
    target,
    weight,
    slice_parts,
    mass_parts,
    loss,
    lse,
    row_max,
    row_log_sum,
    row_mass,
    parts,
    total_loss,
    total_divisor,
    positions: tl.int64,
    classes: tl.int64,
    inner: tl.int64,
    logits_outer: tl.int64,
    logits_class: tl.int64,
    logits_inner: tl.int64,
    target_stride: tl.int64,
    ignore_index: tl.int64,
    slices: tl.int64,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    logit_softcap: tl.float64,
    tile: tl.constexpr,
    o: tl.constexpr,
    SLICES: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Rows from the sums of their slices."""
    position, live = positions_of(tl.program_id(0), positions, tile)
    smoothing = _smoothing(label_smoothing, classes, o)
    softcap = math.number(logit_softcap, tl.float64)
    of_target = _target_of(target, target_stride, ignore_index, weight, position, live, classes, smoothing, o)
    view = view_of(logits, position, inner, classes, logits_outer, logits_class, logits_inner, tile)
    target_logit = _target_logit(view, target, of_target, softcap, tile, o)

    slice = tl.arange(0, SLICES)[None, :]
    exists = live[:, None] & (slice < slices)
    at = slice * positions + position[:, None]
    max = tl.load(slice_parts + at, mask=exists, other=-float("inf"))
    sum = tl.load(slice_parts + slices * positions + at, mask=exists, other=0.0)
    dense_loss = sum
    mass = sum.to(tl.float64)
    if o.dense:
        dense_loss = tl.load(slice_parts + 2 * slices * positions + at, mask=exists, other=0.0)
        mass = tl.load(mass_parts + at, mask=exists, other=0.0)
    sums = _merge((max, sum, dense_loss, mass), o)
    if row_mass is not None:
        tl.store(row_mass + position, sums[3], mask=live)
    z = math.number(z_loss, o.acc)
    losses, divisor = _finish_rows(
        position, live, target, of_target, target_logit, sums, smoothing, z, classes, loss, lse, row_max, row_log_sum, o
    )
    finish(parts, total_loss, total_divisor, losses, divisor, o.is_mean, ALONE)


@kernel
def _mass(
    probabilities,
    weight,
    row_mass,
    positions: tl.int64,
    classes: tl.int64,
    inner: tl.int64,
    q_outer: tl.int64,
    q_class: tl.int64,
    q_inner: tl.int64,
    label_smoothing: tl.float64,
    tile: tl.constexpr,
    o: tl.constexpr,
):
    """The mass on all classes of each row of probabilities, which backward has to know before it writes."""
    position, live = positions_of(tl.program_id(0), positions, tile)
    smoothing = _smoothing(label_smoothing, classes, o)
    q_view = view_of(probabilities, position, inner, classes, q_outer, q_class, q_inner, tile)
    count: tl.constexpr = tile.positions
    lanes: tl.constexpr = tile.lanes
    sums = tl.zeros((count, lanes), tl.float64)
    for first in range(0, classes.to(tl.int32) + tile.shift, tile.chunk * tile.lanes):
        entry = entries(first, tile)
        exists = is_class(q_view, entry, tile) & live[:, None, None]
        sums += tl.sum(_masses(q_view, weight, entry, exists, smoothing, tile, o).to(tl.float64), 1)
    tl.store(row_mass + position, tl.sum(sums, 1), mask=live)


@kernel
def _backward(
    logits,
    target,
    probabilities,
    weight,
    row_max,
    row_log_sum,
    row_mass,
    grad_loss,
    grad_lse,
    divisor,
    grad_logits,
    grad_probabilities,
    positions: tl.int64,
    classes: tl.int64,
    inner: tl.int64,
    logits_outer: tl.int64,
    logits_class: tl.int64,
    logits_inner: tl.int64,
    q_outer: tl.int64,
    q_class: tl.int64,
    q_inner: tl.int64,
    grad_outer: tl.int64,
    grad_class: tl.int64,
    grad_inner: tl.int64,
    grad_q_outer: tl.int64,
    grad_q_class: tl.int64,
    grad_q_inner: tl.int64,
    target_stride: tl.int64,
    ignore_index: tl.int64,
    grad_loss_stride: tl.int64,
    chunks: tl.int64,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    logit_softcap: tl.float64,
    tile: tl.constexpr,
    o: tl.constexpr,
):
    """One tile of the gradients, from the statistics that forward has saved."""
    chunk = (tl.program_id(0) % chunks).to(tl.int32)
    position, live = positions_of(tl.program_id(0) // chunks, positions, tile)
    smoothing = _smoothing(label_smoothing, classes, o)
    softcap = math.number(logit_softcap, tl.float64)
    z = math.number(z_loss, o.acc)
    of_target = _target_of(target, target_stride, ignore_index, weight, position, live, classes, smoothing, o)
    index, counts, mass_on_target, class_weight = of_target
    readable = live & (counts | (grad_lse is not None))
    view = view_of(logits, position, inner, classes, logits_outer, logits_class, logits_inner, tile)
    q_view = _q_view(probabilities, view, position, inner, q_outer, q_class, q_inner, tile)

    max = tl.load(row_max + position, mask=readable, other=0.0)
    log_sum = tl.load(row_log_sum + position, mask=readable, other=0.0)
    g = math.number(1.0, tl.float64)
    if divisor is not None:
        g = 1.0 / tl.load(divisor)
    if grad_loss is not None:
        g = g * tl.load(grad_loss + position * grad_loss_stride, mask=live, other=0.0).to(tl.float64)
    from_lse = tl.zeros(position.shape, o.acc)
    if grad_lse is not None:
        from_lse = tl.load(grad_lse + position, mask=live, other=0.0)
    mass = classes.to(tl.float64)
    if target is None:
        mass = tl.load(row_mass + position, mask=live, other=0.0)
    elif row_mass is not None:
        mass = tl.load(row_mass)
    flows = _flows(g.to(o.acc), from_lse, target, of_target, mass, max, log_sum, smoothing, z, o)
    # log(sum) of no less than 0 is the rule; all logits -inf or an infinite one give -inf and NaN.
    factor = tl.where(log_sum >= 0, math.times_exp(flows[0], -log_sum), log_sum - log_sum)

    entry = entries(chunk * (tile.chunk * tile.lanes), tile)
    x, slope, exists = _values(view, entry, readable, softcap, tile, o)
    if grad_probabilities is not None:
        keep, spread = smoothing
        rows, head, class_stride, classes = view
        weights = tl.full(x.shape, 1.0, o.acc)
        if weight is not None:
            weights = tl.load(weight + (entry - head[:, None, None]), mask=exists, other=0.0)
        shifted = x - max[:, None, None]
        grads = math.probability_grad(shifted, log_sum[:, None, None], flows[2][:, None, None], keep, weights)
        grad_q_view = view_of(
            grad_probabilities, position, inner, classes, grad_q_outer, grad_q_class, grad_q_inner, tile
        )
        store_entries(grad_q_view, entry, live, grads, tile)
    if grad_logits is not None:
        grads = _entry_grads(
            x, slope, exists, max, factor, flows, q_view, weight, entry, target, of_target, smoothing, tile, o
        )
        grad_view = view_of(grad_logits, position, inner, classes, grad_outer, grad_class, grad_inner, tile)
        store_entries(grad_view, entry, live, grads, tile)


# --- Geometry --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """Of tiles, for up to so many classes."""

    classes: float
    entries: int  # of a tile
    warps: int


# A thread has 16 or 32 entries, so that a row is in registers between its sums and its gradient. Where rows are longer
# than the last line allows, they are swept.
ROWS = [
    Geometry(2048, 2048, 4),
    Geometry(4096, 4096, 8),
    Geometry(8192, 8192, 8),
    Geometry(16384, 16384, 16),
    Geometry(32768, 32768, 32),
]
SWEPT_ROWS = Geometry(float("inf"), 16384, 16)
SWEPT_CHUNK = 4  # lanes are 16 bytes wide: a thread has so many of them at once
COLUMNS = [Geometry(256, 4096, 8)]
SWEPT_COLUMNS = Geometry(float("inf"), 4096, 4)
SWEPT_CLASSES = 32
BACKWARD = Geometry(float("inf"), 8192, 8)  # needs no row as a whole
FEWEST_PROGRAMS = 2  # for each multiprocessor; with fewer, swept rows are sliced


def _geometry(share):
    """(entries of a row, whether a tile is to be wide in classes) -> a tile's positions, chunk, lanes, warps, sweeps.

    share: a tile has 1 / share of the table's entries, because each needs so many more registers.
    """

    def geometry(entries, wide):
        for line in ROWS if wide else COLUMNS:
            if entries * share <= line.classes:
                padded = next_power_of_2(entries)
                positions = max(line.entries // share // padded, 1)
                return positions, *((1, padded) if wide else (padded, 1)), line.warps, False
        swept = SWEPT_ROWS if wide else SWEPT_COLUMNS
        count = swept.entries // share
        if wide:
            return 1, SWEPT_CHUNK, count // SWEPT_CHUNK, swept.warps, True
        return count // SWEPT_CLASSES, SWEPT_CLASSES, 1, swept.warps, True

    return geometry


def _backward_geometry(share):
    def geometry(entries, wide):
        count = BACKWARD.entries // share
        padded = min(next_power_of_2(entries), count if wide else SWEPT_CLASSES)
        return count // padded, *((1, padded) if wide else (padded, 1)), BACKWARD.warps, False

    return geometry


# --- Launches --------------------------------------------------------------------------------------------------


def launch(args, pass_name):
    """Starts the kernels of a pass."""
    tensors = [args.logits, args.grad_logits, args.probabilities, args.grad_probabilities]
    options = Options(
        acc=accumulate_type(args.logits.data),
        rough=args.logits.data.dtype.itemsize == 2,
        dense=args.has_probabilities or args.label_smoothing != 0,
        probabilities=args.has_probabilities and args.probabilities.data is not None,  # they may be empty
        capped=args.logit_softcap != 0,
        has_z=args.z_loss != 0,
        every_lse=args.every_lse,
        is_mean=args.total.is_mean,
        with_gradient=pass_name == "forward_with_gradient" and args.grad_logits.data is not None,  # it may be empty
    )
    share = 2 ** sum([options.acc == tl.float64, options.dense, 2 * options.capped])  # a cap is computed in float64
    tile = tile_of(args.shape, tensors, (_backward_geometry if pass_name == "backward" else _geometry)(share))
    if pass_name == "backward":
        return _start_backward(args, tile, options)
    slices = _slice_count(args, tile)
    if slices > 1:
        return _start_slices(args, tile, options, slices)
    return _start_forward(args, tile, options)


def _numbers(*tensors):
    return [n for tensor in tensors for n in (tensor.outer_stride, tensor.class_stride, tensor.inner_stride)]


def _start_forward(args, tile, options):
    shape, target = args.shape, args.target.index
    counted, counted_parts = None, 0
    if options.with_gradient and options.is_mean and not args.has_probabilities:
        counted, counted_parts = count_before(args)
    programs = max(tile.blocks(shape), 1)  # the total of nothing has a program too
    parts = Parts(args.total, programs, args.device)
    start(
        _forward,
        programs,
        *(args.logits.data, target.data, args.probabilities.data, args.weight),
        *(args.loss.data, args.lse, args.row_max, args.row_log_sum),
        *(args.grad_logits.data, args.flow.grad_loss.data, counted, *parts.pointers),
        *(shape.positions, shape.classes, shape.inner),
        *_numbers(args.logits, args.probabilities, args.grad_logits),
        *(target.stride, args.target.ignore_index, counted_parts),
        *(args.label_smoothing, args.z_loss, args.logit_softcap),
        tile=tile,
        o=options,
        ALONE=parts.alone,
        warps=tile.warps,
    )
    parts.add_up()


def _slice_count(args, tile):
    """How many programs share a row."""
    blocks = tile.blocks(args.shape)
    fewest = FEWEST_PROGRAMS * multiprocessors(args.device)
    if not tile.sweeps or tile.order == "columns" or not 0 < blocks < fewest:
        return 1
    return min(tile.chunks(args.shape), ceil_div(fewest, blocks))


def _start_slices(args, tile, options, slices):
    """Forward, and if a gradient is wanted backward, from statistics of its own."""
    shape, target, device = args.shape, args.target.index, args.device
    backward = options.with_gradient
    sums = torch.float64 if options.acc == tl.float64 else torch.float32
    row_mass = None
    if backward:
        row_mass = workspace(device, shape.positions) if args.has_probabilities else None
        row_max, row_log_sum = workspace(device, (2, shape.positions), sums)
        divisor = workspace(device, 1)
        total = SimpleNamespace(**{**vars(args.total), "divisor": divisor})
        args = SimpleNamespace(**{**vars(args), "row_max": row_max, "row_log_sum": row_log_sum, "total": total})
        options = replace(options, with_gradient=False)

    slice_chunks = ceil_div(tile.chunks(shape), slices)
    slices = ceil_div(tile.chunks(shape), slice_chunks)  # none is empty
    slice_parts = workspace(device, 3 * slices * shape.positions, sums)
    mass_parts = workspace(device, slices * shape.positions) if options.dense else None
    start(
        _slices,
        tile.blocks(shape) * slices,
        *(args.logits.data, target.data, args.probabilities.data, args.weight, slice_parts, mass_parts),
        *(shape.positions, shape.classes, shape.inner, *_numbers(args.logits, args.probabilities)),
        *(target.stride, args.target.ignore_index, slices, slice_chunks),
        *(args.label_smoothing, args.logit_softcap),
        tile=tile,
        o=options,
        warps=tile.warps,
    )
    padded = next_power_of_2(slices)
    rows = replace(tile, positions=max(2048 // padded, 1))
    programs = rows.blocks(shape)
    parts = Parts(args.total, programs, device)
    start(
        _finish,
        programs,
        *(args.logits.data, target.data, args.weight, slice_parts, mass_parts),
        *(args.loss.data, args.lse, args.row_max, args.row_log_sum, row_mass, *parts.pointers),
        *(shape.positions, shape.classes, shape.inner, *_numbers(args.logits)),
        *(target.stride, args.target.ignore_index, slices),
        *(args.label_smoothing, args.z_loss, args.logit_softcap),
        tile=rows,
        o=options,
        SLICES=padded,
        ALONE=parts.alone,
    )
    parts.add_up()
    if backward:
        flow = SimpleNamespace(grad_loss=args.flow.grad_loss, divisor=args.total.divisor if options.is_mean else None)
        args = SimpleNamespace(**{**vars(args), "flow": flow, "row_mass": row_mass})
        launch(args, "backward")


def _start_backward(args, tile, options):
    shape, target = args.shape, args.target.index
    if shape.classes == 0:  # there is no gradient
        return
    row_mass = getattr(args, "row_mass", None)
    if row_mass is None and args.has_probabilities:
        row_mass = workspace(args.device, shape.positions)
        start(
            _mass,
            tile.blocks(shape),
            *(args.probabilities.data, args.weight, row_mass),
            *(shape.positions, shape.classes, shape.inner, *_numbers(args.probabilities), args.label_smoothing),
            tile=tile,
            o=options,
            warps=tile.warps,
        )
    elif row_mass is None and options.dense and args.weight is not None:
        row_mass = workspace(args.device, 1)
        add_up(args.weight, shape.classes, SimpleNamespace(loss=row_mass, divisor=None, is_mean=False), args.device)
    flow = args.flow
    start(
        _backward,
        tile.blocks(shape) * tile.chunks(shape),
        *(args.logits.data, target.data, args.probabilities.data, args.weight),
        *(args.row_max, args.row_log_sum, row_mass, flow.grad_loss.data, args.grad_lse, flow.divisor),
        *(args.grad_logits.data, args.grad_probabilities.data),
        *(shape.positions, shape.classes, shape.inner),
        *_numbers(args.logits, args.probabilities, args.grad_logits, args.grad_probabilities),
        *(target.stride, args.target.ignore_index, flow.grad_loss.stride, tile.chunks(shape)),
        *(args.label_smoothing, args.z_loss, args.logit_softcap),
        tile=tile,
        o=options,
        warps=tile.warps,
    )
