"""Sums over the programs of a grid, in a fixed order: every program leaves its part, and another launch adds them up.

There each program adds up a run of parts. Where there are several runs their sums are parts again, and are added up in
the same way.

No floating-point atomics: a result is bitwise the same from run to run. Parts are float64, as on the other backends.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fusedloss.triton import math
from fusedloss.triton.arguments import Reduction, Total
from fusedloss.triton.launch import ceil_div, kernel, start, workspace
from fusedloss.triton.portable import converted, number

_BLOCK = 1024
# The parts that a program adds up, in one block after the other: four take about as long as another launch, which fewer
# parts do without. One program for all would have hundreds of blocks in a large batch, and take longer than the loss.
RUN = 4096


class Totals(NamedTuple):
    """Where a program's sums go: to the parts; where there are none, the program is alone, and they are the total."""

    parts: tl.tensor
    loss: tl.tensor
    divisor: tl.tensor
    denominator: tl.tensor  # the divisor, where it need not be counted


@triton.jit
def store_sums(total, loss_sum, divisor_sum, IS_MEAN: tl.constexpr):
    if total.parts is not None:
        program = tl.program_id(0)
        tl.store(total.parts + program, loss_sum)
        if total.denominator is None:
            tl.store(total.parts + tl.num_programs(0) + program, divisor_sum)
    else:
        if total.denominator is not None:
            divisor_sum = tl.load(total.denominator)
        if total.divisor is not None:
            tl.store(total.divisor, divisor_sum)
        if total.loss is not None:
            if total.denominator is not None:
                loss = math.reduced_over(loss_sum, divisor_sum)
            else:
                loss = math.reduced(IS_MEAN, loss_sum, divisor_sum)
            tl.store(total.loss, converted(loss, total.loss))


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
    total: Totals,
    count: tl.int64,
    IS_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * RUN
    in_run = tl.minimum(count - begin, RUN)
    loss_sum = sum_of_parts(parts + begin, in_run, BLOCK)
    divisor_sum = number(0.0, tl.float64)
    if total.denominator is None and (IS_MEAN or total.divisor is not None):
        divisor_sum = sum_of_parts(parts + count + begin, in_run, BLOCK)
    store_sums(total, loss_sum, divisor_sum, IS_MEAN)


def add_up(parts, count, total, device):
    """Writes the total of so many parts: of the loss and, where it is wanted, of the divisor behind them."""
    sums = Parts(total, ceil_div(count, RUN), device)
    start(_sum_runs, sums.programs, parts, sums.totals, count, IS_MEAN=total.is_mean, BLOCK=_BLOCK, RUN=RUN)
    sums.add_up()


def sum_into(result, values, count, device):
    """Writes the sum of so many values."""
    add_up(values, count, Total(Reduction.sum, result, None), device)


class Parts:
    """Where the programs of a grid leave their sums, and who makes the total of them."""

    def __init__(self, total, programs, device):
        wanted = total.loss is not None or total.divisor is not None
        parts = workspace(device, 2 * programs) if wanted and programs != 1 else None
        self.totals = Totals(parts, total.loss, total.divisor, total.denominator)
        self.total, self.programs, self.device = total, programs, device

    def add_up(self):
        if self.totals.parts is not None:
            add_up(self.totals.parts, self.programs, self.total, self.device)
