"""What the losses over classes share: a position's target, where its entries lie, and the mean's divisor.

Tensors are seen as (outer, classes, inner), as in csrc/kernels/class_loss.h. A program works on a tile, whose entries
are (positions, chunk, lanes): neighbours along the lanes are classes, and so are those along the chunk, `lanes` apart.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fusedloss.triton import portable
from fusedloss.triton.launch import ceil_div, hidden, kernel, shown, start, workspace
from fusedloss.triton.reduce import sum_of_parts

# Up to this many positions every program counts the mean's divisor for itself, in one block, which takes less time than
# another launch. With more, the counting is most of the work: rows may have a program each, which reads all targets.
COUNTED_INLINE = 256
_COUNT_BLOCK = 1024
_COUNT_PROGRAMS = 256


# --- What kernels are handed; numbers are hidden, and None is what is absent -------------------------------------


class Shape(NamedTuple):
    positions: int
    classes: int
    inner: int


class View(NamedTuple):
    """A tensor of shape (outer, classes, inner)."""

    data: tl.tensor
    outer_stride: int
    class_stride: int
    inner_stride: int


class Vector(NamedTuple):
    """A tensor of shape (positions,)."""

    data: tl.tensor
    stride: int


class Counted(NamedTuple):
    """Parts of the mean's divisor, which a launch before has counted."""

    parts: tl.tensor
    count: int  # type: ignore[assignment]  # hides the method of tuples, which nothing calls


def shape_of(shape):
    return Shape(hidden(shape.positions), hidden(shape.classes), hidden(shape.inner))


def view_of(tensor):
    if tensor is None:
        return None
    return View(tensor.data, hidden(tensor.outer_stride), hidden(tensor.class_stride), hidden(tensor.inner_stride))


def vector_of(tensor):
    return None if tensor is None else Vector(tensor.data, hidden(tensor.stride))


# --- Positions ---------------------------------------------------------------------------------------------------


@triton.jit
def _multiple(x, align: tl.constexpr):
    if align == 1:
        return x
    else:
        return x // align * align


@triton.jit
def sizes_of(shape):
    """The numbers of a Shape."""
    return Shape(shown(shape.positions), shown(shape.classes), shown(shape.inner))


@triton.jit
def positions_of(block, positions, tile: tl.constexpr):
    """(the numbers of a block's positions, which of them there are)"""
    count: tl.constexpr = tile.positions
    position = block.to(tile.index) * count + tl.arange(0, count).to(tile.index)
    if tile.order == "columns":
        return position, position < _multiple(positions.to(tile.index), tile.align)
    else:
        return position, position < positions


@triton.jit
def load_positions(vector, position, mask):
    return tl.load(vector.data + position * shown(vector.stride), mask=mask, other=0)


@triton.jit
def class_of(target, position, live, ignore_index, classes):
    """(class index, 0 where there is none; whether the position counts). Another number that is no class stops the
    kernel. Without a target, which is probabilities then, every position counts, if there are classes."""
    if target is None:
        return tl.zeros(position.shape, tl.int32), live & (classes > 0)
    else:
        index = load_positions(target, position, live).to(tl.int64)
        is_class = (index >= 0) & (index < classes)
        counts = live & (index != ignore_index)
        tl.device_assert(is_class | ~counts, "fusedloss: a target is out of bounds")
        counts = counts & is_class  # nothing is read out of bounds before the assertion has stopped the others
        return tl.where(counts, index, 0).to(tl.int32), counts


@triton.jit
def weights_of(weight, index, counts, acc: tl.constexpr):
    """The classes' weights; 0 where a position does not count."""
    if weight is None:
        return tl.where(counts, 1.0, 0.0).to(acc)
    else:
        return tl.load(weight + index, mask=counts, other=0.0)


# --- Entries -----------------------------------------------------------------------------------------------------


class TileView(NamedTuple):
    """Where the entries of a tile lie in a tensor."""

    rows: tl.tensor  # pointers to entry 0 of each position
    head: tl.tensor  # how many entries there are before its class 0, which are none of its own
    class_stride: tl.tensor
    classes: tl.tensor


@triton.jit
def tile_view(view, position, shape, tile: tl.constexpr):
    align: tl.constexpr = tile.align
    if tile.order == "columns":
        step = 1
        size = _multiple(shape.inner.to(tile.index), align)
    else:
        step = _multiple(shown(view.inner_stride), align)
        size = shape.inner.to(tile.index)
    if tile.one_outer:
        rows = view.data + position.to(tl.int64) * step
    else:
        outer = (position // size).to(tl.int64) * _multiple(shown(view.outer_stride), align)
        rows = view.data + (outer + (position % size).to(tl.int64) * step)
    head = tl.zeros((1,), tl.int32)
    if tile.shift:
        bytes: tl.constexpr = view.data.dtype.element_ty.primitive_bitwidth // 8
        head = (rows.to(tl.int64) // bytes % tile.shift).to(tl.int32)
        rows = tl.multiple_of(rows - head, (16,))
    # The classes' number has 32 bits: 64 would double the comparisons' instructions.
    return TileView(rows, head, shown(view.class_stride), shape.classes.to(tl.int32))


@triton.jit
def entries(begin, tile: tl.constexpr):
    """The numbers of a tile's entries, (1, chunk, lanes), of which `begin` is the first. Class = entry - head."""
    lanes: tl.constexpr = tile.lanes
    chunk: tl.constexpr = tile.chunk
    tiled = tl.arange(0, chunk)[:, None] * lanes + tl.arange(0, lanes)[None, :]
    return (begin + tiled)[None, :, :]


@triton.jit
def classes_of(view, entry):
    """The entries' classes, where they have one."""
    return entry - view.head[:, None, None]


@triton.jit
def is_class(view, entry, tile: tl.constexpr):
    head = view.head[:, None, None]
    if tile.shift:
        return (entry >= head) & (entry < view.classes + head)
    elif tile.order == "rows":
        return entry < _multiple(view.classes, tile.align)
    else:
        return entry < view.classes


@triton.jit
def places_of(view, entry, tile: tl.constexpr):
    if tile.order == "rows":
        return view.rows[:, None, None] + entry
    else:
        return view.rows[:, None, None] + entry.to(tl.int64) * _multiple(view.class_stride, tile.align)


@triton.jit
def _packets_with(readable, tile: tl.constexpr):
    """Whether any position of a column within the same 16 bytes is to be read; such bytes are loaded at once."""
    if tile.align > 1:
        align: tl.constexpr = tile.align
        packets: tl.constexpr = tile.positions // tile.align
        some = tl.max(readable.to(tl.int32).reshape(packets, align), 1)[:, None]
        some = tl.broadcast_to(some, (packets, align)).reshape(packets * align)
        return tl.max_constancy(some > 0, (align,))
    else:
        return readable


@triton.jit
def load_entries(view, entry, readable, acc: tl.constexpr, tile: tl.constexpr):
    """(positions, chunk, lanes) in the accumulate type; -inf where there is no class, or the row is not to be read."""
    exists = is_class(view, entry, tile) & readable[:, None, None]
    if tile.shift:
        # With what lies beyond the row's ends: memory is there in units of at least 16 bytes.
        first = entry // tile.shift * tile.shift
        x = tl.load(
            places_of(view, entry, tile),
            mask=(first < view.classes + view.head[:, None, None]) & readable[:, None, None],
            other=0.0,
        )
        return tl.where(exists, x.to(acc), -float("inf"))
    elif tile.order == "columns":
        packets = _packets_with(readable, tile)[:, None, None]
        x = tl.load(places_of(view, entry, tile), mask=is_class(view, entry, tile) & packets, other=0.0)
        return tl.where(exists, x.to(acc), -float("inf"))
    else:
        return tl.load(places_of(view, entry, tile), mask=exists, other=-float("inf")).to(acc)


@triton.jit
def store_entries(view, entry, live, values, tile: tl.constexpr):
    live = live[:, None, None]
    exists = is_class(view, entry, tile) & live
    places = places_of(view, entry, tile)
    values = portable.converted(values, view.rows)
    if tile.shift:
        first = entry // tile.shift * tile.shift
        head = view.head[:, None, None]
        whole = (first >= head) & (first + tile.shift <= view.classes + head)
        tl.store(places, values, mask=whole & live)
        tl.store(places, values, mask=exists & ~whole)
    else:
        tl.store(places, values, mask=exists)


# --- The mean's divisor ------------------------------------------------------------------------------------------


@triton.jit
def _count(target, weight, sample_weight, begin, step, positions, ignore_index, classes, BLOCK: tl.constexpr):
    """The positions that count, or their weights, in every step'th block from `begin` on."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for block in range(begin, tl.cdiv(positions, BLOCK), step):
        position = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        index, counts = class_of(target, position, position < positions, ignore_index, classes)
        shares = weights_of(weight, index, counts, tl.float64).to(tl.float64)
        if sample_weight is not None:
            shares *= load_positions(sample_weight, position, counts).to(tl.float64)
        sums += shares
    return tl.sum(sums, 0)


@kernel
def _count_kernel(
    target: Vector,
    weight,
    sample_weight: Vector,
    parts,
    positions: tl.int64,
    classes: tl.int64,
    ignore_index: tl.int64,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64)
    sum = _count(target, weight, sample_weight, program, step, positions, ignore_index, classes, BLOCK)
    tl.store(parts + program, sum)


@triton.jit
def mean_divisor(counted, target, weight, sample_weight, shape, ignore_index):
    """What a launch before has counted; without one, it is counted here."""
    if counted is None:
        return _count(target, weight, sample_weight, 0, 1, shape.positions, ignore_index, shape.classes, 256)
    else:
        return sum_of_parts(counted.parts, shown(counted.count), 1024)


def count_before(args):
    """Starts the counting of a divisor that is too much for every program. What it leaves: Counted, or None."""
    shape, index, weight, ignore_index = args.shape, None, None, 0
    if args.target is not None:
        index, weight, ignore_index = vector_of(args.target.index), args.weight, args.target.ignore_index
    if shape.positions <= COUNTED_INLINE:
        return None
    programs = min(_COUNT_PROGRAMS, ceil_div(shape.positions, _COUNT_BLOCK))
    parts = workspace(args.device, programs)
    tensors = index, weight, vector_of(args.sample_weight), parts
    start(_count_kernel, programs, *tensors, shape.positions, shape.classes, ignore_index, BLOCK=_COUNT_BLOCK)
    return Counted(parts, hidden(programs))
