"""Losses of DTensors: the kernels run on the shards, and what is reduced is added up over the ranks.

The input may be replicated, or sharded over dimensions that do not hold the classes. The target follows it, wherever it
lies; a weight is replicated, or lies as the input does. A loss that is reduced comes back replicated: its sum and its
divisor are added up before they are divided, so that ranks may count different numbers of targets.
"""

import torch

from fusedloss import reference
from fusedloss.reference import CLASS_LOSSES, ELEMENTWISE_LOSSES

_FUNCTIONS = {name: loss.__name__ for name, loss in (CLASS_LOSSES | ELEMENTWISE_LOSSES).items()}
_ELEMENTWISE = {loss.__name__ for loss in ELEMENTWISE_LOSSES.values()}
_NONE, _MEAN, _SUM = 0, 1, 2
_NUMBERS = {"denominator", "grad_scale"}  # which all ranks bring alike
_ANSWERS = {"return_lse": 1, "return_entropy": 2, "return_argmax": 3}  # their places among the outputs
_FIRST_DERIVATIVES_ONLY = torch.__version__.startswith("2.11.")  # torch's own, between a DTensor and its shard


class Sharded:
    """Stands for the namespace of operators where a call's tensors are DTensors."""

    def __init__(self, operators):
        for name in _FUNCTIONS:
            setattr(self, name, _Operator(operators, name))


class _Operator:
    def __init__(self, operators, name):
        self._operators, self._name = operators, name

    def default(self, input, *arguments):
        return _run(getattr(self._operators(input), self._name).default, _FUNCTIONS[self._name], input, *arguments)


class _Guard(torch.autograd.Function):
    """Raises in backward where what follows would be wrong, without a word.

    What is written to a DTensor passes its shard's version counter by, which autograd looks at. And a second derivative
    through the gradient that flows back is lost between a DTensor and its shard, as torch wraps the one in the other.
    """

    @staticmethod
    def forward(ctx, output, input, loss):
        ctx.input, ctx.loss, ctx.version = input, loss, input._version
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        if ctx.input._version != ctx.version:
            raise RuntimeError(f"{ctx.loss}: backward needs the input, which has been modified by an inplace operation")
        if torch.is_grad_enabled() and _FIRST_DERIVATIVES_ONLY:
            raise NotImplementedError(f"{ctx.loss}: second derivatives of DTensors need torch 2.12 or newer")
        if torch.is_grad_enabled() and any(placement.is_shard() for placement in ctx.input.placements):
            raise NotImplementedError(
                f"{ctx.loss}: second derivatives of an input that is in parts are not supported, "
                f"got the placements {ctx.input.placements}"
            )
        return grad, None, None


def is_dtensor(value) -> bool:
    # Nothing else has placements, and importing DTensor to ask takes longer than importing fusedloss.
    return hasattr(value, "placements")


def _run(operator, loss, input, *arguments):
    from torch.distributed.tensor import DTensor, Partial, Replicate

    names = _argument_names(operator)
    values = dict(zip(names, (input, *arguments), strict=False))
    _check(loss, {"input" if name == names[0] else name: value for name, value in values.items()})
    values["inplace"] = False
    values["upcast"] = values.get("upcast") or reference.autocasts(input.device.type)
    values = {name: value for name, value in values.items() if name in names}

    # Checked as a whole, so that all ranks raise where one does; and so is known what comes out.
    with torch.no_grad():
        whole = operator(**{name: _meta(value) for name, value in values.items()})

    mesh, placements = input.device_mesh, input.placements
    layouts = {names[0]: placements, "target": _beside(input, values["target"], placements)}
    layouts |= {name: [Replicate()] * mesh.ndim for name in _NUMBERS}
    if is_dtensor(values.get("sample_weight")):
        layouts["sample_weight"] = _beside(input, values["sample_weight"], placements)
    for name in ("weight", "pos_weight"):
        if is_dtensor(values.get(name)):
            layouts[name] = _under(loss, name, input, values[name], placements)
    reduction = values["reduction"]
    in_parts = reduction != _NONE and any(placement.is_shard() for placement in placements)
    denominator = _local(values.get("denominator"), layouts["denominator"])
    if in_parts:
        values["denominator"] = None
        # The sum in float32 or wider, and the divisor, which is not returned where forward writes the gradient.
        values |= {"reduction": _SUM, "upcast": True, "grad_in_forward": False, "grad_scale": None, "statistics": True}
    local = {name: _local(value, layouts.get(name)) for name, value in values.items() if name in names}
    outputs = list(operator(**local))
    answers = [place for name, place in _ANSWERS.items() if values.get(name)]
    if not torch.compiler.is_compiling():  # a compiler refuses second derivatives, and follows what is written
        for i in (0, *answers):
            if outputs[i].is_floating_point():
                outputs[i] = _Guard.apply(outputs[i], input, loss)

    everywhere = [Replicate()] * mesh.ndim
    result, divisor = outputs[0], outputs[-1]
    if in_parts:
        sums = [Partial() if placement.is_shard() else placement for placement in placements]
        parts = DTensor.from_local(torch.stack([result.double(), divisor]), mesh, sums, run_check=False)
        total, divisor = _local(parts, everywhere).unbind()
        if reduction == _MEAN and denominator is not None:
            total = reference.mean_over(total, denominator)
        elif reduction == _MEAN:
            total = total / divisor.detach()
        result = total.to(whole[0].dtype)
    by_position = _beside(input, whole[0], placements) if reduction == _NONE else everywhere
    outputs = [_shared(result, mesh, by_position, whole[0]), *outputs[1:]]
    for i in answers:
        outputs[i] = _shared(outputs[i], mesh, _beside(input, whole[i], placements), whole[i])
    return outputs


@torch.compiler.assume_constant_result
def _argument_names(operator):
    return [argument.name for argument in operator._schema.arguments]


def _check(loss, tensors):
    """Raises for what is not a DTensor of the input's mesh, and for an input whose rows are in parts."""
    found = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor) and name not in _NUMBERS}
    for name, value in found.items():
        if not is_dtensor(value):
            shared = next(other for other, it in found.items() if is_dtensor(it))
            raise RuntimeError(
                f"{loss}: {name} must be a DTensor as {shared} is, whose placements are {found[shared].placements}, "
                f"got a Tensor of shape {list(value.shape)}"
            )
        if value.device_mesh != found["input"].device_mesh:
            raise RuntimeError(
                f"{loss}: {name} must be on the input's mesh {found['input'].device_mesh}, got {value.device_mesh}"
            )
    input = found["input"]
    classes = None if loss in _ELEMENTWISE else min(1, input.ndim - 1)
    for placement in input.placements:
        if not (placement.is_replicate() or (placement.is_shard() and placement.dim != classes)):
            raise NotImplementedError(
                f"{loss}: input must be replicated or sharded over dimensions other than the classes', "
                f"got the placements {input.placements}"
            )


def _beside(input, other, placements):
    """Where a tensor with the input's shape lies, or one without its dimension of classes."""
    from torch.distributed.tensor import Shard

    lacking = input.ndim - other.ndim  # the classes are dimension 1, and 0 is before them
    return [Shard(p.dim - lacking) if p.is_shard() and p.dim > 0 else p for p in placements]


def _under(loss, name, input, weight, placements):
    """Where a weight lies that broadcasts to the input: in parts only over the dimensions that the two share."""
    from torch.distributed.tensor import Replicate, Shard

    replicated = (Replicate(),) * len(placements)
    if loss in _ELEMENTWISE:
        first = input.ndim - weight.ndim
        shares = [p.is_shard() and p.dim >= first and weight.shape[p.dim - first] > 1 for p in placements]
        expected = tuple(Shard(p.dim - first) if s else Replicate() for p, s in zip(placements, shares, strict=True))
    else:
        expected = replicated
    if weight.placements not in (expected, replicated):
        raise NotImplementedError(
            f"{loss}: {name} must be replicated{' or lie as the input does' if expected != replicated else ''}, "
            f"got the placements {weight.placements}"
        )
    return expected


def _meta(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _local(value, placements):
    if not is_dtensor(value):
        return value
    if placements is not None:
        value = value.redistribute(placements=placements)
    local = value.to_local()
    return local.wait() if hasattr(local, "wait") else local  # it is on its way still


def _shared(local, mesh, placements, whole):
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
