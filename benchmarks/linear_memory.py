"""The memory of a training step behind a linear layer, against the size of the vocabulary; measured on the CPU.

    python -m benchmarks.linear_memory [--output docs/tutorial/figures/linear_memory.svg]

Draws a picture and prints its numbers: what a step holds at its peak beside its arguments, less the gradients of the
embeddings and the weight, which it has to make. It takes a few minutes.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fusedloss
from benchmarks import pictures, report
from benchmarks.cases import linear_cross_entropy
from benchmarks.contestants import native
from benchmarks.devices import Cpu
from benchmarks.measure import MEASURES, non_leaf

ROWS, WIDTH = 2048, 512
VOCABULARIES = [8192 << doubled for doubled in range(6)]
DTYPES = (torch.float32, torch.bfloat16)
TIGHT = 32 << 20  # bytes
# On a CPU torch's chunks are slow: beyond this vocabulary a step takes minutes. What it holds is a multiple of the
# weight, so that its line goes on as it is.
LAST_OF_CHUNKED = 65536


def calls() -> dict[str, Callable]:
    """What is compared, by the name in the picture: calls of embeddings, target and classifier."""

    def ours(input, target, classifier, **options):
        return fusedloss.functional.linear_cross_entropy(input, classifier, target, **options)

    def chunked(input, target, classifier):
        options = torch.nn.LinearCrossEntropyOptions()
        return torch.nn.functional.linear_cross_entropy(input, classifier, target, options=options)

    has_chunks = hasattr(torch.nn, "LinearCrossEntropyOptions")
    return {
        "native": native(linear_cross_entropy(ROWS, 1, width=WIDTH)),
        **({"native, chunked": chunked} if has_chunks else {}),
        "fusedloss": ours,
        f"fusedloss, memory={TIGHT >> 20} MB": partial(ours, memory=TIGHT),
    }


def scratch(call: Callable, embeddings: Tensor, target: Tensor, options: dict) -> int:
    learned = tuple(options.values())
    step = partial(MEASURES["step"], partial(call, target=target, **options), learned, None)
    gradients = sum(tensor.nbytes for tensor in (embeddings, *learned))
    return Cpu().peak_bytes(step, non_leaf(embeddings)) - gradients


def measured(dtype: torch.dtype, vocabularies: list[int]) -> dict[str, list[int | None]]:
    """By name, the bytes with each vocabulary; beside them those of all logits."""
    found: dict[str, list[int | None]] = {name: [] for name in ["all logits", *calls()]}
    for classes in vocabularies:
        data = linear_cross_entropy(ROWS, classes, width=WIDTH, dtype=dtype).draw("cpu")
        found["all logits"].append(ROWS * classes * dtype.itemsize)
        for name, call in calls().items():
            skipped = "chunked" in name and classes > LAST_OF_CHUNKED
            found[name].append(None if skipped else scratch(call, *data))
    return found


def table(found: dict[str, list[int | None]], vocabularies: list[int]) -> str:
    cells = [[report.NOTHING if one is None else report.size(one) for one in sizes] for sizes in found.values()]
    rows = [[str(classes), *row] for classes, *row in zip(vocabularies, *cells, strict=True)]
    return report.table(["vocabulary", *found], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_memory", description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "docs" / "tutorial" / "figures" / "linear_memory.svg"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    found = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found[name] = measured(dtype, VOCABULARIES)
        print(f"{name}, {ROWS} rows of width {WIDTH}: a step's scratch\n")
        print(table(found[name], VOCABULARIES), flush=True)
    pictures.draw_linear_memory(found, VOCABULARIES, ROWS, WIDTH, options.output)


if __name__ == "__main__":
    main()
