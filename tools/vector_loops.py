"""Counts the vector instructions of the CPU kernels' loops, in the objects that a build has left.

    python tools/vector_loops.py             # a table of what is there; fails where the README has another
    python tools/vector_loops.py --update    # and into csrc/kernels/cpu/README.md

For each loop: the instructions that touch a vector register in one turn of the innermost loop, over the float32
elements of a turn, times 16. Moves between registers count, though most processors drop them. "cycles" is the least
that 16 elements can take, if nothing else is in the way: a vector a cycle for each of the units that do arithmetic on
vectors of that width, 2 of 64 bytes, 3 of 32, 3 of 16, as recent Intel cores have; loads and stores have units of
their own.

The table in the README is of one version of the compiler, which it names: that of another is printed, and not judged.
"""

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "csrc" / "kernels" / "cpu" / "README.md"
MARKS = "<!-- written by tools/vector_loops.py -->\n", "<!-- end -->"
SETS = {"baseline": (16, 3), "avx2": (32, 3), "avx512": (64, 2)}  # bytes of a vector, and how many in a cycle
VECTOR = re.compile(r"%[xyz]mm(\d+)")
WIDTHS = {"x": 16, "y": 32, "z": 64}
# An operand in memory that is neither a constant nor on the stack.
STREAM = r"(?:-?0x[0-9a-f]+)?\((?!%rip|%rsp|%rbp)[^)]*\)"
MOVES = {"vmovaps", "vmovapd", "vmovdqa", "vmovdqa32", "vmovdqa64", "vmovups", "vmovdqu", "movaps", "movups", "movdqu"}


@dataclass(frozen=True)
class Loop:
    """A row of the table: what it does, the function that it is, and by which bytes its elements are counted."""

    what: str
    function: str
    counted: str  # "loads" or "stores" of float32
    arrays: int = 1  # that are read or written


def evaluate_run(loss: str, stored: int) -> str:
    """Of a call without weights; 0: nothing but the sum, 2: the gradients."""
    return rf"evaluate_run<fusedloss::math::{loss}, \(Stored\){stored}, true, float, float, float>"


LOOPS = [
    Loop("exponentials", r"exponentials<true, float>", "stores"),
    Loop("rows: maximum", r"(load_largest<float, float>|largest_number<float>)", "loads"),
    Loop("rows: their sum", r"sums_of<float>", "loads"),
    Loop("rows: loss of masses on all classes", r"dense_losses<float>", "loads", 2),
    Loop("rows: gradient", r"write_gradient<float, float>\([^,]*, float, [^,]*, long\)", "stores"),
    Loop("columns: maximum", r"find_largest<float>", "loads"),
    Loop("columns: their sums", r"add_exponentials<float>", "loads"),
    Loop("columns: losses of masses on all classes", r"add_weighted_losses<float>", "loads"),
    Loop("columns: gradient", r"target_gradients<false, float>", "stores"),
    Loop("BCE with logits: forward", evaluate_run("BceWithLogits", 0), "loads", 2),
    Loop("BCE with logits: step", evaluate_run("BceWithLogits", 2), "loads", 2),
    Loop("BCE: forward", evaluate_run("Bce", 0), "loads", 2),
    Loop("BCE: step", evaluate_run("Bce", 2), "loads", 2),
]

Instruction = tuple[int, str, str]  # address, name, operands


@dataclass(frozen=True)
class Count:
    """Of one turn."""

    vectors: int  # instructions on vectors
    arithmetic: int  # of them, neither a load, nor a store, nor a move
    loads: int  # bytes
    stores: int


def functions(listing: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in listing.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = found.setdefault(start[1].replace("fusedloss::cpu::(anonymous namespace)::", ""), [])
        elif code := re.match(r"\s+([0-9a-f]+):\t(\S+)\s*([^#<]*)", line):
            body.append((int(code[1], 16), code[2], code[3].strip()))
    return found


def innermost_loops(body: list[Instruction]) -> list[list[Instruction]]:
    places = {address: index for index, (address, _, _) in enumerate(body)}
    spans = []
    for end, (address, name, operands) in enumerate(body):
        target = int(operands, 16) if name.startswith("j") and re.fullmatch(r"[0-9a-f]+", operands) else -1
        if target in places and target <= address:
            spans.append((places[target], end))
    inside = [span for span in spans if not any(span[0] <= s and e <= span[1] and (s, e) != span for s, e in spans)]
    return [body[start : end + 1] for start, end in inside]


def count(loop: list[Instruction]) -> Count:
    vectors = arithmetic = 0
    streams: dict[bool, dict[str, int]] = {
        False: {},
        True: {},
    }  # by whether it is stored: what is loaded twice counts once
    for _, name, operands in loop:
        registers = re.findall(r"%([xyz])mm", operands)
        if not registers:
            continue
        vectors += 1
        arithmetic += name not in MOVES
        if place := re.search(STREAM, operands):
            streams[operands.endswith(place[0])][place[0]] = max(WIDTHS[register] for register in registers)
    loads, stores = (sum(streams[stored].values()) for stored in (False, True))
    return Count(vectors, arithmetic, loads, stores)


def best(row: Loop, bodies: dict[str, list[Instruction]], width: int) -> tuple[float, float] | None:
    """Vector instructions, and those that compute, for 16 elements: of the loop with the fewest."""
    costs = []
    for name, body in bodies.items():
        if not re.search(rf"(?:^|\s){row.function}", name):
            continue
        for loop in innermost_loops(body):
            found = count(loop)
            elements = getattr(found, row.counted) / (4 * row.arrays)
            if elements and elements % (width // 4) == 0 and found.vectors >= elements * 4 / width:
                costs.append((16 * found.vectors / elements, 16 * found.arithmetic / elements))
    return min(costs) if costs else None


def objects(folder: Path) -> dict[str, Path]:
    return {name: path for name in SETS for path in sorted(folder.glob(f"**/kernels/cpu/{name}.o"))}


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compiler(folder: Path) -> str:
    """As the compiler has signed the objects: GCC: (Debian 12.2.0-14) 12.2.0."""
    signed = output_of("readelf", "-p", ".comment", str(next(iter(objects(folder).values()))))
    found = re.search(r"\] +(.*)", signed)
    return found[1].strip() if found else "unknown"


def table(folder: Path) -> str:
    bodies = {}
    for name, path in objects(folder).items():
        bodies[name] = functions(output_of("objdump", "-d", "-C", "--no-show-raw-insn", str(path)))
    rows = [["loop", *(f"{name}: {what}" for name in bodies for what in ("instructions", "cycles"))]]
    for row in LOOPS:
        cells = [row.what]
        for name, functions_of_set in bodies.items():
            width, units = SETS[name]
            cost = best(row, functions_of_set, width)
            cells += [f"{cost[0]:.1f}", f"{cost[1] / units:.1f}"] if cost else ["", ""]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [
            f"{cell:>{width}}" if k else f"{cell:{width}}"
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    aligned.insert(1, ["-" * (width - 1) + ":" if k else "-" * width for k, width in enumerate(widths)])
    lines = ["| " + " | ".join(row) + " |" for row in aligned]
    return f"{compiler(folder)}\n\n" + "\n".join(lines) + "\n"


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", nargs="?", type=Path, default=ROOT / "build", help="the build's folder")
    parser.add_argument("--update", action="store_true", help=f"write the table into {README.relative_to(ROOT)}")
    options = parser.parse_args()
    if not shutil.which("objdump"):
        return "there is no objdump, of binutils, to read machine code with"
    if not objects(options.build):
        return f"no objects of csrc/kernels/cpu in {options.build}: build the extension first"
    found = table(options.build)
    print(found, end="")
    before, rest = README.read_text().split(MARKS[0])
    written, after = rest.split(MARKS[1], 1)
    if options.update:
        README.write_text(before + MARKS[0] + found + MARKS[1] + after)
    elif written.split("\n")[0] != found.split("\n")[0]:
        print("of another compiler than the README's table, and not compared")
    elif written != found:
        return f"{README.relative_to(ROOT)} has another table: look why, and run this with --update"
    return None


if __name__ == "__main__":
    sys.exit(main())
