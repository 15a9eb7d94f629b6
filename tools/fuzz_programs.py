"""Run random programs around the losses, print what was exercised and each finding, minimised; fail if there are any.

    python tools/fuzz_programs.py --programs 20000 --seed 1
    python tools/fuzz_programs.py --replay finding.txt        # a program, as it was printed

What a program is, and how it is judged, is in tests/programs.py.
"""

import argparse
import ast
import gc
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT)]  # last: PYTHONPATH may name another checkout

import programs  # noqa: E402

A_SEED = 10_000_000  # programs of one seed; they are numbered
MINIMISED = 6  # findings of a kind that are minimised; the others are counted
ONE_IS_COMPILED_IN = 400  # compiling one takes as long as a hundred others


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first program")
    parser.add_argument("--replay", type=Path, help="a file with one program; nothing else is run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.replay:
        return replay(ast.literal_eval(options.replay.read_text()))
    return campaign(range(options.first, options.programs), options.seed)


def replay(program):
    verdict, finding = programs.judge(program)
    print(programs.as_text(program), verdict, finding.text if finding else "", sep="\n")
    for name, losses in (("ours", programs.Ours()), ("native", programs.Native())):
        print(f"\n{name}: ", programs.execute(program, losses))
    print("\ntruth: ", programs.execute(program, programs.Native(), wide=True))
    return finding is not None


def campaign(numbers, seed):
    verdicts, kinds, table, seen, start = Counter(), Counter(), {}, set(), time.monotonic()
    for number in numbers:
        compiles = number % ONE_IS_COMPILED_IN == ONE_IS_COMPILED_IN - 1
        program = programs.generate(seed * A_SEED + number, compiles)
        verdict, finding = programs.judge(program)
        verdicts[verdict] += 1
        for ingredient in programs.ingredients(program):
            table.setdefault(ingredient, Counter())[verdict] += 1
        if finding:
            kinds[finding.kind] += 1
            if kinds[finding.kind] <= MINIMISED:
                report(number, program, finding, seen)
        if number % 1000 == 999:
            gc.collect()
            seconds = time.monotonic() - start
            print(
                f"{number + 1} programs, {verdicts['finding']} findings, {seconds:.0f} s", file=sys.stderr, flush=True
            )
    summary(verdicts, kinds, table, time.monotonic() - start)
    return verdicts["finding"] > 0


def report(number, program, finding, seen):
    small = programs.minimise(program, programs.same_finding(finding))
    shape = (finding.kind, tuple((step["op"], *sorted(step.get("options", {}))) for step in programs.walk(small)))
    if shape in seen:
        return
    seen.add(shape)
    # A finding that comes and goes is one all the same.
    text = (programs.judge(small)[1] or finding).text
    print(f"\nprogram {number} {text}", programs.as_text(small), sep="\n", flush=True)


def summary(verdicts, kinds, table, seconds):
    total = max(1, sum(verdicts.values()))
    print(f"\n{total} programs in {seconds:.0f} s, {1000 * seconds / total:.1f} ms each")
    for verdict, count in verdicts.most_common():
        print(f"{count:7} {verdict}")
    if kinds:
        print("\nfindings by kind")
    for kind, count in kinds.most_common():
        print(f"{count:7} {kind}")
    print("\n judged  findings  refused   with")
    for ingredient, counts in sorted(table.items()):
        refused = sum(counts.values()) - counts["judged"] - counts["finding"]
        print(f"{counts['judged']:7} {counts['finding']:9} {refused:8}   {ingredient}")


if __name__ == "__main__":
    sys.exit(main())
