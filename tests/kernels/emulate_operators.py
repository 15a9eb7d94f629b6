"""Run the Python tests with the CUDA kernels in the place of the CPU's, under an emulator: no GPU is needed.

    python tests/kernels/emulate_operators.py [pytest arguments]

Builds a copy of the package in build/emulated whose operators hand tensors of the CPU to the CUDA kernels, and runs the
tests on it: values, gradients, edge cases, layouts, dtypes and options are judged as they would be on a GPU. Speed,
streams and graphs are not seen. The emulator is found in FUSEDLOSS_CUDA_EMU, or in ../shared/cuda_emu.
"""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulated"
EMULATOR = Path(os.environ.get("FUSEDLOSS_CUDA_EMU", ROOT.parent / "shared" / "cuda_emu")).resolve()

# What is about the CPU or about neither, or would wait for a compiler.
LEFT_OUT = ["benchmarks", "compile", "cuda", "documents", "kernel_resources", "layering", "on_gpu", "packaging"]
LEFT_OUT += ["backend", "threads", "triton", "triton_math", "what_is_there"]
# An invalid target or value is an assertion of the device here, not the CPU's exception.
ASSERTED = [
    "a class too many",
    "a negative class",
    "a class far out",
    "a class where there is none",
    "a default ignored class",
    "a probability above",
    "a probability below",
    "no probability",
    "a label above",
    "no label",
    "out_of_range",
    "bad_target",
    "broken_calls",
    "invalid_target",
]

# The emulator looks for stray writes behind the static shared memory of a block, which it has marked as far as the
# last launch went. A launch that goes far, before each, keeps it from blaming what an earlier one left there.
POISON = """
__global__ void poison() {
  __shared__ char all[40000];
  if (threadIdx.x == 0) all[0] = 1;
}
extern "C" void emulated_poison() { poison<<<1, 32>>>(); }
"""


def build_kernels() -> str:
    """The CUDA kernels as a library for the CPU."""
    sys.path.insert(0, str(EMULATOR))
    import cuda_emu

    sources = sorted(str(path) for kind in ("*.cu", "*.cpp") for path in ROOT.glob(f"csrc/kernels/cuda/{kind}"))
    return cuda_emu.load(sources, include_dirs=[str(ROOT / "csrc")], glue=POISON, std="c++20").path


def build_package(kernels: str) -> None:
    """A copy of the package whose operators call them."""
    import torch
    from setuptools import setup
    from torch.utils import cpp_extension

    shutil.copytree(ROOT / "fusedloss", BUILD / "fusedloss", dirs_exist_ok=True, ignore=shutil.ignore_patterns("_C*"))
    replaced = {ROOT / "csrc/ops/cuda_seam.cpp"}
    sources = [path for path in sorted(ROOT.glob("csrc/**/*.cpp")) if path not in replaced]
    sources.append(ROOT / "tests/kernels/emulated_launch.cpp")
    flags = ["-std=c++20", "-O2", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    extension = cpp_extension.CppExtension(
        "fusedloss._C",
        [str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "build")],  # setup.py leaves a header in build
        define_macros=[("FUSEDLOSS_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args={"cxx": flags},
        extra_link_args=["-fopenmp", kernels],
    )
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja
    os.chdir(ROOT)
    setup(
        name="fusedloss",
        packages=[],
        ext_modules=[extension],
        cmdclass={"build_ext": cpp_extension.BuildExtension},
        script_args=["--quiet", "build_ext", "--build-lib", str(BUILD), "--build-temp", str(BUILD / "objects")],
    )


class WithoutAsserted:
    """A plugin of pytest that leaves out the tests of ASSERTED."""

    def pytest_collection_modifyitems(self, config, items):
        left_out = [item for item in items if any(name in item.name for name in ASSERTED)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def main() -> None:
    if not (EMULATOR / "cuda_emu.py").exists():
        sys.exit(f"emulate_operators: no emulator in {EMULATOR}; FUSEDLOSS_CUDA_EMU names its folder")
    build_package(build_kernels())
    import pytest

    tests = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if path.stem[len("test_") :] not in LEFT_OUT]
    options = ["-o", f"pythonpath={BUILD}", "-p", "no:cacheprovider", "--interpreted", "none", *sys.argv[1:]]
    sys.exit(pytest.main([*options, *tests], plugins=[WithoutAsserted()]))


if __name__ == "__main__":
    main()
