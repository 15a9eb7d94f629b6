"""Builds fusedloss._C; the metadata that do not depend on torch are in pyproject.toml.

FUSEDLOSS_CUDA=auto|1|0 decides whether the CUDA kernels are built: auto means if nvcc is found. A GPU in the build
machine decides nothing. Build with --no-build-isolation: an isolated build would use another torch than yours.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
VERSION = (ROOT / "fusedloss/version.txt").read_text().strip()
TORCH = (ROOT / "requirements/torch.txt").read_text().splitlines()[-1]

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    sys.exit(f"fusedloss builds against torch. First: pip install '{TORCH}'; then: pip install --no-build-isolation .")

BUILD = ROOT / "build"
# Overridden by TORCH_CUDA_ARCH_LIST. Code runs on later minor versions too: that for 8.0 on 8.6 and 8.9.
CUDA_ARCHS = "8.0 9.0+PTX 10.0 12.0"
CXX_FLAGS = "-std=c++20 -O3 -g0 -fopenmp -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall"
NVCC_FLAGS = "-std=c++20 -O3 -lineinfo --expt-relaxed-constexpr -Xptxas -v -Xfatbin -compress-all"


def find_cuda_home():
    """A folder with bin/nvcc and the headers; the nvcc on the PATH may be a wrapper far from both."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for home in (Path(candidate) for candidate in candidates if candidate):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return str(home)


def what_hinders_cuda(home):
    """Why the CUDA kernels cannot be built with the toolkit there, or None."""
    if not home:
        return "no CUDA toolkit (nvcc) was found"
    said = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", said)
    theirs, ours = torch.version.cuda, release[1] if release else "unknown"
    if theirs and ours.split(".")[0] != theirs.split(".")[0]:
        return f"the CUDA toolkit in {home} is {ours}, and this torch's {theirs}: torch wants the same major version"


def decide_cuda():
    """The toolkit to build the CUDA kernels with, or None; says what was decided and why."""
    wish = os.environ.get("FUSEDLOSS_CUDA", "auto")
    if wish not in ("auto", "1", "0"):
        sys.exit(f"FUSEDLOSS_CUDA must be auto, 1 or 0, got {wish!r}")
    home = find_cuda_home()
    obstacle = "FUSEDLOSS_CUDA=0" if wish == "0" else what_hinders_cuda(home)
    if wish == "1" and obstacle:
        sys.exit(f"FUSEDLOSS_CUDA=1, but {obstacle}")
    decision = f"not building the CUDA kernels: {obstacle}" if obstacle else f"building the CUDA kernels: {home}"
    print(f"fusedloss: {decision}", file=sys.stderr)
    return None if obstacle else home


def gencode(archs):
    """nvcc's flags for them. The kernels use nothing that 9.0 does not have: code for later devices is made from 9.0's
    PTX, since PTX takes as long to make."""
    for arch in archs.split():
        number = arch.removesuffix("+PTX").replace(".", "")
        ptx = min(number, "90", key=int)
        yield f"-gencode=arch=compute_{ptx},code=sm_{number}"
        if arch.endswith("+PTX"):
            yield f"-gencode=arch=compute_{ptx},code=compute_{ptx}"


def write_build_info(cuda_archs):
    """A header for csrc/module.cpp alone: as compiler flags, a new commit would recompile every file."""
    git = f'git -C "{ROOT}" rev-parse --short HEAD'
    revision = os.environ.get("FUSEDLOSS_REVISION") or subprocess.getoutput(git)  # a copy of the tree has no history
    facts = {
        "VERSION": VERSION,
        "GIT_REVISION": revision if revision.isalnum() else "unknown",
        "CUDA_ARCHS": cuda_archs.replace(";", " "),
    }
    text = "".join(f'#define FUSEDLOSS_{name} "{value}"\n' for name, value in facts.items())
    header = BUILD / "fusedloss_build_info.h"
    BUILD.mkdir(exist_ok=True)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


def extension():
    kinds = ("csrc/**/*.cpp", "csrc/kernels/cuda/*.cu")
    sources, cuda_sources = (sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(kind)) for kind in kinds)
    options = {"include_dirs": [str(BUILD)], "extra_link_args": ["-fopenmp"]}
    # In the command of each file, which is compiled again beside another torch: its headers may be older than objects.
    options["define_macros"] = [("FUSEDLOSS_TORCH_VERSION", f'"{torch.__version__}"')]
    cuda_home = decide_cuda()
    if cuda_home:
        cpp_extension.CUDA_HOME = cuda_home
        sources = cuda_sources + sources  # the longest to compile first
        # A build of torch without CUDA does not tell ninja which headers a .cu includes.
        newest = max(path.stat().st_mtime for path in ROOT.glob("csrc/**/*.*h"))
        for stale in (o for o in BUILD.glob("temp*/csrc/kernels/cuda/*.o") if o.stat().st_mtime < newest):
            stale.unlink()
        # One CUDA runtime in the process: torch's where it has one, else our own.
        runtime = ["cudart"] if torch.version.cuda else ["cudart_static", "dl", "rt", "pthread"]
        options |= {"libraries": runtime, "library_dirs": [f"{cuda_home}/{lib}" for lib in ("lib64", "lib")]}
        options["define_macros"] += [("FUSEDLOSS_WITH_CUDA", None)]
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST")  # torch makes flags of it
    write_build_info((archs or CUDA_ARCHS) if cuda_home else "")
    # The environment's CXXFLAGS come last, and win: setuptools puts its own before ours, where it reads them at all.
    cxx_flags = CXX_FLAGS.split() + shlex.split(os.environ.get("CXXFLAGS", ""))
    nvcc_flags = NVCC_FLAGS.split() + ([] if archs else list(gencode(CUDA_ARCHS)))
    options["extra_compile_args"] = {"cxx": cxx_flags, "nvcc": nvcc_flags}
    # Not CUDAExtension, which links libraries that a CPU build of torch does not have.
    return cpp_extension.CppExtension("fusedloss._C", sources, **options)


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, and beside the library a file that says which torch it is to be loaded with."""

    def run(self):
        super().run()
        library = Path(self.get_ext_fullpath("fusedloss._C"))
        library.with_name("_C.torch").write_text(f"{torch.__version__}\n")


def required_torch():
    """What is built holds the layout of torch's classes, and requires that torch; a source distribution takes any."""
    minor = ".".join(torch.__version__.split(".")[:2])
    return TORCH if "sdist" in sys.argv else f"torch=={minor}.*"


# torch looks for ninja on the PATH; in a virtual environment that is not activated it is beside the interpreter.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
local = os.environ.get("FUSEDLOSS_LOCAL_VERSION")  # of a wheel, which its name has to tell from another torch's
setup(
    version=f"{VERSION}+{local}" if local else VERSION,
    install_requires=[required_torch()],
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
)
