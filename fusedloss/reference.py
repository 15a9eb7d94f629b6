"""The losses in plain torch: native's functions, composed with what fusedloss adds to them.

This is the specification. Tests judge the kernels by it (in float64), benchmarks measure against it, exported programs
are decomposed into it, and calls under functorch transforms and forward-mode AD are routed to it. Outside those it is
never a fallback. The arguments are those of fusedloss.functional, without native's legacy size_average and reduce.
"""

import functools
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
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    denominator: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_argmax: bool = False,
):
    seen = seen_logits(input, logit_scale, logit_softcap)
    target = _class_indices(target)
    adds = z_loss != 0 or denominator is not None or sample_weight is not None
    lse: Any = log_sum_exp(seen) if adds or return_lse else None
    if not adds:
        loss = native.cross_entropy(seen, target, weight, None, ignore_index, None, reduction, label_smoothing)
    else:
        # In half precision, losses and their sum would be rounded before the mean is taken.
        of_loss = [input, *(other for other in (target, weight) if target.is_floating_point() and other is not None)]
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in of_loss))
        if autocasts(input.device.type):
            dtype = torch.promote_types(dtype, torch.float32)
        wide: Any = [x if x is None or not x.is_floating_point() else _wide(x) for x in (seen, target, weight)]
        loss = native.cross_entropy(*wide, None, ignore_index, None, "none", label_smoothing)  # type: ignore[call-arg]
        loss = loss.reshape(lse.shape)
        indices = None if target.is_floating_point() else target.reshape(lse.shape)
        count, weights = counts(indices, weight, ignore_index, lse)
        if z_loss != 0:
            loss = loss + torch.where(count, z_loss * lse.square(), torch.zeros_like(lse))
        if sample_weight is not None:
            sample_weight = torch.where(count, sample_weight, torch.zeros_like(sample_weight))
            loss, weights = loss * sample_weight, weights * sample_weight
        loss = _reduce(loss, reduction, weights.sum()) if denominator is None else mean_over(loss, denominator)
        loss = loss.to(dtype)
    answers = [lse] if return_lse else []
    answers += [entropy(seen)] if return_entropy else []
    answers += [input.argmax(class_dimension(input))] if return_argmax else []
    return (loss, *answers) if answers else loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    **added,
):
    """input: (N, D)."""
    logits = linear_logits(input, linear_weight, linear_bias)
    return cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, **added)


def linear_logits(input, linear_weight, linear_bias=None):
    """(N, C), or (N, C, d1, ...) of a weight (C, d1, ..., D)."""
    shape = linear_weight.shape[:-1]
    if len(shape) == 1:
        return torch.nn.functional.linear(input, linear_weight, linear_bias)
    bias = None if linear_bias is None else linear_bias.flatten()
    return torch.nn.functional.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, shape)


def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
):
    options: Any = {"logit_scale": logit_scale, "logit_softcap": logit_softcap, "return_entropy": return_entropy}
    losses = cross_entropy(_wide(logits), target, None, ignore_index, "none", **options)
    return (0.0 - losses[0], losses[1]) if return_entropy else 0.0 - losses


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


def seen_logits(input, logit_scale, logit_softcap):
    """The logits as the softmax sees them."""
    scaled = input if logit_scale == 1 else input * logit_scale
    return scaled if logit_softcap is None else logit_softcap * torch.tanh(scaled / logit_softcap)


def class_dimension(input):
    return 0 if input.dim() == 1 else 1


def log_sum_exp(input):
    return torch.logsumexp(_wide(input), class_dimension(input))


def entropy(input):
    """-sum of p log p. A class of no probability adds nothing, and gives no gradient of NaN."""
    log_p = torch.log_softmax(_wide(input), class_dimension(input))
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(class_dimension(input))


def autocasts(device):
    return _has_autocast(device) and torch.is_autocast_enabled(device)


@native.assume_constant_result  # torch 2.11's compiler does not know this function
def _has_autocast(device):
    return torch.amp.is_autocast_available(device)


def _wide(input):
    return input if input.dtype == torch.float64 else input.float()


def counts(indices, weight, ignore_index, like, sample_weight=None):
    """Which positions count, and their weights in the mean, float64; all of them alike for probabilities."""
    if indices is None:
        count, weights = torch.ones_like(like, dtype=torch.bool), torch.ones_like(like, dtype=torch.float64)
    else:
        count = indices != ignore_index
        weights = count.double()
        if weight is not None:
            weights = weight.double().flatten()[indices.where(count, torch.zeros_like(indices))] * count
    return count, weights if sample_weight is None else torch.where(count, weights * sample_weight, 0.0)


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


def mean_over(loss, denominator):
    """Nothing that counts is 0, whatever the denominator."""
    total = loss.sum()
    divisor = torch.as_tensor(denominator, dtype=total.dtype, device=total.device).reshape(())
    return total / divisor.masked_fill((total == 0) & (divisor == 0), 1)
