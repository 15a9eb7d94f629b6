"""Runs one case: judges every contestant against float64, then times those who are right, in turns.

A forward is the call under no_grad. A step is the call and the gradient of the logits, as it is handed to the layer
before: what becomes of it there (a copy into the layout of a leaf's grad, for one) is no part of a loss.
"""

import gc
import random
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import quantiles

import torch
from torch import Tensor

from benchmarks.cases import Case, bytes_to_move
from benchmarks.contestants import native

MEASURES = {
    "forward": lambda call, logits: call(logits),
    "step": lambda call, logits: torch.autograd.grad(call(logits), logits),
}


@dataclass(frozen=True)
class Budget:
    """How often a case is repeated."""

    seconds: float
    fewest: int  # rounds, in which every contestant has its turn
    most: int


@dataclass(frozen=True)
class Times:
    """Seconds per call, over the rounds of a case."""

    median: float
    quartiles: tuple[float, float]
    rounds: int
    calls: int  # in a round


@dataclass
class Entry:
    """A contestant's part in a case: its times by measure, or the problem that kept it from being timed."""

    problem: str = ""  # "wrong: ..." or "failed: ..."
    first_seconds: float = 0.0  # of the first forward and step, compiling included
    times: dict[str, Times] = field(default_factory=dict)


@dataclass
class Result:
    case: Case
    threads: int
    logits_bytes: int
    bytes_to_move: dict[str, int]  # by measure
    copy: Times
    entries: dict[str, Entry]  # by contestant

    def seconds(self, contestant: str, measure: str) -> float | None:
        times = self.entries[contestant].times if contestant in self.entries else {}
        return times[measure].median if measure in times else None

    def ratio(self, measure: str, rival: str) -> float | None:
        """How many times faster we are."""
        ours, theirs = self.seconds("fusedloss", measure), self.seconds(rival, measure)
        return theirs / ours if ours and theirs else None

    def bandwidth(self, measure: str) -> float | None:
        """The bytes that must move in our time, as a fraction of what a plain copy moves in it."""
        ours = self.seconds("fusedloss", measure)
        return self.bytes_to_move[measure] / ours / (2 * self.logits_bytes / self.copy.median) if ours else None

    def copies(self) -> float | None:
        """Our step in plain copies of the logits."""
        ours = self.seconds("fusedloss", "step")
        return ours / self.copy.median if ours else None


def run(case: Case, contestants: dict[str, Callable], budget: Budget, device: str) -> Result:
    logits, target, options = case.draw(device)
    moved = bytes_to_move(case, logits, target, options)
    wide = {name: widen(value) for name, value in options.items()}
    truth = outcome(partial(native(case), target=widen(target), **wide), widen(logits))
    copy = Party(torch.empty_like(logits).copy_, differentiates=False)
    entries, parties = {}, {}
    for name, contestant in contestants.items():
        start = time.perf_counter()
        try:
            call = partial(contestant(case), target=target, **options)
            results = outcome(call, logits)
        except Exception as error:  # whatever a contestant raises is its result
            entries[name] = Entry(f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        entries[name] = Entry(fault(results, truth, case.dtype), time.perf_counter() - start)
        if not entries[name].problem:
            for measure, action in MEASURES.items():
                parties[name, measure] = Party(partial(action, call), differentiates=measure == "step")
    take_turns([copy, *parties.values()], logits, budget)
    for name, entry in entries.items():
        entry.times = {measure: parties[name, measure].times() for measure in MEASURES if (name, measure) in parties}
    return Result(case, torch.get_num_threads(), logits.nbytes, moved, copy.times(), entries)


# --- Is it right? ------------------------------------------------------------------------------------------

# Generous: what is noise in a dtype is no fault. Native rounds log-probabilities to bfloat16, which moves a softmax by
# 3%, and softmax minus probability by more. A mistake that hides in there shows in float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.25}


def outcome(call: Callable, logits: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        forward = call(logits.clone())
    logits = non_leaf(logits)
    loss = call(logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    return {"loss under no_grad": forward, "loss": loss.detach(), "gradient": gradient}


def fault(results: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> str:
    """What is wrong with the results; empty when nothing is."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name, true in truth.items():
        error = (results[name].double() - true).abs()
        # The mean beside an entry's own size: a small difference of two numbers has their errors. And the gradient
        # of a mean over many elements is, in float16, only a few times its smallest number.
        allowed = TOLERANCE[dtype] * (true.abs() + true.abs().mean()) + 4 * smallest
        if not (error <= allowed).all():  # so that NaN is wrong
            return f"wrong: {name}, by up to {error.max().item():.2g}"
    return ""


def widen(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


# --- How long does it take? --------------------------------------------------------------------------------

SAMPLE = 200e-6  # seconds; what is shorter is repeated, or the clock's own cost would be seen


@dataclass
class Party:
    """What takes its turn on the clock: a contestant's forward, its step, or the plain copy."""

    run: Callable[[Tensor], object]
    differentiates: bool
    calls: int = 1
    samples: list[float] = field(default_factory=list)

    def sample(self, logits: Tensor) -> float:
        """Seconds per call. Each gets logits of its own, since it may overwrite them.

        One call goes before the clock starts: in training a step follows a step of its own kind, and finds the caches
        and the free memory as that one left them, not as another contestant did.
        """
        with torch.set_grad_enabled(self.differentiates):
            own = [non_leaf(logits) for _ in range(self.calls + 1)]
            self.run(own.pop())
            start = time.perf_counter()
            for one in own:
                self.run(one)
            return (time.perf_counter() - start) / self.calls

    def times(self) -> Times:
        low, median, high = quantiles(self.samples, n=4)
        return Times(median, (low, high), len(self.samples), self.calls)


def take_turns(parties: list[Party], logits: Tensor, budget: Budget) -> None:
    """Fills the parties' samples. Interleaved, so that what slows the machine for a while slows all of them."""
    with no_garbage_collection():
        for party in parties:
            party.calls = 1 + int(SAMPLE / min(party.sample(logits) for _ in range(3)))
        start = time.perf_counter()
        for party in parties:
            party.sample(logits)
        rounds = int(budget.seconds / (time.perf_counter() - start))
        shuffle = random.Random(0).shuffle
        for _ in range(min(max(rounds, budget.fewest), budget.most)):
            shuffle(parties)  # in a fixed order, one would always find the caches as the same other leaves them
            for party in parties:
                party.samples.append(party.sample(logits))


def non_leaf(logits: Tensor) -> Tensor:
    """A copy with the same strides that is, where gradients are recorded, the output of a layer before."""
    return logits.detach().requires_grad_(torch.is_grad_enabled()).clone()


@contextmanager
def no_garbage_collection():
    """It would fall on whoever happens to allocate the one object too many."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
