"""What the losses over classes share: a position's target, where its entries lie, and the mean's divisor.

Tensors are seen as (outer, classes, inner), as in csrc/kernels/class_loss.h. A program works on a tile, whose entries
are (positions, chunk, lanes): neighbours along the lanes are classes, and so are those along the chunk, `lanes` apart.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.launch import ceil_div, index_type, kernel, start, workspace
from fusedloss.triton.reduce import sum_of_parts

# Up to this many positions every program counts the mean's divisor for itself, in one block, which takes less time than
# another launch. With more, the counting is most of the work: rows may have a program each, which reads all targets.
COUNTED_INLINE = 256
_COUNT_BLOCK = 1024
_COUNT_PROGRAMS = 256


@dataclass(frozen=True)
class Tile:
    """The shape of a program's work, and what is known of memory when a kernel is compiled."""

    positions: int
    chunk: int
    lanes: int
    warps: int  # of a program
    sweeps: bool  # rows are longer than a tile
    order: str  # neighbours in memory are classes in "rows", positions in "columns", neither in "any"
    # The elements of 16 bytes, where rows (columns) begin and end at multiples of 16 bytes; else 1. Triton moves 16
    # bytes at once where it can prove that this holds; it takes `x // align * align` for a proof.
    align: int
    # The elements of 16 bytes, where rows begin anywhere: a tile starts at the multiple of 16 bytes before the row, so
    # that all but the row's first and last 16 bytes are moved at once; else 0.
    shift: int
    one_outer: bool
    index: tl.dtype  # of a position's number

    def blocks(self, shape):
        return ceil_div(shape.positions, self.positions)

    def chunks(self, shape):
        """How many tiles the entries of a row take."""
        return ceil_div(shape.classes + max(self.shift - 1, 0), self.chunk * self.lanes)


# --- Positions -------------------------------------------------------------------------------------------------


@triton.jit
def _multiple(x, align: tl.constexpr):
    if align == 1:
        return x
    else:
        return x // align * align


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
def class_of(target, target_stride, position, live, ignore_index, classes):
    """(class index, 0 where there is none; whether there is one). Another number that is no class stops the kernel."""
    index = tl.load(target + position * target_stride, mask=live, other=0).to(tl.int64)
    is_class = (index >= 0) & (index < classes)
    counts = live & (index != ignore_index)
    tl.device_assert(is_class | ~counts, "fusedloss: a target is out of bounds")
    counts = counts & is_class  # nothing is read out of bounds before the assertion has stopped the others
    return tl.where(counts, index, 0).to(tl.int32), counts


# --- Entries ---------------------------------------------------------------------------------------------------
#
# The view of a tile is a tuple (rows, head, class_stride, classes): pointers to entry 0 of each position; how many
# entries there are before its class 0, which are none of its own; and how classes follow one another.


@triton.jit
def view_of(data, position, inner, classes, outer_stride, class_stride, inner_stride, tile: tl.constexpr):
    align: tl.constexpr = tile.align
    if tile.order == "columns":
        step = 1
        size = _multiple(inner.to(tile.index), align)
    else:
        step = _multiple(inner_stride, align)
        size = inner.to(tile.index)
    if tile.one_outer:
        rows = data + position.to(tl.int64) * step
    else:
        outer = (position // size).to(tl.int64) * _multiple(outer_stride, align)
        rows = data + (outer + (position % size).to(tl.int64) * step)
    head = tl.zeros((1,), tl.int32)
    if tile.shift:
        bytes: tl.constexpr = data.dtype.element_ty.primitive_bitwidth // 8
        head = (rows.to(tl.int64) // bytes % tile.shift).to(tl.int32)
        rows = tl.multiple_of(rows - head, (16,))
    return rows, head, class_stride, classes.to(tl.int32)  # 64 bits would double the comparisons' instructions


@triton.jit
def entries(begin, tile: tl.constexpr):
    """The numbers of a tile's entries, (1, chunk, lanes), of which `begin` is the first. Class = entry - head."""
    lanes: tl.constexpr = tile.lanes
    chunk: tl.constexpr = tile.chunk
    tiled = tl.arange(0, chunk)[:, None] * lanes + tl.arange(0, lanes)[None, :]
    return (begin + tiled)[None, :, :]


@triton.jit
def is_class(view, entry, tile: tl.constexpr):
    rows, head, class_stride, classes = view
    head = head[:, None, None]
    if tile.shift:
        return (entry >= head) & (entry < classes + head)
    elif tile.order == "rows":
        return entry < _multiple(classes, tile.align)
    else:
        return entry < classes


@triton.jit
def places_of(view, entry, tile: tl.constexpr):
    rows, head, class_stride, classes = view
    if tile.order == "rows":
        return rows[:, None, None] + entry
    else:
        return rows[:, None, None] + entry.to(tl.int64) * _multiple(class_stride, tile.align)


@triton.jit
def _packets_with(readable, tile: tl.constexpr):
    """Of columns: whether any position within the same 16 bytes is to be read; such bytes are loaded at once."""
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
    rows, head, class_stride, classes = view
    exists = is_class(view, entry, tile) & readable[:, None, None]
    if tile.shift:
        # With what lies beyond the row's ends: memory is there in units of at least 16 bytes.
        first = entry // tile.shift * tile.shift
        x = tl.load(
            places_of(view, entry, tile),
            mask=(first < classes + head[:, None, None]) & readable[:, None, None],
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
    rows, head, class_stride, classes = view
    live = live[:, None, None]
    exists = is_class(view, entry, tile) & live
    places = places_of(view, entry, tile)
    values = math.converted(values, rows)
    if tile.shift:
        first = entry // tile.shift * tile.shift
        head = head[:, None, None]
        whole = (first >= head) & (first + tile.shift <= classes + head)
        tl.store(places, values, mask=whole & live)
        tl.store(places, values, mask=exists & ~whole)
    else:
        tl.store(places, values, mask=exists)


# --- The mean's divisor ----------------------------------------------------------------------------------------


@triton.jit
def _count(target, weight, target_stride, begin, step, positions, ignore_index, classes, BLOCK: tl.constexpr):
    """The positions that count, or their weights, in every step'th block from `begin` on."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for block in range(begin, tl.cdiv(positions, BLOCK), step):
        position = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        index, counts = class_of(target, target_stride, position, position < positions, ignore_index, classes)
        if weight is None:
            sums += tl.where(counts, 1.0, 0.0)
        else:
            sums += tl.load(weight + index, mask=counts, other=0.0).to(tl.float64)
    return tl.sum(sums, 0)


@kernel
def _count_kernel(
    target,
    weight,
    parts,
    target_stride: tl.int64,
    positions: tl.int64,
    ignore_index: tl.int64,
    classes: tl.int64,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64)
    sum = _count(target, weight, target_stride, program, step, positions, ignore_index, classes, BLOCK)
    tl.store(parts + program, sum)


@triton.jit
def mean_divisor(counted, counted_parts, target, weight, target_stride, positions, ignore_index, classes):
    """What a launch before has counted; without one, it is counted here."""
    if counted is None:
        return _count(target, weight, target_stride, 0, 1, positions, ignore_index, classes, 256)
    else:
        return sum_of_parts(counted, counted_parts, 1024)


def count_before(args):
    """Starts the counting of a divisor that is too much for every program. (parts, their number), or (None, 0)."""
    target, shape = args.target, args.shape
    if shape.positions <= COUNTED_INLINE:
        return None, 0
    programs = min(_COUNT_PROGRAMS, ceil_div(shape.positions, _COUNT_BLOCK))
    parts = workspace(args.device, programs)
    numbers = target.index.stride, shape.positions, target.ignore_index, shape.classes
    start(_count_kernel, programs, target.index.data, args.weight, parts, *numbers, BLOCK=_COUNT_BLOCK)
    return parts, programs


# --- What a tile has to know of tensors --------------------------------------------------------------------------


def order_of(shape, tensors):
    """(the order, whether a tile is to be wide in classes)"""
    if shape.classes == 1 or all(tensor.class_stride == 1 for tensor in tensors):
        return "rows", True
    if shape.inner > 1 and all(tensor.inner_stride == 1 for tensor in tensors):
        return "columns", False
    return "any", shape.inner == 1 or tensors[0].class_stride < tensors[0].inner_stride


def alignment(shape, order, tensors):
    """(align, shift)"""
    if order == "any":
        return 1, 0
    packet = max(16 // tensor.data.element_size() for tensor in tensors)
    counts = [shape.classes if order == "rows" else shape.inner]
    for tensor in tensors:
        counts += [tensor.inner_stride] if order == "rows" and shape.inner > 1 else []
        counts += [tensor.class_stride] if order == "columns" else []
        counts += [tensor.outer_stride] if shape.outer > 1 else []
    heads = {tensor.data.data_ptr() % 16 for tensor in tensors}
    if heads == {0} and all(count % packet == 0 for count in counts):
        return packet, 0
    # Rows of all tensors must begin equally far behind a multiple of 16 bytes.
    alike = {(tensor.data.dtype, tensor.outer_stride, tensor.inner_stride) for tensor in tensors}
    return 1, packet if order == "rows" and len(heads) == len(alike) == 1 and shape.classes >= 8 * packet else 0


def tile_of(shape, tensors, geometry):
    """The tile for the tensors that a launch loads from and stores to by tiles; absent ones are passed over.

    geometry(entries, wide): positions, chunk, lanes, warps and sweeps.
    """
    tensors = [tensor for tensor in tensors if tensor.data is not None]
    order, wide = order_of(shape, tensors)
    align, shift = alignment(shape, order, tensors)
    return Tile(
        *geometry(shape.classes + max(shift - 1, 0), wide),
        order=order,
        align=align,
        shift=shift,
        one_outer=shape.outer == 1,
        index=index_type(shape.positions),
    )
