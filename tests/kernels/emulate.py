"""Runs the checks of the CUDA kernels on a machine without a GPU, under cuda_emu, an emulator that compiles the same
sources with g++:

    python tests/kernels/emulate.py [--quick] [--cuda-emu DIR]

A fast build runs every case at full size. A build that checks every access (bounds, races, barriers) then runs small
cases in several orders of threads and blocks. Last, the bytes that each pass moves are compared with what it should
move. Two processes share the work; builds are cached. --quick has fewer orders, and two
element types, one of them at full size.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ["float32", "float64", "bfloat16", "float16"]
SIZES = [4, 8, 2, 2]
CROSS_ENTROPY, NLL, ELEMENTS, RESCALE, LAUNCHES, BORDERS = range(6)  # the parts of check_kernels.cu
HALVES = [CROSS_ENTROPY, LAUNCHES, RESCALE], [BORDERS, ELEMENTS, NLL]  # that take about as long
FORWARD, FORWARD_WITH_GRADIENT, BACKWARD = range(3)
PASSES = ["forward", "forward_with_gradient", "backward"]


def find_emulator(given):
    for place in filter(None, [given, os.environ.get("FUSEDLOSS_CUDA_EMU"), ROOT.parent / "shared" / "cuda_emu"]):
        if (Path(place) / "cuda_emu.py").is_file():
            return Path(place).resolve()
    sys.exit("cuda_emu not found: set FUSEDLOSS_CUDA_EMU to its directory")


def import_emulator(place):
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(place))
    import cuda_emu

    # It fills as much of a block's shared memory with a pattern as the launch before has used. A cluster's second block
    # then still holds what an older launch has left, and that is reported as a write out of bounds.
    source = (place / "emu_rt.cpp").read_text()
    stale = "cur = nullptr, static_poison = static_used;"
    if stale in source:
        patched = Path(tempfile.gettempdir()) / f"fusedloss_cuda_emu_{os.getuid()}"
        patched.mkdir(exist_ok=True)
        shutil.copyfile(place / "emu.h", patched / "emu.h")
        fixed = source.replace(stale, "cur = nullptr, static_poison = std::max(static_poison, static_used);")
        (patched / "emu_rt.cpp").write_text(fixed)
        cuda_emu.HERE = str(patched)
    return cuda_emu


def load_cpu_reference(emulator):
    """The CPU kernels, which the emulator must not take for device code, in a library of their own."""
    sources = [*sorted((ROOT / "csrc/kernels/cpu").glob("*.cpp")), ROOT / "tests/kernels/cpu_reference.cpp"]
    headers = [*ROOT.glob("csrc/kernels/*.h"), *ROOT.glob("csrc/kernels/cpu/*"), *ROOT.glob("csrc/math/*")]
    key = ("cpu reference", [(str(path), path.read_text()) for path in sorted({*sources, *headers})])
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    include = [f"-I{ROOT / 'csrc'}", "-fvisibility=hidden"]
    os.makedirs(emulator.CACHE, exist_ok=True)
    path = emulator.cached(
        "_cpu.so", key, lambda to: emulator.run("the CPU kernels", "g++", *flags, *include, *sources, "-o", to)
    )
    library = ctypes.CDLL(path)
    library.fusedloss_cpu_reference.restype = ctypes.c_void_p
    return ctypes.c_void_p(library.fusedloss_cpu_reference())


def load(emulator, check, **config):
    folder = ROOT / "csrc/kernels/cuda"
    sources = [*sorted([*folder.glob("*.cu"), *folder.glob("*.cpp")]), ROOT / "tests/kernels/check_kernels.cu"]

    def build(some):
        return emulator.load(some, include_dirs=[ROOT / "csrc"], std="c++20", check=check, timeout=300, **config)

    def build_alone(source):
        try:
            build([source])
        except emulator.EmuError as error:
            if not str(error).startswith("linking"):  # one file alone lacks the others; its object is kept
                raise

    build_alone(ROOT / "csrc/kernels/cuda/device.cu")  # and the runtime, which the others then share
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build_alone, sorted(sources, key=lambda path: "cross_entropy" not in path.name)))
    return build(sources)


class Worker:
    """One process's share of the work; `jobs` are (check, order, seed, dtype, part)."""

    def __init__(self, emulator):
        self.emulator = emulator
        self.cpu = load_cpu_reference(emulator)
        self.failures = self.launches = 0

    def run(self, check, orders, dtype, part):
        library = load(self.emulator, check)
        before = library.dll.fusedloss_cases()
        for order, seed in orders:
            library.config(order=order, seed=seed)
            failed = library.dll.fusedloss_failures()
            try:
                library.call("fusedloss_check", self.cpu, dtype, part, int(not check))
                self.failures += library.dll.fusedloss_failures() - failed
            except self.emulator.EmuError as error:
                # A fault stays with the library, as an error stays with a device.
                print(f"{DTYPES[dtype]}, part {part}, {order} {seed}: {str(error)[:3000]}", flush=True)
                self.failures += 1
                break
        self.launches += library.stats()["launches"]
        return library.dll.fusedloss_cases() - before


def worker(emulator, args):
    """Prints what failed, and last a line of three numbers: cases, launches, failures."""
    work = Worker(emulator)
    cases = 0
    orders = [("sequential", 0)]
    if args.check:
        orders += [("reverse", 0)] + [("random", seed) for seed in range(args.seeds)]
    for dtype in args.dtypes:
        for part in args.parts:
            cases += work.run(args.check, orders, dtype, part)
    print(cases, work.launches, work.failures, flush=True)


# --- Bytes ---


def byte_cases():
    """What is measured, and at which two numbers of classes. Between them only rows grow longer: traversal, threads and
    blocks stay, so that what each thread reads beside the logits (targets, statistics, the divisor's count) and what
    blocks leave for one another cancels out of the difference."""
    rows, columns = 0, 1
    yield "tiles, one lane", rows, (8, 16), 512, False
    yield "tiles, four lanes", rows, (96, 120), 48, False
    yield "warps", rows, (640, 960), 16, True
    yield "warps, more classes", rows, (1032, 2048), 16, True
    yield "rows, one block", rows, (4224, 6144), 160, True
    yield "rows, slices", rows, (28800, 30400), 2, False
    yield "columns", columns, (19, 27), 64, False
    yield "columns, packets", columns, (5, 7), 8448, False
    yield "columns, narrow", columns, (72, 74), 2112, False


def check_bytes(emulator):
    library = load(emulator, check=True)
    failures = launches = 0

    def measured(what, pass_, dtype, classes, positions, ignored):
        nonlocal launches
        library.stats()
        library.call("fusedloss_measure", what, pass_, dtype, classes, positions, int(ignored))
        stats = library.stats()
        launches += stats["launches"]
        return stats["global_read_bytes"], stats["global_write_bytes"]

    def row(name, pass_, dtype, got, model, small=(0, 0)):
        nonlocal failures
        fits = all(m <= g <= m + s for g, m, s in zip(got, model, small, strict=True))
        failures += not fits
        verdict = "" if fits else "   DIFFERS"
        print(f"{name:28} {PASSES[pass_]:22} {DTYPES[dtype]:9}", *(f"{n:12}" for n in (*got, *model)), verdict)

    print(f"\n{'bytes':28} {'':22} {'':9} {'read':>12} {'written':>12} {'model':>12} {'model':>12}")
    for dtype in (0, 2):
        size = SIZES[dtype]
        for name, what, (few, many), positions, ignored in byte_cases():
            for pass_ in (FORWARD, FORWARD_WITH_GRADIENT, BACKWARD):
                less = measured(what, pass_, dtype, few, positions, ignored)
                more = measured(what, pass_, dtype, many, positions, ignored)
                got = tuple(b - a for a, b in zip(less, more, strict=True))
                counted = positions - positions // 4 if ignored else positions
                extra = (many - few) * size
                # Each logit of a position that counts is read once; the gradient of each position is written once.
                model = extra * counted, 0 if pass_ == FORWARD else extra * positions
                row(f"{name}, {many - few} classes", pass_, dtype, got, model)
        # All bytes. Forward: target and log-probability of each position. Backward: the divisor (by each thread) and
        # each target, and the targets' entries a second time, after the zeros. Blocks leave 16 bytes each for the
        # last of them, and a ticket of 4; loss and divisor are written once.
        positions, classes = 700, 40
        got = measured(2, FORWARD, dtype, classes, positions, False)
        row("nll", FORWARD, dtype, got, (positions * (8 + size), size + 8), (3 * 24, 3 * 24))
        got = measured(2, BACKWARD, dtype, classes, positions, False)
        row("nll", BACKWARD, dtype, got, (positions * 8, positions * (classes + 1) * size), (256 * 8, 0))
        # Input and target of each element once, and its gradient.
        count = 3 * 8192
        blocks = count * size // 16 // 256 + 1
        for name, what in (("bce_with_logits", 3), ("bce", 4)):
            for pass_ in (FORWARD, FORWARD_WITH_GRADIENT, BACKWARD):
                got = measured(what, pass_, dtype, 8192, 3, False)
                written = (0 if pass_ == FORWARD else count * size) + (0 if pass_ == BACKWARD else size + 8)
                sums = 0 if pass_ == BACKWARD else 24 * blocks
                row(name, pass_, dtype, got, (2 * count * size, written), (sums, sums))
    return launches, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 random orders instead of 20, and fewer element types")
    parser.add_argument("--cuda-emu", help="the emulator's directory; else FUSEDLOSS_CUDA_EMU, or ../shared/cuda_emu")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--dtypes", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    start = time.time()
    place = find_emulator(args.cuda_emu)
    emulator = import_emulator(place)
    if args.worker:
        return worker(emulator, args)

    seeds = 3 if args.quick else 20
    dtypes_at_full_size, dtypes_checked = ([0], [0, 2]) if args.quick else ([0, 1, 2, 3], [0, 1, 2, 3])
    total = [0, 0, 0]

    def share(check, dtypes, parts):
        command = [sys.executable, __file__, "--worker", "--cuda-emu", str(place), "--seeds", str(seeds)]
        command += ["--check"] * check + ["--dtypes", *map(str, dtypes), "--parts", *map(str, parts)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        *lines, last = result.stdout.rstrip().split("\n")
        numbers = last.split()
        if result.returncode or len(numbers) != 3:
            return [*lines, last, f"a process has died, exit status {result.returncode}"], [0, 0, 1]
        return lines, [int(n) for n in numbers]

    for check, what in ((False, "full size, one order"), (True, f"every access checked, {2 + seeds} orders")):
        load(emulator, check)  # built once, before two processes use it
        print(f"{what} (built after {time.time() - start:.0f} s)", flush=True)
        with ThreadPoolExecutor(2) as pool:
            dtypes = dtypes_checked if check else dtypes_at_full_size
            for lines, numbers in pool.map(share, [check] * 2, [dtypes] * 2, HALVES):
                for line in lines:
                    print("   ", line)
                for i, n in enumerate(numbers):
                    total[i] += n
        print(
            f"    {total[0]} cases, {total[1]} launches, {total[2]} failures ({time.time() - start:.0f} s)", flush=True
        )

    launches, failures = check_bytes(emulator)
    total[1] += launches
    total[2] += failures
    print(
        f"\nkernels under the emulator: {total[0]} cases, {total[1]} launches, {2 + seeds} orders, "
        f"{total[2]} failures ({time.time() - start:.0f} s)"
    )
    return int(total[2] > 0)


if __name__ == "__main__":
    sys.exit(main())
