"""Which tile a program takes: its shape, and what is known of memory when a kernel is compiled."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import triton.language as tl

from fusedloss.triton.launch import ceil_div, index_type, next_power_of_2


class TileShape(NamedTuple):
    positions: int
    chunk: int
    lanes: int
    warps: int
    sweeps: bool


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


_tile = functools.cache(Tile)  # a kernel that is compiled for the very same object is found faster


# --- What a tile has to know of tensors --------------------------------------------------------------------------


def order_of(shape, tensors):
    """(the order, whether a tile is to be wide in classes)"""
    if shape.classes == 1 or all(tensor.class_stride == 1 for tensor in tensors):
        return "rows", True
    if shape.inner > 1 and all(tensor.inner_stride == 1 for tensor in tensors):
        return "columns", False
    return "any", shape.inner == 1 or tensors[0].class_stride < tensors[0].inner_stride


def alignment(shape, order, tensors, steady=False):
    """(align, shift). steady: the same for a row in every batch."""
    if order == "any":
        return 1, 0
    packet = max(16 // tensor.data.element_size() for tensor in tensors)
    counts = [shape.classes if order == "rows" else shape.inner]
    for tensor in tensors:
        counts += [tensor.inner_stride] if order == "rows" and shape.inner > 1 else []
        counts += [tensor.class_stride] if order == "columns" else []
        counts += [tensor.outer_stride] if shape.outer > 1 or steady else []
    heads = {tensor.data.data_ptr() % 16 for tensor in tensors}
    if heads == {0} and all(count % packet == 0 for count in counts):
        return packet, 0
    if steady:  # how far a row begins behind 16 bytes decides which of its entries are added first
        return 1, 0
    # Rows of all tensors must begin equally far behind a multiple of 16 bytes.
    alike = {(tensor.data.dtype, tensor.outer_stride, tensor.inner_stride) for tensor in tensors}
    return 1, packet if order == "rows" and len(heads) == len(alike) == 1 and shape.classes >= 8 * packet else 0


def tile_of(shape, tensors, geometry, steady=False):
    """The tile for the tensors that a launch loads from and stores to by tiles; absent ones are passed over.

    geometry(entries, wide): the TileShape for rows of so many entries, and whether it is to be wide in classes. steady:
    a row's entries are added in the same order whatever else is in the batch.
    """
    tensors = [tensor for tensor in tensors if tensor is not None]
    order, wide = order_of(shape, tensors)
    align, shift = alignment(shape, order, tensors, steady)
    return _tile(
        *geometry(shape.classes + max(shift - 1, 0), wide),
        order=order,
        align=align,
        shift=shift,
        one_outer=shape.outer == 1,
        index=index_type(shape.positions),
    )


# --- Cross entropy -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """The shape of tiles for up to so many classes."""

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
GRADIENT = Geometry(float("inf"), 8192, 8)  # needs no row as a whole


def forward_geometry(share):
    """share: a tile has 1 / share of the table's entries, because each needs so many more registers."""

    def geometry(entries, wide):
        for line in ROWS if wide else COLUMNS:
            if entries * share <= line.classes:
                padded = next_power_of_2(entries)
                positions = max(line.entries // share // padded, 1)
                return TileShape(positions, *((1, padded) if wide else (padded, 1)), line.warps, False)
        swept = SWEPT_ROWS if wide else SWEPT_COLUMNS
        count = swept.entries // share
        if wide:
            return TileShape(1, SWEPT_CHUNK, count // SWEPT_CHUNK, swept.warps, True)
        return TileShape(count // SWEPT_CLASSES, SWEPT_CLASSES, 1, swept.warps, True)

    return geometry


def gradient_geometry(share):
    def geometry(entries, wide):
        count = GRADIENT.entries // share
        padded = min(next_power_of_2(entries), count if wide else SWEPT_CLASSES)
        return TileShape(count // padded, *((1, padded) if wide else (padded, 1)), GRADIENT.warps, False)

    return geometry
