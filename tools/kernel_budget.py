"""What the hot loops of the CUDA kernels cost in machine code, beside what a table in the repository allows.

Two numbers of each loop: the instructions that a thread executes for one logit (or element), and the loads of 16 bytes
that it has in flight before it waits for one. They need no GPU, and they are no measurement: the time that follows from
them is a prediction. How a loop is found and what counts is in sass.py.

KERNELS says what is looked at, kernel_budget.json what has been found. Registers are dealt out, and instructions
ordered, by the compiler: the numbers are of one version of nvcc, and another's are printed but not judged.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".json")
README = ROOT / "csrc/kernels/cuda/README.md"


# --- What a GPU has time for ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    multiprocessors: int
    lanes: int  # of a multiprocessor: threads whose instruction it starts in a cycle
    hertz: float
    bytes_per_second: float  # of a copy

    def instructions_per_byte(self) -> float:
        """Of threads, in the time in which a byte moves. Real code starts 65 to 85 % of them."""
        return self.multiprocessors * self.lanes * self.hertz / self.bytes_per_second


GPUS = {"H100": Gpu(132, 4 * 32, 1.85e9, 3.0e12), "H200": Gpu(132, 4 * 32, 1.85e9, 4.3e12)}


# --- What is looked at ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hot:
    """A hot loop.

    stream: copy, read, write, fill, max, sum or change, a loop over packets (sass.Code.streams). `row` is the loop with
    the most instructions of the kind `work`, `tile` the one around it without it. `item` goes round the loops over
    packets, without them; `element` takes single elements.
    """

    stream: str
    logits: float = 0  # of an iteration; 0: as many as are in the packets that it moves
    work: str = ""  # what its path has the most of
    through: str = ""  # an instruction on its path,
    every: int = 1  # which only one iteration of so many takes


@dataclass(frozen=True)
class Kernel:
    kernel: str
    dtype: str
    code: str  # its demangled name, up to the arguments
    file: str
    bytes: int  # of a logit that are read and written
    loops: tuple[Hot, ...]
    packet: int = sass.PACKET  # bytes

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.dtype}"


READ, WRITE, COPY, FILL = Hot("read"), Hot("write"), Hot("copy"), Hot("fill")
# Each entry of a lane is read, has its exponential and is written back. A row is finished where its loss is added up.
ENTRIES, FINISH = r"(LDS|STS)(\.U16)?$|(LDG|STG).*\.128|MUFU\.EX2", "DADD"
EXPONENTIALS = r"MUFU\.EX2"
WARP_CLASSES = 1000
KEPT = [COPY, Hot("max"), Hot("sum")]
IMAGE_CLASSES, MANY_CLASSES = 19, 150  # which share what is done once for a position
NARROW = 4  # bytes of a packet of positions, where there are so many classes
FORWARD, STEP, BACKWARD = (f"(fusedloss::Pass){number}" for number in range(3))


def kernels(dtype: str, t: str, size: int) -> list[Kernel]:
    width = 16 // size
    ce, rows, warps, tiles, columns, bce, bce_packets = (
        f"cross_entropy_{dtype}",
        f"cross_entropy_rows<{t}, false, ",
        f"cross_entropy_warps<{t}, ",
        f"cross_entropy_tiles<{t}, false, ",
        f"cross_entropy_columns<{t}, false, ",
        f"elementwise<fusedloss::math::BceWithLogits, {t}, ",
        f"elementwise_packets<fusedloss::math::BceWithLogits, {t}, ",
    )
    warp = Hot("row", WARP_CLASSES / 32, ENTRIES, FINISH, every=32)
    # Rows of as many classes as a lane, or four of them, can hold; of 24 KB a tile has so many rows of each lane.
    few, fewest = Hot("row", 32, ENTRIES, FINISH, every=4), Hot("row", 16, ENTRIES, FINISH)
    few_tile = Hot("tile", 32, EXPONENTIALS)
    fewest_tile = Hot("tile", 16 * (2 if size == 2 else 1), EXPONENTIALS)
    item, narrow_item = Hot("item", IMAGE_CLASSES * width), Hot("item", MANY_CLASSES * NARROW // size)
    element = Hot("element", 1, "LDG|STG")
    read, read_write = size, 2 * size
    narrow = f"columns, {MANY_CLASSES} classes, forward with gradient"
    found = [
        ("rows, forward", f"{rows}{FORWARD}, false>", ce, read, [READ]),
        ("rows, forward with gradient", f"{rows}{STEP}, false>", ce, read_write, [READ, WRITE]),
        ("rows, backward", f"{rows}{BACKWARD}, false>", ce, read_write, [WRITE]),
        (f"warps, {WARP_CLASSES} classes, forward", f"{warps}{FORWARD}, 32, true>", ce, read, [warp]),
        (f"warps, {WARP_CLASSES} classes, forward with gradient", f"{warps}{STEP}, 32, true>", ce, read_write, [warp]),
        *(
            (f"tiles, {classes} classes, {name}", f"{tiles}{pass_}, {lanes}>", ce, moved, [COPY, *loops])
            for classes, lanes, of_row in ((128, 4, [few, few_tile]), (16, 1, [fewest, fewest_tile]))
            for name, pass_, moved, loops in (
                ("forward", FORWARD, read, of_row),
                ("forward with gradient", STEP, read_write, [*of_row, WRITE]),
            )
        ),
        (f"columns, {IMAGE_CLASSES} classes, forward", f"{columns}{FORWARD}, {width}>", ce, read, [*KEPT, item]),
        (
            f"columns, {IMAGE_CLASSES} classes, forward with gradient",
            f"{columns}{STEP}, {width}>",
            ce,
            read_write,
            [*KEPT, Hot("change"), WRITE, item],
        ),
        (
            narrow,
            f"{columns}{STEP}, {NARROW // size}>",
            ce,
            read_write,
            [*KEPT, Hot("change"), WRITE, narrow_item],
        ),
        (
            "BCE with logits, forward with gradient",
            f"{bce_packets}{t}, false, {STEP}>",
            "bce_with_logits",
            3 * size,
            [WRITE],
        ),
        (
            "BCE with logits, uint8 labels and weights of columns, forward with gradient",
            f"{bce_packets}unsigned char, true, {STEP}>",
            "bce_with_logits",
            2 * size + 1,
            [WRITE],
        ),
        (
            "BCE with logits, general, forward with gradient",
            f"{bce}{STEP}>",
            "bce_with_logits",
            3 * size,
            [element],
        ),
        ("nll, backward", f"nll_backward<{t}>", "nll", size, [FILL]),
        ("rescaled gradient", f"rescale_gradient<{t}>", "rescale", read_write, [WRITE]),
    ]
    return [
        Kernel(name, dtype, code, file, moved, tuple(loops), NARROW if name == narrow else sass.PACKET)
        for name, code, file, moved, loops in found
    ]


KERNELS = {k.name: k for k in [*kernels("bfloat16", "__nv_bfloat16", 2), *kernels("float32", "float", 4)]}


# --- Counting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    instructions: float  # of a thread, for a logit
    in_flight: int | None  # loads of 16 bytes
    loops: int | None = None  # of this purpose over packets: one more might be one more pass over the memory


Costs = dict[str, dict[str, Cost]]  # by kernel and loop


def cost_of(hot: Hot, code: sass.Code, dtype_bytes: int) -> Cost:
    def path_of(through: str) -> list[sass.Instruction]:
        if hot.stream == "row":
            return code.around_path(code.busiest(hot.work), hot.work, through)
        if hot.stream == "tile":
            return code.around_path(code.around(code.busiest(hot.work)), hot.work, through)
        if hot.stream == "item":
            return code.around_path(code.around(code.streams["copy"]), hot.work, through)
        if hot.stream == "element":
            return code.around_path(code.elements, hot.work, through)
        if hot.stream in code.streams:
            return code.fast_path(code.streams[hot.stream], through)
        raise sass.Unreadable(f"no loop that would {hot.stream} packets")

    path = path_of(hot.through)
    cost = float(code.cost(path))
    if hot.every > 1:
        usual = code.cost(path_of(""))
        cost = usual + (cost - usual) / hot.every
    if hot.stream == "tile":
        cost -= code.cost(code.around_path(code.busiest(hot.work), hot.work))
    logits = hot.logits or sass.packets(path, code.packet) * code.packet // dtype_bytes
    loops = code.purposes[hot.stream] if hot.stream in code.streams else None
    return Cost(round(cost / logits, 2), sass.in_flight(path, code.packet), loops)


def measure(cuobjdump: str, objects: Path, names: Callable[[list[str]], dict[str, str]]) -> tuple[Costs, list[str]]:
    """What the objects in a folder cost, and what could not be found in them. `names`: demangles."""
    costs: Costs = {}
    missing: list[str] = []
    for file in dict.fromkeys(kernel.file for kernel in KERNELS.values()):
        if not (objects / f"{file}.o").exists():
            missing.append(f"{file}.o in {objects}")
            continue
        functions = sass.disassemble(cuobjdump, objects / f"{file}.o")
        shown = names(list(functions))
        for kernel in (kernel for kernel in KERNELS.values() if kernel.file == file):
            code = next((code for name, code in functions.items() if kernel.code in shown[name]), None)
            if code is None:
                missing.append(f"{kernel.name}: no kernel {kernel.code} in {file}.o")
                continue
            try:
                control_flow = sass.Code(code, kernel.packet)
                size = 2 if kernel.dtype == "bfloat16" else 4
                costs[kernel.name] = {hot.stream: cost_of(hot, control_flow, size) for hot in kernel.loops}
            except sass.Unreadable as problem:
                missing.append(f"{kernel.name}: {problem}")
    return {name: costs[name] for name in KERNELS if name in costs}, missing


# --- The table -----------------------------------------------------------------------------------------------------


def load(path: Path = TABLE) -> tuple[str, Costs]:
    """The version of nvcc that the table is of, and its numbers."""
    table = json.loads(path.read_text())
    return table["nvcc"], {
        name: {loop: Cost(**cost) for loop, cost in loops.items()} for name, loops in table["kernels"].items()
    }


def save(nvcc: str, costs: Costs, path: Path = TABLE) -> None:
    table = {"nvcc": nvcc, "kernels": {k: {loop: vars(c) for loop, c in loops.items()} for k, loops in costs.items()}}
    text = json.dumps(table, indent=2)
    path.write_text(re.sub(r"\{\s+(\"instructions\": [^\n]+)\s+([^\n]+)\s+([^\n]+)\s+\}", r"{\1 \2 \3}", text) + "\n")


def compare(found: Costs, allowed: Costs) -> tuple[list[str], list[str]]:
    """What is worse than allowed, and what is better."""
    worse: list[str] = []
    better: list[str] = []
    for kernel in dict.fromkeys([*allowed, *found]):
        loops = dict.fromkeys([*allowed.get(kernel, {}), *found.get(kernel, {})])
        for loop in loops:
            now, before = found.get(kernel, {}).get(loop), allowed.get(kernel, {}).get(loop)
            what = f"{kernel}: {loop}:"
            if now is None:
                worse.append(f"{what} is in the table, and was not found")
            elif before is None:
                worse.append(f"{what} is not in the table")
            elif now.loops != before.loops:
                # The numbers are of one of them, and say nothing of the others.
                worse.append(f"{what} {now.loops} loops over packets, the table has {before.loops}")
            else:
                if now.instructions != before.instructions:
                    change = f"{what} {now.instructions} instructions a logit, the table has {before.instructions}"
                    (worse if now.instructions > before.instructions else better).append(change)
                if now.in_flight != before.in_flight:
                    change = f"{what} {now.in_flight} loads in flight, the table has {before.in_flight}"
                    # Without a number nothing waits: the best there is.
                    is_less = before.in_flight is None or (now.in_flight or math.inf) < before.in_flight
                    (worse if is_less else better).append(change)
    return worse, better


# --- The documents -------------------------------------------------------------------------------------------------


def markdown(costs: Costs) -> str:
    """The README's rows."""
    lines = [
        f"| kernel | dtype | instructions a logit | sum | copy leaves time for: {' / '.join(GPUS)} | in flight |",
        "|---|---|---|---|---|---|",
    ]
    for name, loops in costs.items():
        kernel = KERNELS[name]
        each = ", ".join(f"{loop} {cost.instructions:.1f}" for loop, cost in loops.items())
        total = sum(cost.instructions for cost in loops.values())
        room = " / ".join(f"{gpu.instructions_per_byte() * kernel.bytes:.1f}" for gpu in GPUS.values())
        flights = [f"{loop} {cost.in_flight}" for loop, cost in loops.items() if cost.in_flight]
        lines.append(
            f"| {kernel.kernel} | {kernel.dtype} | {each} | {total:.1f} | {room} | {', '.join(flights) or '-'} |"
        )
    return "\n".join(lines) + "\n"


def is_current(readme: str, costs: Costs) -> bool:
    return between(readme, markdown(costs)) == readme


def between(readme: str, rows: str) -> str:
    """The README with other rows between its marks."""
    begin, end = "<!-- kernel budget -->\n", "<!-- /kernel budget -->\n"
    before, _, rest = readme.partition(begin)
    return f"{before}{begin}{rows}{end}{rest.partition(end)[2]}"
