"""Applies chapter 9's patch to a copy of this checkout, builds the copy for the CPU and tests the new loss.

    python docs/tutorial/apply_patch.py                 in build/focal, which keeps its objects for the next time
    python docs/tutorial/apply_patch.py --regenerate    writes the patch anew, from what build/focal has become

Where the patch no longer applies, its parts that do are in build/focal, and the others beside their files, as *.rej.
Put them in by hand, and regenerate.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATCH = Path(__file__).with_name("focal_loss.patch")
COPY = ROOT / "build/focal"


def run(*command, **options):
    return subprocess.run([str(part) for part in command], cwd=COPY, **options)


def git(*arguments, **options):
    identity = ("-c", "user.name=tutorial", "-c", "user.email=tutorial@localhost", "-c", "core.autocrlf=false")
    return run("git", *identity, *arguments, **options)


def make_copy():
    """The files of the checkout as they are, in a repository whose first commit is what the patch starts from."""
    COPY.mkdir(parents=True, exist_ok=True)
    for entry in COPY.iterdir():
        if entry.name != "build":  # whose objects are compared with the sources by time, which copying keeps
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)
    git("init", "--quiet", check=True)
    git("add", "--all", "--force", ".", ":!build", check=True)
    git("commit", "--quiet", "--message", "before the patch", check=True)


def regenerate():
    git("add", "--all", check=True)
    changes = git("diff", "--cached", "HEAD", "--", ".", ":!*.rej", capture_output=True, text=True, check=True).stdout
    PATCH.write_text(changes)


def main():
    if "--regenerate" in sys.argv:
        return regenerate()
    make_copy()
    if git("apply", "--reject", "--whitespace=nowarn", PATCH).returncode:
        sys.exit(f"the patch does not apply: {COPY} has what does, and *.rej what does not")
    os.environ["FUSEDLOSS_CUDA"] = "0"
    run(sys.executable, "setup.py", "build_ext", "--inplace", check=True, stdout=subprocess.DEVNULL)
    run(sys.executable, "-m", "pytest", "tests/test_focal.py", check=True)


if __name__ == "__main__":
    main()
