"""A wheel, in an environment that has nothing else and no compiler: tools/wheel.py builds it, and names it here."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

TRAINING = """
import json
import torch, fusedloss

def losses(criterion):
    torch.manual_seed(0)
    layer, x, y = torch.nn.Linear(20, 1000), torch.randn(256, 20), torch.randint(1000, (256,))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = criterion(layer(x), y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found

print(json.dumps({
    "file": fusedloss.__file__,
    "build": fusedloss.build_info(),
    "native": losses(torch.nn.CrossEntropyLoss()),
    "fused": losses(fusedloss.CrossEntropyLoss()),
    "openmp": sorted({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}),
}))
"""


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(request, tmp_path_factory):
    """The interpreter of an environment into which the wheel, and what it requires, is installed."""
    wheel = request.config.getoption("--wheel")
    if not wheel:
        pytest.skip("no wheel is tried: `make wheel` builds one, and tries it")
    wheel = os.path.abspath(wheel)
    folder = tmp_path_factory.mktemp("of_a_wheel")
    run(sys.executable, "-m", "venv", folder / "env")
    python = folder / "env/bin/python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    yield python
    shutil.rmtree(folder)  # torch alone takes gigabytes


def test_a_wheel_trains_where_there_is_no_compiler(environment, tmp_path):
    path = str(environment.parent)
    assert not any(shutil.which(compiler, path=path) for compiler in ("cc", "gcc", "c++", "g++", "clang", "nvcc"))
    found = json.loads(run(environment, "-c", TRAINING, cwd=tmp_path, env={"PATH": path, "HOME": str(tmp_path)}))
    assert found["file"].startswith(str(environment.parents[1]))
    torch.testing.assert_close(found["fused"], found["native"], rtol=1e-5, atol=0)
    assert found["fused"][-1] < found["fused"][0]
    assert bool(found["build"]["cuda"]) == (os.environ.get("FUSEDLOSS_CUDA") != "0")
    assert len(found["openmp"]) == 1, "threads of two OpenMP libraries do not know of each other"


def test_a_wheel_says_which_torch_it_requires(environment):
    run(environment, "-m", "pip", "check")
    script = (
        "import importlib.metadata as m, json; print(json.dumps([m.version('fusedloss'), m.requires('fusedloss')]))"
    )
    version, requires = json.loads(run(environment, "-c", script))
    minor = ".".join(torch.__version__.split(".")[:2])
    has_cuda = torch.version.cuda and os.environ.get("FUSEDLOSS_CUDA") != "0"
    cuda = f".cu{torch.version.cuda.split('.')[0]}" if has_cuda else ""
    assert version.endswith(f"+torch{minor}{cuda}")
    assert f"torch=={minor}.*" in requires
