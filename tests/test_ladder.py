"""The tutorial's ladders: the files compile, and their values and gradients are right on small inputs."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

LADDER = Path(__file__).parents[1] / "docs" / "tutorial" / "ladder"


def script(folder):
    spec = importlib.util.spec_from_file_location(f"ladder_{folder}", LADDER / folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cpu, cuda = script("cpu"), script("cuda")
RESULTS = LADDER.parent / "results"
EMULATOR = os.environ.get("FUSEDLOSS_CUDA_EMU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the ladder with")
    return tmp_path_factory.mktemp("ladder")


def test_every_rung_is_listed():
    assert sorted(cpu.RUNGS) == sorted(path.stem for path in (LADDER / "cpu").glob("*.cpp"))


def test_the_committed_results_are_of_these_rungs():
    measured = json.loads((RESULTS / "cpu-ladder.json").read_text())
    for shape, (rows, classes, rungs) in cpu.SHAPES.items():
        assert (measured[shape]["rows"], measured[shape]["classes"]) == (rows, classes)
        assert [name for name in measured[shape] if name[0].isdigit() or name.startswith("exercise")] == rungs
    counted = json.loads((RESULTS / "cuda-bytes.json").read_text())["rungs"]
    assert {name: (row["read"], row["written"]) for name, row in counted.items()} == cuda.RUNGS
    assert list(json.loads((RESULTS / "cuda-resources.json").read_text())["rungs"]) == list(cuda.RUNGS)


def each_rung():
    """Each takes a second to compile, and the first and the last are the ones with least in common."""
    ends = (cpu.RUNGS[0], cpu.RUNGS[-1])
    return [pytest.param(name, marks=[] if name in ends else [pytest.mark.long]) for name in cpu.RUNGS]


@pytest.mark.parametrize("name", each_rung())
def test_a_rung_of_the_cpu_ladder(name, folder):
    step = cpu.compile_rung(name, folder)
    # One class; a ragged vector; whole chunks and a ragged one, of which later ones raise the maximum; fewer rows than
    # lanes, and one more than a whole number of them.
    for rows, classes, scale in ((1, 1, 1), (3, 7, 1), (2, 2500, 30), (65, 19, 4), (5, 1024, 0)):
        logits, target = cpu.problem(rows, classes, scale, seed=classes)
        loss, gradient = cpu.evaluate(step, logits, target)
        true_loss, true_gradient = cpu.truth(logits, target)
        np.testing.assert_allclose(loss, true_loss, rtol=2e-6, atol=4e-6, err_msg=f"{rows} x {classes}")
        np.testing.assert_allclose(gradient, true_gradient, rtol=0, atol=1e-6, err_msg=f"{rows} x {classes}")


def test_every_cuda_rung_is_listed():
    assert sorted(cuda.RUNGS) == sorted(path.stem for path in (LADDER / "cuda").glob("*.cu"))


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc to compile the ladder with")
def test_the_cuda_ladder_compiles_to_what_the_chapter_reports():
    found, reported = cuda.resources(), json.loads((RESULTS / "cuda-resources.json").read_text())
    assert {row["spilled_bytes"] for row in found["rungs"].values()} == {0}
    if found["nvcc"] == reported["nvcc"]:  # another version allocates other registers
        assert found == reported


@pytest.mark.skipif(not EMULATOR, reason="FUSEDLOSS_CUDA_EMU names no emulator of CUDA to run the kernels with")
@pytest.mark.parametrize("name", cuda.RUNGS)
def test_a_rung_of_the_cuda_ladder(name):
    library = cuda.load_emulated(EMULATOR, name, check=True, order="random", seed=1)
    # One packet; a ragged number of packets; more than one chunk for each thread.
    for rows, classes, scale in ((1, 4, 1), (3, 52, 30), (2, 9000, 2)):
        cuda.run_emulated(library, rows, classes, scale)
