"""Make an environment that can build and run fusedloss, and build the extension in place.

    python3 tools/bootstrap.py [--torch torch==2.13.0]

Where --torch names one, the environment is .venv, and has that torch. Otherwise an active virtual or conda environment
that has a torch we support (requirements/torch.txt) is used as it is; or it is .venv, which sees the torch of a system
interpreter that has one, and else gets the newest that we support. The path of the chosen interpreter is left in
build/python-path. An environment that has everything is stamped, and from then on only the build, which is incremental,
is run.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
REQUIREMENTS = [ROOT / "requirements" / name for name in ("dev.txt", "triton.txt")]
TORCH = ROOT / "requirements" / "torch.txt"
STAMP = "fusedloss-dev.stamp"  # in the environment that it vouches for, and gone with it


def main():
    # The syntax in this file is Python 3.6's: an old interpreter has to come as far as the next lines.
    if sys.version_info < (3, 10):  # noqa: UP036
        version = "{}.{}".format(*sys.version_info)
        fail(f"Python 3.10 or newer is needed, and this is {version}: name another, as in PYTHON=python3.12")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", help="what pip installs into .venv, such as torch==2.13.0")
    parser.add_argument("--no-build", action="store_true", help="only make the environment")
    options = parser.parse_args()
    if not options.no_build:
        os.environ["CXX"] = compiler()

    torch = None if options.torch else supported_torch()
    if torch and in_environment():
        prefix, python = Path(sys.prefix), Path(sys.executable)
        say(f"using the active environment, with its torch {torch}")
    else:
        prefix, python = VENV, VENV / "bin" / "python"
        make_venv(python, sees_system=bool(torch))
    # The environment need not be active: ninja, which pip puts beside the interpreter, is found all the same.
    os.environ["PATH"] = os.pathsep.join([str(python.parent), os.environ.get("PATH", os.defpath)])

    complete(python, prefix / STAMP, torch, options.torch or requirement_of_torch())
    path = ROOT / "build" / "python-path"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{python}\n")
    if not options.no_build:
        build(python)


def compiler():
    chosen = os.environ.get("CXX")
    if chosen and not shutil.which(shlex.split(chosen)[0]):
        fail(f"CXX names a C++ compiler that is not there: {chosen}")
    found = chosen or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        fail("no C++ compiler was found: install g++ or clang++, or set CXX to the one you have")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        fail("this Python comes without its C headers: on Debian and Ubuntu, install python3-dev")
    return found


def supported_torch():
    """The version of this interpreter's torch, or None. Its metadata has it; importing it takes seconds."""
    from importlib import metadata  # Python 3.7 has none, and must still reach the message in main()

    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
    found, oldest, first_beyond = map(minor_version, [version, *re.findall(r"[=<]([\d.]+)", requirement_of_torch())])
    return version if oldest <= found < first_beyond else None


def requirement_of_torch():
    """As in "torch>=2.11,<2.16"."""
    return next(line for line in TORCH.read_text().splitlines() if line.startswith("torch"))


def minor_version(version):
    return tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups()))


def in_environment():
    return sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir()


def make_venv(python, sees_system):
    """Create .venv, unless the one that is there runs, and was made for this Python and this purpose."""
    purpose = f"include-system-site-packages = {sees_system}".lower()
    config = VENV / "pyvenv.cfg"
    if config.exists() and purpose in config.read_text() and version_of(python) == version_of(sys.executable):
        return
    from importlib import util

    if not (util.find_spec("venv") and util.find_spec("ensurepip")):
        fail("this Python cannot create virtual environments: on Debian and Ubuntu, install python3-venv")
    flags = ["--clear"] + ["--system-site-packages"] * sees_system
    run(f"creating {VENV.name}", sys.executable, "-m", "venv", *flags, VENV)


def version_of(python):
    """As in "3.12"; empty if it does not run, its own interpreter having been moved or removed."""
    command = [python, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def complete(python, stamp, torch, torch_requirement):
    """Install what the environment lacks."""
    facts = [sys.version, torch or torch_requirement, *(path.read_text() for path in REQUIREMENTS)]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    pip = [python, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        run("adding pip", python, "-m", "ensurepip")  # uv leaves it out, and so does an interrupted venv
    install = [*pip, "install", "--disable-pip-version-check"]
    if not torch:  # first of all, so that nothing else brings another
        run(f"installing {torch_requirement}", *install, torch_requirement)
    for path in REQUIREMENTS:
        run(f"installing {path.relative_to(ROOT)}", *install, "--quiet", "-r", path)
    stamp.write_text(digest)  # last: whatever interrupts this, the next run does it again


def build(python):
    """Incremental. The compiler's commands fill screens: they go to a file, and are shown if something goes wrong."""
    say("building the extension; the first time takes a minute or two, with CUDA kernels a few minutes")
    command = [str(python), "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (ROOT / "build" / "build.log").write_text(built.stdout)
    if built.returncode:
        fail(f"{built.stdout}\nbuilding the extension did not work; the command was: {shlex.join(command)}")
    print(*re.findall("^fusedloss: .*", built.stdout, re.MULTILINE), sep="\n", file=sys.stderr)


def run(doing, *command):
    say(doing)
    command = list(map(str, command))
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
        fail(f"{doing} did not work; what went wrong is above, the command was: {shlex.join(command)}")


def say(message):
    print(f"bootstrap: {message}", file=sys.stderr, flush=True)


def fail(reason):
    sys.exit(f"bootstrap: {reason}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the next run goes on from here")
