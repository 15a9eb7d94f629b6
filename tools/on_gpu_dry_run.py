"""Stands in for the programs of on_gpu.sh on a machine without a GPU: looks at a command, and runs none of it.

    python tools/on_gpu_dry_run.py PROGRAM ARGUMENTS...

Files have to exist, a filter has to find something, options have to be known. Without an argument: whether each set of
stages fits into its time, and what they leave into a folder of eight files.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS, FILES = 550, 8
LEFT = {"summary.txt", "bench.json", "peers.json", "ncu.csv"}  # beside the logs
CHECKS = ROOT / "tests/kernels/check_kernels.cu"
ROW = re.compile(
    r"^(?P<stage>\w+) +(?P<limit>\d+)  (?P<log>\w+\.log) +(?P<sets>[\w,]+) +(?P<shows>\S.*)$", re.MULTILINE
)


def stages(script: Path = ROOT / "tools/on_gpu.sh") -> list[dict[str, str]]:
    """The table in the script."""
    table = script.read_text().partition("STAGES='\n")[2].partition("'\n")[0]
    rows = [match.groupdict() for match in ROW.finditer(table)]
    assert len(rows) == len(table.splitlines()), f"a row of the stages cannot be read:\n{table}"
    return rows


def plan() -> str:
    rows = stages()
    totals = {
        name: sum(int(row["limit"]) for row in rows if name in row["sets"].split(","))
        for name in dict.fromkeys(name for row in rows for name in row["sets"].split(","))
    }
    files = LEFT | {row["log"] for row in rows}
    assert max(totals.values()) <= SECONDS, f"more than {SECONDS} seconds: {totals}"
    assert len(files) <= FILES, f"more than {FILES} files: {sorted(files)}"
    return f"seconds of a set, at most: {totals}; {len(files)} files"


def exist(*paths: str) -> str:
    missing = [path for path in paths if not (ROOT / path).is_file()]
    assert not missing, f"no such file: {', '.join(missing)}"
    return f"there: {' '.join(paths)}"


def known(words: list[str], place: Path) -> None:
    unknown = [word for word in words if word not in place.read_text()]
    assert not unknown, f"{place.relative_to(ROOT)} knows nothing of {', '.join(unknown)}"


def collected(arguments: list[str]) -> str:
    """Without a GPU the tests over devices are not there for CUDA; those for the CPU stand for them."""
    files = [argument for argument in arguments if argument.endswith(".py")]
    exist(*files)
    chosen = arguments[arguments.index("-k") + 1].replace("cuda", "cpu") if "-k" in arguments else ""
    command = [sys.executable, "-m", "pytest", "--collect-only", "--interpreted", "all", *files, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\npytest selects nothing, or cannot collect"
    return done.stdout.strip().splitlines()[-1]


def measured(arguments: list[str]) -> str:
    sys.path.insert(0, str(ROOT))
    from benchmarks.cases import CUDA_GROUPS

    known([argument for argument in arguments if argument.startswith("--")], ROOT / "benchmarks/__main__.py")
    wish = arguments[arguments.index("--filter") + 1]
    names = [str(case) for group in CUDA_GROUPS.values() for case in group]
    found = [name for name in names if re.search(wish, name)]
    named = wish.count("|") + 1
    assert len(found) == named, f"of {named} cases that the filter names, {len(found)} are in benchmarks/cases.py"
    return f"{len(found)} of {len(names)} cases"


def listed(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments, "--list"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    calls = done.stdout.splitlines()
    assert len(calls) == 16, f"two passes of eight cases are wanted, not {calls}"
    return f"{len(calls)} calls"


def of_python(arguments: list[str]) -> str:
    match arguments:
        case ["-m", "pytest", *rest]:
            return collected(rest)
        case ["-m", "benchmarks", *rest]:
            return measured(rest)
        case ["-m", "pip", *_]:
            return "wheels"
        case [script, *_]:
            return exist(script)
    raise AssertionError(f"python is called without a script: {arguments}")


def of_program(program: str, arguments: list[str]) -> str:
    match program:
        case "nvcc":
            sources = [argument for argument in arguments if argument.endswith((".cu", ".cpp"))]
            return exist(*sources) if sources else "nvcc"
        case "check_kernels":
            known(arguments, CHECKS)
            return f"{CHECKS.name} knows {' '.join(arguments)}"
        case "compute-sanitizer":
            at = next(i for i, argument in enumerate(arguments) if argument.endswith("check_kernels"))
            assert {"memcheck", "racecheck", "synccheck", "initcheck"}.issuperset(arguments[1:2]), arguments
            return of_program("check_kernels", arguments[at + 1 :])
        case "ncu":
            return listed(arguments[-1:])
        case _:
            return of_python(arguments)


if __name__ == "__main__":
    try:
        print(of_program(Path(sys.argv[1]).name, sys.argv[2:]) if sys.argv[1:] else plan())
    except AssertionError as wrong:
        sys.exit(f"dry run: {wrong}")
