"""Read what ptxas said of each CUDA kernel, and count in their machine code; fail where that is worse than allowed.

    python tools/kernel_resources.py build/build.log
    python tools/kernel_resources.py build/build.log --update

From the log of the build (tools/bootstrap.py leaves it there; setup.py asks ptxas for it): spilled registers, stack
frames and static shared memory. A spill turns registers into memory traffic that no byte model knows of. The few
kernels that may have one, with the reason, are in ALLOWED.

From the objects of the build: instructions a logit and loads in flight of the hot loops, against kernel_budget.json.
A number that got worse is refused. One that got better is too, until --update has written it into the table and the
README. The table is of one version of nvcc: numbers of another are printed, and not judged.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import kernel_budget
import sass

ROOT = Path(__file__).resolve().parents[1]
# A kernel's demangled name, the most bytes of its stack frame, and why.
ALLOWED = [
    (r"cross_entropy_\w+<double, true, ", 160, "a double takes two registers; the type is there for checking"),
    (r"elementwise_packets<fusedloss::math::Bce, ", 16, "two logarithms, for more threads on a multiprocessor"),
    (r"cross_entropy_warps<", 96, "values that are used once a row, beside the row itself"),
    (r"cross_entropy_\w+<\w+, true, ", 80, "smoothing, probabilities or an entropy beside the row's state"),
    (r"cross_entropy_answers<", 56, "values that are used once a row, or where one logit has almost all"),
    (r"cross_entropy_\w+<\w+, false, ", 32, "values that are used once a row, for more threads on a multiprocessor"),
]
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    stack: int
    spilled: int
    registers: int
    shared: int  # bytes of static shared memory

    def is_allowed(self) -> bool:
        most = max((most for pattern, most, _ in ALLOWED if re.search(pattern, self.name)), default=0)
        return self.stack <= most and (self.spilled == 0 or most > 0)


def read(log: str) -> list[Kernel]:
    found = [match.groupdict() for match in KERNEL.finditer(log)]
    names = demangled([kernel["name"] for kernel in found])
    return [
        Kernel(
            names[k["name"]],
            k["arch"],
            stack=int(k["stack"]),
            spilled=int(k["stores"]) + int(k["loads"]),
            registers=int(k["registers"]),
            shared=int(k["shared"] or 0),
        )
        for k in found
    ]


def demangled(names: list[str]) -> dict[str, str]:
    """By the C++ compiler's own tool where it is there."""
    if not names or not shutil.which("c++filt"):
        return dict(zip(names, names, strict=True))
    shown = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {
        name: re.sub(r"\(fusedloss::(?!Pass).*", "", line) for name, line in zip(names, shown.splitlines(), strict=True)
    }


def check_registers(kernels: list[Kernel]) -> bool:
    refused = [kernel for kernel in kernels if not kernel.is_allowed()]
    for kernel in kernels:
        if kernel.stack or kernel.spilled:
            verdict = "allowed" if kernel.is_allowed() else "REFUSED"
            print(f"{verdict}: {kernel.arch} {kernel.name}: {kernel.stack} bytes of stack, {kernel.spilled} spilled")
    archs = ", ".join(dict.fromkeys(kernel.arch for kernel in kernels))
    most = max(kernel.registers for kernel in kernels)
    print(f"kernel_resources: {len(kernels)} kernels for {archs}; at most {most} registers; {len(refused)} refused")
    return not refused


def static_shared_limit(header: str) -> int | None:
    """What launches reckon with, if they say so."""
    if "kStaticShared" not in header:
        return None
    found = re.search(r"kStaticShared\w*\s*=\s*(\d+)\s*(?:\*\s*(\d+))?\s*;", header)
    if not found:
        sys.exit("kernel_resources: plan.h names kStaticShared..., and this does not find its number")
    return int(found[1]) * int(found[2] or 1)


def check_shared_memory(kernels: list[Kernel], limit: int | None) -> bool:
    """Launches subtract the limit from what a block can have; a kernel with more would fail to start."""
    most = max(kernel.shared for kernel in kernels)
    if limit is None:
        print(f"kernel_resources: at most {most} bytes of static shared memory; plan.h sets no limit")
        return True
    refused = [kernel for kernel in kernels if kernel.shared > limit]
    for kernel in refused:
        print(f"REFUSED: {kernel.arch} {kernel.name}: {kernel.shared} bytes of static shared memory, of {limit}")
    print(f"kernel_resources: at most {most} bytes of static shared memory, of {limit}; {len(refused)} refused")
    return not refused


def last_objects() -> Path | None:
    """Where the last build has left its objects."""
    objects = ROOT.glob("build/temp*/csrc/kernels/cuda/*.o")
    newest = max(objects, key=lambda path: path.stat().st_mtime, default=None)
    return newest and newest.parent


def check_machine_code(objects: Path | None, update: bool) -> bool:
    cuobjdump = sass.disassembler()
    if not cuobjdump:
        return not_looked_at("no cuobjdump was found; Triton brings one")
    if not shutil.which("c++filt"):
        return not_looked_at("no c++filt was found")
    if not objects or not (objects / "rescale.o").exists():
        return not_looked_at(f"no objects were found in {objects or 'build/temp*/csrc/kernels/cuda'}")
    nvcc = sass.compiler(cuobjdump, objects / "rescale.o")
    if not nvcc:
        return not_looked_at(f"{objects} has no code for {sass.ARCH}")

    costs, missing = kernel_budget.measure(cuobjdump, objects, demangled)
    print(f"kernel_resources: {sass.ARCH}, nvcc {nvcc}; instructions a logit [16-byte loads in flight]")
    for name, loops in costs.items():
        shown = [f"{loop} {c.instructions}" + f" [{c.in_flight}]" * bool(c.in_flight) for loop, c in loops.items()]
        print(f"  {name}: {', '.join(shown)}")
    for problem in missing:
        print(f"not found: {problem}")
    if update:
        kernel_budget.save(nvcc, costs)
        kernel_budget.README.write_text(
            kernel_budget.between(kernel_budget.README.read_text(), kernel_budget.markdown(costs))
        )
        print("kernel_resources: the table and the README have these numbers now")
        return not missing
    return verdict(costs, nvcc, *kernel_budget.load())


def not_looked_at(reason: str) -> bool:
    """CI has everything that is needed."""
    print(f"kernel_resources: the machine code is not looked at: {reason}")
    return os.environ.get("CI") != "true"


def verdict(costs: kernel_budget.Costs, nvcc: str, table_nvcc: str, table: kernel_budget.Costs) -> bool:
    if nvcc != table_nvcc:
        print(f"kernel_resources: the table is of nvcc {table_nvcc}: nothing is judged")
        return True
    worse, better = kernel_budget.compare(costs, table)
    for change in worse:
        print(f"REFUSED: {change}")
    for change in better:
        print(f"BETTER: {change}")
    if worse or better:
        print("kernel_resources: if this is meant, --update writes it into the table and the README")
    return not worse and not better


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="what the build said, as in build/build.log")
    parser.add_argument("--objects", type=Path, help="the folder of the objects; else that of the last build")
    parser.add_argument("--update", action="store_true", help="write the numbers into the table and the README")
    options = parser.parse_args()
    kernels = read(options.log.read_text())
    if not kernels:
        sys.exit(f"kernel_resources: {options.log} says nothing of kernels: was everything built before?")
    limit = static_shared_limit((ROOT / "csrc/kernels/cuda/plan.h").read_text())
    passed = [
        check_registers(kernels),
        check_shared_memory(kernels, limit),
        check_machine_code(options.objects or last_objects(), options.update),
    ]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
