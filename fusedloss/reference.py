"""The losses in plain torch: native's functions, composed with what fusedloss adds to them.

This is the specification. Tests judge the kernels by it (in float64), benchmarks measure against it, exported programs
are decomposed into it, and calls under functorch transforms and forward-mode AD are routed to it. Outside those it is
never a fallback. The arguments are those of fusedloss.functional, without native's legacy size_average and reduce.
"""

from typing import Any

import torch
from torch import Tensor

from fusedloss import native


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    return_lse: bool = False,
):
    input = capped(input, logit_softcap)
    target = _class_indices(target)
    loss = native.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    lse: Any = log_sum_exp(input) if z_loss != 0 or return_lse else None
    if z_loss != 0:
        indices = None if target.is_floating_point() else target.reshape(lse.shape)
        count, weights = counts(indices, weight, ignore_index, lse)
        added = torch.where(count, z_loss * lse.square(), torch.zeros_like(lse))
        loss = loss + _reduce(added, reduction, weights.sum()).to(loss.dtype)
    return (loss, lse) if return_lse else loss


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
):
    target = _class_indices(target)
    return native.nll_loss(input, target, weight=weight, ignore_index=ignore_index, reduction=reduction)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
):
    def loss(input, target, reduction):
        return native.binary_cross_entropy_with_logits(
            input, target, weight=weight, pos_weight=pos_weight, reduction=reduction
        )

    return _without_ignored(loss, input, target, reduction, ignore_index)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    ignore_index: int | None = None,
):
    def loss(input, target, reduction):
        return native.binary_cross_entropy(input, target, weight=weight, reduction=reduction)

    return _without_ignored(loss, input, target, reduction, ignore_index)


# By the names of their operators (csrc/register.cpp).
CLASS_LOSSES = {"cross_entropy": cross_entropy, "nll": nll_loss}
ELEMENTWISE_LOSSES = {"bce_with_logits": binary_cross_entropy_with_logits, "bce": binary_cross_entropy}


def _class_indices(target):
    """Native takes uint8 targets for (N, C) only, and int32 ones never."""
    return target.long() if target.dtype in (torch.uint8, torch.int32) else target


def capped(input, logit_softcap):
    return input if logit_softcap is None else logit_softcap * torch.tanh(input / logit_softcap)


def class_dimension(input):
    return 0 if input.dim() == 1 else 1


def log_sum_exp(input):
    wide = input if input.dtype == torch.float64 else input.float()
    return torch.logsumexp(wide, class_dimension(input))


def counts(indices, weight, ignore_index, like):
    """Which positions count, and their weights in the mean, float64; all of them alike for probabilities."""
    if indices is None:
        return torch.ones_like(like, dtype=torch.bool), torch.ones_like(like, dtype=torch.float64)
    count = indices != ignore_index
    if weight is None:
        return count, count.double()
    return count, weight.double().flatten()[indices.where(count, torch.zeros_like(indices))] * count


def _without_ignored(native_loss, input, target, reduction, ignore_index):
    """Elements whose target is ignore_index give no loss and no gradient, and do not count in the mean."""
    ignored = None if ignore_index is None else target == ignore_index
    if not target.is_floating_point() and not target.is_complex():
        target = target.to(input.dtype)
    if ignored is None:
        return native_loss(input, target, reduction)
    # A value that every loss accepts, so that nothing an ignored element holds, NaN included, meets a formula.
    half = torch.full((), 0.5, device=input.device)
    input = input.where(~ignored, half.to(input.dtype))
    target = target.where(~ignored, half.to(target.dtype))
    loss = native_loss(input, target, "none")
    loss = torch.where(ignored, torch.zeros_like(loss), loss)
    return _reduce(loss, reduction, (~ignored).sum())


def _reduce(loss, reduction, divisor):
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / divisor.to(total.dtype)
