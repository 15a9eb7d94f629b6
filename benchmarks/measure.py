"""Runs one case: judges every contestant against float64, then times those who are right, in turns.

A forward is the call under no_grad. A step is the call and the gradient of the logits, as it is handed to the layer
before: what becomes of it there (a copy into the layout of a leaf's grad, for one) is no part of a loss. Where a case
begins with a linear layer, "logits" are the embeddings that it is given, and its weight has a gradient too.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import quantiles

import torch
from torch import Tensor

from benchmarks.cases import IGNORED, Case, bytes_to_move, learned
from benchmarks.contestants import CannotRun, first_line, native
from benchmarks.devices import Cpu, Cuda, CudaClock, HostClock

MEASURES = {  # of a call, what is differentiated beside the logits, and the grad_output of the loss
    "forward": lambda call, learned, grad_output, logits: call(logits),
    "step": lambda call, learned, grad_output, logits: torch.autograd.grad(
        call(logits), (logits, *learned), grad_output
    ),
}
GRAPHED = "graphed step"  # replayed from a CUDA graph; of latency cases


@dataclass(frozen=True)
class Budget:
    """How often a case is repeated."""

    seconds: float
    fewest: int  # rounds, in which every contestant has its turn
    most: int
    patience: float = 10  # seconds: who has taken so long in all has no further turn


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

    problem: str = ""  # "wrong: ...", "failed: ..." or "cannot: ..."
    first_seconds: float = 0.0  # of the first forward and step, compiling included
    errors: dict[str, float] = field(default_factory=dict)  # of the loss and the gradient, beside float64
    times: dict[str, Times] = field(default_factory=dict)
    peak_bytes: int | None = None  # that a step takes beside the logits
    not_graphed: str = ""  # why a CUDA graph could not be made of its step
    launches: int | None = None  # in a step; on CUDA, of a latency case


@dataclass
class Result:
    case: Case
    threads: int
    logits_bytes: int
    bytes_to_move: dict[str, int]  # by measure
    copy: Times
    entries: dict[str, Entry]  # by contestant
    memory_bandwidth: float = 0.0  # bytes per second of a large copy; on CUDA
    products: Times | None = None  # of a linear layer in a step, and a copy in place of the loss

    def seconds(self, contestant: str, measure: str) -> float | None:
        times = self.entries[contestant].times if contestant in self.entries else {}
        return times[measure].median if measure in times else None

    def bound_by_memory(self, contestant: str, measure: str) -> float | None:
        """The seconds of what a copy is a yardstick for: a linear layer's products are bound by arithmetic."""
        return None if self.case.width else self.seconds(contestant, measure)

    def ratio(self, measure: str, rival: str, own: str = "fusedloss") -> float | None:
        """How many times faster we are."""
        ours, theirs = self.seconds(own, measure), self.seconds(rival, measure)
        return theirs / ours if ours and theirs else None

    def best(self, measure: str, rivals: Iterable[str]) -> str | None:
        """The quickest of the rivals that were timed."""
        timed = {rival: seconds for rival in rivals if (seconds := self.seconds(rival, measure))}
        return min(timed, key=timed.__getitem__) if timed else None

    def bandwidth(self, measure: str) -> float | None:
        """The bytes that must move in our time, as a fraction of what a plain copy moves in it."""
        ours = self.bound_by_memory("fusedloss", measure)
        return self.bytes_to_move[measure] / ours / (2 * self.logits_bytes / self.copy.median) if ours else None

    def floor(self, measure: str) -> float | None:
        """The time that the bytes take at the bandwidth of a large copy, as a fraction of ours."""
        ours = self.bound_by_memory("fusedloss", measure)
        return self.bytes_to_move[measure] / self.memory_bandwidth / ours if ours and self.memory_bandwidth else None

    def of_products(self) -> float | None:
        """The time of a linear layer's products and a copy in place of the loss, as a fraction of our step's."""
        ours = self.seconds("fusedloss", "step")
        return self.products.median / ours if ours and self.products else None

    def copies(self) -> float | None:
        """Our step in plain copies of the logits."""
        ours = self.bound_by_memory("fusedloss", "step")
        return ours / self.copy.median if ours else None


def run(case: Case, contestants: dict[str, Callable], budget: Budget, device: Cpu | Cuda) -> Result:
    device.prepare(case)
    logits, target, options = case.draw(device.name)
    moved = bytes_to_move(case, logits, target, options)
    clock = device.clock(case)
    entries, calls = judge(case, contestants, logits, target, options)
    yardsticks = [Party(torch.empty_like(logits).copy_, clock, differentiates=False)]
    if case.width:
        yardsticks.append(Party(products(target, options["classifier"]), clock, differentiates=False))
    parties = {}
    for name, call in calls.items():
        with torch.no_grad():
            grad_output = case.draw_grad_output(call(logits.clone()))
        also = tuple(learned(options).values())
        actions = {measure: partial(action, call, also, grad_output) for measure, action in MEASURES.items()}
        entries[name].peak_bytes = device.peak_bytes(actions["step"], non_leaf(logits))
        if case.latency:
            entries[name].launches = device.launches(call, logits)
            try:
                graphed = device.graphed(actions["step"], non_leaf(logits))  # type: ignore[union-attr]  # a GPU
                parties[name, GRAPHED] = Party(graphed, clock, True)
            except RuntimeError as error:  # a contestant that waits for the GPU cannot be captured
                entries[name].not_graphed = first_line(error)
        for measure, action in actions.items():
            parties[name, measure] = Party(action, clock, differentiates=measure == "step")
    take_turns([*yardsticks, *parties.values()], logits, budget)
    for (name, measure), party in parties.items():
        entries[name].times[measure] = party.times()
    size = math.prod(case.shape) * case.dtype.itemsize
    copy, *of_layer = (party.times() for party in yardsticks)
    return Result(case, torch.get_num_threads(), size, moved, copy, entries, device.bandwidth, *of_layer)


def products(target: Tensor, weight: Tensor) -> Callable[[Tensor], None]:
    """What no step with a linear layer can avoid: its three products, of the rows that are not ignored.

    A plain copy of the logits is in the place of the loss. All of it goes into memory that is already there.
    """
    rows = int((target != IGNORED).sum())
    logits, gradient = (weight.detach().new_empty(rows, len(weight)) for _ in range(2))
    of_weight, of_embeddings = torch.empty_like(weight.detach()), weight.detach().new_empty(rows, weight.shape[1])

    def run(embeddings: Tensor) -> None:
        torch.mm(embeddings[:rows], weight.t(), out=logits)
        gradient.copy_(logits)
        torch.mm(gradient, weight, out=of_embeddings)
        torch.mm(gradient.t(), embeddings[:rows], out=of_weight)

    return run


def judge(case: Case, contestants: dict[str, Callable], logits: Tensor, target: Tensor, options: dict) -> tuple:
    """An entry for each contestant, and the calls of those who are right."""
    truth = true_outcome(case, logits, target, options)
    entries, calls = {}, {}
    for name, contestant in contestants.items():
        start = time.perf_counter()
        try:
            call: Callable = partial(contestant(case), target=target, **options, **reduction_of(case))
            call = under_autocast(call) if case.autocast else call
            results = outcome(case, call, logits, options)
        except CannotRun as reason:
            entries[name] = Entry(f"cannot: {reason}")
            continue
        except Exception as error:  # whatever a contestant raises is its result
            entries[name] = Entry(f"failed: {first_line(error)}")
            continue
        first_seconds = time.perf_counter() - start
        entries[name] = Entry(fault(results, truth, case.dtype), first_seconds, errors(results, truth))
        if not entries[name].problem:
            calls[name] = call
    return entries, calls


def reduction_of(case: Case) -> dict[str, str]:
    """As an argument, where it is not everyone's default."""
    return {} if case.reduction == "mean" else {"reduction": case.reduction}


def under_autocast(call: Callable) -> Callable:
    def wrapped(logits, *rest, **options):
        with torch.autocast(logits.device.type, torch.bfloat16):
            return call(logits, *rest, **options)

    return wrapped


# --- Is it right? ------------------------------------------------------------------------------------------

# Generous: what is noise in a dtype is no fault. Native rounds log-probabilities to bfloat16, which moves a softmax by
# 3%, and softmax minus probability by more. A mistake that hides in there shows in float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.25}


def outcome(case: Case, call: Callable, logits: Tensor, options: dict) -> dict[str, Tensor]:
    with torch.no_grad():
        forward = call(logits.clone())
    logits = non_leaf(logits)
    loss = call(logits)
    also = learned(options)
    grads = torch.autograd.grad(loss, (logits, *also.values()), case.draw_grad_output(loss.detach()))
    return {
        "loss under no_grad": forward,
        "loss": loss.detach(),
        **dict(zip(names_of_gradients(also), grads, strict=True)),
    }


def names_of_gradients(learned: dict[str, Tensor]) -> list[str]:
    return ["gradient", *(f"gradient of the {name}" for name in learned)]


# Entries that float64 takes on at once: what a CPU's cache holds, and on a GPU what leaves room for its intermediates.
CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}


def true_outcome(case: Case, logits: Tensor, target: Tensor, options: dict) -> dict[str, Tensor]:
    """Native's in float64, some rows after the other: their sum as a part of the mean, or each loss."""
    wide = {name: widen(value) for name, value in options.items()}
    also = learned(wide)
    whole = case.reduction == "none"
    grad_output = true_grad_output(case, logits, target, wide)
    # With fewer rows than that, a part's gradient of a linear layer's weight would be larger than its logits.
    rows = max(rows_at_once(case.shape, logits.device.type), case.width)
    losses, gradient = [], torch.empty_like(logits, dtype=torch.float64)
    of_also = [torch.zeros_like(value) for value in also.values()]
    for first in range(0, len(logits), rows):
        some = slice(first, first + rows)
        leaf = logits[some].double().detach().requires_grad_()
        loss = native(case)(leaf, widen(target[some]), **wide, reduction="none" if whole else "sum")
        gradient[some], *rest = torch.autograd.grad(
            loss, (leaf, *also.values()), grad_output[some] if whole else grad_output
        )
        losses.append(loss.detach())
        of_also = [sofar + part for sofar, part in zip(of_also, rest, strict=True)]
    loss = torch.cat(losses) if whole else sum(losses) / divisor(case, target, wide)
    gradients = dict(zip(names_of_gradients(also), [gradient, *of_also], strict=True))
    return {"loss under no_grad": loss, "loss": loss, **gradients}


def true_grad_output(case: Case, logits: Tensor, target: Tensor, options: dict) -> Tensor:
    """What the losses are differentiated with; of a mean, what their sum is."""
    if case.reduction == "none":
        shape = logits.shape if case.loss.startswith("binary") else target.shape
        # Drawn in the type that the loss will have: what the contestants see.
        drawn = case.draw_grad_output(torch.empty(shape, dtype=case.loss_type, device=logits.device))
        assert drawn is not None, "losses that are not reduced are differentiated with a tensor"
        return drawn.double()
    return torch.ones((), dtype=torch.float64, device=logits.device) * case.grad_output / divisor(case, target, options)


def errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The sum of all errors of a result, as a fraction of the sum of what is true; NaN where a result is."""
    found = {}
    for name in truth.keys() - {"loss under no_grad"}:
        if name not in results or results[name].shape != truth[name].shape:
            return {}
        pairs = zip(parts(results[name]), parts(truth[name]), strict=True)
        total = sum((result.double() - true).abs().sum().item() for result, true in pairs)
        found[name] = total / max(torch.linalg.vector_norm(truth[name], 1).item(), 1e-300)
    return found


def divisor(case: Case, target: Tensor, options: dict) -> Tensor | int:
    """What the mean divides by."""
    if case.loss.startswith("binary"):
        return target.numel()
    if target.is_floating_point():
        return target.numel() // target.shape[1]
    counted = target[target != IGNORED]
    return options["weight"][counted].sum() if "weight" in options else counted.numel()


def fault(results: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> str:
    """What is wrong with the results; empty when nothing is."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name, true in truth.items():
        if results[name].shape != true.shape:
            return f"wrong: {name}, of shape {tuple(results[name].shape)}"
        mean = torch.linalg.vector_norm(true, 1) / true.numel()
        right, largest = True, 0.0
        for result, part in zip(parts(results[name]), parts(true), strict=True):
            error = (result.double() - part).abs()
            # The mean beside an entry's own size: a small difference of two numbers has their errors. And the gradient
            # of a mean over many elements is, in float16, only a few times its smallest number.
            right &= bool((error <= TOLERANCE[dtype] * (part.abs() + mean) + 4 * smallest).all())  # NaN is wrong
            largest = max(largest, error.max().item(), key=lambda value: math.inf if math.isnan(value) else value)
        if not right:
            return f"wrong: {name}, by up to {largest:.2g}"
    return ""


def parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Some rows each."""
    return tensor.split(rows_at_once(tensor.shape, tensor.device.type)) if tensor.dim() else (tensor,)


def rows_at_once(shape: tuple[int, ...], device: str) -> int:
    return max(1, CHUNK[device] // math.prod(shape[1:]))


def widen(value):
    """In float64; what is differentiated becomes a leaf again."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


# --- How long does it take? --------------------------------------------------------------------------------

# Seconds of a call that is too dear to be made without being timed. Not less: free memory as another contestant left it
# costs a step of three seconds 7 percent.
LONG = 5.0


@dataclass
class Party:
    """What takes its turn on the clock: a contestant's forward, its step, or the plain copy."""

    run: Callable[[Tensor], object]
    clock: HostClock | CudaClock
    differentiates: bool
    calls: int = 1
    samples: list[float] = field(default_factory=list)

    def sample(self, logits: Tensor) -> float:
        """Seconds per call. Each gets logits of its own, since it may overwrite them.

        One call goes before the clock starts: in training a step follows a step of its own kind, and finds the caches
        and the free memory as that one left them, not as another contestant did. One that is LONG has no such call.
        """
        with torch.set_grad_enabled(self.differentiates):
            own = [non_leaf(logits) for _ in range(self.calls + 1)]
            start = time.perf_counter()
            self.run(own.pop())
            first = time.perf_counter() - start
            return first if first > LONG else self.clock.seconds(self.run, own) / self.calls

    def times(self) -> Times:
        low, median, high = quantiles(self.samples, n=4) if len(self.samples) > 1 else 3 * self.samples
        return Times(median, (low, high), len(self.samples), self.calls)


def take_turns(parties: list[Party], logits: Tensor, budget: Budget) -> None:
    """Fills the parties' samples. Interleaved, so that what slows the machine for a while slows all of them."""
    with no_garbage_collection():
        for party in parties:
            first = party.sample(logits)
            party.calls = party.clock.calls(first)
            if first > LONG:  # too dear to be without use
                party.samples.append(first)
            if party.calls > 1:  # the first one of something so short may have been slow by chance
                party.calls = 1
                party.calls = party.clock.calls(min(party.sample(logits) for _ in range(2)))
        start = time.perf_counter()
        for party in parties:
            if not party.samples:
                party.sample(logits)
        rounds = int(budget.seconds / (time.perf_counter() - start + sum(sum(party.samples) for party in parties)))
        shuffle = random.Random(0).shuffle
        for _ in range(min(max(rounds, budget.fewest), budget.most)):
            shuffle(parties)  # in a fixed order, one would always find the caches as the same other leaves them
            for party in parties:
                if sum(party.samples) < budget.patience:
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
