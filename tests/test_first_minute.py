"""python -m fusedloss tells what is here and what is missing, and compares a step with native's."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from conftest import missing_cuda

import fusedloss
from fusedloss import __main__ as command


def shown():
    done = subprocess.run([sys.executable, "-m", "fusedloss"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_here():
    text, info = shown(), fusedloss.build_info()
    for fact in ("version", "git_revision", "torch", "compiler"):
        assert info[fact] in text
    assert torch.__version__ in text.splitlines()[0]
    assert re.search(r"^  cpu +yes$", text, re.MULTILINE)
    assert bool(re.search(r"^  cuda +yes$", text, re.MULTILINE)) == (missing_cuda() is None)
    native, ours, ratio = map(float, re.findall(r"native +([\d.]+) ms\n.* ([\d.]+) ms, ([\d.]+) times", text)[0])
    assert ratio == pytest.approx(native / ours, rel=0.1)
    assert f"on {'cuda' if torch.cuda.is_available() else 'cpu'}, median" in text


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.parametrize(("built_for", "is_enough"), [("", False), ("8.0 9.0+PTX", True), ("10.0", False)])
def test_missing_cuda_kernels(built_for, is_enough, on_a_gpu, monkeypatch):
    info = {"openmp": True, "cuda": built_for}
    monkeypatch.setattr(fusedloss.backend, "build_info", lambda: info)
    commands = [command for _, command in command.missing_here(info) if "CUDA" in command]
    assert (
        commands == [] if is_enough else commands[0].startswith("FUSEDLOSS_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 pip install")
    )


OF_TORCH = ["numpy", 'triton==3.9.0; platform_system == "Linux"']


@pytest.mark.parametrize(("requirements", "wanted"), [(OF_TORCH, "triton==3.9.0"), (None, "triton")])
def test_missing_triton(requirements, wanted, on_a_gpu, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    missing = dict(command.missing_here({"openmp": True, "cuda": ""}))
    assert missing["Triton kernels"] == f"pip install '{wanted}'"


def test_without_a_gpu_nothing_of_it_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [what.partition(":")[0] for what, _ in command.missing_here({"openmp": False, "cuda": ""})] == ["Threads"]
