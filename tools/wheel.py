"""Build a wheel with the CPU and CUDA kernels, for this torch and this Python, and try it in an empty environment.

    python tools/wheel.py

It lands in build/wheels. Its version names the torch that it is built beside, which it requires; its platform is what
auditwheel finds that it needs. TORCH_CUDA_ARCH_LIST says for which GPUs it is, as in any build; FUSEDLOSS_CUDA=0 leaves
the CUDA kernels out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import bootstrap
import torch

ROOT = Path(__file__).resolve().parent.parent
RAW, WHEELS = ROOT / "build/wheels/raw", ROOT / "build/wheels"
# They come with torch and are loaded before us. A second OpenMP would have threads of its own, and a number of its own.
OF_TORCH = ["libc10.so", "libtorch_cpu.so", "libtorch_python.so", "libgomp.so.1", "libcudart.so.*"]


def main():
    os.environ.setdefault("FUSEDLOSS_CUDA", "1")
    os.environ["CXX"] = bootstrap.compiler()  # as in the build in place, whose objects are then taken
    os.environ["FUSEDLOSS_LOCAL_VERSION"] = local_version()
    shutil.rmtree(WHEELS, ignore_errors=True)
    run("pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", RAW, ROOT)
    (built,) = RAW.glob("*.whl")
    excluded = (argument for name in OF_TORCH for argument in ("--exclude", name))
    run("auditwheel", "repair", *excluded, "--wheel-dir", WHEELS, built)
    (wheel,) = WHEELS.glob("*.whl")
    run("pytest", "tests/test_wheel.py", "--wheel", wheel)
    print(f"built, and tried: {wheel.relative_to(ROOT)}, {wheel.stat().st_size / 1e6:.1f} MB")


def local_version():
    """As in torch2.15.cu13: wheels with kernels need the CUDA runtime of that major version, which torch brings."""
    cuda = torch.version.cuda if os.environ["FUSEDLOSS_CUDA"] != "0" else None
    return f"torch{'.'.join(torch.__version__.split('.')[:2])}" + (f".cu{cuda.split('.')[0]}" if cuda else "")


def run(module, *arguments):
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
