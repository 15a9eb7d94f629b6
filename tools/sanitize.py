"""Build fusedloss with sanitizers, beside the ordinary build, and run C++ and Python tests on it.

    python tools/sanitize.py [--quick] [address] [thread]

address: AddressSanitizer and UndefinedBehaviorSanitizer. C++ tests are searched for leaks too; Python is not, since the
interpreter and torch keep memory until the end on purpose (tools/soak.py watches a process that trains).

thread: ThreadSanitizer. libgomp is not built for it: races would be reported wherever OpenMP's threads have waited for
each other. So tests/cpp/test_kernels.cpp shares blocks among threads of its own, and the extension is built without
OpenMP, for Python's threads to call at once. On "unexpected memory mapping" try: setarch -R make sanitize

Before its verdict counts, each build has to report faults that are planted. --quick leaves out the libtorch program,
Python under thread, and all instruction sets but the widest. g++ is needed, or another GCC that CXX names.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CXX = os.environ.get("CXX", "g++")

# Not -O3: compiling takes twice as long, and checks keep most loops from becoming vectors anyway.
COMMON = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
# Following the scope of each temporary, GCC 12 takes minutes for the CPU kernels, whose vectors are many of them.
NO_SCOPES = "-fno-sanitize-address-use-after-scope"
FLAGS = {
    "address": f"-fsanitize=address,undefined,float-cast-overflow {NO_SCOPES} {COMMON}",
    "thread": f"-fsanitize=thread {COMMON}",
}
EXTENSION_FLAGS = {"address": "", "thread": "-fno-openmp -fopenmp-simd"}
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
ABOUT_MEMORY = "parity edge_cases errors fuzz gradients grad_in_forward threads processes"
PYTHON_TESTS = {
    "address": [f"tests/test_{name}.py" for name in ABOUT_MEMORY.split()],
    "thread": ["tests/test_threads.py", "-k", "not uses_the_threads"],  # OpenMP's
}

# Arguments of tests/cpp/planted.cpp, and what has to be reported.
PLANTED = {
    "address": {"read": "heap-buffer-overflow", "leak": "detected memory leaks", "overflow": "signed integer overflow"},
    "thread": {"race": "data race"},
}
PLANTED_IN_PYTHON = {
    "heap-buffer-overflow": """
import torch, fusedloss
x = torch.randn(8, 100)
x.untyped_storage().resize_(64)  # bytes; the tensor keeps its shape
fusedloss.cross_entropy(x, torch.zeros(8).long())
""",
    "data race": """
import threading, torch, fusedloss
memory, y, start = torch.ones(512, 1000), torch.zeros(512).long(), threading.Barrier(2, timeout=60)
def write():
    for _ in range(20):  # one of them overlaps
        x = torch.ones(512, 1000, requires_grad=True) * 1
        x.data = memory  # of both threads
        start.wait()
        fusedloss.cross_entropy(x, y, inplace=True)
threads = [threading.Thread(target=write) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="address|thread", help="both, where none is named")
    parser.add_argument("--quick", action="store_true", help="what fits beside other checks")
    options = parser.parse_args()
    for kind in options.kinds or FLAGS:
        build = ROOT / "build" / "sanitize" / kind
        build.mkdir(parents=True, exist_ok=True)
        every = kind == "address" and not options.quick
        test_cpp(kind, build, with_torch=every)
        if kind == "address" or not options.quick:
            test_python(kind, build, narrower=["avx2", "default"] if every else [])


def test_cpp(kind, build, with_torch):
    planted = build / "planted"
    run(*shlex.split(f"{CXX} -std=c++20 {FLAGS[kind]} tests/cpp/planted.cpp -o"), planted)
    for fault, report in PLANTED[kind].items():
        run(planted, fault, report=report)
    cmake = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build / "cmake", "-DCMAKE_BUILD_TYPE=Debug"]
    cmake += [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", f"-DFUSEDLOSS_TORCH={int(with_torch)}"]
    run(*cmake, CXX=CXX, CXXFLAGS=FLAGS[kind])
    run("cmake", "--build", build / "cmake")
    run("ctest", "--test-dir", build / "cmake", "--output-on-failure")


def test_python(kind, build, narrower):
    """On copies of the package and of its tests in a folder of their own; nothing takes the ordinary build's place."""
    lib = build / "lib"
    base = ["--build-base", build / "python", "--build-lib", lib]
    flags = {"CXXFLAGS": f"{FLAGS[kind]} {EXTENSION_FLAGS[kind]}", "LDFLAGS": FLAGS[kind]}
    run(sys.executable, "setup.py", "--quiet", "build", *base, CXX=CXX, FUSEDLOSS_CUDA="0", **flags)
    shutil.copytree(ROOT / "tests", lib / "tests", dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", lib)
    # Beside libstdc++: a runtime that is loaded before it finds no function that throws, and stops at the first throw.
    preload = " ".join(library(name) for name in (RUNTIME[kind], "libstdc++.so"))
    environment = {"LD_PRELOAD": preload, "PYTHONPATH": str(lib), "ASAN_OPTIONS": "detect_leaks=0"}
    if kind == "thread":  # and torch is to start none of OpenMP's threads either, whatever a test asks for
        environment |= {"TSAN_OPTIONS": f"halt_on_error=1 suppressions={ROOT}/tools/tsan.supp", "OMP_THREAD_LIMIT": "1"}
    for report in PLANTED_IN_PYTHON.keys() & PLANTED[kind].values():
        run(sys.executable, "-c", PLANTED_IN_PYTHON[report], report=report, cwd=lib, **environment)
    # The runtimes report to file descriptor 2, which pytest must not keep to itself.
    pytest = [sys.executable, "-m", "pytest", "--capture=sys", "--interpreted=none", f"--sanitized={kind}"]
    run(*pytest, *PYTHON_TESTS[kind], cwd=lib, **environment)
    for capability in narrower:
        run(*pytest, *PYTHON_TESTS[kind], cwd=lib, ATEN_CPU_CAPABILITY=capability, **environment)


def library(name):
    path = subprocess.check_output([*shlex.split(CXX), f"-print-file-name={name}"], text=True).strip()
    return path if Path(path).is_absolute() else sys.exit(f"sanitize: {CXX} has no {name}")


def run(*command, report=None, cwd=ROOT, **environment):
    """Runs a command that has to succeed; or, where a report is named, to fail with it."""
    command = [str(part) for part in command]
    doing = shlex.join(command) if report is None else f"looking for a planted fault: {report}"
    print(f"sanitize: {doing}", flush=True)
    output = {} if report is None else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, text=True, **output)
    if report is None and done.returncode:
        sys.exit(f"sanitize: the command above failed, with {environment}")
    if report is not None and (not done.returncode or report not in done.stdout):
        sys.exit(f"{done.stdout}\nsanitize: it was not reported")


if __name__ == "__main__":
    main()
