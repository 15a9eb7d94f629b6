"""Compiles every rung of the CPU ladder, checks it against float64, and times all of them turn by turn.

    python docs/tutorial/ladder/cpu/run.py            # compile, check, time; a table on the screen
    python docs/tutorial/ladder/cpu/run.py --write    # and into docs/tutorial/results/cpu-ladder.{json,txt}

A time is that of a whole step: the gradient's memory is asked for, written and given back. Where the gradient takes
the place of the logits, these are restored before, outside the time. Bandwidth counts 8 bytes a logit: one float32
read, one written. The yardsticks move the same bytes and compute next to nothing; the memory is in use already, except
where it is called fresh. Last comes the library itself, with its operators and autograd around the same loops.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import fusedloss

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "results"
FLAGS = ["-std=c++20", "-O3", "-fopenmp-simd", "-pthread", "-Wall", "-Wextra"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")
RUNGS = [
    "1_passes_over_memory",
    "2_passes_in_cache",
    "exercise_maximum",
    "3_one_exponential",
    "4_vector_exponential",
    "5_wider_vectors",
    "6_chunks",
    "7_huge_pages",
    "8_in_place",
    "9_threads",
    "10_few_classes",
    "11_table",
]
SHAPES = {  # rows, classes, and the rungs that are timed on them
    "many": (1024, 32000, [name for name in RUNGS if name != "10_few_classes"]),
    "few": (1 << 20, 19, ["8_in_place", "9_threads", "10_few_classes"]),
}
BUSY = 0.5
libc = ctypes.CDLL(None)
libc.free.argtypes = [ctypes.c_void_p]
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p


def compile_rung(name, folder):
    """The rung's `step`, which returns where the gradient lies: the logits, or memory that is the caller's to free."""
    library = Path(folder) / f"{name}.so"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *FLAGS, "-shared", "-fPIC", str(HERE / f"{name}.cpp"), "-o", str(library)], check=True)
    step = ctypes.CDLL(str(library)).step
    step.restype = ctypes.c_void_p
    step.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
    return step


def address(array):
    return array.ctypes.data


def evaluate(step, logits, target):
    """Loss and gradient, as new arrays; the logits are left alone."""
    rows, classes = logits.shape
    work, loss = logits.copy(), np.empty(rows, np.float32)
    place = step(address(work), address(target), address(loss), rows, classes)
    gradient = np.ctypeslib.as_array(ctypes.cast(place, ctypes.POINTER(ctypes.c_float)), logits.shape).copy()
    if place != address(work):
        libc.free(place)
    return loss, gradient


def truth(logits, target):
    x = logits.astype(np.float64)
    shifted = x - x.max(1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(1, keepdims=True)
    rows = np.arange(len(x))
    gradient = e / total
    gradient[rows, target] -= 1
    return np.log(total[:, 0]) - shifted[rows, target], gradient


def problem(rows, classes, scale=2.0, seed=0):
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, classes), np.float32) * np.float32(scale)
    return logits, random.integers(0, classes, rows)


def errors(step, logits, target):
    """The largest error of the losses and of the gradients."""
    found, true = evaluate(step, logits, target), truth(logits, target)
    return [float(np.abs(f - t).max()) for f, t in zip(found, true, strict=True)]


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def of_the_library(work, target):
    """The same step of fusedloss, on the same memory."""
    target, weight = torch.from_numpy(target), torch.zeros((), requires_grad=True)

    class Layer(torch.autograd.Function):
        """Has the logits as its output: the memory of a leaf could not be taken."""

        @staticmethod
        def forward(ctx, weight):
            return torch.from_numpy(work)

    def step(threads, inplace):
        torch.set_num_threads(threads)
        logits = Layer.apply(weight)
        loss = fusedloss.cross_entropy(logits, target, reduction="sum", inplace=inplace)
        return torch.autograd.grad(loss, logits)

    return {
        "fusedloss, 1 thread": lambda: step(1, inplace=False),
        "fusedloss, inplace, 1 thread": lambda: step(1, inplace=True),
        "fusedloss, inplace, 2 threads": lambda: step(2, inplace=True),
    }


def time_shape(steps, rows, classes, turns):
    """Medians, in seconds, of steps and yardsticks that take turns."""
    logits, target = problem(rows, classes)
    work, other, loss = np.empty_like(logits), np.zeros_like(logits), np.empty(rows, np.float32)
    halves = [slice(0, rows // 2), slice(rows // 2, rows)]
    pool = ThreadPoolExecutor(2)

    def run(step):
        place = step(address(work), address(target), address(loss), rows, classes)
        if place != address(work):
            libc.free(place)

    def copy(part=slice(None)):
        ctypes.memmove(address(other[part]), address(work[part]), work[part].nbytes)

    def copy_into_fresh_memory():
        place = libc.malloc(work.nbytes)
        ctypes.memmove(place, address(work), work.nbytes)
        libc.free(place)

    def scale(part=slice(None)):
        np.multiply(work[part], np.float32(0.5), out=work[part])

    contestants = {name: lambda step=step: run(step) for name, step in steps.items()}
    contestants["copy, 1 thread"] = copy
    contestants["copy into fresh memory"] = copy_into_fresh_memory
    contestants["scale in place, 1 thread"] = scale
    contestants["scale in place, 2 threads"] = lambda: list(pool.map(scale, halves))
    contestants |= of_the_library(work, target)
    times = {name: [] for name in contestants}
    for _ in range(turns):
        for name, contestant in contestants.items():
            np.copyto(work, logits)
            times[name].append(seconds(contestant))
    return {name: statistics.median(found) for name, found in times.items()}


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()


def table(result):
    lines = [f"{result['processor']}, {result['cores']} cores, {result['compiler']}", f"flags: {' '.join(FLAGS)}"]
    for shape in result["shapes"].values():
        lines += ["", f"{shape['rows']} x {shape['classes']}, float32, medians of {result['turns']} turns", ""]
        lines.append(
            f"{'':30}{'ms':>9}{'ns a logit':>12}{'GB/s':>8}{'gain':>7}{'error of loss':>15}{'of gradient':>13}"
        )
        for name, row in shape["rungs"].items():
            gain = f"{row['gain']:7.2f}" if "gain" in row else " " * 7
            error = f"{row['loss_error']:15.1e}{row['gradient_error']:13.1e}" if "loss_error" in row else ""
            lines.append(f"{name:30}{row['ms']:9.1f}{row['ns']:12.3f}{row['gbps']:8.1f}{gain}{error}".rstrip())
    return "\n".join(lines) + "\n"


def stored(result):
    """The result with short keys, such as many.6_chunks.ms, for the tutorial's text to name."""
    shapes = result["shapes"]
    sizes = {key: {"rows": shape["rows"], "classes": shape["classes"]} for key, shape in shapes.items()}
    about = {key: value for key, value in result.items() if key != "shapes"}
    return about | {key: sizes[key] | shape["rungs"] for key, shape in shapes.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store the results beside the tutorial")
    parser.add_argument("--turns", type=int, default=7, help="how often each rung is timed (default: 7)")
    args = parser.parse_args()
    if args.write and os.getloadavg()[0] > BUSY:
        parser.error(f"--write wants a machine without other work, and the load is {os.getloadavg()[0]:.1f}")
    version = subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True, check=True)
    result = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "compiler": version.stdout.splitlines()[0],
        "turns": args.turns,
        "shapes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: compile_rung(name, folder) for name in RUNGS}
    for key, (rows, classes, names) in SHAPES.items():
        chosen = {name: steps[name] for name in names}
        small = problem(min(rows, 256), classes)
        found = {name: errors(step, *small) for name, step in chosen.items()}
        times = time_shape(chosen, rows, classes, args.turns)
        rungs, previous = {}, None
        for name, took in times.items():
            logits = rows * classes
            rungs[name] = {"ms": took * 1e3, "ns": took * 1e9 / logits, "gbps": 8 * logits / took / 1e9}
            if name in found:
                rungs[name] |= dict(zip(("loss_error", "gradient_error"), found[name], strict=True))
                if previous:
                    rungs[name]["gain"] = previous / took  # over the rung before; the exercise is none
                if name != "exercise_maximum":
                    previous = took
        result["shapes"][key] = {"rows": rows, "classes": classes, "rungs": rungs}
    print(table(result), end="")
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu-ladder.json").write_text(json.dumps(stored(result), indent=1) + "\n")
        (RESULTS / "cpu-ladder.txt").write_text(table(result))


if __name__ == "__main__":
    main()
