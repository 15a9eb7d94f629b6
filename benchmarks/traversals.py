"""How near whole traversals of the CPU kernels come to what bounds them: arithmetic, or a copy.

    python -m benchmarks.traversals             # on this processor, with its instruction set; an idle machine
    python -m benchmarks.traversals --update    # and into csrc/kernels/cpu/README.md

Cycles of 16 elements, on one thread. "bound": the least that the loops of a traversal take (tools/vector_loops.py
counts them in the objects; converting and transposing are not among them). "copy": copy_ of the input. "takes": the
difference between a call and one of half as many rows, so that what any call costs is not in it; the data stay in the
second-level cache. The clock is measured beside each: a chain of additions, one a cycle.
"""

import argparse
import ctypes
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import machine, report
from fusedloss._library import ops
from tools import vector_loops

MARKS = "<!-- written by benchmarks.traversals -->\n", "<!-- end of traversals -->"
ROUNDS = 200

# Of a register: some processors take several additions of constants at once.
CHAIN = """
void chain(long turns) {
  long x = 0;
  for (long i = 0; i < turns; ++i)
    __asm__ volatile("add %1, %0; add %1, %0; add %1, %0; add %1, %0; add %1, %0; add %1, %0; add %1, %0; add %1, %0"
                     : "+r"(x) : "r"(turns));
}
"""
ADDITIONS = 8  # of a turn


def chain() -> Callable[[int], None]:
    """A function that adds eight numbers in each turn, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "chain.so"
        command = ["cc", "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=CHAIN, text=True, check=True)
        function = ctypes.CDLL(str(library)).chain
    function.argtypes, function.restype = [ctypes.c_long], None
    return function


ROWS = ["rows: maximum", "exponentials", "rows: their sum"]
COLUMNS = ["columns: maximum", "exponentials", "columns: their sums"]


@dataclass(frozen=True)
class Traversal:
    what: str
    loops: list[str]
    loss: str  # the name of its operators
    shape: tuple[int, ...]  # of half a call
    step: bool = False
    dtype: torch.dtype = torch.float32

    def call(self, times: int) -> tuple[Callable, Callable, int]:
        """A call, a copy of its input, and its elements; a step writes to memory that is there."""
        shape = (self.shape[0] * times, *self.shape[1:])
        input = (torch.rand(shape) if self.loss == "bce" else torch.randn(shape)).to(self.dtype)
        gradient = torch.empty_like(input)
        written = (False, gradient) if self.step else ()  # upcast, and where to
        scale = (None,) if self.step else ()
        if self.loss == "cross_entropy":
            target = torch.randint(shape[1], (shape[0], *shape[2:]))
            of_rows = (MEAN, -100, 0.0, 0.0, 1.0, 0.0)
            arguments = (input, target, None, None, None, *scale, *of_rows, *written)
        else:
            target = torch.rand(shape).to(self.dtype)
            weights = (None,) if self.loss == "bce" else (None, None)
            arguments = (input, target, *weights, *scale, MEAN, None, *written)
        operator = getattr(ops, f"{self.loss}_with_grad" if self.step else self.loss).default
        return partial(operator, *arguments), partial(gradient.copy_, input), input.numel()


MEAN = 1
LOGITS, BFLOAT16 = "bce_with_logits", torch.bfloat16
TRAVERSALS = [
    Traversal("1024 classes, forward", ROWS, "cross_entropy", (32, 1024)),
    Traversal("1024 classes, step", [*ROWS, "rows: gradient"], "cross_entropy", (32, 1024), step=True),
    Traversal("1024 classes, forward, bfloat16", ROWS, "cross_entropy", (32, 1024), dtype=BFLOAT16),
    Traversal("100 classes, forward", ROWS, "cross_entropy", (320, 100)),
    Traversal("100 classes, step", [*ROWS, "rows: gradient"], "cross_entropy", (320, 100), step=True),
    Traversal("10 classes, forward", COLUMNS, "cross_entropy", (4096, 10)),
    Traversal("10 classes, step", [*COLUMNS, "columns: gradient"], "cross_entropy", (4096, 10), step=True),
    Traversal("image of 19 classes, forward", COLUMNS, "cross_entropy", (1, 19, 32, 64)),
    Traversal(
        "image of 19 classes, step", [*COLUMNS, "columns: gradient"], "cross_entropy", (1, 19, 32, 64), step=True
    ),
    Traversal("BCE with logits, forward", ["BCE with logits: forward"], LOGITS, (32, 1024)),
    Traversal("BCE with logits, step", ["BCE with logits: step"], LOGITS, (32, 1024), step=True),
    Traversal("BCE with logits, forward, bfloat16", ["BCE with logits: forward"], LOGITS, (32, 1024), dtype=BFLOAT16),
    Traversal("BCE, forward", ["BCE: forward"], "bce", (32, 1024)),
    Traversal("BCE, step", ["BCE: step"], "bce", (32, 1024), step=True),
]


def bounds(name: str) -> dict[str, float]:
    """Cycles of 16 elements of each loop, compiled for an instruction set."""
    path = vector_loops.objects(vector_loops.ROOT / "build")[name]
    bodies = vector_loops.functions(vector_loops.output_of("objdump", "-d", "-C", "--no-show-raw-insn", str(path)))
    width, units = vector_loops.SETS[name]
    costs = {loop.what: vector_loops.best(loop, bodies, width) for loop in vector_loops.LOOPS}
    return {what: cost[1] / units for what, cost in costs.items() if cost}


def shortest(calls: list[Callable]) -> list[float]:
    """Of each call the shortest time, in seconds, interleaved."""
    times = [float("inf")] * len(calls)
    for _, (i, call) in itertools.product(range(ROUNDS), enumerate(calls)):
        start = time.perf_counter()
        call()
        times[i] = min(times[i], time.perf_counter() - start)
    return times


def measure(traversal: Traversal, additions: Callable, loops: dict[str, float]) -> list[str]:
    turns = 20000
    (one, copy_one, count), (two, copy_two, count_two) = traversal.call(1), traversal.call(2)
    with torch.no_grad():
        t_one, t_two, c_one, c_two, clock = shortest([one, two, copy_one, copy_two, partial(additions, turns)])
    cycles = turns * ADDITIONS / clock * 16 / (count_two - count)
    bound = sum(loops[loop] for loop in traversal.loops)
    copy, takes = (c_two - c_one) * cycles, (t_two - t_one) * cycles
    return [traversal.what, *(f"{value:.1f}" for value in (bound, copy, takes)), f"{takes / max(bound, copy):.2f}"]


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table into the kernels' README")
    options = parser.parse_args()
    torch.set_num_threads(1)
    capability = torch.backends.cpu.get_cpu_capability()
    name = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")
    loops, additions = bounds(name), chain()
    titles = ["traversal", "bound", "copy", "takes", "of the larger"]
    rows = [measure(traversal, additions, loops) for traversal in TRAVERSALS]
    found = f"{machine.cpu_model()}, {capability}:\n\n{report.table(titles, rows)}"
    print(found, end="")
    if options.update:
        before, rest = vector_loops.README.read_text().split(MARKS[0])
        vector_loops.README.write_text(before + MARKS[0] + found + MARKS[1] + rest.split(MARKS[1], 1)[1])
    return None


if __name__ == "__main__":
    sys.exit(main())
