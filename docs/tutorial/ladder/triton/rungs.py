"""Cross entropy in Triton, forward and gradient in one pass: three rungs of a ladder.

Rows are float32 or half precision. Each kernel computes a row's loss and the gradient of the sum of all losses.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def whole_row(logits, target, loss, gradient, classes, LANES: tl.constexpr):
    """Rung 1: a program has a row in a tile, which is as long as the next power of two."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LANES)
    x = tl.load(logits + row * classes + c, mask=c < classes, other=-float("inf")).to(tl.float32)
    t = tl.load(target + row)
    maximum = tl.max(x, 0)
    e = tl.exp(x - maximum)
    total = tl.sum(e, 0)
    tl.store(loss + row, tl.log(total) - (tl.sum(tl.where(c == t, x, 0.0), 0) - maximum))
    slope = e / total - tl.where(c == t, 1.0, 0.0)
    tl.store(gradient + row * classes + c, slope.to(gradient.dtype.element_ty), mask=c < classes)


@triton.jit
def swept_row(logits, target, loss, gradient, classes, LANES: tl.constexpr):
    """Rung 2: rows of any length; each lane has a running maximum and sum of its own."""
    row = tl.program_id(0).to(tl.int64)
    x_t = tl.load(logits + row * classes + tl.load(target + row)).to(tl.float32)
    maxima = tl.full((LANES,), -float("inf"), tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    for begin in range(0, classes, LANES):
        c = begin + tl.arange(0, LANES)
        x = tl.load(logits + row * classes + c, mask=c < classes, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(maxima, x)
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        sums = sums * tl.exp(maxima - shift) + tl.exp(x - shift)
        maxima = larger
    maximum = tl.max(maxima, 0)
    total = tl.sum(sums * tl.exp(maxima - maximum), 0)
    tl.store(loss + row, tl.log(total) - (x_t - maximum))
    for begin in range(0, classes, LANES):
        c = begin + tl.arange(0, LANES)
        x = tl.load(logits + row * classes + c, mask=c < classes, other=-float("inf")).to(tl.float32)
        slope = tl.exp(x - maximum) / total - tl.where(c == tl.load(target + row), 1.0, 0.0)
        tl.store(gradient + row * classes + c, slope.to(gradient.dtype.element_ty), mask=c < classes)


@triton.jit(do_not_specialize=["classes"])
def proven_row(logits, target, loss, gradient, classes, LANES: tl.constexpr, ALIGN: tl.constexpr):
    """Rung 3: rung 1, and the compiler knows that rows begin and end at multiples of ALIGN elements."""
    row = tl.program_id(0).to(tl.int64)
    classes = classes // ALIGN * ALIGN
    c = tl.arange(0, LANES)
    x = tl.load(logits + row * classes + c, mask=c < classes, other=-float("inf")).to(tl.float32)
    t = tl.load(target + row)
    maximum = tl.max(x, 0)
    e = tl.exp(x - maximum)
    total = tl.sum(e, 0)
    tl.store(loss + row, tl.log(total) - (tl.sum(tl.where(c == t, x, 0.0), 0) - maximum))
    slope = e / total - tl.where(c == t, 1.0, 0.0)
    tl.store(gradient + row * classes + c, slope.to(gradient.dtype.element_ty), mask=c < classes)


RUNGS = {  # by name: the kernel, its constants for so many classes
    "1_whole_row": (whole_row, lambda classes: {"LANES": triton.next_power_of_2(classes)}),
    "2_swept_row": (swept_row, lambda classes: {"LANES": 1024}),
    "3_proven_row": (proven_row, lambda classes: {"LANES": triton.next_power_of_2(classes), "ALIGN": 8}),
}


def arguments(logits, target):
    """What a kernel takes before its constants; loss and gradient are new."""
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    return logits, target, loss, torch.empty_like(logits), logits.shape[1]


def run(name, logits, target):
    """(losses, gradient of their sum)"""
    kernel, constants = RUNGS[name]
    given = arguments(logits, target)
    kernel[(len(logits),)](*given, **constants(logits.shape[1]))
    return given[2], given[3]
