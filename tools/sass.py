"""The machine code of a CUDA object: instructions, loops, and what one iteration of a loop executes.

cuobjdump writes the instructions and their addresses; everything else is found here. No address is known beforehand,
for they change with every compilation: a loop is known by what it does.

    code = Code(functions(listing)[kernel])
    path = code.fast_path(code.streams["read"])
    code.cost(path) / packets(path), in_flight(path)

A path is chosen as if its branches did not depend on one another, and an instruction counts whether its predicate holds
or not: it takes its turn all the same.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import util
from pathlib import Path

ARCH = "sm_90"
FUNCTION = re.compile(r"Function : (\S+)")
INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")

# What an access of a packet's bytes is for. A copy goes from global to shared memory; nothing waits for it until
# LDGDEPBAR's count.
ACCESSES = {"LDG": "global", "LDS": "shared", "LDGSTS": "copy", "STG": "write", "STS": "keep"}
PACKET = 16


State = tuple[int, bool]


class Unreadable(Exception):
    """The machine code has something that these rules do not know."""


# --- Instructions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # as in "!P0"; empty: always executed
    opcode: str  # as in "LDG.E.EF.128"
    operands: str

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def target(self) -> int | None:
        """Where it may jump to, if its operands end in an address."""
        found = re.search(r"(?:^|[ ,])0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None

    @cached_property
    def width(self) -> int:
        """Registers of its data, for a load or a store."""
        return 4 if ".128" in self.opcode else 2 if ".64" in self.opcode else 1

    @cached_property
    def bytes(self) -> int:
        """Of its data, for a load or a store."""
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[part] for part in self.opcode.split(".") if part in sizes), 4)

    @cached_property
    def fills(self) -> frozenset[int]:
        """The registers that arrive later: those of a load from global memory."""
        found = re.match(r"R(\d+)", self.operands) if self.name == "LDG" else None
        return frozenset(range(int(found[1]), int(found[1]) + self.width)) if found else frozenset()

    @cached_property
    def reads(self) -> frozenset[int]:
        """Registers among its operands. The first operand is written, except by a store or a jump."""
        first, _, others = self.operands.partition(",")
        only_reads = "[" in first or self.name in {"BRX", "CALL", "RET", "RED", "ST", "STG", "STL", "STS"}
        registers: set[int] = set()
        for number, pair in REGISTER.findall(self.operands if only_reads else others):
            registers.update(range(int(number), int(number) + (2 if pair else 1)))
        data = re.search(r"\bR(\d+)$", self.operands) if self.name.startswith("ST") else None
        if data:
            registers.update(range(int(data[1]), int(data[1]) + self.width))
        return frozenset(registers)


def functions(listing: str) -> dict[str, list[Instruction]]:
    """Of each function in cuobjdump's listing, by its mangled name."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in listing.splitlines():
        if match := INSTRUCTION.search(line):
            address, predicate, opcode, operands = match.groups()
            code.append(Instruction(int(address, 16), predicate or "", opcode, operands))
        elif match := FUNCTION.search(line):
            code = found.setdefault(match[1], [])
    return found


# --- Loops and paths ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    header: int  # as an index of the function's instructions, like those below
    body: frozenset[int]  # the header, and all that come back to it without leaving
    depth: int  # loops around it


class Code:
    """A function's control flow. Subroutines that it calls are instructions of it too, behind its end."""

    def __init__(self, instructions: Iterable[Instruction], packet: int = PACKET) -> None:
        self.instructions = list(instructions)
        self.packet = packet  # bytes
        self.index = {instruction.address: k for k, instruction in enumerate(self.instructions)}
        self.reconvergence = {i.target for i in self.instructions if i.name == "BSSY"}
        self.successors = [self._successors(k) for k in range(len(self.instructions))]
        self._subroutines: dict[int, int] = {}

    def _successors(self, k: int) -> list[int]:
        instruction = self.instructions[k]
        following = [k + 1] if k + 1 < len(self.instructions) else []
        jump = [self.index[instruction.target]] if instruction.target in self.index else []
        if instruction.name == "BRA":
            if not jump:
                raise Unreadable(f"a jump to nowhere at {instruction.address:#x}: {instruction.operands}")
            # A condition may also be an operand: BRA.DIV UR4, 0x40.
            always = not instruction.predicate and "," not in instruction.operands
            return jump if always else jump + following
        if instruction.name in {"EXIT", "RET", "BPT", "KILL"}:
            return following if instruction.predicate else []
        if instruction.name in {"BRX", "JMX", "JMP"}:
            raise Unreadable(f"an indirect jump at {instruction.address:#x}")
        if instruction.name == "CALL" and not jump:
            return []  # out of this code: a failed assertion
        if instruction.name == "WARPSYNC" and "COLLECTIVE" in instruction.opcode:
            return jump + following
        # Threads that waited for one another go on where the matching BSSY says, which is the next instruction.
        if instruction.name == "BSYNC" and not (self.reconvergence & {self.instructions[f].address for f in following}):
            raise Unreadable(f"BSYNC at {instruction.address:#x} goes on elsewhere")
        return following

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops: of each jump back to an instruction that is on every way to the jump."""
        order = self._order(0, None)
        place = {k: n for n, k in enumerate(order)}
        before: dict[int, list[int]] = {k: [] for k in order}
        for k in order:
            for successor in self.successors[k]:
                before[successor].append(k)
        dominator = self._dominators(order, place, before)
        bodies: dict[int, set[int]] = {}
        for k in order:
            for header in self.successors[k]:
                above = k
                while place[above] > place[header]:
                    above = dominator[above]
                if above == header:
                    body = bodies.setdefault(header, {header})
                    reached = [k]
                    while reached:
                        if (one := reached.pop()) not in body:
                            body.add(one)
                            reached += before[one]
        return [
            Loop(header, frozenset(body), sum(body < other for other in bodies.values()))
            for header, body in sorted(bodies.items())
        ]

    @staticmethod
    def _dominators(order: list[int], place: dict[int, int], before: dict[int, list[int]]) -> dict[int, int]:
        """The nearest instruction that is on every way to one (Cooper, Harvey and Kennedy)."""
        dominator = {order[0]: order[0]}
        changed = True
        while changed:
            changed = False
            for k in order[1:]:
                known = [one for one in before[k] if one in dominator]
                nearest = known[0]
                for other in known[1:]:
                    while nearest != other:
                        if place[nearest] > place[other]:
                            nearest = dominator[nearest]
                        else:
                            other = dominator[other]
                if dominator.get(k) != nearest:
                    dominator[k] = nearest
                    changed = True
        return dominator

    def _order(self, start: int, among: Collection[int] | None) -> list[int]:
        """Reverse postorder: whatever does not jump back leads to a later place."""
        seen, done = {start}, []
        stack = [(start, iter(self.successors[start]))]
        while stack:
            k, rest = stack[-1]
            for successor in rest:
                if successor not in seen and (among is None or successor in among):
                    seen.add(successor)
                    stack.append((successor, iter(self.successors[successor])))
                    break
            else:
                done.append(k)
                stack.pop()
        return done[::-1]

    @cached_property
    def streaming(self) -> list[Loop]:
        """The innermost loops with an access of a packet."""
        having = [loop for loop in self.loops if any(self._accesses(k) for k in loop.body)]
        return [loop for loop in having if not any(other.body < loop.body for other in having)]

    @cached_property
    def elements(self) -> Loop:
        """Of the loops without an access of a packet, the one with the most stores to global memory."""

        def stores(loop: Loop) -> int:
            inside = frozenset().union(*(other.body for other in self.loops if other.body < loop.body))
            return sum(self.instructions[k].name == "STG" for k in loop.body - inside)

        rest = [loop for loop in self.loops if not any(self._accesses(k) for k in loop.body)]
        if not rest or not max(map(stores, rest)):
            raise Unreadable("no loop that stores single elements")
        return max(rest, key=stores)

    def busiest(self, work: str) -> Loop:
        """The loop with the most instructions of a kind, without those of loops inside."""
        kind = re.compile(work)

        def amount(loop: Loop) -> int:
            inside = frozenset().union(*(other.body for other in self.loops if other.body < loop.body))
            return sum(bool(kind.match(self.instructions[k].opcode)) for k in loop.body - inside)

        if not self.loops or not max(map(amount, self.loops)):
            raise Unreadable(f"no loop with {work}")
        return max(self.loops, key=amount)

    @cached_property
    def streams(self) -> dict[str, Loop]:
        """The streaming loops, by what they do on their fast path: `copy` (to shared memory, unwaited for), `read`,
        `write` (what has been read) and `fill`; and of packets that wait in shared memory `max` (no exponentials),
        `sum` and `change` (they are written back). Of several with one purpose it is the most deeply nested (one before
        a loop does the first turn of one inside), and of these the one with the most accesses: the unrolled one.
        """
        found: dict[str, Loop] = {}
        for loop in sorted(self.streaming, key=lambda loop: (-loop.depth, -packets(self.fast_path(loop), self.packet))):
            found.setdefault(self._purpose_of(loop), loop)
        return found

    @cached_property
    def purposes(self) -> Counter[str]:
        """How many streaming loops have each purpose."""
        return Counter(map(self._purpose_of, self.streaming))

    def _purpose_of(self, loop: Loop) -> str:
        path = self.fast_path(loop)
        done = Counter(purpose(instruction, self.packet) for instruction in path)
        if done["write"]:
            return "write" if done["global"] + done["shared"] else "fill"
        if done["global"]:
            return "read"
        if done["shared"]:
            return "change" if done["keep"] else "sum" if any(map(is_exponential, path)) else "max"
        return "copy"

    def _accesses(self, k: int) -> bool:
        return bool(purpose(self.instructions[k], self.packet))

    def around(self, loop: Loop) -> Loop:
        """The loop next outside."""
        outside = [other for other in self.loops if loop.body < other.body]
        if not outside:
            raise Unreadable("no loop around a streaming one")
        return min(outside, key=lambda other: len(other.body))

    def fast_path(self, loop: Loop, through: str = "") -> list[Instruction]:
        """One iteration, as whole, aligned packets take it that no position ignores: of the paths with the most
        accesses of packets those with the most exponentials, and of these the shortest. With `through`, the path has
        an instruction of that kind.
        """
        return self._path(loop.header, loop.body, self._work, through)

    def around_path(self, loop: Loop, work: str = "", through: str = "") -> list[Instruction]:
        """One iteration of a loop around streaming loops, without those: the shortest path with the most
        instructions of the kind `work`, and by all streaming loops. Other loops inside count with one iteration. With
        `through`, the path has an instruction of that kind.
        """
        inner = [other for other in self.streaming if other.body < loop.body]
        headers = {other.header for other in inner}
        skipped = frozenset().union(*(other.body for other in inner))
        kind = re.compile(work or "(?!)")

        def gain(k: int) -> int:
            return int(k in headers or (k not in skipped and bool(kind.match(self.instructions[k].opcode))))

        return self._path(loop.header, loop.body, gain, through, skipped)

    def _work(self, k: int) -> int:
        accesses, exponentials = 1000, 1
        if self._accesses(k):
            return accesses
        return exponentials if is_exponential(self.instructions[k]) else 0

    def cost(self, path: Iterable[Instruction]) -> int:
        """Instructions of a path, with those of the subroutines that it calls."""
        return sum(self._cost(self.index[instruction.address]) for instruction in path)

    def _cost(self, k: int) -> int:
        instruction = self.instructions[k]
        if instruction.name != "CALL" or instruction.target not in self.index:
            return 1
        return 1 + self._subroutine(self.index[instruction.target])

    def _subroutine(self, start: int) -> int:
        """The shortest path to its end; by a load from global memory if it has one."""
        costs = self._subroutines
        if costs.get(start) == 0:
            raise Unreadable(f"a subroutine at {self.instructions[start].address:#x} that calls itself")
        if start not in costs:
            costs[start] = 0  # under way
            try:
                path = self._path(start, None, lambda _: 0, "LDG")
            except Unreadable:
                path = self._path(start, None, lambda _: 0, "")
            costs[start] = self.cost(path)
        return costs[start]

    def _path(
        self,
        start: int,
        among: Collection[int] | None,
        gain: Callable[[int], int],
        through: str,
        skipped: Collection[int] = (),
    ) -> list[Instruction]:
        """From `start` round to itself, or to a return. The most gain first, then the fewest instructions; what is
        `skipped` costs nothing, and is left out.
        """
        order = self._order(start, among)
        place = {k: n for n, k in enumerate(order)}
        needed = re.compile(through)

        def passes(k: int) -> bool:
            return bool(needed.match(self.instructions[k].opcode))

        def value(k: int) -> tuple[int, int]:
            return gain(k), 0 if k in skipped else -self._cost(k)

        # Of an instruction, and of whether the way to it is by one that is needed: the best value, and the way's end.
        first = (start, passes(start))
        best: dict[State, tuple[tuple[int, int], State | None]] = {first: (value(start), None)}
        ends: list[State] = []
        for k in order:
            for state in [(k, False), (k, True)]:
                if state not in best:
                    continue
                for successor in self.successors[k]:
                    if place.get(successor, -1) > place[k]:  # no jump back
                        following = (successor, state[1] or passes(successor))
                        total = tuple(a + b for a, b in zip(best[state][0], value(successor), strict=True))
                        if following not in best or total > best[following][0]:
                            best[following] = (total, state)
                if state[1] and (
                    start in self.successors[k] if among is not None else self.instructions[k].name == "RET"
                ):
                    ends.append(state)
        if not ends:
            raise Unreadable(f"no path from {self.instructions[start].address:#x} by {through or 'itself'}")
        path: list[Instruction] = []
        state = max(ends, key=lambda end: best[end][0])
        while state:
            if state[0] not in skipped:
                path.append(self.instructions[state[0]])
            state = best[state][1]
        return path[::-1]


# --- What a path amounts to --------------------------------------------------------------------------------------


def is_exponential(instruction: Instruction) -> bool:
    return instruction.opcode.startswith("MUFU.EX2")


def purpose(instruction: Instruction, size: int = PACKET) -> str:
    """Of an access of so many bytes: global, shared, copy, write or keep; empty for any other instruction."""
    never = instruction.predicate == "!PT"  # as what keeps two asynchronous copies apart
    return "" if never or instruction.bytes != size else ACCESSES.get(instruction.name, "")


def packets(path: Iterable[Instruction], size: int = PACKET) -> int:
    """Packets that are written or, where none is, that are read, from either memory, or copied."""
    done = Counter(purpose(instruction, size) for instruction in path)
    return done["write"] or max(done["global"], done["shared"]) or done["copy"]


def in_flight(path: Sequence[Instruction], size: int = PACKET) -> int | None:
    """The fewest loads of packets from global memory that are issued between one wait and the next, as the path is
    repeated. A thread waits where it reads a register that a load from global memory fills; what was issued before
    has then arrived too, or nearly. None: no loads; or copies to shared memory, and nothing waits in this loop; or
    packets that have waited in shared memory.
    """
    if any(purpose(instruction, size) == "shared" for instruction in path):
        return None  # loads beside them are for rows that shared memory does not hold
    fewest: list[int] = []
    pending: set[int] = set()
    issued, waited = 0, False
    for instruction in [*path, *path, *path]:
        if pending & instruction.reads:
            if issued and waited:
                fewest.append(issued)
            pending.clear()
            issued, waited = 0, True
        issued += purpose(instruction, size) in ("global", "copy")
        pending |= instruction.fills
    return min(fewest, default=None)


# --- Objects -----------------------------------------------------------------------------------------------------


def disassembler() -> str | None:
    """cuobjdump, of the toolkit or of Triton, which brings one along."""
    folders = [os.path.join(os.environ["CUDA_HOME"], "bin")] if "CUDA_HOME" in os.environ else []
    triton = util.find_spec("triton")
    for folder in (triton and triton.submodule_search_locations) or []:
        folders.append(os.path.join(folder, "backends", "nvidia", "bin"))
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


def disassemble(cuobjdump: str, path: Path) -> dict[str, list[Instruction]]:
    """The functions in an object, by their mangled names."""
    return functions(_output(cuobjdump, "-sass", path))


def compiler(cuobjdump: str, path: Path) -> str:
    """The version of the toolkit that an object is from, as in "13.0.88"; empty if it has no code for ARCH."""
    found = re.search(r"Tool Version: .*, V(\S+)", _output(cuobjdump, "-elf", path))
    return found[1] if found else ""


def _output(cuobjdump: str, what: str, path: Path) -> str:
    command = [cuobjdump, what, "-arch", ARCH, path]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout
