"""Who competes: a table of functions that make, for a case, the callable (input, target, **options) that runs it.

What a contestant's user has to do in each call, such as converting a target, is a part of that callable and thus of
its time. What is done once, such as compiling, is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

import fusedloss
from benchmarks.cases import IGNORED_PARTS, LABEL_SMOOTHING, Case


class CannotRun(Exception):
    """Says what about a case a contestant does not offer."""


ENTROPY_BONUS = 0.01


def ours(case: Case) -> Callable:
    if case.loss == "token_log_probs":
        return our_log_probs_and_bonus
    function = getattr(fusedloss.functional, case.loss)
    return partial(classifier_second(function, case) if case.width else function, **case.ours)


def classifier_second(function: Callable, case: Case) -> Callable:
    return lambda input, target, classifier, **options: function(input, classifier, target, **options)


def our_log_probs_and_bonus(input, target, reduction="none", **options):
    log_probs, entropy = fusedloss.token_log_probs(input, target, return_entropy=True, **options)
    return log_probs + ENTROPY_BONUS * entropy


def log_probs_and_bonus(input, target, reduction="none"):
    """As trainers compose them; in float32, since half precision would leave two digits of either."""
    wide = input if input.dtype == torch.float64 else input.float()
    log_p = wide.log_softmax(1)
    entropy = -(wide.softmax(1) * log_p).sum(1)
    return log_p.gather(1, target[:, None]).squeeze(1) + ENTROPY_BONUS * entropy


def native(case: Case) -> Callable:
    if case.loss == "token_log_probs":
        return log_probs_and_bonus
    if case.width:
        return layer_and_loss
    function = getattr(torch.nn.functional, case.loss)
    if case.target == "uint8 labels":  # native's binary losses take no integers
        return lambda input, target, **options: function(input, target.to(input.dtype), **options)
    return function


def layer_and_loss(input, target, classifier, **options):
    """What torch's linear_cross_entropy does by default, where torch has it."""
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(input, classifier), target, **options)


def compiled(case: Case) -> Callable:
    """Anew for each case: compiled code holds its shapes, its strides and the number of threads."""
    torch._dynamo.reset()
    return torch.compile(native(case), dynamic=False)


CONTESTANTS = {"fusedloss": ours, "native": native, "compiled": compiled}


# --- On a GPU ----------------------------------------------------------------------------------------------


def triton(case: Case) -> Callable:
    """fusedloss's own Triton kernels, where CUDA's are the default."""
    if reason := fusedloss.backends()["triton"]:
        raise CannotRun(reason)
    return partial(ours(case), backend="triton")


OWN = {"triton": triton}


# --- Others, where they are installed -------------------------------------------------------------------------


def as_it_is(function: Callable, case: Case) -> Callable:
    return function


def module_with_smoothing(loss: Callable, case: Case) -> Callable:
    module = loss(label_smoothing=LABEL_SMOOTHING if "label_smoothing" in case.options else 0.0)
    return lambda input, target, label_smoothing=0.0, **layer: module(input, target, *layer.values())


def chunked(function: Callable, case: Case) -> Callable:
    """Torch's own, that never holds all of the logits; without these options it is native's two calls.

    On a CPU its many small chunks are slow: a step takes up to forty times as long as native's.
    """
    return partial(classifier_second(function, case), options=torch.nn.LinearCrossEntropyOptions())


@dataclass(frozen=True)
class Peer:
    """A cross entropy over rows of logits, with the mean over the targets that are not ignored.

    Or, if it has the option "classifier", one over rows of embeddings, which holds the linear layer too.
    """

    package: str  # the name that it is installed by
    module: str
    name: str  # in the module
    options: frozenset[str]  # of a case, those that it takes
    adapt: Callable[[Callable, Case], Callable] = as_it_is
    devices: frozenset[str] = frozenset({"cuda"})  # that it has kernels for

    def __call__(self, case: Case) -> Callable:
        if case.loss not in ("cross_entropy", "linear_cross_entropy"):
            raise CannotRun("has cross entropy alone")
        if len(case.shape) != 2 or case.channels_last:
            raise CannotRun("takes contiguous logits of two dimensions")
        if case.target != "indices" and case.target not in IGNORED_PARTS:
            raise CannotRun("takes class indices")
        if missing := set(case.options) - self.options:
            raise CannotRun(f"has no {', '.join(sorted(missing))}")
        if case.reduction != "mean" and "reduction" not in self.options:
            raise CannotRun(f'has no reduction="{case.reduction}" that is asked for here')
        return self.adapt(self.load(), case)

    def load(self) -> Callable:
        return getattr(import_module(self.module), self.name)

    def state(self) -> tuple[bool, str]:
        """Whether it can be imported, and its version or what is in the way."""
        try:
            self.load()
            return True, installed(self.package) or "of unknown version"
        except Exception as error:  # a package may look for its GPU, or for its libraries, when it is imported
            absent = isinstance(error, ModuleNotFoundError) and error.name == self.module.partition(".")[0]
            return False, "not installed" if absent else f"cannot be imported: {first_line(error)}"


PEERS = {
    "liger": Peer(
        "liger-kernel",
        "liger_kernel.transformers.functional",
        "liger_cross_entropy",
        frozenset({"weight", "label_smoothing", "reduction"}),
    ),
    "quack": Peer("quack-kernels", "quack.cross_entropy", "cross_entropy", frozenset({"weight", "reduction"})),
    "flash": Peer(
        "flash-attn",
        "flash_attn.losses.cross_entropy",
        "CrossEntropyLoss",
        frozenset({"label_smoothing"}),
        module_with_smoothing,
    ),
    "cut": Peer(
        "cut-cross-entropy",
        "cut_cross_entropy",
        "linear_cross_entropy",
        frozenset({"classifier", "reduction"}),
        classifier_second,
    ),
    "liger linear": Peer(
        "liger-kernel",
        "liger_kernel.transformers.functional",
        "liger_fused_linear_cross_entropy",
        frozenset({"classifier", "label_smoothing", "reduction"}),
        classifier_second,
    ),
    "quack linear": Peer(
        "quack-kernels",
        "quack.linear_cross_entropy",
        "chunked_linear_cross_entropy",
        frozenset({"classifier", "reduction"}),
        classifier_second,
    ),
    "fla linear": Peer(
        "flash-linear-attention",
        "fla.modules",
        "FusedLinearCrossEntropyLoss",
        frozenset({"classifier", "label_smoothing"}),
        module_with_smoothing,
    ),
    "torch linear": Peer(
        "torch",
        "torch.nn.functional",
        "linear_cross_entropy",
        frozenset({"classifier", "reduction"}),
        chunked,
        frozenset({"cpu", "cuda"}),
    ),
}


def those_for(case: Case, contestants: dict[str, Callable]) -> dict[str, Callable]:
    """Without the peers that hold a linear layer where there is none, and those that do not where there is."""

    def meets(contestant):
        return not isinstance(contestant, Peer) or ("classifier" in contestant.options) == bool(case.width)

    return {name: contestant for name, contestant in contestants.items() if meets(contestant)}


def installed_peers(device: str) -> dict[str, Peer]:
    return {name: peer for name, peer in PEERS.items() if device in peer.devices and peer.state()[0]}


def installed(package: str) -> str:
    """Its version; empty where it is not installed under this name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
