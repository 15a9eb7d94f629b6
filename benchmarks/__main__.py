"""Measure the losses beside native torch, torch.compile and a plain copy.

    python -m benchmarks --device cpu
    python -m benchmarks --device cuda
    python -m benchmarks --filter '^nll .* bfloat16' --threads 1 --quick --output build/benchmarks

Prints a table for each number of threads, or those of a GPU. A run of everything also leaves them, as Markdown and
JSON, where the results of this machine are kept; a run of less does so only where --output says, for it must not
replace those.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks import machine, report
from benchmarks.cases import GROUPS
from benchmarks.contestants import CONTESTANTS, OWN, PEERS, first_line
from benchmarks.devices import DEVICES
from benchmarks.measure import Budget, run

THOROUGH = {"cpu": Budget(seconds=2, fewest=7, most=200), "cuda": Budget(seconds=1, fewest=7, most=100)}
QUICK = Budget(seconds=0.2, fewest=3, most=20)
MINUTES = {"cpu": float("inf"), "cuda": 9}


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all; on a CPU alone")
    parser.add_argument("--filter", metavar="REGEX", default="", help="only the cases whose name it is found in")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--minutes", type=float, help="no case begins later; default: 9 on a GPU, no limit on a CPU")
    parser.add_argument("--output", type=Path, help="default, for a run of everything: benchmarks/results/<machine>")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    groups = GROUPS[options.device].values()
    cases = [case for group in groups for case in group if re.search(options.filter, str(case))]
    if not cases:
        parser.error(f"no case has a name like {options.filter!r}")
    if cuda and options.threads:
        parser.error("--threads is for --device cpu")
    if cuda and (obstacle := machine.no_gpu()):
        parser.error(f"--device cuda: {obstacle}")
    contestants = {name: make for name, make in CONTESTANTS.items() if not (name == "compiled" and options.no_compile)}
    if cuda:
        contestants |= OWN | {name: peer for name, peer in PEERS.items() if peer.state()[0]}
    budget = QUICK if options.quick else THOROUGH[options.device]
    minutes = MINUTES[options.device] if options.minutes is None else options.minutes
    part = options.filter or options.quick or options.no_compile or options.threads or options.minutes is not None
    default = Path(__file__).parent / "results" / machine.slug(options.device)
    output = options.output or (None if part else default)

    if not cuda:
        machine.touch_memory()
    device = DEVICES[options.device]()
    facts = machine.facts(options.device) | ({"copy_bandwidth": device.bandwidth} if cuda else {})
    print(report.header(facts))
    results, left_out = {}, {}
    for threads in [None] if cuda else dict.fromkeys(options.threads or [1, torch.get_num_threads()]):
        if threads:
            torch.set_num_threads(threads)
        results[threads] = []
        for number, case in enumerate(cases, start=1):
            where = f"threads: {threads}, " if threads else ""
            print(f"\r\033[K{where}{number}/{len(cases)}: {case}", end="", file=sys.stderr, flush=True)
            if time.monotonic() - start > 60 * minutes:
                left_out[str(case)] = f"{minutes:g} minutes were over"
                continue
            try:
                results[threads].append(run(case, contestants, budget, device))
            except device.errors as error:
                left_out[str(case)] = first_line(error)
        print("\r\033[K", end="", file=sys.stderr)
        print(report.section(facts, results[threads], left_out), flush=True)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.md").write_text(report.document(facts, results, left_out))
        (output / "results.json").write_text(report.as_json(facts, results, left_out))
        print(f"These tables are in {output / 'results.md'}, everything is in {output / 'results.json'}.")


if __name__ == "__main__":
    main()
