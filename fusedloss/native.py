"""Native torch's losses, from when fusedloss was imported: within fusedloss.patch() their names in
torch.nn.functional lead back here, and what is pickled by name finds them here.

LinearCrossEntropyLoss is native's, too, or what stands in for it where torch has none."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    nll_loss,
)
from torch.nn.modules.loss import _WeightedLoss

__all__ = ["binary_cross_entropy", "binary_cross_entropy_with_logits", "cross_entropy", "nll_loss"]


def assume_constant_result(function):
    """torch.compiler.assume_constant_result, which does no more, but first imports the compiler: two seconds."""
    function._dynamo_marked_constant = True
    return function


class SubstituteLinearCrossEntropyLoss(_WeightedLoss):
    """torch.nn.LinearCrossEntropyLoss as torch 2.13 has it, but for forward: a base of modules with their own."""

    __constants__: ClassVar = ["num_classes", "out_features", "reduction", "ignore_index", "label_smoothing"]
    num_classes: int
    out_features: tuple[int, ...]
    reduction: str
    ignore_index: int | None
    label_smoothing: float

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options=None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        rows = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.options = options

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )


try:
    from torch.nn import LinearCrossEntropyLoss
    from torch.nn.functional import linear_cross_entropy

    __all__ += ["linear_cross_entropy"]
except ImportError:  # torch before 2.13
    LinearCrossEntropyLoss = SubstituteLinearCrossEntropyLoss  # type: ignore[assignment, misc]
