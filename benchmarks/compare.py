"""What became slower, and what quicker, between two results of one machine."""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import duration, table

# Two runs of the same code differ by more than the quartiles of one: the machine has other neighbours, memory other
# pages. A change counts when it exceeds both runs' quartiles and this.
SMALLEST = 0.05


def timed(path: Path) -> dict[tuple, dict]:
    """Our times by case, threads and measure."""
    return {
        (result["name"], result["threads"], measure): times
        for result in json.loads(path.read_text())["results"]
        for measure, times in result["entries"].get("fusedloss", {}).get("times", {}).items()
    }


def changes(before: dict[tuple, dict], after: dict[tuple, dict]) -> Iterator[tuple[tuple, float]]:
    """Who changed beyond the spread, and the ratio of the times: above 1 is slower."""
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        ratio = new["median"] / old["median"]
        slower = new["quartiles"][0] > old["quartiles"][1] and ratio > 1 + SMALLEST
        quicker = new["quartiles"][1] < old["quartiles"][0] and ratio < 1 / (1 + SMALLEST)
        if slower or quicker:
            yield key, ratio


def main(before: Path, after: Path) -> int:
    """Prints the changes, the worst first. The exit status: 1 when something is slower or was lost."""
    old, new = timed(before), timed(after)
    found = sorted(changes(old, new), key=lambda change: -change[1])
    rows = [
        [
            f"{name}, {measure}",
            str(threads),
            duration(old[name, threads, measure]["median"]),
            duration(new[name, threads, measure]["median"]),
            f"{ratio:.2f}x",
        ]
        for (name, threads, measure), ratio in found
    ]
    if rows:
        print(table(["our time of", "threads", "before", "after", "ratio"], rows))
    lost = sorted(map(str, old.keys() - new.keys()))
    for key in lost:
        print(f"only in {before}: {key}")
    slower = sum(ratio > 1 for _, ratio in found)
    print(f"{len(old.keys() & new.keys())} times in both: {slower} slower, {len(found) - slower} quicker.")
    return int(bool(slower or lost))
