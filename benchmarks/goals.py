"""What the kernels for CUDA have to reach: a table of goals, each judged by the worst of its cases."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cases import CUDA_GROUPS, Case
from benchmarks.contestants import PEERS
from benchmarks.measure import MEASURES, Entry, Result

BEYOND_CACHE = 100e6  # bytes of logits that no L2 cache holds
LARGE = 256e6  # bytes of logits
STRONGEST = ("compiled", *PEERS)
TRITON_PEERS = ("liger", "flash")


@dataclass(frozen=True)
class Goal:
    title: str
    wanted: float
    unit: str  # "percent", "times" or "launches", of which there may be no more
    cases: Callable[[Case], bool]
    value: Callable[[Result], tuple[float | None, str]]  # the number, and the rival that it speaks of
    own: str = "fusedloss"  # whose goal it is


def of_copy(measure: str) -> Callable:
    return lambda result: (result.bandwidth(measure), "")


def of_floor(measure: str) -> Callable:
    return lambda result: (result.floor(measure), "")


def versus(*rivals: str, measure: str = "step", own: str = "fusedloss") -> Callable:
    """How many times faster than the best of the rivals."""

    def value(result):
        best = result.best(measure, rivals)
        return (result.ratio(measure, best, own), best) if best else (None, "")

    return value


def of_products(result: Result) -> tuple[float | None, str]:
    return result.of_products(), ""


def launches(result: Result) -> tuple[int | None, str]:
    return result.entries["fusedloss"].launches, ""


def plain(case: Case) -> bool:
    """A mean over class indices, without options: what the bytes per logit of the goals are about."""
    usual = case.target == "indices" and not case.options and not case.ours and not other_step(case)
    return case.loss == "cross_entropy" and usual and not case.latency and not case.width


def other_step(case: Case) -> bool:
    return case.reduction == "none" or case.grad_output != 1


def beyond(case: Case, size: float) -> bool:
    return math.prod(case.shape) * case.dtype.itemsize > size


def forward_of_many(case: Case) -> bool:
    return plain(case) and not case.autocast and beyond(case, LARGE) and case.shape[1] >= 1024


def forward_of_few(case: Case) -> bool:
    return plain(case) and not case.autocast and beyond(case, LARGE) and case.shape[1] < 1024


def training_step(case: Case) -> bool:
    return plain(case) and not case.autocast and beyond(case, BEYOND_CACHE)


def under_autocast(case: Case) -> bool:
    return plain(case) and case.autocast and beyond(case, BEYOND_CACHE)


def bce_step(case: Case) -> bool:
    usual = not case.autocast and not other_step(case)
    return case.loss == "binary_cross_entropy_with_logits" and usual and beyond(case, BEYOND_CACHE)


def behind_a_layer(case: Case) -> bool:
    return case.width > 0


def large(case: Case) -> bool:
    return beyond(case, BEYOND_CACHE) and not case.latency and not case.width


def smallest(case: Case) -> bool:
    return case.latency and case.shape == (32, 10)


GOALS = [
    Goal("forward, 1024 classes and more: of copy", 0.90, "percent", forward_of_many, of_copy("forward")),
    Goal("forward, fewer classes: of copy", 0.82, "percent", forward_of_few, of_copy("forward")),
    Goal("cross entropy step: of floor", 0.85, "percent", training_step, of_floor("step")),
    Goal("cross entropy step: vs best of compiled and peers", 1.4, "times", training_step, versus(*STRONGEST)),
    Goal("cross entropy step: vs native", 4.0, "times", training_step, versus("native")),
    Goal("cross entropy step, bfloat16 under autocast: vs native", 7.0, "times", under_autocast, versus("native")),
    Goal("bce with logits step: of floor", 0.85, "percent", bce_step, of_floor("step")),
    Goal("bce with logits step: vs native", 5.0, "times", bce_step, versus("native")),
    Goal("bce with logits step: vs compiled", 1.5, "times", bce_step, versus("compiled")),
    Goal("a linear layer and its loss, a step: of products", 0.97, "percent", behind_a_layer, of_products),
    Goal("a linear layer and its loss, a step: vs best", 1.0, "times", behind_a_layer, versus("native", *STRONGEST)),
    *(
        Goal(f"latency of a {measure}, (32, 10): vs native", 1.0, "times", smallest, versus("native", measure=measure))
        for measure in MEASURES
    ),
    Goal("launches of a step, (32, 10): at most", 2, "launches", smallest, launches),
    Goal("Triton, a step: of CUDA's speed", 0.9, "times", large, versus("fusedloss", own="triton"), "triton"),
    Goal("Triton, a step: vs Triton peers", 1.0, "times", training_step, versus(*TRITON_PEERS, own="triton"), "triton"),
]


def fails(entry: Entry | None) -> bool:
    """Whether someone who takes part was wrong, or raised; who is absent or offers no such case, does not."""
    return entry is not None and bool(entry.problem) and not entry.problem.startswith("cannot")


def judge(goal: Goal, results: list[Result]) -> dict:
    """The goal's verdict, its worst case, and how many of its cases were measured.

    A case that the goal's owner could not be timed in is missed. One without the rival, or left out, is not measured:
    what the others reach is then reached in part.
    """
    mine = [result for result in results if goal.cases(result.case)]
    broken = [result for result in mine if fails(result.entries.get(goal.own))]
    values = [(*goal.value(result), result) for result in mine if result not in broken]
    measured = [(number, rival, result) for number, rival, result in values if number is not None]
    bound = goal.unit == "launches"
    good = [value for value in measured if (value[0] <= goal.wanted if bound else value[0] >= goal.wanted)]
    worst, rival, where = (max if bound else min)(measured, key=lambda value: value[0], default=(None, "", None))
    where = broken[0] if broken else where
    cases = sum(goal.cases(case) for group in CUDA_GROUPS.values() for case in group)
    if broken or len(good) < len(measured):
        verdict = "missed"
    elif measured:
        verdict = "reached" if len(measured) == cases else "reached in part"
    else:
        verdict = "not measured"
    return {
        "goal": goal.title,
        "wanted": goal.wanted,
        "unit": goal.unit,
        "verdict": verdict,
        "worst": None if broken else worst,
        "where": str(where.case) if where else "",
        "rival": "" if broken else rival,
        "met": len(good),
        "measured": len(measured) + len(broken),
        "cases": cases,
    }
