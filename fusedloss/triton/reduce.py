"""Sums over the programs of a grid, in a fixed order: every program leaves its part, one more program adds them up.

No floating-point atomics: a result is bitwise the same from run to run. Parts are float64, as on the other backends.
"""

import triton
import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.launch import kernel, start, workspace

_BLOCK = 1024


@triton.jit
def _write(loss, divisor, loss_sum, divisor_sum, IS_MEAN: tl.constexpr):
    if divisor is not None:
        tl.store(divisor, divisor_sum)
    if loss is not None:
        tl.store(loss, math.converted(math.reduced(IS_MEAN, loss_sum, divisor_sum), loss))


@triton.jit
def finish(parts, total_loss, total_divisor, loss_sum, divisor_sum, IS_MEAN: tl.constexpr, ALONE: tl.constexpr):
    """What a program does with its sums. ALONE: there is no other, and its sums are the total."""
    if ALONE:
        _write(total_loss, total_divisor, loss_sum, divisor_sum, IS_MEAN)
    elif parts is not None:
        program = tl.program_id(0)
        tl.store(parts + program, loss_sum)
        tl.store(parts + tl.num_programs(0) + program, divisor_sum)


@triton.jit
def sum_of_parts(parts, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, count, BLOCK):
        sums += tl.load(parts + begin + i, mask=begin + i < count, other=0.0)
    return tl.sum(sums, 0)


@kernel
def _total(parts, loss, divisor, count: tl.int64, IS_MEAN: tl.constexpr, BLOCK: tl.constexpr):
    _write(loss, divisor, sum_of_parts(parts, count, BLOCK), sum_of_parts(parts + count, count, BLOCK), IS_MEAN)


class Parts:
    """Where the programs of a grid leave their sums, and who makes the total of them."""

    def __init__(self, total, programs, device):
        wanted = total.loss is not None or total.divisor is not None
        self.total, self.programs = total, programs
        self.alone = wanted and programs == 1
        self.parts = workspace(device, 2 * programs) if wanted and programs != 1 else None

    @property
    def pointers(self):
        return self.parts, self.total.loss, self.total.divisor

    def add_up(self):
        if self.parts is not None:
            start(_total, 1, *self.pointers, self.programs, IS_MEAN=self.total.is_mean, BLOCK=_BLOCK)
