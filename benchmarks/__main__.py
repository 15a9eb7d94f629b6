"""Measure the losses beside native torch, torch.compile and a plain copy.

    python -m benchmarks --device cpu
    python -m benchmarks --filter '^nll .* bfloat16' --threads 1 --quick --output build/benchmarks

Prints a table for each number of threads. A run of everything also leaves them, as Markdown and JSON, where the
results of this machine are kept; a run of less does so only where --output says, for it must not replace those.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from benchmarks import machine, report
from benchmarks.cases import GROUPS
from benchmarks.contestants import CONTESTANTS
from benchmarks.measure import Budget, run

THOROUGH = Budget(seconds=2, fewest=7, most=200)
QUICK = Budget(seconds=0.2, fewest=3, most=20)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, torch.get_num_threads()], help="default: 1 and all"
    )
    parser.add_argument("--filter", metavar="REGEX", default="", help="only the cases whose name it is found in")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--output", type=Path, help="default, for a run of everything: benchmarks/results/<machine>")
    options = parser.parse_args()
    cases = [case for group in GROUPS.values() for case in group if re.search(options.filter, str(case))]
    if not cases:
        parser.error(f"no case has a name like {options.filter!r}")
    contestants = {name: make for name, make in CONTESTANTS.items() if not (name == "compiled" and options.no_compile)}
    budget = QUICK if options.quick else THOROUGH
    part = options.filter or options.quick or options.no_compile or options.threads != parser.get_default("threads")
    output = options.output or (None if part else Path(__file__).parent / "results" / machine.slug())

    machine.touch_memory()
    facts = machine.facts()
    print(report.header(facts))
    results = {}
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        results[threads] = []
        for number, case in enumerate(cases, start=1):
            print(f"\r\033[Kthreads: {threads}, {number}/{len(cases)}: {case}", end="", file=sys.stderr, flush=True)
            results[threads].append(run(case, contestants, budget, options.device))
        print("\r\033[K", end="", file=sys.stderr)
        print(report.section(facts, results[threads]), flush=True)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.md").write_text(report.document(facts, results))
        (output / "results.json").write_text(report.as_json(facts, results))
        print(f"These tables are in {output / 'results.md'}, everything is in {output / 'results.json'}.")


if __name__ == "__main__":
    main()
