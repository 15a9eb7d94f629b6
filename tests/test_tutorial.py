"""The tutorial's programs: each is built as its chapter says, in a copy, and used."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs/tutorial"
needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake")


def run(*command, cwd):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.long
def test_the_miniature(tmp_path):
    folder = shutil.copytree(TUTORIAL / "minimal", tmp_path / "minimal", ignore=shutil.ignore_patterns("build", "*.so"))
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=folder)
    assert "passed" in run(sys.executable, "-m", "pytest", "--rootdir", folder, "test_tinyloss.py", cwd=folder)


@pytest.mark.long
@needs_cmake
def test_the_program_in_cpp():
    """In build/, so that the next run compiles only what has changed."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    run("cmake", "-G", "Ninja", "-S", TUTORIAL / "cpp", "-B", "build/train", prefix, cwd=ROOT)
    run("cmake", "--build", "build/train", cwd=ROOT)
    assert "% right" in run("build/train/train", cwd=ROOT)


A_TORCH_WITH_CUDA = """
set(CAFFE2_USE_CUDA ON)
include("{prefix}/Caffe2/public/cuda.cmake" OPTIONAL)
if(DEFINED CUDA_FOUND OR NOT CAFFE2_USE_CUDA)
  message(FATAL_ERROR "torch has looked for a CUDA toolkit")
endif()
"""


@needs_cmake
@pytest.mark.parametrize("project", [ROOT, TUTORIAL / "cpp"], ids=["the library", "the program"])
def test_a_torch_with_cuda_does_not_ask_cmake_for_a_toolkit(project, tmp_path):
    """The part of torch's own files that looks for one, which a torch without CUDA brings too."""
    (tmp_path / "TorchConfig.cmake").write_text(A_TORCH_WITH_CUDA.format(prefix=torch.utils.cmake_prefix_path))
    (tmp_path / "TorchConfigVersion.cmake").write_text("set(PACKAGE_VERSION_COMPATIBLE TRUE)\n")
    options = [f"-DTorch_DIR={tmp_path}", "-DFUSEDLOSS_TORCH=ON"]
    run("cmake", "-G", "Ninja", "-S", project, "-B", tmp_path / "build", *options, cwd=ROOT)


@pytest.mark.long
@pytest.mark.parametrize("script", sorted(TUTORIAL.glob("figures/*.py")), ids=lambda path: path.name)
def test_a_script_that_draws_figures(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run(sys.executable, script, tmp_path, cwd=ROOT)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn
    assert drawn <= {path.name for kind in ("figures/*", "results/*") for path in TUTORIAL.glob(kind)}


def test_the_picture_of_the_cpu_ladder_shows_its_results():
    found = json.loads((TUTORIAL / "results/cpu-ladder.json").read_text())["many"]
    drawn = (TUTORIAL / "figures/05-ladder.svg").read_text()
    for name, row in found.items():
        if name[:1].isdigit():
            assert name in drawn
            assert f">{row['ns']:.2f}<" in drawn, "run docs/tutorial/figures/ladders.py"


def files_of_the_patch():
    text = (TUTORIAL / "focal_loss.patch").read_text()
    return set(re.findall(r"^diff --git a/(\S+)", text, re.MULTILINE))


def test_the_patch_of_chapter_9_applies():
    """What it makes is built and tested by docs/tutorial/apply_patch.py, which compiles the library once more."""
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    run("git", "apply", "--check", TUTORIAL / "focal_loss.patch", cwd=ROOT)


def test_the_recipe_names_the_files_of_the_patch():
    recipe = re.search(r"^## Add a loss\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    steps = recipe[recipe.index("\n1. ") :]
    assert set(re.findall(r"`(\w+/[\w./]+)`", steps)) == files_of_the_patch()


def test_a_loss_is_added_in_few_files():
    """Tests included. Each place that a loss must be written in is one that may be forgotten."""
    assert len([name for name in files_of_the_patch() if (ROOT / name).exists()]) <= 12


def test_the_recipe_s_template_is_in_the_files_that_it_lists():
    """Of each new file in csrc, there is one of the template; each other file of the patch holds the template."""
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    command = re.search(r"`(git grep [^`]*)`", (ROOT / "README.md").read_text())[1]
    listed = set(run(*shlex.split(command), cwd=ROOT).split())
    expected = {name.replace("focal", "bce") for name in files_of_the_patch() if not name.startswith("tests/")}
    assert expected - listed == set()
