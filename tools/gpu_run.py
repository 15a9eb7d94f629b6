"""Reads what tools/on_gpu.sh has left in a folder: of each stage its verdict, and what its log or file says."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

VERDICT = re.compile(
    r"(?P<stage>\w+) +(?P<verdict>passed|failed|stopped) +(?P<status>\d+) +"
    r"(?P<seconds>\d+) s of +(?P<limit>\d+) s  (?P<last>.*)"
)
SAME = ("gpu", "revision")  # facts that folders of one run share


class Damaged(Exception):
    """Says which folder cannot be read, and why."""


def read(folders: list[Path]) -> dict[str, dict]:
    """By stage; of a stage in several folders, the last. What is found is empty where nothing came back."""
    run, first = {}, {}
    for folder in folders:
        stages = read_folder(folder)
        facts = stages.get("facts", {}).get("found", {})
        if facts.get("gpu", "absent") == "absent":
            raise Damaged(f"{folder}: the stage facts names no GPU")
        for name in SAME:
            if first.setdefault(name, facts[name]) != facts[name]:
                raise Damaged(f"{folder}: the {name} is {facts[name]}, and {first[name]} in the folder before")
        run |= stages
    return run


def read_folder(folder: Path) -> dict[str, dict]:
    if not (folder / "summary.txt").exists():
        raise Damaged(f"{folder} has no summary.txt: is it what tools/on_gpu.sh left?")
    stages, logs = {}, sections(folder)
    for line in (folder / "summary.txt").read_text().splitlines():
        if not (match := VERDICT.fullmatch(line)):
            raise Damaged(f"{folder}/summary.txt: no verdict of a stage: {line[:80]!r}")
        stage = match.groupdict()
        name = stage.pop("stage")
        file, reader = READERS.get(name, (None, lambda text: {}))
        text = logs.get(name, "") if file is None else text_of(folder / file)
        try:
            found = reader(text) if text else {}
        except (ValueError, KeyError, TypeError) as error:
            if stage["verdict"] != "passed":  # it was ended while it wrote
                found = {}
            else:
                raise Damaged(f"{folder}: {file or 'the log'} of {name}: {type(error).__name__}: {error}") from error
        if name in READERS and not found and stage["verdict"] == "passed":
            raise Damaged(f"{folder}: {name} has passed, and {file or 'no log'} says nothing of it")
        stages[name] = stage | {key: int(stage[key]) for key in ("status", "seconds", "limit")} | {"found": found}
    return stages


def text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def sections(folder: Path) -> dict[str, str]:
    """What each stage has printed, from all logs."""
    parts = re.split(r"^===== (\w+)\n", "\n".join(map(text_of, sorted(folder.glob("*.log")))), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# --- What is found ---


def facts(text: str) -> dict[str, str]:
    found = dict(re.findall(r"^([\w.,\- ]+): (.+)$", text, re.MULTILINE))
    return found if found.keys() >= set(SAME) else {}


def kernels(text: str) -> dict[str, dict]:
    """By element type."""
    rows = re.findall(r"^(\w+): kernels: (\d+) cases, (\d+) failed", text, re.MULTILINE)
    return {dtype: {"cases": int(cases), "failed": int(failed)} for dtype, cases, failed in rows}


def tests(text: str) -> dict:
    """Pytest's counts, and who failed; no counts where it was stopped."""
    counts = re.findall(r"^(?:=+ )?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", text, re.MULTILINE)[-1:]
    names = [name.partition(" - ")[0] for name in re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)]
    found = {kind: int(count) for count, kind in re.findall(r"(\d+) (\w+)", "".join(counts))}
    return {"counts": found, "failures": list(dict.fromkeys(names))} if found or names else {}


def sanitizers(text: str) -> dict[str, dict]:
    """By tool: its last word, and the first thing it has complained of."""
    found = {}
    for tool, line in re.findall(r"^(\w+): =+ (\S.*)$", text, re.MULTILINE):
        if "SUMMARY" in line:
            found.setdefault(tool, {"first": ""})["verdict"] = line
        elif "COMPUTE-SANITIZER" not in line:
            entry = found.setdefault(tool, {"first": "", "verdict": "no verdict"})
            entry["first"] = entry["first"] or line
    return found


NCU = {  # the first of these metrics that is there
    "duration": ("gpu__time_duration.sum",),
    "memory": (
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
STALL = re.compile(r"issue_stalled_(?P<reason>\w+?)_per_\w+\.ratio$")
MARKER = "arange"  # tools/ncu_cases.py launches it before each call


def ncu(text: str) -> list[dict]:
    """Of each call of tools/ncu_cases.py, in its order, the kernel that took longest."""
    table = text[text.index('"ID"') :].splitlines() if '"ID"' in text else []
    calls = []
    for row in csv.DictReader(table):
        if not row["ID"]:  # the line of units
            continue
        if MARKER in row["Kernel Name"]:
            calls.append([])
        elif "fusedloss" in row["Kernel Name"] and calls:
            calls[-1].append(counters(row))
    return [max(call, key=lambda kernel: kernel["duration"] or 0, default={}) for call in calls]


def counters(row: dict[str, str]) -> dict:
    def number(metric: str) -> float | None:
        try:
            return float(row[metric].replace(",", ""))
        except (KeyError, ValueError):  # "n/a", or nothing
            return None

    found = {name: next((number(m) for m in metrics if row.get(m)), None) for name, metrics in NCU.items()}
    stalls = {match["reason"]: number(metric) or 0 for metric in row if metric and (match := STALL.search(metric))}
    stalls.pop("selected", None)  # such a warp does issue
    return (
        {"kernel": re.sub(r"\((?!fusedloss::Pass).*", "", row["Kernel Name"])}
        | found
        | {"stall": max(stalls, key=stalls.get, default=None)}
    )


READERS: dict[str, tuple[str | None, Callable]] = {  # a file, or else the stage's part of a log; and who reads it
    "facts": (None, facts),
    "kernels": (None, kernels),
    **dict.fromkeys(("tests", "large", "devices", "triton"), (None, tests)),
    "sanitize": (None, sanitizers),
    "bench": ("bench.json", json.loads),
    "peers": ("peers.json", json.loads),
    "ncu": ("ncu.csv", ncu),
}
