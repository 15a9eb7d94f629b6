"""Losses of DTensors: the kernels run on the shards, and what is reduced is added up over the ranks.

The input may be replicated, or sharded over dimensions that do not hold the classes; logits may be sharded over their
classes too, on one dimension of the mesh, whose group then shares them (vocab_parallel.py). The target follows the
input, wherever it lies; a weight is replicated, or lies as the input does. A loss that is reduced comes back
replicated: its sum and its divisor are added up before they are divided, so that ranks may count different numbers of
targets.

A linear layer's input lies as logits would, without their classes, and its weight is replicated or sharded over them.
"""

import torch

from fusedloss import native, reference, vocab_parallel
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
        return _run(self._operators(input), self._name, input, *arguments)


class _Guard(torch.autograd.Function):
    """Raises in backward where what follows would be wrong, without a word.

    What is written to a DTensor passes its shard's version counter by, which autograd looks at. And a second derivative
    through the gradient that flows back is lost between a DTensor and its shard, as torch wraps the one in the other.
    """

    @staticmethod
    def forward(ctx, output, tensors, loss):
        ctx.tensors, ctx.loss, ctx.versions = tensors, loss, [tensor._version for tensor in tensors.values()]
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        for (name, tensor), version in zip(ctx.tensors.items(), ctx.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"{ctx.loss}: backward needs the {name}, which has been modified by an inplace operation"
                )
        if torch.is_grad_enabled() and _FIRST_DERIVATIVES_ONLY:
            raise NotImplementedError(f"{ctx.loss}: second derivatives of DTensors need torch 2.12 or newer")
        for name, tensor in ctx.tensors.items():
            if torch.is_grad_enabled() and any(placement.is_shard() for placement in tensor.placements):
                raise NotImplementedError(
                    f"{ctx.loss}: second derivatives of an {name} that is in parts are not supported, "
                    f"got the placements {tensor.placements}"
                )
        return grad, None, None


def _guarded(output, tensors, loss):
    # A compiler refuses second derivatives, and follows what is written.
    guards = not torch.compiler.is_compiling() and output.is_floating_point()
    return _Guard.apply(output, tensors, loss) if guards else output


def is_dtensor(value) -> bool:
    # Nothing else has placements, and importing DTensor to ask takes longer than importing fusedloss.
    return hasattr(value, "placements")


def _run(kernels, name, input, *arguments):
    from torch.distributed.tensor import Replicate

    operator, loss = getattr(kernels, name).default, _FUNCTIONS[name]
    names = _argument_names(operator)
    values = dict(zip(names, (input, *arguments), strict=False))
    on = _class_mesh_dim(loss, input)
    values = _check(loss, {"input" if n == names[0] else n: value for n, value in values.items()}, on)
    values = {names[0] if n == "input" else n: value for n, value in values.items()}
    values["inplace"] = False
    values["upcast"] = values.get("upcast") or reference.autocasts(input.device.type)
    values = {name: value for name, value in values.items() if name in names}

    # Checked as a whole, so that all ranks raise where one does; and so is known what comes out.
    with torch.no_grad():
        whole = operator(**{name: _meta(value) for name, value in values.items()})

    mesh, of_input = input.device_mesh, input.placements
    everywhere = [Replicate()] * mesh.ndim
    placements = [Replicate() if i == on else placement for i, placement in enumerate(of_input)]  # of the rows
    has_probabilities = values["target"].ndim == input.ndim
    layouts = {
        names[0]: of_input,
        "target": _beside(input, values["target"], of_input if has_probabilities else placements),
    }
    if on is not None:
        num_classes = input.shape[_class_dim(loss, input)]
        classes = vocab_parallel.classes_of(loss, mesh.get_group(on), num_classes, input.to_local(), "input")
        if classes is not None:
            operator = vocab_parallel.SharedClasses(kernels, loss, classes).cross_entropy.default
    layouts |= dict.fromkeys(_NUMBERS, everywhere)
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
    for i in (0, *answers):
        outputs[i] = _guarded(outputs[i], {"input": input}, loss)

    result = outputs[0]
    if in_parts:
        divisor = denominator if denominator is not None else outputs[-1]
        result = _added_up(result, mesh, placements, reduction == _MEAN, divisor, denominator is not None)
        result = result.to(whole[0].dtype)
    by_position = _beside(input, whole[0], placements) if reduction == _NONE else everywhere
    outputs = [_shared(result, mesh, by_position, whole[0]), *outputs[1:]]
    for i in answers:
        outputs[i] = _shared(outputs[i], mesh, _beside(input, whole[i], placements), whole[i])
    return outputs


def _added_up(loss, mesh, placements, is_mean, divisor, is_given):
    """The whole loss, in float64, from each rank's sum; and from its divisor, unless that is given for the whole."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    sums = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    numbers = loss.double().reshape(1) if is_given else torch.stack([loss.double(), divisor])
    parts = DTensor.from_local(numbers, mesh, sums, run_check=False)
    total, *counted = _local(parts, [Replicate()] * mesh.ndim).unbind()
    if not is_mean:
        return total
    return reference.mean_over(total, divisor) if is_given else total / counted[0].detach()


@native.assume_constant_result
def _argument_names(operator):
    return [argument.name for argument in operator._schema.arguments]


def _class_dim(loss, input):
    return None if loss in _ELEMENTWISE else min(1, input.ndim - 1)


def _class_mesh_dim(loss, input):
    """The dimension of the mesh on which logits are sharded over their classes, if there is one."""
    if loss != "cross_entropy" or not is_dtensor(input):
        return None
    shared = [i for i, p in enumerate(input.placements) if p.is_shard() and p.dim == _class_dim(loss, input)]
    return shared[0] if len(shared) == 1 else None


def _check(loss, tensors, class_mesh_dim):
    """The tensors. Raises for what is not a DTensor of the input's mesh, and for an input whose rows are in parts.

    Beside logits of shared classes, and of no shared rows, a plain tensor is one that is replicated: what Megatron and
    torch's loss_parallel are given.
    """
    from torch.distributed.tensor import DTensor, Replicate

    found = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor) and name not in _NUMBERS}
    input = found["input"]
    if class_mesh_dim is not None and sum(p.is_shard() for p in input.placements) == 1:
        mesh, replicated = input.device_mesh, [Replicate()] * input.device_mesh.ndim
        for name, value in found.items():
            if not is_dtensor(value) and not (name == "target" and value.ndim == input.ndim):
                found[name] = DTensor.from_local(value, mesh, replicated, run_check=False)
        tensors = tensors | found
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
    classes = _class_dim(loss, input)
    for i, placement in enumerate(input.placements):
        of_rows = placement.is_shard() and placement.dim != classes
        if not (placement.is_replicate() or of_rows or i == class_mesh_dim):
            of_classes = ", which one dimension of the mesh may share" if loss == "cross_entropy" else ""
            raise NotImplementedError(
                f"{loss}: input must be replicated or sharded over dimensions other than the classes'{of_classes}, "
                f"got the placements {input.placements}; redistribute it"
            )
    return tensors


# --- Linear layers ---------------------------------------------------------------------------------------------------


def linear(function, input, linear_weight, target, **values):
    """A linear layer and its loss: the function's, of the parts that this rank has.

    values: the function's other arguments.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    loss = function.__name__
    of_layer = {"input": input, "linear_weight": linear_weight, "target": target}
    others = {name: values.get(name) for name in ("linear_bias", "weight", "sample_weight")}
    tensors = of_layer | {name: value for name, value in others.items() if value is not None}
    mesh, on, rows = _linear_layout(loss, tensors)
    everywhere = [Replicate()] * mesh.ndim
    in_parts = [placement.is_shard() for placement in rows]
    has_probabilities = target.is_floating_point()
    if not any(in_parts):  # else nobody knows whose rows they are
        plain = {name for name, tensor in tensors.items() if not is_dtensor(tensor)}
        plain -= {"target"} if has_probabilities and on is not None else set()
        tensors |= {name: _shared(tensors[name], mesh, everywhere, tensors[name]) for name in plain}
    for name, tensor in tensors.items():
        if not is_dtensor(tensor):
            raise RuntimeError(
                f"{loss}: {name} must be a DTensor as input is, whose placements are {input.placements}, "
                f"got a Tensor of shape {list(tensor.shape)}"
            )
    with torch.no_grad():  # checked as a whole, so that all ranks raise where one does
        whole = function(**{name: _meta(value) for name, value in (values | tensors).items()})
    whole = whole if isinstance(whole, tuple) else (whole,)

    of_classes = [Shard(0) if i == on else Replicate() for i in range(mesh.ndim)]
    of_target = [Shard(input.ndim - 1) if i == on and has_probabilities else p for i, p in enumerate(rows)]
    layouts = {"input": rows, "target": of_target, "sample_weight": rows, "weight": everywhere}
    layouts |= {"linear_weight": of_classes, "linear_bias": of_classes}
    # The gradients of the layer are terms of a sum, where ranks have different rows.
    terms = [Partial() if shared else p for shared, p in zip(in_parts, of_classes, strict=True)]
    local = values | {
        name: _local(tensor, layouts[name], terms if name.startswith("linear_") else None)
        for name, tensor in tensors.items()
    }
    if on is not None:
        local |= {"process_group": mesh.get_group(on), "num_classes": linear_weight.shape[0]}
    reduction, denominator = values.get("reduction", "none"), _local(values.get("denominator"), everywhere)
    adds_up = reduction != "none" and any(in_parts)
    if adds_up:
        local |= {"reduction": "sum", "denominator": None}
    elif denominator is not None:
        local["denominator"] = denominator
    outputs = function(**local)
    outputs = list(outputs if isinstance(outputs, tuple) else (outputs,))
    watched = {name: tensors[name] for name in ("input", "linear_weight")}
    outputs = [_guarded(output, watched, loss) for output in outputs]
    if adds_up:
        divisor = _divisor(local) if denominator is None else denominator
        total = _added_up(outputs[0], mesh, rows, reduction == "mean", divisor, denominator is not None)
        outputs[0] = total.to(whole[0].dtype)
    placed = [everywhere if reduction != "none" else rows, *[rows] * (len(outputs) - 1)]
    shared = tuple(_shared(x, mesh, place, of) for x, place, of in zip(outputs, placed, whole, strict=True))
    return shared if len(shared) > 1 else shared[0]


def _divisor(local):
    """Of a mean over this rank's rows."""
    indices = None if local["target"].is_floating_point() else local["target"].long()
    positions = local["input"].new_empty(()).expand(*local["input"].shape[:-1], *local["linear_weight"].shape[1:-1])
    ignore_index = -100 if local["ignore_index"] is None else local["ignore_index"]
    weights = (local.get("weight"), ignore_index, positions, local.get("sample_weight"))
    return reference.counts(indices, *weights)[1].sum()


def _linear_layout(loss, tensors):
    """(the mesh, its dimension that shares the classes or None, where the rows of input lie)"""
    input, weight = tensors["input"], tensors["linear_weight"]
    meshes = {name: tensor.device_mesh for name, tensor in tensors.items() if is_dtensor(tensor)}
    if not is_dtensor(input) or not is_dtensor(weight):
        plain, shared = ("input", "linear_weight") if is_dtensor(weight) else ("linear_weight", "input")
        if is_dtensor(tensors[shared]):
            raise NotImplementedError(
                f"{loss}: {shared} is a DTensor with the placements {tensors[shared].placements}, and {plain} is not. "
                "The weight of a module that fully_shard has sharded is whole only within the module: call the loss in "
                "its forward, or between module.unshard() and module.reshard(). In tensor parallelism, make "
                f"{plain} a DTensor: DTensor.from_local({plain}, mesh, [Replicate()])"
            )
        other = next(iter(meshes))
        raise RuntimeError(f"{loss}: {other} is a DTensor, and input and linear_weight are not")
    mesh = meshes["input"]
    for name, other in meshes.items():
        if other != mesh:
            raise RuntimeError(f"{loss}: {name} must be on the input's mesh {mesh}, got {other}")
    shares_rows = [p.is_shard() and p.dim != input.ndim - 1 for p in input.placements]
    for rows, placement in zip(shares_rows, input.placements, strict=True):
        if not rows and not placement.is_replicate():
            raise NotImplementedError(
                f"{loss}: input must be replicated or sharded over dimensions other than in_features', "
                f"got the placements {input.placements}; redistribute it"
            )
    on = [i for i, p in enumerate(weight.placements) if not p.is_replicate()]
    for i in on:
        if shares_rows[i] and weight.placements[i].is_shard():
            raise NotImplementedError(
                f"{loss}: input, with the placements {input.placements}, and linear_weight, with the placements "
                f"{weight.placements}, are sharded on one dimension of the mesh. The weight of a module that "
                "fully_shard has sharded is whole only within the module: call the loss in its forward, or between "
                "module.unshard() and module.reshard(). In tensor parallelism, redistribute input, so that it is "
                "replicated there"
            )
    if len(on) > 1 or any(not weight.placements[i].is_shard(0) for i in on):
        raise NotImplementedError(
            f"{loss}: linear_weight must be replicated, or sharded over its classes (Shard(0)) on one dimension of the "
            f"mesh, got the placements {weight.placements}; redistribute it"
        )
    return mesh, on[0] if on else None, list(input.placements)


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


def _local(value, placements, grad_placements=None):
    if not is_dtensor(value):
        return value
    if placements is not None:
        value = value.redistribute(placements=placements)
    local = value.to_local(grad_placements=grad_placements)
    return local.wait() if hasattr(local, "wait") else local  # it is on its way still


def _shared(local, mesh, placements, whole):
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
