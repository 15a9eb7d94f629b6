"""What the kernels of cross entropy do with the rows of a tile. The formulas are math.py's.

A row passes through four phases: its statistics, their merge, its finish and its gradient.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.class_loss import (
    Counted,
    Shape,
    TileView,
    Vector,
    View,
    class_of,
    classes_of,
    entries,
    is_class,
    load_entries,
    places_of,
    positions_of,
    sizes_of,
    store_entries,
    tile_view,
    weights_of,
)
from fusedloss.triton.launch import shown_floats
from fusedloss.triton.portable import converted, exp_nonpositive, fast_exp, max_ignoring_nan
from fusedloss.triton.reduce import Totals


@dataclass(frozen=True)
class Options:
    """What a kernel is compiled for, beside the types of its tensors and the tile."""

    acc: tl.dtype
    rough: bool  # half precision: there is no time for an exact exponential, and no place where it would show
    dense: bool  # every class has mass
    probabilities: bool  # they are the target
    capped: bool
    has_z: bool
    every_lse: bool  # of positions that do not count too, the lse is wanted or gives a gradient
    is_mean: bool
    with_gradient: bool  # forward has one


options_of = functools.cache(Options)  # a kernel that is compiled for the very same object is found faster


# --- What kernels are handed -------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    shape: Shape
    logits: View
    target: Vector  # class indices, or None
    probabilities: View  # or None
    weight: tl.tensor
    options: math.RowOptions  # hidden


class Outputs(NamedTuple):
    """What forward writes; what is not wanted is None."""

    loss: tl.tensor
    lse: tl.tensor
    max: tl.tensor
    log_sum: tl.tensor
    mass: tl.tensor  # of probabilities, in float64
    total: Totals


class Gradient(NamedTuple):
    """What a gradient in forward needs; counted: parts of the mean's divisor, if a launch before has counted it."""

    logits: View
    grad_loss: tl.tensor
    counted: Counted


class Slices(NamedTuple):
    """The statistics of slices: max, sum and dense_loss are (3, count, positions), mass is (count, positions)."""

    statistics: tl.tensor
    mass: tl.tensor
    count: int  # type: ignore[assignment]  # hides the method of tuples, which nothing calls
    chunks: int  # of each: tiles


class Saved(NamedTuple):
    """What forward has saved of each row; mass is its own of probabilities, else the sum of all weights or None."""

    max: tl.tensor
    log_sum: tl.tensor
    mass: tl.tensor


class GradOutputs(NamedTuple):
    """The gradients of a row's loss and lse; None is ones, zeros, and not divided."""

    grad_loss: Vector
    grad_lse: tl.tensor
    divisor: tl.tensor


class Gradients(NamedTuple):
    logits: View
    probabilities: View


# --- A program's rows --------------------------------------------------------------------------------------------


class TargetClass(NamedTuple):
    index: tl.tensor
    counts: tl.tensor  # whether the position does; without classes none does
    weight: tl.tensor  # of the class, 0 where the position does not count


class Rows(NamedTuple):
    shape: Shape
    position: tl.tensor
    live: tl.tensor  # whether there is such a position
    readable: tl.tensor  # whether its logits are to be read
    logits: TileView
    masses: TileView  # of probabilities; without any that of the logits, which stands for the place of each class
    target: TargetClass
    options: math.RowOptions
    problem: math.RowProblem


@triton.jit
def _target_class(inputs, shape, position, live, ignore_index, o: tl.constexpr):
    if o.probabilities:
        counts = live & (shape.classes > 0)
        return TargetClass(tl.zeros(position.shape, tl.int32), counts, tl.where(counts, 1.0, 0.0).to(o.acc))
    else:
        index, counts = class_of(inputs.target, position, live, ignore_index, shape.classes)
        return TargetClass(index, counts, weights_of(inputs.weight, index, counts, o.acc))


@triton.jit
def _masses_view(inputs, logits, position, shape, tile: tl.constexpr):
    if inputs.probabilities is None:
        return logits
    else:
        return tile_view(inputs.probabilities, position, shape, tile)


@triton.jit
def options_shown(inputs):
    return math.RowOptions(*shown_floats(inputs.options))


@triton.jit
def rows_of(inputs, block, ignore_index, tile: tl.constexpr, o: tl.constexpr):
    shape = sizes_of(inputs.shape)
    position, live = positions_of(block, shape.positions, tile)
    target = _target_class(inputs, shape, position, live, ignore_index, o)
    logits = tile_view(inputs.logits, position, shape, tile)
    masses = _masses_view(inputs, logits, position, shape, tile)
    readable = live & (target.counts | o.every_lse)
    options = options_shown(inputs)
    problem = math.row_problem(options, shape.classes, shape.classes, o)
    return Rows(shape, position, live, readable, logits, masses, target, options, problem)


@triton.jit
def problem_with(rows, weight_sum, o: tl.constexpr):
    """The problem of rows whose weights' sum is known only when they have been read."""
    return math.row_problem(rows.options, rows.shape.classes, weight_sum, o)


# --- Entries of a tile -------------------------------------------------------------------------------------------


class Entries(NamedTuple):
    at: tl.tensor  # their numbers
    x: tl.tensor  # as the softmax sees them
    slope: tl.tensor  # the cap's
    exists: tl.tensor


@triton.jit
def _exp(x, o: tl.constexpr):
    if o.rough:
        return fast_exp(x)
    else:
        return exp_nonpositive(x)


@triton.jit
def _capped(x, options, exists, o: tl.constexpr):
    """(value, slope), both from float64: what the cap rounds off, exp magnifies."""
    value, slope = math.soft_cap(x.to(tl.float64), options.logit_softcap)
    return tl.where(exists, value.to(o.acc), x), slope.to(o.acc)


@triton.jit
def read(rows, begin, tile: tl.constexpr, o: tl.constexpr):
    """The entries of the tile that begins there."""
    at = entries(begin, tile)
    x = load_entries(rows.logits, at, rows.readable, o.acc, tile)
    exists = is_class(rows.logits, at, tile) & rows.readable[:, None, None]
    slope = x
    if o.capped:
        x, slope = _capped(x, rows.options, exists, o)
    return Entries(at, x, slope, exists)


@triton.jit
def class_weights(view, weight, at, exists, acc: tl.constexpr):
    if weight is None:
        return tl.where(exists, 1.0, 0.0).to(acc)
    else:
        return tl.load(weight + classes_of(view, at), mask=exists, other=0.0)


@triton.jit
def masses_of(view, weight, problem, at, exists, tile: tl.constexpr, o: tl.constexpr):
    """The mass that every class has: its weight, which the spread multiplies for the whole row, or a probability's."""
    masses = class_weights(view, weight, at, exists, o.acc)
    if o.probabilities:
        q = tl.load(places_of(view, at, tile), mask=exists, other=0.0).to(o.acc)
        masses = tl.where(exists, math.probability_mass(problem, q, masses), 0.0)
    return masses


# --- Statistics --------------------------------------------------------------------------------------------------


@triton.jit
def _added(values, tile: tl.constexpr):
    """Along the chunk; where a tile holds whole rows, along the lanes too."""
    if tile.sweeps:
        return tl.sum(values, 1)
    else:
        return tl.sum(tl.sum(values, 2), 1)


@triton.jit
def _statistics_of(rows, weight, part, max, tile: tl.constexpr, o: tl.constexpr):
    """What the entries of a tile add up to, relative to a maximum for each lane, or for each row that it holds."""
    shift = math.finite_shift(max)
    if tile.sweeps:
        shifted = part.x - shift[:, None, :]
    else:
        shifted = part.x - shift[:, None, None]
    sum = _added(_exp(shifted, o), tile)
    dense_loss = sum
    mass = sum
    if o.dense:
        masses = masses_of(rows.masses, weight, rows.problem, part.at, part.exists, tile, o)
        dense_loss = _added(tl.where(part.exists, math.entry_loss_at_max(shifted, masses), 0.0), tile)
        mass = _added(masses.to(tl.float64), tile)
    return math.RowStatistics(max, sum, dense_loss, mass)


@triton.jit
def whole_rows(rows, weight, part, tile: tl.constexpr, o: tl.constexpr):
    """The statistics of rows that a tile holds whole."""
    max = max_ignoring_nan(tl.max(tl.max(part.x, 2), 1), -float("inf"))
    return _statistics_of(rows, weight, part, max, tile, o)


@triton.jit
def sweep(rows, weight, begin, end, tile: tl.constexpr, o: tl.constexpr):
    """The statistics of the entries [begin, end) of each row: tile by tile for each lane, then merged."""
    positions: tl.constexpr = tile.positions
    lanes: tl.constexpr = tile.lanes
    max = tl.full((positions, lanes), -float("inf"), o.acc)
    sum = tl.zeros((positions, lanes), o.acc)
    lane = math.RowStatistics(max, sum, sum, tl.zeros((positions, lanes), tl.float64))
    for first in range(begin, end, tile.chunk * tile.lanes):
        part = read(rows, first, tile, o)
        max = max_ignoring_nan(tl.max(part.x, 1), lane.max)
        lane = math.relative_to(max, lane, o)
        added = _statistics_of(rows, weight, part, max, tile, o)
        dense_loss = lane.dense_loss
        mass = lane.mass
        if o.dense:
            dense_loss += added.dense_loss
            mass += added.mass
        lane = math.RowStatistics(max, lane.sum + added.sum, dense_loss, mass)
    return math.merge(lane, o)


# --- Finish ------------------------------------------------------------------------------------------------------


@triton.jit
def target_logits(rows, o: tl.constexpr):
    """The logits of the target classes, as the softmax sees them."""
    target = rows.target
    if o.probabilities:
        return tl.zeros(target.index.shape, o.acc)
    else:
        at = rows.logits.rows + (target.index + rows.logits.head).to(tl.int64) * rows.logits.class_stride
        x = tl.load(at, mask=target.counts, other=0.0).to(o.acc)
        if o.capped:
            x, slope = _capped(x, rows.options, target.counts, o)
        return x


@triton.jit
def row_target(rows, shifted, o: tl.constexpr):
    if o.probabilities:
        mass = tl.zeros(rows.target.weight.shape, o.acc)
    else:
        mass = math.index_mass(rows.problem, rows.target.weight)
    return math.RowTarget(rows.target.counts, mass, tl.where(rows.target.counts, shifted, 0.0))


@triton.jit
def store_rows(rows, row, losses, out):
    """Writes what is wanted of finished rows. (sum of their losses, of the mean's divisor)"""
    if out.loss is not None:
        tl.store(out.loss + rows.position, converted(losses, out.loss), mask=rows.live)
    if out.max is not None:
        tl.store(out.max + rows.position, row.max, mask=rows.live)
        tl.store(out.log_sum + rows.position, row.log_sum, mask=rows.live)
    if out.lse is not None:
        tl.store(out.lse + rows.position, math.row_lse(row), mask=rows.live)
    return tl.sum(losses.to(tl.float64), 0), tl.sum(rows.target.weight.to(tl.float64), 0)


# --- Gradient ----------------------------------------------------------------------------------------------------


@triton.jit
def store_gradient(rows, weight, part, shift, softmax, gradient, view, tile: tl.constexpr, o: tl.constexpr):
    """Writes the gradient of a tile. softmax: the gradient's factor, divided by the sum of exp(x - shift)."""
    on_class = tl.zeros(part.x.shape, o.acc)
    if not o.probabilities:
        is_target = classes_of(rows.masses, part.at) == rows.target.index[:, None, None]
        on_class = tl.where(is_target, gradient.on_target[:, None, None], 0.0)
    if o.dense:
        masses = masses_of(rows.masses, weight, rows.problem, part.at, part.exists, tile, o)
        on_class += gradient.on_all[:, None, None] * masses
    grads = math.logit_grad(_exp(part.x - shift[:, None, None], o), softmax[:, None, None], on_class)
    if o.capped:
        grads *= part.slope
    store_entries(view, part.at, rows.live, tl.where(part.exists, grads, 0.0), tile)
