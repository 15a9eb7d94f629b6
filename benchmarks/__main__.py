"""Measure the losses beside native torch, torch.compile and a plain copy.

    python -m benchmarks --device cpu
    python -m benchmarks --device cuda
    python -m benchmarks --filter '^nll .* bfloat16' --threads 1 --quick --output build/benchmarks

    python -m benchmarks --compare before/results.json after/results.json

Prints a table for each number of threads, or those of a GPU. A run of everything also leaves them, as Markdown, JSON
and pictures, where the results of this machine are kept; a run of less does so only where --output says, for it must
not replace those. The files are written after each case: an interrupted run keeps what it has.
"""

import argparse
import gc
import math
import re
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import compare, machine, pictures, report
from benchmarks.cases import GROUPS
from benchmarks.contestants import CONTESTANTS, OWN, first_line, installed_peers, those_for
from benchmarks.devices import DEVICES
from benchmarks.measure import Budget, Result, run

THOROUGH = {"cpu": Budget(seconds=1, fewest=7, most=200), "cuda": Budget(seconds=0.7, fewest=7, most=100)}
QUICK = Budget(seconds=0.1, fewest=3, most=20, patience=2)
MINUTES = {"cpu": float("inf"), "cuda": 9}
QUICK_MINUTES = 1.6  # and what was begun by then ends within two


def main() -> str | int | None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all; on a CPU alone")
    parser.add_argument("--filter", metavar="REGEX", default="", help="only the cases whose name it is found in")
    parser.add_argument("--quick", action="store_true", help="few repetitions, all threads, no torch.compile")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="JSON", help="says what is slower in the second one")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--minutes", type=float, help="no case begins later; default: 9 on a GPU, none on a CPU, 1.6 if quick"
    )
    parser.add_argument("--output", type=Path, help="default, for a run of everything: benchmarks/results/<machine>")
    options = parser.parse_args()
    if options.compare:
        return compare.main(*options.compare)
    cuda = options.device == "cuda"
    groups = GROUPS[options.device].values()
    cases = [case for group in groups for case in group if re.search(options.filter, str(case))]
    if not cases:
        parser.error(f"no case has a name like {options.filter!r}")
    if cuda and options.threads:
        parser.error("--threads is for --device cpu")
    if cuda and (obstacle := machine.no_gpu()):
        parser.error(f"--device cuda: {obstacle}")
    no_compile = options.no_compile or options.quick
    contestants = {name: make for name, make in CONTESTANTS.items() if not (name == "compiled" and no_compile)}
    contestants |= (OWN if cuda else {}) | installed_peers(options.device)
    budget = QUICK if options.quick else THOROUGH[options.device]
    default_minutes = QUICK_MINUTES if options.quick else MINUTES[options.device]
    minutes = default_minutes if options.minutes is None else options.minutes
    part = options.filter or options.quick or options.no_compile or options.threads or options.minutes is not None
    default = Path(__file__).parent / "results" / machine.slug(options.device)
    output = options.output or (None if part else default)

    gc.freeze()  # what has been imported would be looked through before each case
    if not cuda:
        machine.touch_memory(max(math.prod(case.shape) for case in cases))
    device = DEVICES[options.device]()
    facts = machine.facts(options.device) | ({"copy_bandwidth": device.bandwidth} if cuda else {})
    print(report.header(facts))
    results: dict[int | None, list[Result]] = {}
    left_out: dict[str, str] = {}
    runs = [None] if cuda else dict.fromkeys(options.threads or [1, torch.get_num_threads()][options.quick :])
    with progress_bar() as progress:
        task = progress.add_task("", total=len(runs) * len(cases))
        for threads in runs:
            if threads:
                torch.set_num_threads(threads)
            results[threads] = []
            for case in cases:
                progress.update(task, description=f"threads: {threads}, {case}" if threads else str(case), refresh=True)
                if time.monotonic() - start > 60 * minutes:
                    left_out[str(case)] = f"{minutes:g} minutes were over"
                else:
                    try:
                        results[threads].append(run(case, those_for(case, contestants), budget, device))
                    except device.errors as error:
                        left_out[str(case)] = first_line(error)
                progress.update(task, advance=1, refresh=True)
                if output:
                    report.save(output, facts, results, left_out)
    for some in results.values():
        print(report.section(facts, some, left_out))
    if output:
        pictures.draw(output)
        print(f"These tables are in {output / 'results.md'}, all numbers and pictures are beside it.")
    return None


def progress_bar() -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True, highlight=False),
        auto_refresh=False,  # a thread that redraws would take a core while the clock runs
    )


if __name__ == "__main__":
    sys.exit(main())
