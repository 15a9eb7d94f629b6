"""The operators in terms of ATen's, for whatever does not know them: other compilers, runtimes, ONNX.

They are the reference (fusedloss/reference.py) and its derivatives, with the arguments and the results of the operators
(csrc/register.cpp). ``torch.export``'s default table has them, so ``run_decompositions()`` leaves ATen operators only,
and ONNX's exporter finds them. torch.compile keeps the fused operators, unless a backend is given :func:`table`.

Operators that write where they are told to (NAME_with_grad, rescale_grad_) have none, nor has
linear_cross_entropy_with_grad. They are of eager training steps, and of compiled ones that ask for
``grad_in_forward=True`` or have a linear layer in their loss; exported calls leave that out. Nor have those of classes
that ranks share (NAME_shard...), whose graphs have collectives and stay with the ranks they were made for.
"""

import contextlib
import functools

import torch
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.export import exported_program

from fusedloss import calls, reference
from fusedloss.backend import NAMESPACES
from fusedloss.functional import REDUCTIONS

_AUTOGRAD_KEYS = [
    getattr(torch._C.DispatchKey, f"Autograd{kind}") for kind in ("Functionality", "Other", "NestedTensor")
]
_HALF = (torch.float16, torch.bfloat16)
# What a backward operator is given for each output of its loss.
_GRAD_OUTPUTS = ("grad_loss", "grad_lse", "grad_entropy")
_OF_BACKWARD = {*_GRAD_OUTPUTS, "row_max", "row_log_sum", "row_gap", "divisor", "output_mask", "weight_type"}
_NOT_OF_THE_LOSS = {"return_lse", "return_entropy", "return_argmax"}
_NOT_OF_THE_LOSS |= {"upcast", "grad_in_forward", "grad_scale", "inplace", "statistics"}
_OF_THE_PRODUCTS = {"product_type", "memory", "chunk", "skip_ignored"}  # how a linear layer's are made


def table() -> dict:
    """The decompositions of all operators of all namespaces, for ``decomposition_table=`` and ``decomp_table=``."""
    return {
        # A graph is decomposed after it has been made functional, and native's losses write in place.
        getattr(getattr(torch.ops, namespace), name).default: dispatch_functionalize(_counted(name, decomposition))
        for namespace in NAMESPACES
        for name, decomposition in _DECOMPOSITIONS.items()
    }


def _counted(name, decomposition):
    @functools.wraps(decomposition)
    def counted(*arguments, **options):
        outputs = decomposition(*arguments, **options)
        calls.count_native(name, "decomposed, for each graph")
        return outputs

    return counted if name in _LOSSES else decomposition


def register() -> None:
    """Adds them to export's default table, which has no place for the operators of others.

    Not to torch._decomp.core_aten_decompositions, which returns the same table: inductor starts from it, and refuses
    operators that it would also call as they are.
    """
    native = exported_program.default_decompositions

    @functools.wraps(native)
    def default_decompositions():
        decompositions = native()
        decompositions.update(table())
        return decompositions

    exported_program.default_decompositions = torch.export.default_decompositions = default_decompositions
    torch._decomp.core_aten_decompositions = functools.wraps(torch._decomp.core_aten_decompositions)(lambda: native())


def _upcast(value):
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALF else value


# Each takes the arguments of its operators that are the loss's own, by the names that the reference has for them, and
# returns its differentiable outputs.


def _cross_entropy(logits, *, logit_softcap, **options):
    return reference.cross_entropy(
        logits, logit_softcap=logit_softcap or None, return_lse=True, return_entropy=True, **options
    )


def _linear_cross_entropy(input, linear_weight, target, linear_bias, **options):
    logits = reference.linear_logits(input, linear_weight, linear_bias)
    return _cross_entropy(logits, target=target, **options)


def _nll(log_probs, **options):
    return (reference.nll_loss(log_probs.contiguous(), **options),)  # native's own backward refuses channels_last


def _elementwise(loss, **options):
    return (loss(**options),)


_LOSSES = {
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "nll": _nll,
    **{name: functools.partial(_elementwise, loss) for name, loss in reference.ELEMENTWISE_LOSSES.items()},
}


def _forward(name, loss):
    """The decomposition of a loss, which is given the operator's arguments by their names."""
    schema = getattr(torch.ops.fusedloss, name).default._schema.arguments
    names = [argument.name for argument in schema]
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    results = _RESULTS.get(name, _elementwise_results)

    def decomposition(*arguments, **options):
        values = {**defaults, **dict(zip(names, arguments, strict=False)), **options}
        given = {name: value for name, value in values.items() if name not in _NOT_OF_THE_LOSS}
        given["reduction"] = REDUCTIONS[given["reduction"]]
        if values["upcast"]:
            given = {name: _upcast(value) for name, value in given.items()}
        return results(values, *loss(**given))

    return decomposition


def _linear_forward(cross_entropy):
    """The decomposition of the linear layer's loss, by that of the loss of its logits."""
    names = [argument.name for argument in torch.ops.fusedloss.linear_cross_entropy.default._schema.arguments]
    of_logits = {argument.name for argument in torch.ops.fusedloss.cross_entropy.default._schema.arguments}

    def decomposition(*arguments, **options):
        values = {**dict(zip(names, arguments, strict=False)), **options}
        dtype = values.get("product_type") or values["input"].dtype
        layer = [values["input"], values["linear_weight"], values["linear_bias"]]
        operands = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in layer]
        given = {name: value for name, value in values.items() if name in of_logits}
        return cross_entropy(logits=reference.linear_logits(*operands), **given)

    return decomposition


def _cross_entropy_results(values, loss, lse, entropy):
    logits, classes = values["logits"], reference.class_dimension(values["logits"])
    answers = {"lse": lse, "entropy": entropy}
    if values["return_argmax"]:
        answers["argmax"] = logits.argmax(classes)
    returned = [answers[name] if values[f"return_{name}"] else None for name in ("lse", "entropy", "argmax")]
    if not values["statistics"]:
        return loss, *returned, None, None, None, None
    absent = [lse.new_empty(0), lse.new_empty(0), lse.new_empty(0, dtype=torch.int64)]
    returned = [empty if answer is None else answer for empty, answer in zip(absent, returned, strict=True)]
    seen = reference.seen_logits(logits.to(lse.dtype), values["logit_scale"], values["logit_softcap"] or None)
    row_max = seen.amax(classes)
    row_gap = entropy - (lse - row_max) if values["return_entropy"] else lse.new_empty(0)
    divisor = values["denominator"]
    divisor = _class_divisor(logits, values) if divisor is None else divisor.double().reshape(())
    return loss, *returned, row_max, lse - row_max, row_gap, divisor


def _nll_results(values, loss):
    return loss, _class_divisor(values["log_probs"], values)


def _elementwise_results(values, loss):
    target, ignore_index = values["target"], values["ignore_index"]
    counts = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    return loss, counts.sum().double()


_RESULTS = {"cross_entropy": _cross_entropy_results, "nll": _nll_results}


def _class_divisor(input, values):
    """The weights of the positions that count, added up in float64."""
    like, target = input.select(reference.class_dimension(input), 0), values["target"]
    indices = None if target.is_floating_point() else target.long().reshape(like.shape)
    weights = (values["weight"], values["ignore_index"], like, values.get("sample_weight"))
    return reference.counts(indices, *weights)[1].sum()


def rescale_grad(grad, grad_output, scale, keep_zeros):
    wide = torch.promote_types(grad.dtype, torch.float32)
    factor = grad_output.double() if scale is None else grad_output.double() / scale
    result = grad.to(wide) * factor.to(wide)
    return (torch.where(grad == 0, torch.zeros_like(result), result) if keep_zeros else result).to(grad.dtype)


def linear_gradients(
    grad_output,
    grad_logits,
    rows,
    scale,
    input,
    linear_weight,
    target,
    ignore_index,
    weight_type,
    output_mask,
    input_type=None,
):
    """Of a linear layer, from the gradient of its logits, of all of its rows."""
    wide = torch.promote_types(input.dtype, torch.float32)
    factor = (grad_output.double() if scale is None else grad_output.double() / scale).to(wide)
    matrix, weight = grad_logits.flatten(1).to(wide), linear_weight.flatten(0, -2).to(wide)
    if target.shape != grad_logits.shape:  # what an ignored row holds meets no product
        counts = (target.long() != ignore_index).reshape(input.shape[0], -1).any(1, keepdim=True)
        input = input.where(counts, torch.zeros_like(input))
    grads = [
        ((matrix @ weight) * factor).to(input_type or input.dtype),
        ((matrix.T @ input.to(wide)) * factor).to(weight_type).reshape(linear_weight.shape),
        (matrix.sum(0) * factor).to(weight_type).reshape(linear_weight.shape[:-1]),
    ]
    absent = [input.new_empty(0, dtype=input_type), *[linear_weight.new_empty(0, dtype=weight_type)] * 2]
    return tuple(grad if wanted else empty for grad, empty, wanted in zip(grads, absent, output_mask, strict=True))


def _differentiate(outputs, inputs, grad_outputs):
    """torch.autograd.grad, where grad_outputs may be absent and outputs may be constants."""
    pairs = [(y, v) for y, v in zip(outputs, grad_outputs, strict=False) if y.requires_grad and v is not None]
    if not pairs:
        return [None] * len(inputs)
    outputs = [y for y, _ in pairs]
    grad_outputs = [v.to(y.dtype) for y, v in pairs]
    return torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)


@contextlib.contextmanager
def _autograd():
    """A graph may be built within, also where a tracer has left autograd behind."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _absent(values, name):
    """The empty tensor in the place of a gradient that is not asked for."""
    if name in ("linear_weight", "linear_bias"):
        return values["linear_weight"].new_empty(0, dtype=values["weight_type"])
    return values[name].new_empty(0)


def _backward(name, loss):
    """The decomposition of a backward operator, by the derivatives of its loss."""
    schema = getattr(torch.ops.fusedloss, f"{name}_backward").default._schema
    names = [argument.name for argument in schema.arguments]
    of_the_loss = [name for name in names if name not in _OF_BACKWARD | _NOT_OF_THE_LOSS | _OF_THE_PRODUCTS]
    differentiable = of_the_loss[: len(schema.returns)]

    def decomposition(*arguments):
        values = dict(zip(names, arguments, strict=True))
        mask = values.get("output_mask", [True])
        wanted = [name for name, used in zip(differentiable, mask, strict=True) if used]
        grad_outputs = [values.get(name) for name in _GRAD_OUTPUTS]
        # A float32 loss of half precision is autocast's, where native casts every operand first.
        upcast = values["grad_loss"].dtype == torch.float32

        def outputs(*primals):
            given = {name: values[name] for name in of_the_loss} | dict(zip(wanted, primals, strict=True))
            given["reduction"] = REDUCTIONS[given["reduction"]]
            return loss(**{name: _upcast(value) if upcast else value for name, value in given.items()})

        with _autograd():
            leaves = [values[name].detach().requires_grad_() for name in wanted]
            grads = _differentiate(outputs(*leaves), leaves, grad_outputs)
        grads = {n: torch.zeros_like(x) if g is None else g for n, x, g in zip(wanted, leaves, grads, strict=True)}
        for name in {"linear_weight", "linear_bias"} & grads.keys():
            grads[name] = grads[name].to(values["weight_type"])
        results = [grads[name] if name in grads else _absent(values, name) for name in differentiable]
        return results[0] if len(results) == 1 else tuple(results)

    return decomposition


_DECOMPOSITIONS = {
    "rescale_grad": rescale_grad,
    **{name: _forward(name, loss) for name, loss in _LOSSES.items() if name != "linear_cross_entropy"},
    **{f"{name}_backward": _backward(name, loss) for name, loss in _LOSSES.items()},
    "linear_cross_entropy_gradients": linear_gradients,
}
_DECOMPOSITIONS["linear_cross_entropy"] = _linear_forward(_DECOMPOSITIONS["cross_entropy"])
