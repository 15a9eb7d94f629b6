"""The examples of trainers and libraries: each trains as it does with native losses, and with our kernels."""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest

from examples.integrations import NEEDS
from examples.integrations.compare import Comparison, missing

ROOT = Path(__file__).parents[1]


# Processes of which each imports torch take longer than all of the others.
each_example = [pytest.param(name, marks=[pytest.mark.long] * (name == "distributed")) for name in NEEDS]


@pytest.mark.parametrize("name", each_example)
def test_an_example_trains_as_with_native_losses(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if absent := missing(NEEDS[name]):
        pytest.skip(f"{', '.join(absent)} not installed")
    comparisons = importlib.import_module(f"examples.integrations.{name}").comparisons()
    assert comparisons
    assert [each.error for each in comparisons if each.error] == []


@pytest.mark.parametrize(
    ("ours", "kernels", "error"),
    [
        ([2.0, 1.00001], {"nll": 2}, None),
        ([2.0, 1.001], {"nll": 2}, "the losses differ by 1.0e-03"),
        ([2.0, math.nan], {"nll": 2}, "the losses differ by nan"),
        ([2.0, 1.0], {}, "none of fusedloss's operators has run"),
    ],
)
def test_a_comparison_can_fail(ours, kernels, error):
    found = Comparison("name", [2.0, 1.0], ours, kernels, tolerance=1e-4).error
    assert found is None if error is None else error in found


def test_the_table_of_all():
    command = [sys.executable, "-m", "examples.integrations", "detection"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "detection, pos_weight" in done.stdout
    assert "8 bce_with_logits" in done.stdout
