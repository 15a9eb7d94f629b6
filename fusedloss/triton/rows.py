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
    load_positions,
    places_of,
    positions_of,
    sizes_of,
    store_entries,
    tile_view,
    weights_of,
)
from fusedloss.triton.launch import shown, shown_floats
from fusedloss.triton.portable import converted, exp_nonpositive, fast_exp, max_ignoring_nan, number
from fusedloss.triton.reduce import Totals


@dataclass(frozen=True)
class Options:
    """What a kernel is compiled for, beside the types of its tensors and the tile."""

    acc: tl.dtype
    rough: bool  # half precision: there is no time for an exact exponential, and no place where it would show
    dense: bool  # every class has mass
    probabilities: bool  # they are the target
    weighted: bool  # rows have weights of their own
    sharded: bool  # the classes are some of many; forward has no gradient then
    scaled: bool
    capped: bool
    has_z: bool
    every_row: bool  # of positions that do not count too, something is wanted or gives a gradient
    entropy: bool  # is wanted, or gives a gradient
    argmax: bool  # is wanted
    is_mean: bool
    with_gradient: bool  # forward has one

    @property
    def sum(self):
        """The type in which exponentials are added up. An entropy is little more than what the smallest add up to."""
        return tl.float64 if self.entropy else self.acc


_NO_INDEX = tl.constexpr(2**31 - 1)  # above every class

options_of = functools.cache(Options)  # a kernel that is compiled for the very same object is found faster


# --- What kernels are handed -------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """Which classes there are, of how many; hidden."""

    first_class: int
    all_classes: int


class Inputs(NamedTuple):
    shape: Shape
    shard: Shard  # or None: the classes are all
    logits: View
    target: Vector  # class indices, or None
    probabilities: View  # or None
    weight: tl.tensor
    sample_weight: Vector  # or None
    options: math.RowOptions  # hidden


class Outputs(NamedTuple):
    """What forward writes; what is not wanted is None."""

    loss: tl.tensor
    lse: tl.tensor
    entropy: tl.tensor
    argmax: tl.tensor
    max: tl.tensor
    log_sum: tl.tensor
    gap: tl.tensor
    mass: tl.tensor
    total: Totals


class Gradient(NamedTuple):
    """What a gradient in forward needs; counted: parts of the mean's divisor, if a launch before has counted it."""

    logits: View
    grad_loss: tl.tensor
    counted: Counted


class Slices(NamedTuple):
    """The statistics of slices: max, sum and dense_loss are (3, count, positions), mass is (count, positions). Beside
    an entropy the sum and the gap are (2, count, positions), and so are the two of Largest for an argmax."""

    statistics: tl.tensor
    mass: tl.tensor
    entropy: tl.tensor  # or None
    largest: tl.tensor  # or None
    count: int  # type: ignore[assignment]  # hides the method of tuples, which nothing calls
    chunks: int  # of each: tiles


class Saved(NamedTuple):
    """What forward has saved of each row."""

    max: tl.tensor
    log_sum: tl.tensor
    gap: tl.tensor  # for an entropy's gradient
    mass: tl.tensor  # or None: that of a class index, which need not be saved


class GradOutputs(NamedTuple):
    """The gradients of a row's loss, lse and entropy; None is ones, zeros, and not divided."""

    grad_loss: Vector
    grad_lse: tl.tensor
    grad_entropy: tl.tensor
    divisor: tl.tensor


class Gradients(NamedTuple):
    logits: View
    probabilities: View


# --- A program's rows --------------------------------------------------------------------------------------------


class TargetClass(NamedTuple):
    index: tl.tensor
    counts: tl.tensor  # whether the position does; without classes none does
    exists: tl.tensor  # whether it counts, and its class is one of these
    weight: tl.tensor  # of the class, 0 where there is none
    sample_weight: tl.tensor  # likewise of the position; stands for nothing where it has none


class Rows(NamedTuple):
    shape: Shape
    all_classes: tl.tensor  # how many
    position: tl.tensor
    live: tl.tensor  # whether there is such a position
    readable: tl.tensor  # whether its logits are to be read
    logits: TileView
    masses: TileView  # of probabilities; without any that of the logits, which stands for the place of each class
    target: TargetClass
    options: math.RowOptions
    problem: math.RowProblem


@triton.jit
def all_classes_of(inputs, shape, o: tl.constexpr):
    """How many there are."""
    if o.sharded:
        return shown(inputs.shard.all_classes)
    else:
        return shape.classes


@triton.jit
def _target_class(inputs, shape, all_classes, position, live, ignore_index, o: tl.constexpr):
    if o.probabilities:
        index, counts = class_of(None, position, live, ignore_index, shape.classes)
        exists = counts
        weight = weights_of(None, index, counts, o.acc)
    else:
        index, counts = class_of(inputs.target, position, live, ignore_index, all_classes)
        exists = counts
        if o.sharded:
            index -= shown(inputs.shard.first_class).to(tl.int32)
            exists = counts & (index >= 0) & (index < shape.classes)
            index = tl.where(exists, index, -1)
        weight = weights_of(inputs.weight, index, exists, o.acc)
    sample_weight = weight
    if o.weighted:
        sample_weight = load_positions(inputs.sample_weight, position, counts).to(o.acc)
    return TargetClass(index, counts, exists, weight, sample_weight)


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
    all_classes = all_classes_of(inputs, shape, o)
    target = _target_class(inputs, shape, all_classes, position, live, ignore_index, o)
    logits = tile_view(inputs.logits, position, shape, tile)
    masses = _masses_view(inputs, logits, position, shape, tile)
    readable = live & (target.counts | o.every_row)
    options = options_shown(inputs)
    problem = math.row_problem(options, all_classes, shape.classes, o)
    return Rows(shape, all_classes, position, live, readable, logits, masses, target, options, problem)


@triton.jit
def problem_with(rows, weight_sum, o: tl.constexpr):
    """The problem of rows whose weights' sum is known only when they have been read."""
    return math.row_problem(rows.options, rows.all_classes, weight_sum, o)


# --- Entries of a tile -------------------------------------------------------------------------------------------


class Entries(NamedTuple):
    at: tl.tensor  # their numbers
    logit: tl.tensor  # as they are
    x: tl.tensor  # as the softmax sees them
    slope: tl.tensor  # of x, under a cap
    exists: tl.tensor


@triton.jit
def _exp(x, o: tl.constexpr):
    if o.rough:
        return fast_exp(x)
    else:
        return exp_nonpositive(x)


@triton.jit
def _seen(x, options, exists, o: tl.constexpr):
    """(value, slope) of logits; under a cap both from float64: what the cap rounds off, exp magnifies."""
    if o.capped:
        value, slope = math.seen_logit(x.to(tl.float64), options.logit_scale, options.logit_softcap, o)
        return tl.where(exists, value.to(o.acc), x), slope.to(o.acc)
    elif o.scaled:
        value, slope = math.seen_logit(x, options.logit_scale.to(o.acc), None, o)
        return tl.where(exists, value, x), slope
    else:
        return x, x


@triton.jit
def read(rows, begin, tile: tl.constexpr, o: tl.constexpr):
    """The entries of the tile that begins there."""
    at = entries(begin, tile)
    logit = load_entries(rows.logits, at, rows.readable, o.acc, tile)
    exists = is_class(rows.logits, at, tile) & rows.readable[:, None, None]
    x, slope = _seen(logit, rows.options, exists, o)
    return Entries(at, logit, x, slope, exists)


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


# --- The largest logits ------------------------------------------------------------------------------------------


class Largest(NamedTuple):
    """The largest logit of a part of a row, before the softmax sees it, and the first class that has it."""

    key: tl.tensor  # ordered_key of the logit; below all of them where a part has none
    index: tl.tensor


@triton.jit
def ordered_key(x):
    """An integer that is larger where x is. Both zeros have one, all NaN have the largest."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        most = number(2**63 - 1, tl.int64)
    else:
        bits = x.to(tl.int32, bitcast=True)
        most = number(2**31 - 1, tl.int32)
    key = tl.where(bits < 0, bits ^ most, bits)
    return tl.where(x != x, most, tl.where(x == 0, 0, key))


@triton.jit
def no_key(o: tl.constexpr):
    """Below every logit's."""
    if o.acc == tl.float64:
        return number(-(2**63), tl.int64)
    else:
        return number(-(2**31), tl.int32)


@triton.jit
def _largest_of(rows, part, tile: tl.constexpr, o: tl.constexpr):
    """Of a tile: for each lane, or for each row that it holds."""
    keys = tl.where(part.exists, ordered_key(part.logit), no_key(o))
    index = tl.where(part.exists, classes_of(rows.logits, part.at), 0)
    if tile.sweeps:
        key = tl.max(keys, 1)
        return Largest(key, tl.min(tl.where(keys == key[:, None, :], index, _NO_INDEX), 1))
    elif o.acc == tl.float32:  # both in one number: a thread need not keep the keys beside the row
        both = (keys.to(tl.int64) << 32) | (index ^ _NO_INDEX)
        most = tl.max(tl.max(both, 2), 1)
        return Largest((most >> 32).to(tl.int32), most.to(tl.int32) ^ _NO_INDEX)
    else:
        key = tl.max(tl.max(keys, 2), 1)
        return Largest(key, tl.min(tl.min(tl.where(keys == key[:, None, None], index, _NO_INDEX), 2), 1))


@triton.jit
def _larger(before, after):
    """Of two parts, where `before` has the lower classes."""
    larger = after.key > before.key
    return Largest(tl.where(larger, after.key, before.key), tl.where(larger, after.index, before.index))


@triton.jit
def merge_largest(parts):
    """Of many parts, along the last of two axes."""
    key = tl.max(parts.key, 1)
    return Largest(key, tl.min(tl.where(parts.key == key[:, None], parts.index, _NO_INDEX), 1))


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
    e = _exp(shifted, o)
    sum = _added(e.to(o.sum), tile)
    gap = sum
    if o.entropy:
        gap = _added(math.times_gap(e, shifted).to(o.sum), tile)
    dense_loss = sum
    mass = sum
    if o.dense:
        masses = masses_of(rows.masses, weight, rows.problem, part.at, part.exists, tile, o)
        dense_loss = _added(tl.where(part.exists, math.entry_loss_at_max(shifted, masses), 0.0), tile)
        mass = _added(masses.to(tl.float64), tile)
    return math.RowStatistics(max, sum, gap, dense_loss, mass)


@triton.jit
def whole_rows(rows, weight, part, tile: tl.constexpr, o: tl.constexpr):
    """(the statistics of rows that a tile holds whole, their largest logits)"""
    largest = Largest(rows.target.index, rows.target.index)
    if o.argmax:
        largest = _largest_of(rows, part, tile, o)
    max = max_ignoring_nan(tl.max(tl.max(part.x, 2), 1), -float("inf"))
    return _statistics_of(rows, weight, part, max, tile, o), largest


@triton.jit
def sweep(rows, weight, begin, end, tile: tl.constexpr, o: tl.constexpr):
    """(statistics, largest) of the entries [begin, end) of each row: tile by tile for each lane, then merged."""
    positions: tl.constexpr = tile.positions
    lanes: tl.constexpr = tile.lanes
    max = tl.full((positions, lanes), -float("inf"), o.acc)
    sum = tl.zeros((positions, lanes), o.sum)
    none = tl.zeros((positions, lanes), o.acc)
    lane = math.RowStatistics(max, sum, sum, none, tl.zeros((positions, lanes), tl.float64))
    keys = tl.zeros((positions, lanes), tl.int32) + no_key(o)
    largest = Largest(keys, tl.zeros((positions, lanes), tl.int32))
    for first in range(begin, end, tile.chunk * tile.lanes):
        part = read(rows, first, tile, o)
        if o.argmax:
            largest = _larger(largest, _largest_of(rows, part, tile, o))
        max = max_ignoring_nan(tl.max(part.x, 1), lane.max)
        lane = math.relative_to(max, lane, o)
        added = _statistics_of(rows, weight, part, max, tile, o)
        gap = lane.gap
        dense_loss = lane.dense_loss
        mass = lane.mass
        if o.entropy:
            gap += added.gap
        if o.dense:
            dense_loss += added.dense_loss
            mass += added.mass
        lane = math.RowStatistics(max, lane.sum + added.sum, gap, dense_loss, mass)
    if o.argmax:
        largest = merge_largest(largest)
    return math.merge(lane, o), largest


# --- Finish ------------------------------------------------------------------------------------------------------


@triton.jit
def target_logits(rows, o: tl.constexpr):
    """The logits of the target classes, as the softmax sees them."""
    target = rows.target
    if o.probabilities:
        return tl.zeros(target.index.shape, o.acc)
    else:
        at = rows.logits.rows + (target.index + rows.logits.head).to(tl.int64) * rows.logits.class_stride
        x = tl.load(at, mask=target.exists, other=0.0).to(o.acc)
        x, slope = _seen(x, rows.options, target.exists, o)
        return x


@triton.jit
def weighted(x, rows, o: tl.constexpr):
    """A float64 number of rows, times their weights."""
    if o.weighted:
        return x * rows.target.sample_weight.to(tl.float64)
    else:
        return x


@triton.jit
def row_target(rows, shifted, o: tl.constexpr):
    if o.probabilities:
        mass = tl.zeros(rows.target.weight.shape, o.acc)
    else:
        mass = math.index_mass(rows.problem, rows.target.weight)
    shifted = tl.where(rows.target.exists, shifted, 0.0)
    return math.RowTarget(rows.target.counts, mass, shifted, rows.target.sample_weight)


@triton.jit
def store_rows(rows, row, mass, largest, losses, out, o: tl.constexpr):
    """Writes what is wanted of finished rows. (sum of their losses, of the mean's divisor)"""
    if out.loss is not None:
        tl.store(out.loss + rows.position, converted(losses, out.loss), mask=rows.live)
    if out.max is not None:
        tl.store(out.max + rows.position, row.max, mask=rows.live)
        tl.store(out.log_sum + rows.position, row.log_sum, mask=rows.live)
    if out.lse is not None:
        tl.store(out.lse + rows.position, math.row_lse(row), mask=rows.live)
    if out.entropy is not None:
        tl.store(out.entropy + rows.position, math.row_entropy(row), mask=rows.live)
    if out.gap is not None:
        tl.store(out.gap + rows.position, row.gap, mask=rows.live)
    if out.mass is not None:
        tl.store(out.mass + rows.position, mass, mask=rows.live)
    if out.argmax is not None:
        tl.store(out.argmax + rows.position, largest.index.to(tl.int64), mask=rows.live)
    return tl.sum(losses.to(tl.float64), 0), tl.sum(weighted(rows.target.weight.to(tl.float64), rows, o), 0)


# --- Gradient ----------------------------------------------------------------------------------------------------


@triton.jit
def store_gradient(rows, weight, part, shift, gradient, view, tile: tl.constexpr, o: tl.constexpr):
    """Writes the gradient of a tile. What multiplies exponentials is divided by the sum of exp(x - shift)."""
    exists = part.exists
    if o.scaled and not o.capped:
        gradient = math.gradient_through(gradient, rows.options.logit_scale.to(o.acc))
    if o.every_row and o.with_gradient:
        exists = exists & rows.target.counts[:, None, None]  # a row that is only looked at; its logits may be NaN
    on_class = tl.zeros(part.x.shape, o.acc)
    if not o.probabilities:
        is_target = classes_of(rows.masses, part.at) == rows.target.index[:, None, None]
        on_class = tl.where(is_target, gradient.on_target[:, None, None], 0.0)
    if o.dense:
        masses = masses_of(rows.masses, weight, rows.problem, part.at, part.exists, tile, o)
        on_class += gradient.on_all[:, None, None] * masses
    shifted = part.x - shift[:, None, None]
    factor = gradient.factor[:, None, None]
    e = _exp(shifted, o)
    if o.entropy:
        grads = math.times_factor(e, factor, gradient.on_gap[:, None, None], shifted) - on_class
    else:
        grads = math.logit_grad(e, factor, on_class)
    if o.capped:
        grads *= part.slope
    store_entries(view, part.at, rows.live, tl.where(exists, grads, 0.0), tile)
