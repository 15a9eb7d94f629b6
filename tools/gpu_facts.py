"""Print what the machine is, a line for each fact; fail where torch finds no GPU, or nvcc is missing."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"


def said_by(*command: str) -> str:
    """The last line that a program prints; "absent" where there is no such program."""
    if not shutil.which(command[0]):
        return "absent"
    lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split("\n")
    return next((line for line in reversed(lines) if line), "silent")


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def facts() -> dict[str, str]:
    found = {
        # The files may be another user's than the one who asks git.
        "revision": os.environ.get("FUSEDLOSS_REVISION")
        or said_by("git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--exclude=*"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "nvcc": said_by("nvcc", "--version"),
        QUERY: said_by("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"),
        **{tool: shutil.which(tool) or "absent" for tool in ("ncu", "compute-sanitizer")},
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu memory"] = f"{gpu.total_memory / 1e9:.0f} GB"
        found["compute capability"] = f"{gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors"
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "absent"
    return found


if __name__ == "__main__":
    found = facts()
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
    sys.exit("absent" in (found["gpu"], found["nvcc"]))
