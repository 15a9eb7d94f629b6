"""The benchmarks count bytes as by hand, time only who is right, and write what they find."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import measure
from benchmarks.cases import GROUPS, IGNORED, Case, bce_with_logits, bytes_to_move, cross_entropy
from benchmarks.contestants import native, ours

ROOT = Path(__file__).parent.parent
CASES = [case for group in GROUPS.values() for case in group]
BRIEF = measure.Budget(seconds=0.01, fewest=3, most=3)
SMALL = cross_entropy(24, 10)


@pytest.mark.parametrize(
    ("case", "forward", "gradient"),
    [
        # 240 logits of 4 bytes and 24 targets of 8.
        (SMALL, 960 + 192, 960),
        # A third of 24 rows of 10 logits of 2 bytes is not read; 10 weights.
        (
            cross_entropy(24, 10, target="a third ignored", options=("weight",), dtype=torch.bfloat16),
            16 * 20 + 192 + 20,
            480,
        ),
        # One logit of each row.
        (Case("nll", "nll_loss", (4096, 1000)), 4096 * 4 + 4096 * 8, 16384000),
        # Logits of 4 bytes and labels of one.
        (bce_with_logits(64, 80, target="uint8 labels"), 20480 + 5120, 20480),
    ],
    ids=str,
)
def test_the_bytes_that_must_move(case, forward, gradient):
    assert bytes_to_move(case, *case.draw("cpu")) == {"forward": forward, "step": forward + gradient}


@pytest.mark.parametrize("case", [replace(case, ours={}) for case in CASES], ids=str)
def test_each_case_in_small_is_one_that_both_can_run(case):
    case = replace(case, shape=tuple(min(size, 24) for size in case.shape))
    logits, target, options = case.draw("cpu")
    assert (logits.shape, logits.dtype) == (case.shape, case.dtype)
    assert logits.stride(1) == 1 if case.channels_last else logits.is_contiguous()
    positions = (case.shape[0], *case.shape[2:])
    if target.dtype == torch.int64:
        assert target.shape == positions
        assert (target == IGNORED).sum() == (target.numel() // 3 if "ignored" in case.target else 0)
    else:
        assert (target.shape, target.dtype) == (case.shape, torch.uint8 if "uint8" in case.target else case.dtype)
    assert options.keys() == set(case.options)
    for function in (native(case), ours(case)):
        leaf = logits.clone().requires_grad_()
        function(leaf, target, **options).backward()
        assert leaf.grad.isfinite().all()


def test_no_two_cases_have_one_name():
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)


def right(input, target):
    return F.cross_entropy(input, target)


def wrong_loss(input, target):
    return 1.01 * F.cross_entropy(input, target)


def wrong_gradient(input, target):
    return F.cross_entropy(input.detach(), target) + 0 * input.sum()


def without_a_kernel(input, target):
    raise NotImplementedError("no kernel\nfor this")


def test_only_who_is_right_is_timed():
    functions = [right, wrong_loss, wrong_gradient, without_a_kernel]
    contestants = {function.__name__: lambda case, function=function: function for function in functions}
    entries = measure.run(SMALL, contestants, BRIEF, "cpu").entries
    assert [name for name, entry in entries.items() if not entry.problem] == ["right"]
    assert [name for name, entry in entries.items() if entry.times] == ["right"]
    assert entries["wrong_loss"].problem.startswith("wrong: loss")
    assert entries["wrong_gradient"].problem.startswith("wrong: gradient")
    assert entries["without_a_kernel"].problem == "failed: NotImplementedError: no kernel"


def test_nan_is_wrong():
    truth = {"loss": torch.tensor(1.0)}
    assert measure.fault({"loss": torch.tensor(float("nan"))}, truth, torch.float32)


def test_a_call_that_overwrites_its_logits_never_sees_them_again():
    def greedy(input, target):
        assert torch.equal(input, untouched)
        loss = F.cross_entropy(input.clone(), target)
        input.detach().zero_()
        return loss

    untouched, _, _ = SMALL.draw("cpu")
    result = measure.run(SMALL, {"greedy": lambda case: greedy}, BRIEF, "cpu")
    assert result.entries["greedy"].problem == ""


def test_ratios_and_fractions():
    def times(seconds):
        return measure.Times(seconds, (seconds, seconds), 3, 1)

    entries = {
        "fusedloss": measure.Entry(times={"step": times(2.0)}),
        "native": measure.Entry(times={"step": times(6.0)}),
        "compiled": measure.Entry("wrong: loss"),
    }
    result = measure.Result(SMALL, 1, 960, {"step": 2112}, times(1.0), entries)
    assert result.ratio("step", "native") == 3.0
    assert result.ratio("step", "compiled") is None
    assert result.ratio("forward", "native") is None
    assert result.copies() == 2.0
    assert result.bandwidth("step") == pytest.approx(2112 / 2 / (2 * 960))


def test_a_run_writes_its_tables_and_numbers(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu", "--threads", "1", "--quick", "--no-compile"]
    chosen = ["--filter", f"^{SMALL}$", "--output", str(tmp_path)]
    done = subprocess.run(command + chosen, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(SMALL) in done.stderr, "progress"
    data = json.loads((tmp_path / "results.json").read_text())
    (result,) = data["results"]
    assert result["name"] == str(SMALL)
    assert result["entries"].keys() == {"fusedloss", "native"}
    assert all(entry["times"]["step"]["median"] > 0 for entry in result["entries"].values())
    assert {mean["cases"] for mean in data["geometric_means"]["1"]} == {1}
    assert data["machine"]["fusedloss"]["git_revision"]
    tables = (tmp_path / "results.md").read_text()
    assert "| cross entropy 24x10 | float32 |" in tables
    assert "step vs native" in tables
    assert tables.split("## Threads")[1].strip() in done.stdout
