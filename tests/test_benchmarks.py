"""The benchmarks count bytes as by hand, time only what is right, and write what they find."""

import json
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from benchmarks import __main__ as command_line
from benchmarks import (
    compare,
    devices,
    goals,
    linear_memory,
    machine,
    measure,
    pictures,
    readme,
    report,
    vocab_parallel,
)
from benchmarks.cases import (
    GROUPS,
    IGNORED,
    IGNORED_PARTS,
    Case,
    bce_with_logits,
    bytes_to_move,
    cross_entropy,
    linear_cross_entropy,
)
from benchmarks.contestants import PEERS, CannotRun, Peer, installed_peers, native, ours, those_for, triton
from examples import gpt

ROOT = Path(__file__).parent.parent
CASES = {device: [case for group in groups.values() for case in group] for device, groups in GROUPS.items()}
PLAIN = {str(case): case for cases in CASES.values() for case in (replace(one, ours={}) for one in cases)}
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
        # 2 bytes of logits and 2 of labels; 80 weights.
        (bce_with_logits(64, 80, options=("pos_weight",), dtype=torch.bfloat16), 10240 + 10240 + 160, 10240),
        # Of 20 rows, 2 are read.
        (cross_entropy(20, 100, target="nine tenths ignored", dtype=torch.bfloat16), 400 + 160, 4000),
        # A cast is not part of the loss that is measured.
        (cross_entropy(24, 10, autocast=True, dtype=torch.bfloat16), 480 + 192, 480),
        # A grad_output other than 1 is known when the logits have gone: both inputs are read again.
        (cross_entropy(24, 10, grad_output=0.5), 960 + 192, 960 + 192 + 960),
        # 24 losses are written, 24 grad_outputs read.
        (cross_entropy(24, 10, reduction="none"), 960 + 192 + 96, 960 + 192 + 96 + 960),
        (bce_with_logits(64, 80, reduction="none"), 3 * 20480, 3 * 20480 + 20480),
        # 24 embeddings of 6 and a weight of 60 entries; no logits, and a gradient of both.
        (linear_cross_entropy(24, 10, width=6), 24 * 6 * 4 + 192 + 240, 24 * 6 * 4 + 240),
        # 12 of the embeddings.
        (
            linear_cross_entropy(24, 10, width=6, target="half ignored"),
            12 * 6 * 4 + 192 + 240,
            24 * 6 * 4 + 240,
        ),
    ],
    ids=str,
)
def test_the_bytes_that_must_move(case, forward, gradient):
    assert bytes_to_move(case, *case.draw("cpu")) == {"forward": forward, "step": forward + gradient}


@pytest.mark.parametrize("case", PLAIN.values(), ids=str)
def test_each_case_in_small_is_one_that_both_can_run(case):
    case = replace(case, shape=tuple(min(size, 24) for size in case.shape), width=min(case.width, 7))
    logits, target, options = case.draw("cpu")
    assert (logits.shape, logits.dtype) == ((24, 7) if case.width else case.shape, case.dtype)
    assert logits.stride(1) == 1 if case.channels_last else logits.is_contiguous()
    positions = (case.shape[0], *case.shape[2:])
    if target.dtype == torch.int64:
        assert target.shape == positions
        part, whole = IGNORED_PARTS.get(case.target, (0, 1))
        assert (target == IGNORED).sum() == target.numel() * part // whole
    else:
        assert (target.shape, target.dtype) == (case.shape, torch.uint8 if "uint8" in case.target else case.dtype)
    assert options.keys() == set(case.options)
    calls = [native(case), ours(case)]
    for function in [measure.under_autocast(call) for call in calls] if case.autocast else calls:
        leaf = logits.clone().requires_grad_()
        function(leaf, target, **options).sum().backward()
        assert leaf.grad.isfinite().all()


def test_no_two_cases_have_one_name():
    for cases in CASES.values():
        names = [str(case) for case in cases]
        assert len(set(names)) == len(names)


def test_a_linear_layer_has_a_gradient_too():
    case = linear_cross_entropy(24, 10, width=6)

    def frozen(case):
        call = native(case)
        return lambda input, target, classifier: call(input, target, classifier=classifier.detach() + 0 * classifier)

    contestants = {"frozen": frozen, "native": native, "fusedloss": ours, **installed_peers("cpu")}  # torch 2.13's own
    result = measure.run(case, contestants, BRIEF, devices.Cpu())
    entries = result.entries
    assert entries["frozen"].problem.startswith("wrong: gradient of the classifier")
    assert {entry.problem for name, entry in entries.items() if name != "frozen"} == {""}
    assert entries["fusedloss"].peak_bytes < entries["native"].peak_bytes
    assert result.of_products() == result.products.median / entries["fusedloss"].times["step"].median > 0
    data = json.loads(report.as_json(machine.facts("cpu"), {1: [result]}, {}))["results"]
    assert report.restored(data[0]).products == result.products


def test_the_products_of_a_layer_are_of_the_rows_that_count():
    case = linear_cross_entropy(24, 10, width=6, target="half ignored")
    assert case.products == 3 * 2 * 12 * 10 * 6  # multiplications and additions
    assert replace(case, target="indices").products == 2 * case.products
    assert SMALL.products == 0
    embeddings, target, options = case.draw("cpu")
    seen = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.mm:
                seen.append((args, kwargs["out"]))
            return function(*args, **(kwargs or {}))

    step = measure.products(target, options["classifier"])
    with torch.no_grad(), Seen():
        step(embeddings)
    weight = options["classifier"].detach()
    logits = embeddings[:12] @ weight.T
    expected = [logits, logits @ weight, logits.T @ embeddings[:12]]
    for (_, out), true in zip(seen, expected, strict=True):
        torch.testing.assert_close(out, true)
    before = [out.data_ptr() for _, out in seen]
    with torch.no_grad(), Seen():
        step(embeddings)
    assert [out.data_ptr() for _, out in seen[3:]] == before, "into memory that is there"


def test_a_linear_layer_is_for_those_who_hold_one():
    everyone = {"native": native, "fusedloss": ours, **PEERS}
    given_logits = {"liger", "quack", "flash"}
    linear = linear_cross_entropy(24, 10, width=6)
    assert those_for(linear, everyone).keys() == everyone.keys() - given_logits
    assert those_for(SMALL, everyone).keys() == given_logits | {"native", "fusedloss"}
    for name in given_logits:
        with pytest.raises(CannotRun, match="has no classifier"):
            PEERS[name](linear)


class Slow:
    """A clock by which every call takes three seconds."""

    def calls(self, seconds):
        return 1

    def seconds(self, run, inputs):
        return 3.0


def test_who_takes_long_has_fewer_turns():
    long, short = (measure.Party(lambda logits: None, clock, False) for clock in (Slow(), devices.HostClock(0)))
    measure.take_turns([long, short], torch.zeros(3), measure.Budget(seconds=0, fewest=7, most=9, patience=7))
    assert (long.samples, len(short.samples)) == ([3.0] * 3, 7)
    assert long.times() == measure.Times(3.0, (3.0, 3.0), 3, 1)


def test_a_long_call_is_not_made_to_be_thrown_away(monkeypatch):
    monkeypatch.setattr(measure, "LONG", -1)  # each is long
    calls = []
    party = measure.Party(calls.append, devices.HostClock(0), False)
    measure.take_turns([party], torch.zeros(3), measure.Budget(seconds=0, fewest=3, most=9, patience=1))
    assert len(calls) == len(party.samples) == 4
    measure.take_turns([party], torch.zeros(3), measure.Budget(seconds=0, fewest=3, most=9, patience=0))
    assert len(calls) == len(party.samples) == 5, "once in any case"
    low, high = measure.Party(lambda: None, party.clock, False, samples=[2.0]).times().quartiles
    assert (low, high) == (2.0, 2.0)


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
    entries = measure.run(SMALL, contestants, BRIEF, devices.Cpu()).entries
    assert [name for name, entry in entries.items() if not entry.problem] == ["right"]
    assert [name for name, entry in entries.items() if entry.times] == ["right"]
    assert entries["wrong_loss"].problem.startswith("wrong: loss")
    assert entries["wrong_gradient"].problem.startswith("wrong: gradient")
    assert entries["without_a_kernel"].problem == "failed: NotImplementedError: no kernel"


def test_a_contestant_that_a_case_is_not_for_says_so():
    entries = measure.run(bce_with_logits(8, 4), {"native": native, **PEERS}, BRIEF, devices.Cpu()).entries
    assert [name for name, entry in entries.items() if not entry.problem] == ["native"]
    assert entries["quack"].problem == "cannot: has cross entropy alone"


@pytest.mark.parametrize(
    "case",
    [
        cross_entropy(24, 10),
        cross_entropy(24, 10, target="half ignored", options=("weight", "label_smoothing")),
        cross_entropy(24, 10, target="probabilities"),
        cross_entropy(4, 10, 6, channels_last=True),
        Case("nll", "nll_loss", (24, 10), options=("weight",)),
        bce_with_logits(24, 10, options=("weight", "pos_weight")),
        bce_with_logits(24, 10, target="uint8 labels"),
        Case("bce", "binary_cross_entropy", (24, 10), "labels"),
        cross_entropy(24, 10, grad_output=0.5),
        linear_cross_entropy(24, 10, width=6),
        linear_cross_entropy(24, 10, width=6, reduction="none"),
        cross_entropy(24, 10, target="half ignored", options=("weight",), reduction="none"),
        bce_with_logits(24, 10, options=("pos_weight",), reduction="none"),
    ],
    ids=str,
)
def test_the_truth_in_parts_is_the_mean_of_all(case, monkeypatch):
    data = case.draw("cpu")
    whole = measure.true_outcome(case, *data)
    monkeypatch.setitem(measure.CHUNK, "cpu", 2 * torch.Size(case.shape[1:]).numel())
    logits, target, options = data
    results = measure.outcome(
        case, lambda logits: native(case)(logits, target, **options, reduction=case.reduction), logits, options
    )
    for name, true in measure.true_outcome(case, *data).items():
        adds_parts = name.startswith("gradient of")  # of what all rows share: entries near 0 keep the terms' errors
        torch.testing.assert_close(true, whole[name], rtol=1e-13, atol=1e-15 if adds_parts else 0)
        torch.testing.assert_close(results[name].double(), true, rtol=1e-4, atol=1e-6)
    assert measure.fault(results, whole, case.dtype) == ""
    results["gradient"].select(0, -1).fill_(7)
    assert measure.fault(results, whole, case.dtype).startswith("wrong: gradient, by up to")


def test_a_result_of_another_shape_is_wrong():
    assert "of shape (1,)" in measure.fault({"loss": torch.ones(1)}, {"loss": torch.tensor(1.0)}, torch.float32)


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
    result = measure.run(SMALL, {"greedy": lambda case: greedy}, BRIEF, devices.Cpu())
    assert result.entries["greedy"].problem == ""


def test_ratios_and_fractions():
    def times(seconds):
        return measure.Times(seconds, (seconds, seconds), 3, 1)

    entries = {
        "fusedloss": measure.Entry(times={"step": times(2.0)}),
        "native": measure.Entry(times={"step": times(6.0)}),
        "compiled": measure.Entry("wrong: loss"),
    }
    result = measure.Result(SMALL, 1, 960, {"step": 2112}, times(1.0), entries, memory_bandwidth=1584)
    assert result.ratio("step", "native") == 3.0
    assert result.ratio("step", "compiled") is None
    assert result.ratio("forward", "native") is None
    assert result.copies() == 2.0
    assert result.bandwidth("step") == pytest.approx(2112 / 2 / (2 * 960))
    assert result.floor("step") == pytest.approx(2112 / 1584 / 2)
    assert result.floor("forward") is None
    assert result.best("step", ["compiled", "native", "liger"]) == "native"
    assert result.best("step", ["compiled", "liger"]) is None


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
    for name in ("speedup", "bandwidth", "memory"):  # of a case that is neither large nor bfloat16
        assert [(tmp_path / f"{name}.{kind}").exists() for kind in ("svg", "png")] == [name == "speedup"] * 2


# --- What is made of results -------------------------------------------------------------------------------


def saved(folder, *results):
    report.save(folder, machine.facts("cpu") | {"load": 0.0}, {2: list(results)}, {})
    return folder / "results.json"


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path):
    def interrupted(case, *rest):
        if case.dtype == torch.bfloat16:
            raise KeyboardInterrupt
        return results_of(case, fusedloss=0.5, native=1.0)

    arguments = ["--threads", "2", "--no-compile", "--filter", "^nll", "--output", str(tmp_path)]
    monkeypatch.setattr(command_line, "run", interrupted)
    monkeypatch.setattr(machine, "touch_memory", lambda logits: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(KeyboardInterrupt):
        command_line.main()
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert result["name"] == "nll 4096x1000 float32"


def test_a_comparison_finds_what_is_slower_beyond_the_spread(tmp_path, capsys):
    before = saved(tmp_path / "before", results_of(SMALL, fusedloss=1.0), results_of(HEAD, fusedloss=1.0))
    within = saved(tmp_path / "within", results_of(SMALL, fusedloss=1.1), results_of(HEAD, fusedloss=1.2))
    assert compare.main(before, within) == 0
    assert "4 times in both: 0 slower, 0 quicker" in capsys.readouterr().out
    slower = saved(tmp_path / "slower", results_of(SMALL, fusedloss=1.5), results_of(HEAD, fusedloss=0.5))
    assert compare.main(before, slower) == 1
    shown = capsys.readouterr().out
    assert "4 times in both: 2 slower, 2 quicker" in shown
    assert re.search(r"cross entropy 24x10 float32, step .* 3000.00 ms \| *1.50x", shown)
    assert compare.main(slower, slower) == 0
    lost = saved(tmp_path / "lost", results_of(SMALL, fusedloss=1.0))
    assert compare.main(before, lost) == 1


def test_the_pictures_show_the_ratios(tmp_path):
    path = saved(tmp_path, results_of(cross_entropy(512, 1000), fusedloss=1.0, native=7.5, compiled=2.5))
    axes = Figure().subplots()
    pictures.speedups(json.loads(path.read_text())["results"], axes)
    assert [bar.get_width() for bar in axes.patches] == [7.5, 2.5]
    pictures.draw(tmp_path)
    assert "cross entropy 512x1000" in (tmp_path / "speedup.svg").read_text()
    assert (tmp_path / "bandwidth.png").read_bytes().startswith(b"\x89PNG")


def test_the_bandwidth_is_that_of_the_bytes_that_must_move(tmp_path):
    path = saved(tmp_path, results_of(cross_entropy(512, 1000), fusedloss=1.0, native=2.0))
    axes = Figure().subplots()
    pictures.bandwidth(json.loads(path.read_text())["results"], axes)
    size = 512 * 1000 * 4
    lines = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.lines}
    assert lines["fusedloss"] == (1000, pytest.approx(2 * size / 2 / 1e9))  # a step takes twice the forward's second
    assert lines["native"] == (1000, pytest.approx(2 * size / 4 / 1e9))
    assert lines["a plain copy"] == (1000, pytest.approx(2 * size / 1e9))


def test_a_picture_shows_usual_steps_and_one_point_for_each_number_of_classes(tmp_path):
    some = [
        cross_entropy(512, 1000),
        cross_entropy(4096, 1000),
        cross_entropy(512, 1000, grad_output=0.5),
        cross_entropy(512, 1000, ours={"inplace": True}),
        cross_entropy(512, 1000, options=("weight",), title="cross entropy, weight"),
    ]
    path = saved(tmp_path, *(results_of(case, fusedloss=1.0, native=2.0) for case in some))
    results = json.loads(path.read_text())["results"]
    axes = Figure().subplots()
    pictures.speedups(results, axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "cross entropy 512x1000",
        "cross entropy 4096x1000",
    ]
    axes = Figure().subplots()
    pictures.bandwidth(results, axes)
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines["fusedloss"]) == [pytest.approx(4096 * 1000 * 4 / 1e9)]


def test_the_documents_show_the_committed_results():
    for name, block in readme.TABLES.items():
        text = (ROOT / name).read_text()
        assert text.count(readme.BEGIN) == text.count(readme.END) == 1
        assert readme.written(text, block) == text, "run python -m benchmarks.readme"
    assert "cross entropy 64x128256 float32" in (ROOT / "docs/speed.md").read_text().partition(readme.BEGIN)[2]
    assert all(words in (ROOT / "README.md").read_text() for words in readme.GAINS.values())


def test_where_we_lose_is_every_case_in_which_someone_is_quicker(tmp_path):
    quick = results_of(cross_entropy(512, 1000), fusedloss=1.0, native=1.5, compiled=2.5)
    saved(tmp_path, quick, results_of(SMALL, fusedloss=1.0, native=0.8, compiled=0.95))
    shown = readme.defeats(tmp_path)
    assert "cross entropy 24x10 float32, forward" in shown
    assert re.search(
        r"cross entropy 24x10 float32, step +\| +2 \| native +\| +0.80x", shown.replace("|  native", "| native")
    )
    assert "512x1000" not in shown
    assert shown.count("compiled") == 0, "the quickest rival alone"


def test_what_was_left_out_or_went_wrong_stands_below_the_tables():
    results = [results_of(SMALL, fusedloss=1.0, native="wrong: loss"), results_of(HEAD, fusedloss=1.0, native=2.0)]
    text = report.cpu_section(machine.facts("cpu"), results, {"nll": "time", "bce": "time"})
    assert "- native wrong: loss: cross entropy 24x10 float32\n" in text
    assert "- left out, time: nll; bce\n" in text
    refused = [results_of(replace(SMALL, shape=(24, count)), liger="cannot: takes logits") for count in range(5)]
    assert "- liger cannot: takes logits: 5 cases\n" in report.notes(refused, {})
    assert "24x1 float32; cross entropy 24x2" in report.notes(refused[1:], {})


def test_a_table_has_no_column_that_nobody_filled():
    columns = [
        ("case", str),
        ("never", lambda result: ""),
        ("nobody", lambda result: "-"),
        ("step", lambda result: "1 s"),
    ]
    _, shown = report.group_tables({"all": [SMALL]}, columns, [results_of(SMALL, fusedloss=1.0)])
    assert re.fullmatch(r"\| case +\| step \|", shown.splitlines()[0])


def test_a_linear_layer_is_measured_in_operations_not_in_bytes():
    (case, *_) = [case for case in CASES["cuda"] if case.width]
    assert (case.shape, case.width) == ((4096, 128256), 4096)
    result = results_of(case, fusedloss=1.0, native=2.0, cut=3.0)
    assert report.flops(result) == f"{6 * 4096 * 128256 * 4096 / 2 / 1e12:.3g}"  # a step takes two seconds
    assert (result.bandwidth("step"), result.floor("step"), result.copies()) == (None, None, None)
    result.entries["cut"].peak_bytes = 5000
    result.products = measure.Times(1.9, (1.9, 1.9), 7, 1)
    tables = report.cuda_section([result], {}).partition("## Cases")[2]
    assert "TFLOP/s" in tables
    assert "5.0 kB cut" in tables
    assert "3.00x cut" in tables
    assert re.search(r"TFLOP/s \| of products .*95%", tables, re.DOTALL)
    assert "of floor" not in tables
    of_products = goals.judge(goal("a linear layer and its loss, a step: of products"), [result])
    assert (of_products["verdict"], of_products["worst"]) == ("missed", 0.95)
    best = goals.judge(goal("a linear layer and its loss, a step: vs best"), [result])
    assert (best["verdict"], best["worst"], best["rival"]) == ("reached in part", 2.0, "native")


def test_a_busy_machine_is_said_to_be_busy():
    facts = machine.facts("cpu")
    assert "**The machine was busy: a load of 3.2" in report.header(facts | {"load": 3.2})
    assert "busy" not in report.header(facts | {"load": 0.1})
    assert "busy" not in report.header(facts | {"load": None})


def test_the_gpt_trains_the_same_with_either_loss():
    outcomes = gpt.compare(gpt.TINY, steps=2, warm_up=1, device=torch.device("cpu"))
    assert outcomes.keys() == {"native", "fused", "fused, inplace", "fused linear"}
    for outcome in outcomes.values():
        assert outcome.losses == pytest.approx(outcomes["native"].losses, rel=1e-5)
        assert len(outcome.losses) == 3
        assert outcome.tokens_per_second > 0
    assert gpt.parted(outcomes) is None
    outcomes["fused"].losses[1] *= 1.01
    assert gpt.parted(outcomes).startswith("step 1: native")


def test_the_memory_of_a_step_against_the_vocabulary(tmp_path, monkeypatch, capsys):
    sizes = {"ROWS": 256, "WIDTH": 32, "VOCABULARIES": [2048, 4096, 8192], "LAST_OF_CHUNKED": 4096}
    for name, value in sizes.items():
        monkeypatch.setattr(linear_memory, name, value)
    monkeypatch.setattr(linear_memory, "TIGHT", 1 << 20)
    monkeypatch.setattr(sys, "argv", ["linear_memory", "--output", str(tmp_path / "picture.svg")])
    linear_memory.main()
    drawn, shown = (tmp_path / "picture.svg").read_text(), capsys.readouterr().out
    for name in ("float32", "bfloat16", "all logits", "fusedloss, memory=1 MB", "8k"):
        assert f">{name}<" in drawn
    assert re.search(r"\| 8192 +\| +8.4 MB \|", shown), "256 x 8192 logits of 4 bytes"
    found = linear_memory.measured(torch.float32, [2048, 8192])
    for logits, native_s, ours_, tight in zip(
        *(found[name] for name in ("all logits", "native", "fusedloss", "fusedloss, memory=1 MB")), strict=True
    ):
        assert native_s > 2 * logits
        assert ours_ < 1.1 * logits
        assert tight < 1.1 * (1 << 20)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert found["native, chunked"][0] > 0
        assert found["native, chunked"][1] is None


@pytest.mark.long
def test_a_step_whose_classes_are_shared(monkeypatch, capsys):
    monkeypatch.setattr(machine, "touch_memory", lambda: None)
    arguments = ["--shapes", "40x64,4x65", "--dtype", "float32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["vocab_parallel", *arguments])
    vocab_parallel.main()
    shown = capsys.readouterr().out
    assert re.search(r"\| 40x64 float32 +\| +[\d.]+ \| +\d+% \|( +[\d.]+, [\d.]+x \|){5}\n", shown)
    assert re.search(r"\| 4x65 float32 .*[\d.]+x \| +wrong \|", shown), "Megatron's ranks have as many classes each"
    assert re.search(r"^4x65 float32, megatron: wrong: ", shown, re.MULTILINE)
    assert shown.count("wrong") == 2


# --- What CUDA has of its own, where there is none -----------------------------------------------------------


class FakeCuda:
    """Keeps a log of what the clock does; between two events pass two milliseconds for each call."""

    def __init__(self):
        self.log = []

    def _sleep(self, cycles):
        self.log.append("busy")

    def Event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = len(self.cuda.log)
        self.cuda.log.append("event")

    def synchronize(self):
        self.cuda.log.append("wait")

    def elapsed_time(self, end):
        return 2.0 * self.cuda.log[self.at : end.at].count("call")


class FakeBuffer:
    def __init__(self, cuda):
        self.cuda = cuda

    def zero_(self):
        self.cuda.log.append("write")

    def sum(self):
        self.cuda.log.append("read")


class FakeGpu(devices.Cuda):
    """The whole way of a CUDA run, with tensors of the CPU."""

    name = "cpu"
    bandwidth = 4e12

    def __init__(self):
        cuda = FakeCuda()
        self.host = devices.HostClock(span=1e-4)
        self.device = devices.CudaClock(FakeBuffer(cuda), cuda)
        self.device.log = cuda.log

    def clock(self, case):
        clock = super().clock(case)
        return clock if case.latency else LoggedCalls(clock)

    def prepare(self, case):
        pass

    def peak_bytes(self, run, logits):
        return 3 * logits.nbytes

    def launches(self, call, logits):
        return 2


class LoggedCalls:
    def __init__(self, clock):
        self.clock = clock
        self.calls = clock.calls

    def seconds(self, run, inputs):
        return self.clock.seconds(lambda one: (self.clock.log.append("call"), run(one)), inputs)


GPU_FACTS = {
    "gpu": "NVIDIA H200",
    "gpu_memory": 150e9,
    "multiprocessors": 132,
    "last_level_cache": 60e6,
    "cuda": "13.0",
    "driver": "",
    "triton": "3.6.0",
    "copy_bandwidth": 4e12,
    "peers": dict.fromkeys(PEERS, "not installed"),
}


def test_the_clock_of_a_gpu_times_each_call_alone_in_an_empty_cache():
    cuda = FakeCuda()
    clock = devices.CudaClock(FakeBuffer(cuda), cuda)
    assert clock.calls(1e-9) == 1
    seconds = clock.seconds(lambda one: cuda.log.append("call"), [torch.zeros(1), torch.zeros(1)])
    assert seconds == pytest.approx(2 * 2e-3)
    assert cuda.log == 2 * ["write", "read", "busy", "event", "call", "event", "wait"]


def test_the_clock_of_the_host_waits_before_and_behind_many_calls():
    log = []
    clock = devices.HostClock(span=1.0, wait=lambda: log.append("wait"))
    assert clock.calls(0.3) == 4
    assert clock.seconds(lambda one: log.append("call"), [torch.zeros(1)] * 3) > 0
    assert log == ["wait", "call", "call", "call", "wait"]


def test_a_latency_case_has_the_clock_of_the_host():
    gpu = FakeGpu()
    assert gpu.clock(cross_entropy(32, 10, latency=True)) is gpu.host
    assert gpu.clock(SMALL).clock is gpu.device


def test_peak_memory_is_counted_from_what_was_there(monkeypatch):
    memory = {"now": 100, "peak": 900}

    def step(logits):
        memory["peak"] = max(memory["peak"], memory["now"] + 70)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=memory["now"]))
    assert devices.Cuda.peak_bytes(FakeGpu(), step, torch.zeros(1)) == 70


def test_a_case_too_large_for_the_memory_raises_before_it_is_drawn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1e9, 2e9))
    devices.Cuda.prepare(FakeGpu(), SMALL)
    with pytest.raises(RuntimeError, match="1 GB of free memory"):
        devices.Cuda.prepare(FakeGpu(), cross_entropy(8192, 128256))


def test_every_case_fits_into_80_gigabytes():
    assert max(torch.Size(case.shape).numel() for case in CASES["cuda"]) * devices.Cuda.BYTES_PER_LOGIT < 78e9


def test_the_errors_are_fractions_of_the_truth():
    truth = {"loss": torch.tensor(2.0), "gradient": torch.tensor([1.0, -3.0])}
    results = {"loss": torch.tensor(2.5), "gradient": torch.tensor([1.5, -3.0])}
    assert measure.errors(results, truth) == {"loss": 0.25, "gradient": 0.125}
    assert measure.errors({"loss": torch.ones(1)}, truth) == {}
    native_s = measure.run(SMALL, {"native": native}, BRIEF, devices.Cpu()).entries["native"].errors
    assert 0 < native_s["gradient"] < 1e-6


@pytest.mark.parametrize("fields", [{"grad_output": 0.5}, {"reduction": "none"}], ids=str)
def test_who_forgets_the_grad_output_is_wrong(fields):
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad_output):
            return torch.ones_like(grad_output)

    def forgetful(case):
        return lambda *arguments, **options: Forgetful.apply(F.cross_entropy(*arguments, **options))

    contestants = {"forgetful": forgetful, "native": native, "fusedloss": ours}
    entries = measure.run(replace(SMALL, **fields), contestants, BRIEF, devices.Cpu()).entries
    assert entries.pop("forgetful").problem.startswith("wrong: gradient")
    assert {entry.problem for entry in entries.values()} == {""}


def test_the_peak_memory_of_a_step_on_the_cpu():
    def run(logits):
        twice = torch.cat([logits, logits])  # there with its square: 4 times the logits
        square = twice * twice
        del twice
        return square.neg()  # 4 times again

    assert devices.Cpu().peak_bytes(run, torch.zeros(5000)) == 4 * 5000 * 4
    assert devices.Cpu().peak_bytes(lambda logits: logits.neg_(), torch.zeros(5000)) == 0


def test_a_step_in_a_cuda_graph_is_timed_or_said_to_be_impossible(monkeypatch):
    def no_capture(self, step, logits):
        raise RuntimeError("operation not permitted when stream is capturing")

    case = cross_entropy(32, 10, latency=True)
    monkeypatch.setattr(FakeGpu, "graphed", no_capture)
    both = {"native": native, "fusedloss": ours}
    result = measure.run(case, both, BRIEF, FakeGpu())
    assert measure.GRAPHED not in result.entries["native"].times
    assert "native in no CUDA graph: RuntimeError: operation not permitted" in report.cuda_section([result], {})
    monkeypatch.setattr(FakeGpu, "graphed", lambda self, step, logits: step)
    result = measure.run(case, both, BRIEF, FakeGpu())
    assert result.entries["native"].times[measure.GRAPHED].median > 0


@pytest.mark.parametrize("state", ["", "no Triton"])
def test_our_triton_kernels_say_why_they_cannot_run(monkeypatch, state):
    backends = {"cpu": "", "cuda": "", "triton": state}
    monkeypatch.setattr("benchmarks.contestants.fusedloss.backends", lambda: backends, raising=False)
    if state:
        with pytest.raises(CannotRun, match=state):
            triton(SMALL)
    else:
        assert triton(SMALL).keywords == {"backend": "triton"}


class LayerAndEntropy(torch.nn.CrossEntropyLoss):
    def forward(self, input, target, weight):
        return super().forward(input @ weight.T, target)


@pytest.fixture
def peer(monkeypatch):
    """One that is installed: native's own cross entropy, under another name."""
    module = types.ModuleType("some_kernels.loss")
    module.entropy = F.cross_entropy
    module.Entropy = torch.nn.CrossEntropyLoss
    module.LayerAndEntropy = LayerAndEntropy
    monkeypatch.setitem(sys.modules, "some_kernels.loss", module)
    monkeypatch.setattr("benchmarks.contestants.version", lambda package: "1.2")
    return Peer("some-kernels", "some_kernels.loss", "entropy", frozenset({"label_smoothing"}))


def test_a_peer_runs_what_it_takes(peer):
    case = cross_entropy(24, 10, target="half ignored", options=("label_smoothing",))
    with_module = replace(peer, name="Entropy", adapt=PEERS["flash"].adapt)
    entries = measure.run(case, {"one": peer, "other": with_module}, BRIEF, devices.Cpu()).entries
    assert {entry.problem for entry in entries.values()} == {""}
    assert peer.state() == (True, "1.2")
    layer = {"name": "LayerAndEntropy", "adapt": PEERS["fla linear"].adapt, "options": PEERS["fla linear"].options}
    case = linear_cross_entropy(24, 10, width=6, target="half ignored", options=("classifier", "label_smoothing"))
    entries = measure.run(case, {"layer": replace(peer, **layer)}, BRIEF, devices.Cpu()).entries
    assert entries["layer"].problem == ""


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("nll", "nll_loss", (24, 10)), "cross entropy alone"),
        (cross_entropy(2, 10, 4), "two dimensions"),
        (cross_entropy(24, 10, target="probabilities"), "class indices"),
        (cross_entropy(24, 10, options=("label_smoothing", "weight")), "has no weight"),
        (cross_entropy(24, 10, reduction="none"), 'has no reduction="none"'),
    ],
    ids=str,
)
def test_a_peer_says_what_it_does_not_take(peer, case, reason):
    with pytest.raises(CannotRun, match=reason):
        peer(case)


def test_a_peer_that_is_absent_or_broken_says_which(peer, monkeypatch):
    assert replace(peer, module="no_such_kernels.loss").state() == (False, "not installed")
    assert replace(peer, name="absent").state()[1].startswith("cannot be imported: AttributeError")
    broken = types.ModuleType("broken")
    monkeypatch.setitem(sys.modules, "broken", broken)
    assert replace(peer, module="broken.loss").state()[1].startswith("cannot be imported: ModuleNotFoundError")


def results_of(case, **seconds):
    """A case whose contestants took so long for a forward, and twice as long for a step; a copy takes a second."""

    def times(value):
        return measure.Times(value, (0.9 * value, 1.1 * value), 7, 1)

    entries = {
        name: measure.Entry(times={"forward": times(value), "step": times(2 * value)}, peak_bytes=10**9, launches=2)
        if isinstance(value, float)
        else measure.Entry(value)
        for name, value in seconds.items()
    }
    size = torch.Size(case.shape).numel() * case.dtype.itemsize
    moved = {"forward": size, "step": 2 * size}
    return measure.Result(case, 2, size, moved, times(1.0), entries, memory_bandwidth=2.0 * size)


def goal(title):
    (found,) = [goal for goal in goals.GOALS if goal.title.startswith(title)]
    return found


HEAD = cross_entropy(8192, 128256, dtype=torch.bfloat16)


def test_a_goal_is_judged_by_its_worst_case():
    good = results_of(HEAD, fusedloss=0.5, native=2.5, compiled=0.9, liger=0.8, quack=1.0)
    bad = results_of(replace(HEAD, shape=(4096, 128256)), fusedloss=0.6, native=2.0, compiled=0.9, liger="cannot: x")
    vs_native = goals.judge(goal("cross entropy step: vs native"), [good, bad])
    assert (vs_native["verdict"], vs_native["met"], vs_native["measured"]) == ("missed", 1, 2)
    assert vs_native["worst"] == pytest.approx(2.0 / 0.6)
    assert vs_native["where"] == "cross entropy 4096x128256 bfloat16"
    best = goals.judge(goal("cross entropy step: vs best"), [good])
    assert (best["verdict"], best["worst"], best["rival"]) == ("reached in part", 1.6, "liger")
    forward = goals.judge(goal("forward, 1024 classes"), [good, bad])
    assert (forward["verdict"], forward["worst"]) == ("missed", pytest.approx(1 / 1.2))
    floor = goals.judge(goal("cross entropy step: of floor"), [good])
    assert (floor["verdict"], floor["worst"]) == ("reached in part", 1.0)


def test_a_goal_is_missed_where_we_fail_and_open_where_nobody_ran():
    ours_wrong = results_of(HEAD, fusedloss="wrong: loss", native=2.5)
    verdict = goals.judge(goal("cross entropy step: vs native"), [ours_wrong])
    assert (verdict["verdict"], verdict["where"], verdict["met"]) == ("missed", str(HEAD), 0)
    native_failed = results_of(HEAD, fusedloss=0.5, native="failed: x")
    for results in ([], [native_failed]):
        assert goals.judge(goal("cross entropy step: vs native"), results)["verdict"] == "not measured"


def test_a_goal_for_launches_is_an_upper_bound():
    results = [results_of(case, fusedloss=0.5, native=0.5) for case in CASES["cuda"] if case.latency]
    assert goals.judge(goal("launches"), results)["verdict"] == "reached"
    results[1].entries["fusedloss"].launches = 3
    verdict = goals.judge(goal("launches"), results)
    assert (verdict["verdict"], verdict["worst"], verdict["where"]) == ("missed", 3, str(results[1].case))


def test_goals_of_triton_are_about_triton():
    results = [results_of(HEAD, fusedloss=0.5, triton=0.55, liger=0.6, flash=0.7)]
    near = goals.judge(goal("Triton, a step: of CUDA's speed"), results)
    assert (near["verdict"], near["worst"]) == ("reached in part", pytest.approx(0.5 / 0.55))
    ahead = goals.judge(goal("Triton, a step: vs Triton peers"), results)
    assert (ahead["worst"], ahead["rival"]) == (pytest.approx(0.6 / 0.55), "liger")
    for entries in ({}, {"triton": "cannot: no driver"}):
        absent = results_of(HEAD, fusedloss=0.5, liger=0.6, **entries)
        assert goals.judge(goal("Triton, a step: vs"), [absent])["verdict"] == "not measured"
    wrong = results_of(HEAD, fusedloss=0.5, liger=0.6, triton="wrong: loss")
    assert goals.judge(goal("Triton, a step: vs"), [wrong])["verdict"] == "missed"


def test_every_goal_has_cases_and_every_case_that_counts_is_large():
    for goal in goals.GOALS:
        cases = [case for case in CASES["cuda"] if goal.cases(case)]
        assert cases
        assert all(case.shape == (32, 10) or goals.beyond(case, goals.BEYOND_CACHE) for case in cases)


def test_the_tables_of_a_gpu():
    results = [
        results_of(HEAD, fusedloss=0.5, native=2.5, compiled=0.9, liger=0.8, quack="cannot: x"),
        results_of(replace(HEAD, shape=(4096, 128256)), fusedloss=3.0, native=2.5, quack="cannot: x"),
    ]
    facts = machine.facts("cpu") | GPU_FACTS
    text = report.document(facts, {None: results}, {"nll": "time"})
    assert "NVIDIA H200, 150 GB, 132 multiprocessors, 60.0 MB of L2" in text
    assert "liger-kernel not installed" in text
    assert "500.00 ms ±10.0%" in text
    assert "1.60x liger" in text
    assert "**0.83x**" in text
    assert "1.0 GB" in text
    assert "- quack cannot: x: cross entropy 8192x128256 bfloat16; cross entropy 4096x128256 bfloat16" in text
    assert "- left out, time: nll" in text
    assert "Threads" not in text
    data = json.loads(report.as_json(facts, {None: results}, {"nll": "time"}))
    assert len(data["goals"]) == len(goals.GOALS)
    assert data["results"][0]["entries"]["fusedloss"]["peak_bytes"] == 10**9


def on_a_fake_gpu(monkeypatch, *arguments):
    monkeypatch.setitem(command_line.DEVICES, "cuda", FakeGpu)
    monkeypatch.setattr(machine, "no_gpu", lambda: "")
    monkeypatch.setattr(machine, "gpu_facts", lambda: GPU_FACTS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda", "--quick", "--no-compile", *arguments])
    command_line.main()


@pytest.mark.long
# Small ones: Triton's interpreter, which takes part, needs two minutes for 65536x10.
@pytest.mark.parametrize("name", ["cross entropy 32x10 autocast bfloat16", "bce with logits 64x80 bfloat16"])
def test_a_run_on_a_gpu_writes_goals_and_cases(name, monkeypatch, tmp_path, capsys):
    on_a_fake_gpu(monkeypatch, "--filter", f"^{name}$", "--output", str(tmp_path))
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert result["name"] == name
    assert {name for name, entry in result["entries"].items() if not entry["problem"]} >= {"native", "fusedloss"}
    assert result["entries"]["fusedloss"]["launches"] == (2 if "32x10" in name else None)
    tables = (tmp_path / "results.md").read_text()
    assert tables.index("## Goals") < tables.index("## Cases")
    assert tables.split("## Goals")[1].strip() in capsys.readouterr().out


def test_a_quick_run_begins_nothing_that_two_minutes_would_not_hold(monkeypatch, tmp_path):
    assert command_line.QUICK_MINUTES < 2
    monkeypatch.setattr(command_line, "QUICK_MINUTES", -1)
    on_a_fake_gpu(monkeypatch, "--output", str(tmp_path))
    data = json.loads((tmp_path / "results.json").read_text())
    assert (data["results"], len(data["left_out"])) == ([], len(CASES["cuda"]))


def test_what_comes_too_late_or_fails_is_left_out(monkeypatch, tmp_path):
    on_a_fake_gpu(monkeypatch, "--minutes", "-1", "--output", str(tmp_path))
    data = json.loads((tmp_path / "results.json").read_text())
    assert (data["results"], len(data["left_out"])) == ([], len(CASES["cuda"]))

    def broken(self, case):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(FakeGpu, "prepare", broken)
    on_a_fake_gpu(monkeypatch, "--filter", "^nll", "--output", str(tmp_path))
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["left_out"]["nll 65536x1000 float32"] == "RuntimeError: CUDA error: out of memory"


def test_the_name_of_a_folder(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert machine.slug("cuda") == "nvidia-h100-80gb-hbm3"
    assert machine.slug("cpu").endswith("-cores")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_an_error_says_so():
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_without_kernels_for_it_is_an_error_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.fusedloss, "backends", lambda: {"cpu": "", "cuda": "not built", "triton": "absent"})
    assert machine.no_gpu() == "fusedloss has no kernels for it: not built; absent"
    monkeypatch.setattr(machine.fusedloss, "backends", lambda: {"cpu": "", "cuda": "not built", "triton": ""})
    assert machine.no_gpu() == ""
