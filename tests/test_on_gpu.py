"""What is to be run on a GPU, where there is none: names and limits fit, stages end, and what comes back is recorded.

Programs that print what the real ones would stand in for Python, nvcc, ncu and compute-sanitizer.
"""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_benchmarks import CASES, GPU_FACTS, results_of

from benchmarks import machine, readme, report

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

import gpu_headlines  # noqa: E402
import on_gpu_dry_run  # noqa: E402
import record_gpu  # noqa: E402

GPU = {str(case): case for case in CASES["cuda"]}
STAGES = [stage["stage"] for stage in on_gpu_dry_run.stages()]
SECOND = ["ncu", "devices", "peers", "triton"]  # beside facts and build

# --- Do names, filters, files and limits fit? ----------------------------------------------------------------


@pytest.mark.long
def test_the_dry_run_finds_nothing_wrong(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["bash", "tools/on_gpu.sh", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in verdicts] == STAGES
    assert re.search(r"bench .* \d+ of \d+ cases", done.stdout)
    assert re.search(r"tests .* \d{4} tests collected", done.stdout)


def starts_torch(*row):
    return pytest.param(*row, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["python", "-m", "pytest", "tests/test_nothing.py"], "no such file: tests/test_nothing.py"),
        starts_torch(
            ["python", "-m", "pytest", "tests/test_lesson.py", "-k", "no_such_test"], "pytest selects nothing"
        ),
        starts_torch(
            ["python", "-m", "benchmarks", "--filter", "^(nll 1x1 float32)$"], "of 1 cases that the filter names, 0"
        ),
        starts_torch(["python", "-m", "benchmarks", "--no-such", "--filter", "nll"], "knows nothing of --no-such"),
        (["python", "tools/nothing.py"], "no such file"),
        (["nvcc", "-o", "x", "tests/kernels/nothing.cu"], "no such file"),
        (["build/check_kernels", "float8"], "knows nothing of float8"),
        (["compute-sanitizer", "--tool", "leakcheck", "build/check_kernels"], "leakcheck"),
        starts_torch(["ncu", "python", "tools/gpu_facts.py"], "eight cases are wanted"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_dry_run_says_what_is_wrong(command, reason):
    done = subprocess.run(
        [sys.executable, "tools/on_gpu_dry_run.py", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_the_plan_has_limits(monkeypatch):
    rows = on_gpu_dry_run.stages()
    assert "8 files" in on_gpu_dry_run.plan()
    longer = [row | {"limit": "300"} for row in rows]
    monkeypatch.setattr(on_gpu_dry_run, "stages", lambda: longer)
    with pytest.raises(AssertionError, match="more than 550 seconds"):
        on_gpu_dry_run.plan()
    monkeypatch.setattr(on_gpu_dry_run, "stages", lambda: [row | {"log": f"{row['stage']}.log"} for row in rows])
    with pytest.raises(AssertionError, match="more than 8 files"):
        on_gpu_dry_run.plan()


def test_the_headlines_are_cases_of_the_benchmarks():
    assert set(gpu_headlines.names("bench")) <= GPU.keys()
    assert len(gpu_headlines.names("ncu")) == 8
    assert gpu_headlines.names("peers")
    assert {mark for headline in gpu_headlines.HEADLINES for mark in headline.marks.split()} == {"ncu", "peers"}


@pytest.mark.parametrize("command", [["bash", "-n"], ["shellcheck"]], ids=" ".join)
def test_the_script_is_well_formed(command):
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([*command, "tools/on_gpu.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- The stages, with programs that stand in -----------------------------------------------------------------

PYTHON = r"""
case "$*" in
  *cache_tag*) echo cpython-312 ;;
  *get_device_capability*) echo 9.0 ;;
  *gpu_facts.py*) printf 'revision: abc1234\nnvcc: Build 13.0\nncu: absent\ngpu: NVIDIA H200\n' ;;
  *kernel_resources.py*) echo 'kernel_resources: 120 kernels for sm_90; 1 refused'; exit 1 ;;
  *'-m pytest'*test_cuda_large.py*) eval "${LARGE:-echo '7 passed in 18.20s'}" ;;
  *'-m pytest'*test_cuda.py*) eval "${TESTS:-echo '3302 passed, 2 skipped in 99.10s (0:01:39)'}" ;;
  *'-m pytest'*) echo '160 passed, 13 deselected in 40.00s' ;;
  *'-m benchmarks'*) while [ "$1" != --output ]; do shift; done
    mkdir -p "$2" && cp "$BENCHMARKS/${2##*/}.json" "$2/results.json" && echo "These tables are in $2" ;;
esac
"""
CHECK_KERNELS = """
[ "$1" = "${WRONG:-}" ] && echo "tiles: 2 wrong" && echo "kernels: 900 cases, 2 failed checks" && exit 1
echo "kernels: 900 cases, 0 failed checks"
"""
PROGRAMS = {
    "python": PYTHON,
    "nvcc": 'while [ "$1" != -o ]; do shift; done; cp "$CHECK_KERNELS" "$2"',
    "compute-sanitizer": """
echo '========= COMPUTE-SANITIZER'
if [ "$2" = "${FAULTY:-}" ]; then
  echo '========= Invalid __global__ read of size 16 bytes'
  echo '========= ERROR SUMMARY: 3 errors'
  exit 9
fi
[ "$2" = racecheck ] && echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)' && exit
echo '========= ERROR SUMMARY: 0 errors'
""",
    "ncu": 'while [ "$1" != --log-file ]; do shift; done; cp "$BENCHMARKS/ncu.csv" "$2"',
}


def as_csv(calls):
    """What ncu leaves: lines of its own, two lines of titles, then a marker and two kernels for each call."""
    metrics = {
        "gpu__time_duration.sum": ("nsecond", "1,234,000"),
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "71.4"),
        "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "48.2"),
        "launch__registers_per_thread": ("register/thread", "64"),
        "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ("inst", "9"),
        "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "6.5"),
        "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "1.5"),
    }
    text = io.StringIO()
    table = csv.writer(text, quoting=csv.QUOTE_ALL)
    table.writerow(["ID", "Kernel Name", *metrics])
    table.writerow(["", "", *(unit for unit, _ in metrics.values())])
    values = [value for _, value in metrics.values()]
    for call in range(calls):
        table.writerow([3 * call, "at::native::elementwise<arange_cuda_out>(int)", *values])
        table.writerow([3 * call + 1, "fusedloss::cuda::divisor<float>(Args)", "4,000", *["1.0"] * 6])
        table.writerow([3 * call + 2, "fusedloss::cuda::rows<bfloat16>(Args)", *values])
    return f"==PROF== Connected to process 7\n{text.getvalue()}"


def benchmarks_of(names, **seconds):
    facts = machine.facts("cpu") | GPU_FACTS
    return report.as_json(facts, {None: [results_of(GPU[name], **seconds) for name in names]}, {})


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine with the script and nothing but programs that stand in."""
    monkeypatch.delenv("OUT", raising=False)
    for name in ("bin", "tree/tools", "tree/build", "benchmarks"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("on_gpu.sh", "gpu_headlines.py"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tree/tools")
    for name, text in (PROGRAMS | {"check_kernels": CHECK_KERNELS}).items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(0o755)
    headlines = gpu_headlines.names("bench")
    (tmp_path / "benchmarks/bench.json").write_text(benchmarks_of(headlines, fusedloss=0.6, native=2.4, triton=0.9))
    (tmp_path / "benchmarks/peers.json").write_text(
        benchmarks_of(gpu_headlines.names("peers"), fusedloss=0.6, native=2.4, compiled=1.2, liger=0.9)
    )
    (tmp_path / "benchmarks/ncu.csv").write_text(as_csv(len(record_gpu.CALLS)))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", str(tmp_path / "bin/python"))
    monkeypatch.setenv("BENCHMARKS", str(tmp_path / "benchmarks"))
    monkeypatch.setenv("CHECK_KERNELS", str(tmp_path / "bin/check_kernels"))
    return tmp_path


def on_gpu(bare, *arguments, **environment):
    """The run, and its verdicts by stage."""
    done = subprocess.run(
        ["bash", bare / "tree/tools/on_gpu.sh", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    verdicts = {line.split()[0]: line for line in done.stdout.split(":\n")[-1].splitlines()}
    return done, verdicts


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()


def test_both_sets_run_and_leave_at_most_eight_files(bare):
    for chosen in ("first", "second"):
        done, verdicts = on_gpu(bare, *([] if chosen == "first" else [chosen]))
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(verdicts) == [row["stage"] for row in on_gpu_dry_run.stages() if chosen in row["sets"]]
        assert all(" passed " in line for line in verdicts.values())
        left = [path.name for path in (bare / "tree/build/on_gpu" / chosen).iterdir()]
        assert len(left) <= on_gpu_dry_run.FILES
        assert set(left) <= on_gpu_dry_run.LEFT | {row["log"] for row in on_gpu_dry_run.stages()}
    assert verdicts["build"].endswith("refuses the machine code"), "which keeps nothing from being tested"


def test_a_stage_that_fails_or_takes_too_long_stops_no_other(bare):
    hangs = f"(trap '' TERM; sleep 300) & echo $! >{bare}/child; echo waits; wait"
    fails = "echo 'FAILED tests/test_cuda.py::test_a[b c] - AssertionError'; echo '1 failed, 9 passed in 1.00s'; exit 1"
    done, verdicts = on_gpu(bare, LIMIT="3", TESTS=fails, LARGE=hangs, WRONG="float16", FAULTY="memcheck")
    assert done.returncode == 1
    assert {stage: line.split()[1:3] for stage, line in verdicts.items()} == {
        "facts": ["passed", "0"],
        "build": ["passed", "0"],
        "kernels": ["failed", "1"],
        "tests": ["failed", "1"],
        "large": ["stopped", "124"],
        "bench": ["passed", "0"],
        "sanitize": ["failed", "1"],
    }
    assert verdicts["kernels"].endswith("checked: 1 of 4 failed: float16")
    assert verdicts["tests"].endswith("1 failed, 9 passed in 1.00s")
    assert verdicts["large"].endswith("waits")
    assert verdicts["sanitize"].endswith("sanitized: 1 of 4 failed: memcheck")
    assert not is_running(int((bare / "child").read_text()))


def test_what_was_measured_before_a_stage_was_stopped_is_kept(bare):
    program = bare / "bin/python"
    program.write_text(program.read_text().replace('echo "These tables are in $2"', "sleep 300"))
    _, verdicts = on_gpu(bare, "bench", LIMIT="2")
    assert " stopped " in verdicts["bench"]
    assert json.loads((bare / "tree/build/on_gpu/bench/bench.json").read_text())["results"]


def test_nothing_runs_on_where_the_script_is_ended(bare):
    environment = os.environ | {"LARGE": f"sleep 300 & echo $! >{bare}/child; wait"}
    running = subprocess.Popen(["bash", bare / "tree/tools/on_gpu.sh", "large"], env=environment)
    for _ in range(100):
        if (bare / "child").exists() and (bare / "child").read_text():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) != 0
    assert not is_running(int((bare / "child").read_text()))


def test_tests_that_are_all_skipped_show_nothing(bare):
    done, verdicts = on_gpu(bare, "tests", TESTS="echo '3304 skipped in 9.00s'")
    assert done.returncode == 1
    assert verdicts["tests"].endswith("no test has run")


@pytest.mark.parametrize(("stage", "program"), [("ncu", "ncu"), ("sanitize", "compute-sanitizer")])
def test_a_program_that_is_missing_is_named(stage, program, bare):
    if shutil.which(program, path="/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin"):
        pytest.skip(f"{program} is installed here")
    (bare / "bin" / program).unlink()
    _, verdicts = on_gpu(bare, stage)
    assert verdicts[stage].endswith(f"{program} is not on the PATH, and this stage needs it")


def test_a_stage_that_does_not_exist_is_refused(bare):
    done, _ = on_gpu(bare, "kernels", "tiles")
    assert (done.returncode, done.stderr) == (2, "on_gpu: no stage or set is called tiles\n")
    assert not (bare / "tree/build/on_gpu").exists()


# --- What comes back is recorded -----------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of all documents and results, as if no GPU had been recorded, which recording changes in ours' place."""
    tree = tmp_path / "checkout"
    for part in ("docs", "csrc", "benchmarks"):
        shutil.copytree(ROOT / part, tree / part)
    shutil.copy(ROOT / "README.md", tree)
    monkeypatch.setattr(readme, "ROOT", tree)
    monkeypatch.setattr(readme, "RESULTS", tree / "benchmarks/results")
    for run in readme.RESULTS.glob("*/run.json"):
        shutil.rmtree(run.parent)
    for path, text in record_gpu.documents().items():
        path.write_text(text)
    return tree


def record(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["record_gpu", *map(str, arguments)])
    record_gpu.main()


def folders_of(bare, *sets, **environment):
    for chosen in sets:
        on_gpu(bare, chosen, **environment)
    return [bare / "tree/build/on_gpu" / chosen for chosen in sets]


def test_all_that_passed_is_recorded(bare, checkout, monkeypatch):
    record(monkeypatch, *folders_of(bare, "first", "second"))
    results = checkout / "benchmarks/results/nvidia-h200"
    assert {path.name for path in results.iterdir()} >= {"run.json", "results.json", "results.md", "speedup.svg"}
    rows = {row["name"]: row for row in json.loads((results / "results.json").read_text())["results"]}
    assert rows.keys() == set(gpu_headlines.names("bench"))
    assert "liger" in rows["cross entropy 8192x32000 bfloat16"]["entries"], "of a case in both, the second"
    assert "1.50x liger" in (results / "results.md").read_text()

    text = (checkout / "README.md").read_text()
    assert "CUDA kernels <!-- gpu: cuda -->have passed their tests on NVIDIA H200<!-- /gpu -->" in text
    assert "Triton kernels <!-- gpu: triton -->have passed their tests on NVIDIA H200<!-- /gpu -->" in text
    assert "<!-- gpu: speed -->has been measured on NVIDIA H200<!-- /gpu -->" in text
    speed = (checkout / "docs/speed.md").read_text()
    assert re.search(r"\| cross entropy 8192x128256 bfloat16 +\| 4800.00 ms", speed.partition("NVIDIA H200, torch")[2])
    assert "NVIDIA H200 is in `docs/gpu.md`" in (checkout / "csrc/kernels/cuda/README.md").read_text()
    assert "of NVIDIA H200." in (checkout / "benchmarks/README.md").read_text()
    for chapter in ("06-cuda", "07-triton"):
        assert "**Nothing in this chapter" in (checkout / f"docs/tutorial/{chapter}.md").read_text()

    page = (checkout / "docs/gpu.md").read_text()
    assert "- revision: abc1234\n" in page
    assert re.search(r"\| tests +\| passed +\| +\d+ \| 3302 passed, 2 skipped ", page)
    assert re.search(r"\| kernels +\| passed .* float32: 0 of 900 wrong; ", page)
    assert re.search(r"\| sanitize +\| passed .* racecheck: RACECHECK SUMMARY: 0 hazards", page)
    # Predicted, wanted and measured; of ncu: memory, occupancy, registers, stall.
    cells = ["8192x32000 bfloat16", "forward", "65-70%", "52-57%", "90%", "83%", "71%", "48%", "64", "long scoreboard"]
    assert re.search(r" +\| +".join(cells), page)
    assert re.search(r"cross entropy 32x10 float32 +\| +step \| +16-20 µs \| +16-20 µs \| +\| 1200.00 ms", page)
    assert record_gpu.readme.written(speed) == speed
    record(monkeypatch)
    with pytest.raises(SystemExit) as verdict:
        record(monkeypatch, "--check")
    assert verdict.value.code == 0


def test_what_failed_or_is_missing_stays_open(bare, checkout, monkeypatch):
    fails = "echo 'FAILED tests/test_cuda.py::test_a[b c] - assert 1 == 2'; echo '1 failed, 9 passed in 1.00s'; exit 1"
    record(monkeypatch, *folders_of(bare, "first", TESTS=fails, FAULTY="memcheck"))
    text = (checkout / "README.md").read_text()
    assert "CUDA kernels <!-- gpu: cuda -->**have not been run yet**<!-- /gpu -->" in text
    assert "Triton kernels <!-- gpu: triton -->**have not been run yet**<!-- /gpu -->" in text
    assert "has been measured on NVIDIA H200" in text
    page = (checkout / "docs/gpu.md").read_text()
    assert "Tests that failed:\n\n- `tests/test_cuda.py::test_a[b c]`\n" in page
    assert re.search(r"\| tests +\| failed +\| +\d+ \| 1 failed, 9 passed ", page)
    assert "memcheck: ERROR SUMMARY: 3 errors (Invalid __global__ read of size 16 bytes)" in page
    assert re.search(r"\| triton +\| not run ", page)


def test_what_came_before_a_stage_was_stopped_is_recorded(came_back, checkout, tmp_path, monkeypatch):
    folders = shutil.copytree(came_back, tmp_path / "came_back")
    (folders / "second/ncu.csv").write_text(as_csv(3))
    spoil(folders / "second/summary.txt", "ncu       passed     0", "ncu       stopped  124")
    record(monkeypatch, folders / "first", folders / "second")
    run = json.loads((checkout / "benchmarks/results/nvidia-h200/run.json").read_text())
    assert list(run["ncu"]["found"]) == [f"{name}, {measure}" for name, measure in record_gpu.CALLS[:3]]


def test_without_benchmarks_nothing_has_been_measured(bare, checkout, monkeypatch):
    (bare / "benchmarks/bench.json").unlink()
    record(monkeypatch, *folders_of(bare, "first"))
    text = (checkout / "README.md").read_text()
    assert "<!-- gpu: cuda -->have passed their tests on NVIDIA H200<!-- /gpu -->" in text
    assert "<!-- gpu: speed -->**has not been measured yet**<!-- /gpu -->" in text
    assert "none of a GPU are there yet" in (checkout / "benchmarks/README.md").read_text()
    assert [path.name for path in (checkout / "benchmarks/results/nvidia-h200").iterdir()] == ["run.json"]


def spoil(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


DAMAGES = {
    "no summary.txt": lambda folder: (folder / "summary.txt").unlink(),
    "no verdict of a stage": lambda folder: (folder / "summary.txt").write_text("Segmentation fault\n"),
    "bench.json says nothing of it": lambda folder: (folder / "bench.json").unlink(),
    "bench.json of bench: JSONDecodeError": lambda folder: (folder / "bench.json").write_text('{"machine": {'),
    "bench.json is not what": lambda folder: (folder / "bench.json").write_text('{"results": [{}]}'),
    "of NVIDIA A100": lambda folder: spoil(folder / "bench.json", "NVIDIA H200", "NVIDIA A100"),
    "tests has passed, and no log says": lambda folder: (folder / "tests.log").write_text("\0\0"),
    "names no GPU": lambda folder: spoil(folder / "build.log", "gpu: NVIDIA H200", "gpu: absent"),
    "revision is fff0000, and abc1234": lambda folder: spoil(folder / "../second/build.log", "abc1234", "fff0000"),
    "15 calls instead of 16": lambda folder: (folder / "../second/ncu.csv").write_text(as_csv(15)),
    "17 calls instead of 16": lambda folder: (folder / "../second/ncu.csv").write_text(as_csv(17)),
}


@pytest.fixture(scope="module")
def came_back(tmp_path_factory):
    """Both sets' folders; made once, and copied."""
    with pytest.MonkeyPatch.context() as patch:
        place = bare.__wrapped__(tmp_path_factory.mktemp("came_back"), patch)
        folders_of(place, "first", "second")
        yield place / "tree/build/on_gpu"


@pytest.mark.parametrize("reason", DAMAGES)
def test_what_cannot_be_read_changes_nothing(reason, came_back, checkout, tmp_path, monkeypatch):
    folders = shutil.copytree(came_back, tmp_path / "came_back")
    DAMAGES[reason](folders / "first")
    before = (checkout / "README.md").read_text()
    with pytest.raises(SystemExit, match=re.escape(reason)):
        record(monkeypatch, folders / "first", folders / "second")
    assert not (checkout / "benchmarks/results/nvidia-h200").exists()
    assert (checkout / "README.md").read_text() == before


def test_results_are_restored_as_they_were():
    paths = list((ROOT / "benchmarks/results").glob("*-cores/results.json"))
    assert paths
    for path in paths:
        data = json.loads(path.read_text())
        restored = {0: [report.restored(row) for row in data["results"]]}
        assert json.loads(report.as_json(data["machine"], restored, {}))["results"] == data["results"]


# --- The documents are true ----------------------------------------------------------------------------------


def test_the_documents_are_what_the_results_make_of_them():
    done = subprocess.run([sys.executable, "tools/record_gpu.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def unmarked(text):
    """Sentences that say that no GPU has run or measured something, outside of the marks."""
    sentences = re.split(r"(?<=[.!?:;])\s+|\n\n|\|", record_gpu.MARK.sub("", text))
    denies = r"\b(yet|never|nothing|none|neither|nobody|not been|untested|unmeasured)\b"
    about = r"\b(run|ran|measured|timed|tried|tested)\b"
    flat = [" ".join(sentence.split()) for sentence in sentences]
    return [s for s in flat if "GPU" in s and all(re.search(part, s, re.IGNORECASE) for part in (denies, about))]


def test_a_sentence_about_what_no_gpu_has_shown_is_marked():
    folders = ("docs", "csrc", "benchmarks", "examples")
    paths = [ROOT / "README.md", *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]
    texts = {str(path): path.read_text() for path in paths if path != ROOT / record_gpu.DOCUMENT}
    assert {path: unmarked(text) for path, text in texts.items() if unmarked(text)} == {}
    assert unmarked("It has never been\nrun on a GPU."), "and would be found"
    marks = {match["key"] for text in texts.values() for match in record_gpu.MARK.finditer(text)}
    assert marks == record_gpu.STATEMENTS.keys()
    assert not [path for path, text in texts.items() if "\n<!-- gpu:" in text], "a line would become HTML"
