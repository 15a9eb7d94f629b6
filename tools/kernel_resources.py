"""Read what ptxas said of each CUDA kernel, and fail where registers are spilled or a stack frame is used.

    python tools/kernel_resources.py build/build.log

The log is the build's output (tools/bootstrap.py leaves it there; setup.py asks ptxas for it). A spill turns registers
into memory traffic that no byte model knows of. The few kernels that may have one, with the reason, are in ALLOWED.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# A kernel's demangled name, the most bytes of its stack frame, and why.
ALLOWED = [
    (r"cross_entropy_\w+<double, true, ", 160, "a double takes two registers; the type is there for checking"),
    (r"cross_entropy_\w+<\w+, true, ", 64, "smoothing, probabilities or a soft cap beside the row's state"),
    (r"cross_entropy_\w+<\w+, false, ", 24, "values that are used once a row, for more threads on a multiprocessor"),
]
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    stack: int
    spilled: int
    registers: int

    def is_allowed(self) -> bool:
        most = max((most for pattern, most, _ in ALLOWED if re.search(pattern, self.name)), default=0)
        return self.stack <= most and (self.spilled == 0 or most > 0)


def read(log: str) -> list[Kernel]:
    found = [match.groupdict() for match in KERNEL.finditer(log)]
    names = demangled([kernel["name"] for kernel in found])
    return [
        Kernel(names[k["name"]], k["arch"], int(k["stack"]), int(k["stores"]) + int(k["loads"]), int(k["registers"]))
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


def main() -> None:
    kernels = read(Path(sys.argv[1]).read_text())
    if not kernels:
        sys.exit(f"kernel_resources: {sys.argv[1]} says nothing of kernels: was everything built before?")
    refused = [kernel for kernel in kernels if not kernel.is_allowed()]
    for kernel in kernels:
        if kernel.stack or kernel.spilled:
            verdict = "allowed" if kernel.is_allowed() else "REFUSED"
            print(f"{verdict}: {kernel.arch} {kernel.name}: {kernel.stack} bytes of stack, {kernel.spilled} spilled")
    archs = ", ".join(dict.fromkeys(kernel.arch for kernel in kernels))
    most = max(kernel.registers for kernel in kernels)
    print(f"kernel_resources: {len(kernels)} kernels for {archs}; at most {most} registers; {len(refused)} refused")
    sys.exit(bool(refused))


if __name__ == "__main__":
    main()
