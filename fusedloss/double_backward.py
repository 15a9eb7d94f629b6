"""Second derivatives: the gradient of the backward operators.

A backward operator computes, in one fused pass, what differentiating the reference computes step by step. Under
create_graph=True its own gradient is wanted, which is rare; it is obtained by differentiating the reference twice, so
derivatives of any order are native's.
"""

import torch

from fusedloss import reference

_REDUCTIONS = ("none", "mean", "sum")


def _cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, logit_softcap):
    options = dict(z_loss=z_loss, logit_softcap=logit_softcap or None, return_lse=True)
    return reference.cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, **options)


def _nll(log_probs, target, weight, reduction, ignore_index):
    # Native's own backward refuses channels_last.
    log_probs = log_probs.contiguous()
    return (reference.nll_loss(log_probs, target, weight, ignore_index, reduction),)


def _bce_with_logits(input, target, weight, pos_weight, reduction, ignore_index):
    options = dict(ignore_index=ignore_index)
    return (
        reference.binary_cross_entropy_with_logits(input, target, weight, reduction, pos_weight, **options),
    )


def _bce(input, target, weight, reduction, ignore_index):
    return (reference.binary_cross_entropy(input, target, weight, reduction, ignore_index=ignore_index),)


_LOSSES = {"cross_entropy": _cross_entropy, "nll": _nll, "bce_with_logits": _bce_with_logits, "bce": _bce}
# Arguments of the backward operators that are no arguments of the loss.
_GRADS = ("grad_loss", "grad_lse")
_NOT_OF_THE_LOSS = {*_GRADS, "row_max", "row_log_sum", "divisor", "output_mask"}


def register(namespace: str) -> None:
    """Makes the backward operators of a namespace differentiable."""
    for name, loss in _LOSSES.items():
        _register(getattr(getattr(torch.ops, namespace), f"{name}_backward").default, loss)


def _register(operator, loss) -> None:
    names = [argument.name for argument in operator._schema.arguments]
    inputs = [name for name in names if name not in _NOT_OF_THE_LOSS]
    differentiable = inputs[:2]  # the loss's input and target

    def setup_context(ctx, inputs, output):
        tensors = {name: value for name, value in zip(names, inputs) if isinstance(value, torch.Tensor)}
        ctx.save_for_backward(*tensors.values())
        ctx.tensor_names = list(tensors)
        ctx.options = {name: value for name, value in zip(names, inputs) if name not in tensors}

    def backward(ctx, *grads):
        values = {**ctx.options, **dict(zip(ctx.tensor_names, ctx.saved_tensors))}
        with torch.enable_grad():
            # Views, so that a tensor that needs no gradient can still be differentiated by in the middle.
            for name in differentiable:
                if values[name].is_floating_point() and not values[name].requires_grad:
                    values[name] = values[name].detach().requires_grad_()
            arguments = {name: values[name] for name in inputs}
            arguments["reduction"] = _REDUCTIONS[arguments["reduction"]]
            outputs = loss(**arguments)
            flows = [(out, values[name]) for out, name in zip(outputs, _GRADS) if values.get(name) is not None]
            by = [name for name in differentiable if values[name].requires_grad]
            first = torch.autograd.grad(
                [out for out, _ in flows],
                [values[name] for name in by],
                [grad.to(out.dtype) for out, grad in flows],
                create_graph=True,
                allow_unused=True,
            )
        mask = values.get("output_mask", [True])
        wanted = {name: grad for name, grad, used in zip(differentiable, grads, mask) if used}
        pairs = [(g, wanted[name]) for name, g in zip(by, first) if name in wanted and g is not None]
        pairs = [(g, v) for g, v in pairs if v is not None and g.requires_grad]
        sources = [name for name in (*_GRADS, *differentiable) if _requires_grad(values.get(name))]
        second = [None] * len(sources)
        if pairs:
            second = torch.autograd.grad(
                [g for g, _ in pairs],
                [values[name] for name in sources],
                [v for _, v in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        found = dict(zip(sources, second))
        return tuple(found.get(name) for name in names)

    torch.library.register_autograd(operator, backward, setup_context=setup_context)


def _requires_grad(value) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
