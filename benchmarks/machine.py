"""Where, when and with what the numbers were made."""

import math
import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import fusedloss
from benchmarks.contestants import PEERS, installed


def facts(device: str) -> dict:
    return common_facts() | (gpu_facts() if device == "cuda" else {})


def common_facts() -> dict:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache": last_level_cache(),
        "load": load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedloss": fusedloss.build_info(),
    }


def gpu_facts() -> dict:
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "gpu_memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "last_level_cache": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": driver(),
        "triton": installed("triton") or "not installed",
        "peers": {name: peer.state()[1] for name, peer in PEERS.items()},
    }


def no_gpu() -> str:
    """Why nothing can be measured on CUDA; empty where it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    reasons = [reason for name, reason in fusedloss.backends().items() if name != "cpu"]
    return "" if "" in reasons else f"fusedloss has no kernels for it: {'; '.join(reasons)}"


def load() -> float | None:
    """How many processes want to run, over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def driver() -> str:
    """The version of NVIDIA's driver; empty where its tool is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0].strip()


def touch_memory(logits: float = math.inf) -> None:
    """Writes to as much memory as cases of up to so many logits use, and gives it back.

    A virtual machine gets each page from its host when it is first touched, which takes longer than a whole loss.
    Without this, whoever happens to be the first to get such a page pays for it.
    """
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        of_entries = 200 * logits  # logits and gradients of all entries, in float64 those of the errors too
        torch.ones(int(min(free // 2, 8 << 30, of_entries)), dtype=torch.uint8)


def slug(device: str) -> str:
    """The name of a folder, such as amd-epyc-2-cores or nvidia-h200."""
    return slug_of(torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()} {os.cpu_count()} cores")


def slug_of(model: str) -> str:
    return "-".join(re.findall(r"[a-z0-9.]+", re.sub(r"\((r|tm)\)", " ", model.lower())))


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = info.exists() and re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Its bytes; 0 where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes), default=0)
