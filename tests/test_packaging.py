"""What is packed, installed and imported; and what a build or an import says that cannot be."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import bootstrap
import pytest
import torch
from conftest import missing_cuda

import fusedloss

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    options = {"cwd": ROOT, **options}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def test_the_source_distribution_has_every_file(tmp_path):
    tracked = run("git", "ls-files")
    if tracked.returncode:
        pytest.skip("not a git checkout")
    made = run(sys.executable, "setup.py", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    assert made.returncode == 0, made.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    of_the_checkout_only = {".gitignore", ".ci/run"}
    assert set(tracked.stdout.split()) - of_the_checkout_only <= packed


def test_what_is_installed_has_its_types(tmp_path):
    """A type checker believes the annotations of a package only if py.typed lies in it."""
    made = run(sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path)
    assert made.returncode == 0, made.stderr
    installed = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"fusedloss/py.typed", "fusedloss/_C.pyi", "fusedloss/version.txt"} <= installed
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fusedloss/**/*.py")} <= installed


def test_another_torch_than_the_build_s_is_a_sentence(tmp_path):
    """Before the library is loaded, which may misread torch's classes; and it stays a sentence where no version is
    known, and loading fails."""
    package = shutil.copytree(ROOT / "fusedloss", tmp_path / "fusedloss")
    assert (package / "_C.torch").read_text().strip() == torch.__version__
    (package / "_C.torch").write_text("1.7.1+cu101\n")
    (library,) = package.glob("_C*.so")
    library.write_bytes(b"no library at all")
    minor = ".".join(torch.__version__.split(".")[:2])
    for words in (
        [
            "built beside torch 1.7.1+cu101",
            f"this is torch {torch.__version__}",
            f"built for torch {minor}",
            "pip install",
        ],
        [f"does not load beside torch {torch.__version__}", "pip install --no-build-isolation"],
    ):
        done = run(
            sys.executable, "-c", "import fusedloss", env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path
        )
        assert done.returncode == 1
        assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr
        (package / "_C.torch").unlink(missing_ok=True)


def test_sources_that_hide_what_is_installed_say_so(tmp_path):
    """Python looks in the current folder first, and there, in a clone, nobody has built in place."""
    package = shutil.copytree(ROOT / "fusedloss", tmp_path / "fusedloss", ignore=shutil.ignore_patterns("_C*.so"))
    shutil.copy(ROOT / "setup.py", tmp_path)
    done = run(sys.executable, "-c", "import fusedloss", cwd=tmp_path)
    assert done.returncode == 1
    assert f"These are the sources, in {package.parent}" in done.stderr.splitlines()[-1], done.stderr
    assert "from another folder" in done.stderr.splitlines()[-1]


def test_an_import_leaves_torch_s_compiler_alone():
    """It takes as long again as the import of torch."""
    done = run(sys.executable, "-c", "import sys, fusedloss; print('torch._dynamo' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_building_without_torch_says_what_to_install():
    """-S hides the installed packages; setuptools itself is on the path, torch is not."""
    stub = "import sys, types; sys.modules['setuptools'] = types.SimpleNamespace(setup=None); import runpy; "
    built = run(sys.executable, "-S", "-c", stub + "runpy.run_path('setup.py')")
    assert built.returncode != 0
    assert "pip install 'torch>=" in built.stderr
    assert "Traceback" not in built.stderr


@pytest.mark.parametrize("named", [[], ["--torch", "torch==2.12.1"]], ids=["", "named"])
def test_a_torch_that_is_named_has_an_environment_of_its_own(named, tmp_path, monkeypatch):
    """However good that of the active environment is."""
    of_its_own = tmp_path / ".venv/bin/python"
    for name, value in {
        "ROOT": tmp_path,
        "VENV": tmp_path / ".venv",
        "supported_torch": lambda: "2.13.0",
        "in_environment": lambda: True,
        "make_venv": lambda python, sees_system: asked.append((python, sees_system)),
        "complete": lambda python, stamp, torch, requirement: asked.append((python, torch, requirement)),
    }.items():
        monkeypatch.setattr(bootstrap, name, value)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # puts back what main() leaves
    monkeypatch.setattr(sys, "argv", ["bootstrap", "--no-build", *named])
    asked = []
    bootstrap.main()
    used = Path((tmp_path / "build/python-path").read_text().strip())
    if named:
        assert used == of_its_own
        assert asked == [(of_its_own, False), (of_its_own, None, "torch==2.12.1")]
    else:
        assert used == Path(sys.executable)
        assert asked == [(used, "2.13.0", bootstrap.requirement_of_torch())]


@pytest.mark.parametrize("wish", ["yes", "1"])
def test_a_cuda_switch_that_cannot_be_obeyed_stops_the_build(wish, monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_CUDA", wish)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    if wish == "1" and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("the default place of the CUDA toolkit cannot be hidden")
    built = run(sys.executable, "setup.py", "--version")
    assert built.returncode != 0
    assert "FUSEDLOSS_CUDA" in built.stderr


@pytest.mark.parametrize("wish", ["auto", "1"])
def test_a_toolkit_of_another_cuda_than_torch_s_is_not_taken(wish, monkeypatch, tmp_path):
    """torch refuses to compile with it, after pages of commands."""
    for name, text in {"bin/nvcc": "#!/bin/sh\necho release 12.8, V12.8.93\n", "include/cuda_runtime.h": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FUSEDLOSS_CUDA", wish)
    script = "import torch, runpy, sys; torch.version.cuda = '13.2'; sys.argv = ['setup.py', '--version']; "
    built = run(sys.executable, "-c", script + "runpy.run_path('setup.py')")
    assert f"the CUDA toolkit in {tmp_path} is 12.8, and this torch's 13.2" in built.stderr
    assert (built.returncode == 0) == (wish == "auto")
    assert ("not building the CUDA kernels" in built.stderr) == (wish == "auto")


def test_what_the_cuda_launcher_is_asked_names_what_is_missing():
    problem = {"dtype": "bfloat16", "pass_": "forward", "columns": False, "general": False, "positions": 2}
    for name, wrong in {"dtype": "int8", "pass_": "backwards"}.items():
        with pytest.raises(ValueError, match=f"there is no {wrong}"):
            fusedloss._C.cuda_class_borders(**problem | {name: wrong}, most=9)
    if missing_cuda() is None:
        assert 1025 in fusedloss._C.cuda_class_borders(**problem, most=2000)  # the first number of classes of long rows
    else:
        with pytest.raises(RuntimeError, match=r"cudaGetDeviceCount|without CUDA kernels"):
            fusedloss._C.cuda_class_borders(**problem, most=9)


def test_build_info():
    info = fusedloss.build_info()
    assert info["version"] == (ROOT / "fusedloss/version.txt").read_text().strip() == fusedloss.__version__
    assert info["openmp"], "without OpenMP every kernel runs on one thread"
    assert {"torch", "compiler", "cpu_capabilities", "cuda", "git_revision"} <= info.keys()
