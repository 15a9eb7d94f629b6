"""Some thousand steps of tools/soak.py leave nothing behind, and it does notice what others leave."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, warnings, torch
from tools import soak
warnings.simplefilter("ignore")
soak.soak(4000, warm_up=2000)
kept = []
def keep_tensor(step):
    kept.append(torch.ones(1000))
def keep_graph(step):
    kept.append(step())
def keep_file(step):
    os.dup(1)
for leak in (keep_tensor, keep_graph, keep_file):
    try:
        soak.soak(2000, warm_up=0, extra=[leak])
    except soak.Grown as grown:
        print(leak.__name__, "is noticed:", grown)
"""


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts what glibc and /proc tell")
def test_nothing_is_left_behind():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for leak in ("keep_tensor", "keep_graph"):
        assert f"{leak} is noticed: heap" in done.stdout
    assert "keep_file is noticed: descriptors" in done.stdout
