"""How many calls fused kernels have taken, and how many native torch, and why.

Fused ones are counted where kernels are started (csrc/ops/calls.h), those of compiled graphs among them; what is sent
to native torch is counted here.
"""

import collections
import dataclasses
import threading

import torch

from fusedloss import native
from fusedloss._library import _C
from fusedloss.reference import CLASS_LOSSES, ELEMENTWISE_LOSSES

_LOSSES = {name: loss.__name__ for name, loss in (CLASS_LOSSES | ELEMENTWISE_LOSSES).items()}
_LOSSES |= dict.fromkeys(("cross_entropy_shard", "linear_cross_entropy_shard"), "losses of shared classes")
_BACKENDS = ("cpu", "cuda", "triton")
_lock = threading.Lock()
_native: collections.Counter[tuple[str, str]] = collections.Counter()


@dataclasses.dataclass
class Report:
    """What :func:`report` returns: numbers of calls, each by the name of a loss and what it was that took it.

    ``fused`` has the backend beside the loss, ``native`` the reason. ``print(report)`` shows both as a table.
    """

    fused: collections.Counter[tuple[str, str]]
    native: collections.Counter[tuple[str, str]]

    def since(self, earlier: "Report") -> "Report":
        """The calls that are in this report and not in an earlier one."""
        return Report(self.fused - earlier.fused, self.native - earlier.native)

    def __enter__(self) -> "Report":
        self.fused, self.native = report()._counts()
        return self

    def __exit__(self, *exception) -> None:
        self.fused, self.native = report().since(self)._counts()

    def _counts(self):
        return self.fused, self.native

    def __str__(self) -> str:
        rows = [(loss, f"fused: {backend}", calls) for (loss, backend), calls in sorted(self.fused.items())]
        rows += [(loss, f"native: {reason}", calls) for (loss, reason), calls in sorted(self.native.items())]
        table = [("loss", "taken by", "calls"), *rows]
        loss, taken_by, calls = (max(len(str(cell)) for cell in column) for column in zip(*table, strict=True))
        return "\n".join(f"{row[0]:{loss}}  {row[1]:{taken_by}}  {row[2]:>{calls}}" for row in table)


def report() -> Report:
    """How many calls of losses fused kernels have taken since fusedloss was imported, and how many native torch.

    Every call of every thread is counted once it has returned, by the operator that it runs, in graphs of torch.compile
    and torch.export too. :func:`token_log_probs` runs ``cross_entropy``, :func:`linear_token_log_probs` runs
    ``linear_cross_entropy``, and classes that a ``process_group`` shares are ``losses of shared classes`` on each rank.
    Not counted are backward, tensors without elements, a compiler's fake tensors, and replays of a CUDA graph.

    Of native torch the report has what fusedloss has sent there, and why: the kinds of calls that docs/options.md
    lists, and functions that were taken from torch.nn.functional within a :class:`patch` and are kept for longer. What
    a compiler traces or decomposes counts once for each graph, and not when the graph runs. Native's own functions,
    which code that a patch does not reach goes on calling, are not seen.

    Returns:
        A :class:`Report`: ``fused`` is a Counter of (loss, backend), ``native`` one of (loss, reason). As a context,
        ``with fusedloss.report() as calls:``, it has the calls of the block when the block ends; and
        ``later.since(earlier)`` those between two reports.
    """
    fused: collections.Counter[tuple[str, str]] = collections.Counter()
    with _lock:
        native = collections.Counter(_native)
    for name, routes in _C.calls().items():
        operator = name.removesuffix("_backward").removesuffix("_with_grad")
        loss = _LOSSES.get(operator, operator)
        for route, calls in routes.items():
            kind, key = (fused, route) if route in _BACKENDS else (native, route)
            kind[loss, key] += calls
    return Report(+fused, +native)


def by_native(loss: str, reason: str, outputs):
    """The outputs of a call that native torch has computed, which is counted."""
    count_native(loss, f"{reason}, for each graph" if torch.compiler.is_compiling() else reason)
    return outputs


@native.assume_constant_result  # a compiler calls it while it traces, and has nothing of it in its graph
def count_native(loss: str, reason: str) -> None:
    """Counts a call, by the name of the loss or of its operator."""
    with _lock:
        _native[_LOSSES.get(loss, loss), reason] += 1
