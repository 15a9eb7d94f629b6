"""The losses as a table, samples for each, and the judge.

Every comparison has three parties: ours, native torch at the same dtype, and the truth, which is the
plain-torch reference in float64. Ours passes when it is no further from the truth than native is, or than the
last place of its dtype.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fusedloss

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]
# Units in the last place that are luck: two equally good results differ by a few roundings, of p and q where the
# result is p - q, and either may have the largest error of a small case. test_accuracy judges the mean over large
# ones, without such an allowance. In float64 the truth is native's own: a sum over 1000 classes is a dozen units off.
UNITS = {torch.float32: 6, torch.float64: 32}
ADDITIONS = {"z_loss", "logit_scale", "logit_softcap", "denominator", "sample_weight"}
ADDITIONS |= {"return_lse", "return_entropy", "return_argmax"}  # and ignore_index, where native has none


@dataclass(frozen=True)
class Loss:
    """One row of the table: the names of a loss in torch.nn, and its kind of target."""

    function: str
    module: str
    native: object
    target: str  # "index" of a class, "soft" probabilities of the classes, or "element": one per logit

    @property
    def ours(self):
        return getattr(fusedloss.functional, self.function)

    @property
    def reference(self):
        return getattr(fusedloss.reference, self.function)

    @property
    def separate(self):
        """The option of separate forward and backward passes: the only road of a compiled call, to the last bit."""
        return {} if self.module == "NLLLoss" else {"grad_in_forward": False}

    def sample(self, *shape, dtype=torch.float32, device="cpu", scale=1.0):
        """(input, target), drawn in float64 and rounded once, so that every dtype holds the same data."""
        input = scale * torch.randn(shape, dtype=torch.float64)
        dim = min(1, input.dim() - 1)
        if self.target == "index":
            target = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :])
        elif self.target == "soft":
            target = torch.randn(shape, dtype=torch.float64).softmax(dim).to(dtype)
        else:
            target = torch.rand(shape, dtype=torch.float64).to(dtype)
        if self.module == "NLLLoss":
            input = input.log_softmax(dim)
        elif self.module == "BCELoss":
            input = input.sigmoid()
        return input.to(device, dtype), target.to(device)

    def baseline(self, options):
        """Native, or the reference at the input's own dtype when the options are ours alone."""
        added = ADDITIONS | ({"ignore_index"} if self.target == "element" else set())
        return self.reference if added & options.keys() else self.native

    def native_target(self, input, target):
        """The target native accepts where ours accepts more: int64 classes, BCE targets of a float dtype."""
        if target.is_floating_point():
            return target
        return target.to(input.dtype) if self.target == "element" else target.long()


LOSSES = {
    "cross_entropy": Loss("cross_entropy", "CrossEntropyLoss", F.cross_entropy, "index"),
    "cross_entropy_soft": Loss("cross_entropy", "CrossEntropyLoss", F.cross_entropy, "soft"),
    "nll": Loss("nll_loss", "NLLLoss", F.nll_loss, "index"),
    "bce_with_logits": Loss(
        "binary_cross_entropy_with_logits",
        "BCEWithLogitsLoss",
        F.binary_cross_entropy_with_logits,
        "element",
    ),
    "bce": Loss("binary_cross_entropy", "BCELoss", F.binary_cross_entropy, "element"),
}


def each(*names):
    """Parametrises a test over the losses of these names, or over all."""
    names = names or tuple(LOSSES)
    return pytest.mark.parametrize("loss", [LOSSES[name] for name in names], ids=names)


def short(dtype):
    return str(dtype).removeprefix("torch.")


each_class_loss = each("cross_entropy", "cross_entropy_soft", "nll")
each_index_loss = each("cross_entropy", "nll")
each_bce_loss = each("bce_with_logits", "bce")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def outputs_of(result):
    return list(result) if isinstance(result, tuple) else [result]


def eighths(shape, dtype=torch.float32, device="cpu"):
    """A grad_output without zeros, of both signs, that every dtype holds exactly."""
    return ((torch.arange(math.prod(shape)) * 5 % 16 - 7.5) / 8).view(shape).to(device, dtype)


def differentiate(function, input, target, grad_output=None, **options):
    """The outputs, then the gradients with respect to input and, if there is a floating one, target.

    Integers are no outputs here.
    """
    given = [tensor for tensor in (input, target) if tensor is not None]
    tensors = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in given]
    outputs = [output for output in outputs_of(function(*tensors, **options)) if output.is_floating_point()]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    seeds = [eighths(y.shape, y.dtype, y.device) if grad_output is None else grad_output for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, seeds))


def widen(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def asserts(device):
    """Whether kernels answer a class or a value out of bounds with an assertion, after which a GPU is of no use."""
    return device != "cpu" or fusedloss.backend._override == "triton"


def moved(value, device):
    """The value on the device: a tensor there; lists, tuples and tables of them; and anything else as it is.

    So is a tensor of the meta device: tests of errors put it there.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value


def compare(loss, input, target, grad_output=None, **options):
    """Judges values and gradients; returns ours."""
    # The others see contiguous copies: native refuses some layouts (the backward of nll_loss: channels_last). And they
    # see them on the CPU, whatever the device: native's CUDA kernels refuse or decide differently at some edges.
    plain = input.contiguous().cpu(), target.contiguous().cpu()
    seed, plain_options = moved(grad_output, "cpu"), moved(options, "cpu")
    wide = {name: widen(value) for name, value in plain_options.items()}
    truth = differentiate(loss.reference, *map(widen, plain), widen(seed), **wide)
    legal = plain[0], loss.native_target(*plain)
    native = differentiate(loss.baseline(options), *legal, seed, **plain_options)
    ours = differentiate(loss.ours, input, target, grad_output, **options, **loss.separate)
    # The widest result of narrow data is no more exact than they are.
    grain = max((x.dtype for x in (input, target) if x.is_floating_point()), key=lambda x: torch.finfo(x).eps)
    # Native has one more when it needs an integer target as floats: that target's gradient.
    for our, theirs, true in zip(ours, native[: len(truth)], truth, strict=True):
        assert our.device == input.device
        judge(our.cpu(), theirs, true, grain)
    has_range = loss.module != "BCELoss" or input.dtype != torch.float16
    reduced = options.get("reduction") != "none"
    if loss.separate and has_range and reduced and not (options.get("return_lse") or options.get("return_entropy")):
        # The other road to the gradient, which a target that requires grad cannot take.
        seed = eighths((), truth[0].dtype, input.device) if grad_output is None else grad_output
        options = {**options, "grad_in_forward": True, "grad_scale": seed.to(truth[0].dtype)}
        fused = differentiate(partial(loss.ours, target=target, **options), input, None, grad_output)
        # A float16 gradient may be written for another grad_output, and is rounded once more then.
        roundings = 2 if input.dtype == torch.float16 else 1
        for our, theirs, true in zip(fused, native[:2], truth[:2], strict=True):
            judge(our.cpu(), theirs, true, grain, roundings)
    return ours


def unit(largest, dtype):
    """One unit in the last place of a number of this size; the smallest number there is, near zero."""
    info = torch.finfo(dtype)
    return info.eps * max(info.tiny, math.ldexp(1.0, math.frexp(largest)[1] - 1))


def judge(ours, native, truth, grain=None, roundings=1):
    """Native's dtype and shape, its NaN and infinities, and no larger an error.

    Where native overflows on its way to a finite result (the sum behind a float16 mean), ours may be right.
    """
    assert (ours.dtype, ours.shape, ours.device) == (native.dtype, native.shape, native.device)
    special = ~native.isfinite()
    rest = ~(special & ours.isclose(native, rtol=0, atol=0, equal_nan=True))
    if rest.any():
        error = (ours - truth)[rest].abs().max().item()
        allowed = (native - truth)[~special].abs().max().item() if not special.all() else 0.0
        grain = grain or ours.dtype
        allowed = max(allowed, roundings * UNITS.get(grain, 1) * unit(truth[rest].abs().max().item(), grain))
        assert error <= allowed, f"error {error:.3g}; native's, or the last place, allows {allowed:.3g}"


def peak_bytes(run):
    """What a call takes beside what there was, at its peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
