"""Where, when and with what the numbers were made."""

import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path

import torch

import fusedloss


def facts() -> dict:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache": last_level_cache(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedloss": fusedloss.build_info(),
    }


def touch_memory() -> None:
    """Writes to as much memory as the cases use, and gives it back.

    A virtual machine gets each page from its host when it is first touched, which takes longer than a whole loss.
    Without this, whoever happens to be the first to get such a page pays for it.
    """
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        torch.ones(min(free // 2, 8 << 30), dtype=torch.uint8)


def slug() -> str:
    """The name of a folder, such as amd-epyc-2-cores."""
    words = re.findall(r"[a-z0-9.]+", re.sub(r"\((r|tm)\)", " ", cpu_model().lower()))
    return "-".join([*words, str(os.cpu_count()), "cores"])


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = info.exists() and re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Its bytes; 0 where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes), default=0)
