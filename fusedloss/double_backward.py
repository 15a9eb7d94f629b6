"""Second derivatives: the gradient of the backward operators.

A backward operator computes, in one fused pass, what differentiating the reference computes step by step. Under
create_graph=True its own gradient is wanted, which is rare; it is obtained by differentiating the reference twice, so
derivatives of any order are native's.

Its arguments may depend on each other: the gradient that flows into loss ** 2 depends on the logits, and so may the
target. Each formula therefore starts from fresh aliases of its arguments: differentiated by the arguments themselves,
it would count those paths, which autograd adds by itself, a second time.
"""

import torch

from fusedloss import reference
from fusedloss.backend import NAMESPACES

REDUCTIONS = ("none", "mean", "sum")


# Each takes the arguments of its operator that are the loss's own, and returns its differentiable outputs.


def _cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, logit_softcap):
    options = {"z_loss": z_loss, "logit_softcap": logit_softcap or None, "return_lse": True}
    return reference.cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, **options)


def _nll(log_probs, target, weight, reduction, ignore_index):
    # Native's own backward refuses channels_last.
    return (reference.nll_loss(log_probs.contiguous(), target, weight, ignore_index, reduction),)


def _bce_with_logits(input, target, weight, pos_weight, reduction, ignore_index):
    return (
        reference.binary_cross_entropy_with_logits(
            input, target, weight, reduction, pos_weight, ignore_index=ignore_index
        ),
    )


def _bce(input, target, weight, reduction, ignore_index):
    return (reference.binary_cross_entropy(input, target, weight, reduction, ignore_index=ignore_index),)


LOSSES = {"cross_entropy": _cross_entropy, "nll": _nll, "bce_with_logits": _bce_with_logits, "bce": _bce}


FLOWS = ("grad_loss", "grad_lse")  # what a backward operator is given for each output of its loss
NOT_OF_THE_LOSS = {*FLOWS, "row_max", "row_log_sum", "divisor", "output_mask"}


def register() -> None:
    """Makes the backward operators of every namespace differentiable."""
    for namespace in NAMESPACES:
        for name, loss in LOSSES.items():
            _register(getattr(getattr(torch.ops, namespace), f"{name}_backward").default, loss)


def _register(operator, loss) -> None:
    names = [argument.name for argument in operator._schema.arguments]
    of_the_loss = [name for name in names if name not in NOT_OF_THE_LOSS]
    differentiable = of_the_loss[: len(operator._schema.returns)]  # the loss's input and, in most, its target

    def setup_context(ctx, inputs, output):
        arguments = dict(zip(names, inputs, strict=True))
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        ctx.save_for_backward(*tensors.values())
        ctx.tensors = list(tensors)
        ctx.options = {name: value for name, value in arguments.items() if name not in tensors}

    def backward(ctx, *cotangents):
        with torch.enable_grad():
            aliases = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
        values = {**ctx.options, **dict(zip(ctx.tensors, aliases, strict=True))}
        mask = values.get("output_mask", [True])
        wanted = [name for name, used in zip(differentiable, mask, strict=True) if used]
        cotangents = [cotangent for cotangent, used in zip(cotangents, mask, strict=True) if used]
        sources = [name for name in (*FLOWS, *differentiable) if _requires_grad(values.get(name))]
        with torch.enable_grad():
            first = _first_derivatives(loss, values, of_the_loss, wanted)
        found = differentiate(first, [values[name] for name in sources], cotangents, torch.is_grad_enabled())
        found = dict(zip(sources, found, strict=True))
        return tuple(found.get(name) for name in names)

    torch.library.register_autograd(operator, backward, setup_context=setup_context)


def _first_derivatives(loss, values, of_the_loss, wanted):
    """What the backward operator has returned, as a differentiable function of its arguments."""
    for name in wanted:
        if not values[name].requires_grad:
            values[name] = values[name].detach().requires_grad_()
    # A float32 loss of half precision is autocast's, where native casts every operand first.
    upcast = values["grad_loss"].dtype == torch.float32
    arguments = {name: _to_float32(values[name]) if upcast else values[name] for name in of_the_loss}
    arguments["reduction"] = REDUCTIONS[arguments["reduction"]]
    flows = [values.get(name) for name in FLOWS]
    return differentiate(loss(**arguments), [values[name] for name in wanted], flows, create_graph=True)


def differentiate(outputs, inputs, cotangents, create_graph):
    """torch.autograd.grad, where outputs and cotangents may be absent and outputs may be constants."""
    pairs = [(y, v) for y, v in zip(outputs, cotangents, strict=False) if _requires_grad(y) and v is not None]
    if not pairs:
        return [None] * len(inputs)
    outputs = [y for y, _ in pairs]
    cotangents = [v.to(y.dtype) for y, v in pairs]
    return torch.autograd.grad(outputs, inputs, cotangents, create_graph=create_graph, allow_unused=True)


def _to_float32(value):
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def _requires_grad(value) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
