"""Run the examples whose packages are installed, and print one table."""

import argparse
import importlib
import sys

import torch

from examples.integrations import NEEDS
from examples.integrations.compare import missing, report


def main() -> str | None:
    parser = argparse.ArgumentParser(prog="python -m examples.integrations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NEEDS)}; default: all")
    names = parser.parse_args().names or NEEDS
    torch.set_num_threads(1)
    comparisons = []
    for name in names:
        if absent := missing(NEEDS[name]):
            print(f"{name} is left out: {', '.join(absent)} not installed")
        else:
            comparisons += importlib.import_module(f"examples.integrations.{name}").comparisons()
    return report(comparisons)


if __name__ == "__main__":
    sys.exit(main())
