"""Sums over the programs of a grid, in a fixed order: every program leaves its part, and another launch adds them up.

There each program adds up a run of parts. Where there are several runs their sums are parts again, and are added up in
the same way.

No floating-point atomics: a result is bitwise the same from run to run. Parts are float64, as on the other backends.
"""

import triton
import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.launch import ceil_div, kernel, start, workspace

_BLOCK = 1024
# The parts that a program adds up, in one block after the other: four take about as long as another launch, which fewer
# parts do without. One program for all would have hundreds of blocks in a large batch, and take longer than the loss.
RUN = 4096


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
def _sum_runs(
    parts,
    sums,
    total_loss,
    total_divisor,
    count: tl.int64,
    IS_MEAN: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * RUN
    in_run = tl.minimum(count - begin, RUN)
    loss_sum = sum_of_parts(parts + begin, in_run, BLOCK)
    divisor_sum = math.number(0.0, tl.float64)
    if IS_MEAN or total_divisor is not None:
        divisor_sum = sum_of_parts(parts + count + begin, in_run, BLOCK)
    finish(sums, total_loss, total_divisor, loss_sum, divisor_sum, IS_MEAN, ALONE)


def add_up(parts, count, total, device):
    """Writes the total of so many parts: of the loss and, where it is wanted, of the divisor behind them."""
    sums = Parts(total, ceil_div(count, RUN), device)
    constants = {"IS_MEAN": total.is_mean, "ALONE": sums.alone, "BLOCK": _BLOCK, "RUN": RUN}
    start(_sum_runs, sums.programs, parts, *sums.pointers, count, **constants)
    sums.add_up()


class Parts:
    """Where the programs of a grid leave their sums, and who makes the total of them."""

    def __init__(self, total, programs, device):
        wanted = total.loss is not None or total.divisor is not None
        self.total, self.programs, self.device = total, programs, device
        self.alone = wanted and programs == 1
        self.parts = workspace(device, 2 * programs) if wanted and programs != 1 else None

    @property
    def pointers(self):
        return self.parts, self.total.loss, self.total.divisor

    def add_up(self):
        if self.parts is not None:
            add_up(self.parts, self.programs, self.total, self.device)
