"""What the examples have in common: two trainings, and whether they are the same."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

LIBRARIES = ("fusedloss", "fusedloss_triton")
OPERATORS = ("cross_entropy", "linear_cross_entropy", "nll", "bce_with_logits", "bce")


@dataclass(frozen=True)
class Comparison:
    """The losses of each step, and which of fusedloss's operators have run in the second training."""

    name: str
    native: list[float]
    ours: list[float]
    kernels: dict[str, int]
    tolerance: float = 1e-5  # relative; half precision rounds more coarsely

    @property
    def difference(self) -> float:
        """The largest, relative; NaN if one of them is."""
        native, ours = torch.tensor([self.native, self.ours], dtype=torch.float64)
        return (ours / native - 1).abs().max().item()

    @property
    def error(self) -> str | None:
        if not self.difference <= self.tolerance:  # nor if it is NaN
            return f"{self.name}: the losses differ by {self.difference:.1e}: {self.native} and {self.ours}"
        if self.native[0] == self.native[-1]:
            return f"{self.name}: nothing was learned"
        return None if self.kernels else f"{self.name}: none of fusedloss's operators has run"


def compare(name: str, native: Callable[[], list[float]], ours: Callable[[], list[float]], **options) -> Comparison:
    expected = native()
    losses, kernels = with_kernels(ours)
    return Comparison(name, expected, losses, kernels, **options)


def with_kernels(train: Callable[[], list[float]]) -> tuple[list[float], dict[str, int]]:
    """The losses, and how often each operator of fusedloss was called in forward."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        losses = train()
    called = (event.name.partition("::") for event in record.events())
    return losses, dict(Counter(name for library, _, name in called if library in LIBRARIES and name in OPERATORS))


def missing(packages: tuple[str, ...]) -> list[str]:
    return [package for package in packages if find_spec(package) is None]


def report(comparisons: list[Comparison]) -> str | None:
    """Prints a table; returns what is wrong."""
    width = max(len(each.name) for each in comparisons)
    print(f"{'':{width}}  first loss  last native    last ours  difference  operators of fusedloss")
    for each in comparisons:
        first, native, ours = each.native[0], each.native[-1], each.ours[-1]
        kernels = ", ".join(f"{count} {name}" for name, count in each.kernels.items())
        print(f"{each.name:{width}}  {first:10.5f}  {native:11.7f}  {ours:11.7f}  {each.difference:10.1e}  {kernels}")
    return "\n".join(each.error for each in comparisons if each.error) or None


def batches(count: int, shape: tuple[int, ...], classes: int, target: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Random inputs, and classes that can be told from them."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for _ in range(count)]
    values = [x.flatten()[: math.prod(target)].view(target) for x in inputs]
    return [(x, ((value.sigmoid() * classes).long())) for x, value in zip(inputs, values, strict=True)]
