"""Train for very long, by every road through the losses, and see whether anything is left behind.

    python tools/soak.py [--steps 100000] [--seed 0]

After a tenth of the steps has warmed up caches and allocators, what the process holds must not grow: bytes on the heap,
resident memory, Python's blocks, file descriptors, threads. These are counted as Linux and glibc tell them.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import random
import sys
import threading
import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedloss

SHAPES = [(1, 5), (7, 10), (3, 70), (2, 3, 5), (2, 4, 3, 5), (5, 1), (0, 4)]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]


def indices(shape):
    return torch.randint(shape[1], shape[:1] + shape[2:])


# The function of each loss, and (input, target) for it.
LOSSES = {
    "cross_entropy": lambda shape: (torch.randn(shape), indices(shape)),
    "soft": lambda shape: (torch.randn(shape), torch.randn(shape).softmax(1)),
    "nll_loss": lambda shape: (torch.randn(shape).log_softmax(1), indices(shape)),
    "binary_cross_entropy_with_logits": lambda shape: (torch.randn(shape), torch.rand(shape)),
    "binary_cross_entropy": lambda shape: (torch.rand(shape), torch.rand(shape)),
}


def function_of(name):
    return getattr(fusedloss.functional, "cross_entropy" if name == "soft" else name)


class Step:
    """One draw: a loss, its data, and options that go with them."""

    def __init__(self, draw):
        self.draw = draw
        self.name = draw.choice(list(LOSSES))
        self.loss = function_of(self.name)
        self.shape = draw.choice(SHAPES)
        dtype = draw.choice(DTYPES)
        input, target = LOSSES[self.name](self.shape)
        self.target = target.to(dtype) if target.is_floating_point() else target
        self.leaf = input.to(dtype).requires_grad_()
        self.options = {"reduction": draw.choice(["none", "mean", "sum"])}
        by_class = self.name in ("cross_entropy", "soft", "nll_loss")
        if draw.random() < 0.3:
            self.options["weight"] = torch.rand(self.shape[1] if by_class else self.shape, dtype=dtype)
        if self.options["reduction"] != "none" and self.name != "nll_loss" and draw.random() < 0.5:
            overflows = self.name == "binary_cross_entropy" and dtype == torch.float16
            self.options["grad_in_forward"] = draw.choice(["auto" if overflows else True, False])
            self.options["grad_scale"] = draw.choice([None, 0.5])
        if self.loss is fusedloss.cross_entropy and draw.random() < 0.3:
            self.options |= draw.choice([{"label_smoothing": 0.1}, {"z_loss": 1e-3}, {"logit_softcap": 20.0}])

    def __call__(self, input=None, **options):
        return self.loss(self.leaf if input is None else input, self.target, **self.options | options)


def plain(step):
    step().sum().backward()


def without_backward(step):
    step()
    with torch.no_grad():
        step()


def strided(step):
    step(step.leaf.mT.contiguous().mT if step.leaf.dim() > 1 else step.leaf).sum().backward()


def with_lse(step):
    if step.loss is fusedloss.cross_entropy:
        step.options.pop("grad_in_forward", None)
        loss, lse = step(return_lse=True)
        (loss.sum() + lse.sum()).backward()


def inplace(step):
    if step.name in ("cross_entropy", "soft", "binary_cross_entropy_with_logits"):
        step.options["reduction"] = "sum"
        step(step.leaf * 1, inplace=True, grad_in_forward=True).backward()


def checkpointed(step):
    checkpoint(lambda leaf: step(leaf * 1), step.leaf, use_reentrant=step.draw.random() < 0.5).sum().backward()


def hooked(step):
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        hidden = step.leaf * 1
        hidden.register_hook(lambda grad: grad * 2)
        loss = step(hidden)
    loss.sum().backward()


def second_derivative(step):
    (grad,) = torch.autograd.grad(step().sum() ** 2, step.leaf, create_graph=True)
    grad.square().sum().backward()


def retained(step):
    loss = step().sum()
    for last in (False, False, True):
        loss.backward(retain_graph=not last)


def autocast(step):
    if step.name != "binary_cross_entropy":
        weight = torch.eye(step.shape[-1])
        step.options.pop("weight", None)
        with torch.autocast("cpu", torch.bfloat16):
            step(step.leaf.float() @ weight).sum().backward()


def refused(step):
    """Raised by checks, by kernels that find an invalid target midway, and by a graph that is gone."""
    with contextlib.suppress(RuntimeError, ValueError, IndexError):
        step(weight=torch.ones(9, 9, 9))
    with contextlib.suppress(RuntimeError, ValueError, IndexError):
        step.loss(step.leaf, torch.full_like(step.target, 99), **step.options)
    loss = step().sum()
    loss.backward()
    with contextlib.suppress(RuntimeError):
        loss.backward()


def patched(step):
    with fusedloss.patch(), fusedloss.use_backend("cpu"):
        F.cross_entropy(torch.randn(3, 4, requires_grad=True), torch.zeros(3).long()).backward()
        step().sum().backward()


def modules(step):
    model = fusedloss.replace_losses(nn.ModuleList([nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()]))
    x = torch.randn(3, 4, requires_grad=True)
    (model[0](x, torch.zeros(3).long()) + model[1](x, torch.rand(3, 4))).backward()


def transformed(step):
    with contextlib.suppress(RuntimeError):  # a reduction of none
        torch.func.grad(step)(step.leaf.detach())


def threaded(step):
    """Threads that end take their scratch memory with them."""
    threads = [threading.Thread(target=plain, args=(Step(step.draw),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Training:
    """A model that lives as long as the process."""

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self, step):
        self.optimizer.zero_grad()
        for _ in range(2):
            loss = fusedloss.cross_entropy(
                self.model(torch.randn(6, 8)), torch.randint(10, (6,)), inplace=True, grad_scale=0.5
            )
            (loss / 2).backward()
        self.optimizer.step()


def roads():
    """(road, how often)"""
    often = [plain, without_backward, strided, with_lse, inplace, retained, autocast, refused, Training()]
    return (
        dict.fromkeys(often, 10)
        | dict.fromkeys([checkpointed, hooked, second_derivative, patched], 4)
        | {modules: 1, transformed: 1, threaded: 0.5}
    )


MALLINFO2 = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class Mallinfo(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO2)


# What may come on top after the warm-up, in long runs too: caches fill slowly.
BOUNDS = {"heap": 256 << 10, "resident": 4 << 20, "blocks of Python": 2000, "descriptors": 0, "threads": 0}


def held():
    """What the process holds now."""
    gc.collect()
    glibc = ctypes.CDLL(None)
    glibc.malloc_trim(0)  # or what was freed may still be resident
    glibc.mallinfo2.restype = Mallinfo
    heap = glibc.mallinfo2()
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return {
        "heap": heap.uordblks + heap.hblkhd,
        "resident": pages * os.sysconf("SC_PAGESIZE"),
        "blocks of Python": sys.getallocatedblocks(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


class Grown(Exception):
    pass


def soak(steps, warm_up, seed=0, extra=()):
    """Takes the steps, with those of `extra` roads among them; raises Grown if more is held than after the warm-up."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    draw = random.Random(seed)
    weights = roads() | dict.fromkeys(extra, 10)
    chosen = draw.choices(list(weights), list(weights.values()), k=warm_up + steps)
    for road in chosen[:warm_up]:
        road(Step(draw))
    first = held()
    print(f"after {warm_up} steps:", first, flush=True)
    tenth = steps // 10
    for begin in range(warm_up, warm_up + 10 * tenth, tenth):
        for road in chosen[begin : begin + tenth]:
            road(Step(draw))
        now = held()
        print("on top of that:", {name: now[name] - first[name] for name in now}, flush=True)
    grown = [name for name, bound in BOUNDS.items() if now[name] - first[name] > bound]
    if grown:
        raise Grown(", ".join(grown))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # some roads warn at each step
    start = time.perf_counter()
    soak(options.steps * 9 // 10, options.steps // 10, options.seed)
    print(f"{options.steps} steps in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
