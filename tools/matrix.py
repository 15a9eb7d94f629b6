"""Build and test fusedloss beside each torch at the ends of what is supported, and write docs/matrix.md.

    python tools/matrix.py [--keep] [oldest] [newest] [cpu]

Each lane is a clone of this commit in build/matrix, where `make test` makes an environment and runs in it, as for
anyone: pip's settings are the machine's own. A build of torch for CPUs has "+cpu" in its version. Where pip finds none,
that lane is left out, and the table says so; PIP_EXTRA_INDEX_URL names where they are.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bootstrap import minor_version, requirement_of_torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGE = ROOT / "build/matrix", ROOT / "docs/matrix.md"
OLDEST = "{}.{}".format(*minor_version(re.search(r"[\d.]+", requirement_of_torch())[0]))
# What pip is asked for, and the interpreter that is taken for it where there is one.
LANES = {
    "oldest": (f"torch=={OLDEST}.*", "python3.10"),
    "newest": (requirement_of_torch(), "python3.13"),
    "cpu": ("torch==2.13.0+cpu", "python3.11"),
}
WHAT_IS_THERE = """
import json, importlib.metadata, platform, torch, fusedloss
print(json.dumps({
    "python": platform.python_version(),
    "torch": torch.__version__,
    "triton": importlib.metadata.version("triton"),
    "kernels": ", ".join(["CPU"] + ["CUDA"] * bool(fusedloss.build_info()["cuda"])),
    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
}))
"""
HEAD = """# Beside which torch it has been tested

`make matrix` builds the library and runs `make test` beside the oldest and the newest torch that are supported
([requirements/torch.txt](../requirements/torch.txt)), as the package index has them, which is for GPUs, and beside a
build of torch for CPUs: each in an environment of its own, made from nothing.

| asked for | torch | Triton | Python | kernels built | tests passed | failed | skipped | C++ tests |
|---|---|---|---|---|---|---|---|---|
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lanes", nargs="*", metavar="|".join(LANES), help="all, where none is named")
    parser.add_argument("--keep", action="store_true", help="go on with the environments of an earlier run")
    options = parser.parse_args()
    lanes = options.lanes or list(LANES)
    if unknown := set(lanes) - set(LANES):
        parser.error(f"there is no lane {', '.join(unknown)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for lane in lanes:
        (FOLDER / f"{lane}.json").write_text(json.dumps(result_of(lane, options.keep)))
    found = {lane: json.loads(path.read_text()) for lane in LANES if (path := FOLDER / f"{lane}.json").exists()}
    PAGE.write_text(HEAD + "".join(map(row, found.values())) + foot(found))
    print(PAGE.read_text())
    sys.exit(not all(result["passes"] for result in found.values()))


def result_of(lane, keep):
    requirement, interpreter = LANES[lane]
    python = shutil.which(interpreter)
    if not python or subprocess.run([python, "--version"], capture_output=True).returncode:
        python = sys.executable
    clone, log = FOLDER / lane, FOLDER / f"{lane}.log"
    if keep and clone.exists():
        subprocess.run(["git", "fetch", "--quiet", ROOT, "HEAD"], cwd=clone, check=True)
        subprocess.run(["git", "checkout", "--quiet", "--force", "FETCH_HEAD"], cwd=clone, check=True)
    else:
        shutil.rmtree(clone, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    print(f"matrix: {lane}: make test TORCH='{requirement}' PYTHON={python}; see {log}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    with log.open("w") as file:
        command = ["make", "test", f"TORCH={requirement}", f"PYTHON={python}"]
        done = subprocess.run(command, cwd=clone, env=environment, stdout=file, stderr=subprocess.STDOUT)
    result = {"requirement": requirement, "date": time.strftime("%Y-%m-%d")}
    text = log.read_text()
    if re.search("No matching distribution found for torch", text):
        return {**result, "passes": True, "instead": "pip found none"}
    closing = re.findall(r"^=*\s*((?:\d+ \w+,? ?)+) in [\d.]+s", text, re.MULTILINE)
    if not closing:
        return {**result, "passes": False, "instead": "it came to no test"}
    counts = {word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) (\w+)", closing[-1])}
    python = (clone / "build/python-path").read_text().rstrip("\n")
    there = subprocess.run([python, "-c", WHAT_IS_THERE], cwd=clone, capture_output=True, text=True, check=True).stdout
    return {
        **result,
        **json.loads(there),
        "passes": done.returncode == 0,
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0),
        "cpp": "pass" if "100% tests passed" in text else "none" if "Skipped the C++ tests" in text else "FAIL",
    }


def row(result):
    asked = f"| `{result['requirement']}` |"
    if "instead" in result:
        return f"{asked} {result['instead']} | | | | | | | |\n"
    columns = ("torch", "triton", "python", "kernels", "passed", "failed", "skipped", "cpp")
    return f"{asked} {' | '.join(str(result[column]) for column in columns)} |\n"


def foot(found):
    gpus = sorted({result["gpu"] for result in found.values() if "gpu" in result})
    dates = sorted({result["date"] for result in found.values()})
    return f"\nOn {platform.system()} {platform.machine()}, {', '.join(gpus)}, {' and '.join(dates)}.\n"


if __name__ == "__main__":
    main()
