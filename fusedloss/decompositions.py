"""The operators in terms of ATen's, for whatever does not know them: other compilers, runtimes, ONNX.

They are the reference (fusedloss/reference.py) and its derivatives, with the arguments and the results of the operators
(csrc/register.cpp). ``torch.export``'s default table has them, so ``run_decompositions()`` leaves ATen operators only,
and ONNX's exporter finds them. torch.compile keeps the fused operators, unless a backend is given :func:`table`.

Operators that write where they are told to (NAME_with_grad, rescale_grad_) have none. They are of eager training steps,
and of compiled ones that ask for ``grad_in_forward=True``; exported calls leave that out.
"""

import contextlib
import functools

import torch
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.export import exported_program

from fusedloss import double_backward, reference
from fusedloss.backend import NAMESPACES

_AUTOGRAD_KEYS = [
    getattr(torch._C.DispatchKey, f"Autograd{kind}") for kind in ("Functionality", "Other", "NestedTensor")
]
_HALF = (torch.float16, torch.bfloat16)
_OF_TRAINING = {"upcast", "grad_in_forward", "grad_scale", "inplace"}  # no arguments of the losses themselves


def table() -> dict:
    """The decompositions of all operators of all namespaces, for ``decomposition_table=`` and ``decomp_table=``."""
    return {
        # A graph is decomposed after it has been made functional, and native's losses write in place.
        getattr(getattr(torch.ops, namespace), name).default: dispatch_functionalize(decomposition)
        for namespace in NAMESPACES
        for name, decomposition in _DECOMPOSITIONS.items()
    }


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


def _upcast(upcast, *tensors):
    return [t.float() if upcast and t is not None and t.dtype in _HALF else t for t in tensors]


def cross_entropy(
    logits,
    target,
    weight,
    reduction,
    ignore_index,
    label_smoothing,
    z_loss,
    logit_softcap,
    return_lse,
    upcast=False,
    grad_in_forward=None,
    grad_scale=None,
    inplace=False,
    statistics=False,
):
    input, probabilities, class_weight = _upcast(upcast, logits, target, weight)
    options = {"z_loss": z_loss, "logit_softcap": logit_softcap or None, "return_lse": True}
    loss, lse = reference.cross_entropy(
        input,
        probabilities,
        class_weight,
        ignore_index,
        double_backward.REDUCTIONS[reduction],
        label_smoothing,
        **options,
    )
    if not statistics:
        return loss, lse if return_lse else None, None, None, None
    dim = 0 if logits.dim() == 1 else 1
    row_max = reference.capped(logits.to(lse.dtype), logit_softcap or None).amax(dim)
    indices = None if target.is_floating_point() else target.long().reshape(lse.shape)
    divisor = reference.counts(indices, weight, ignore_index, lse)[1].sum()
    return loss, lse if return_lse else lse.new_empty(0), row_max, lse - row_max, divisor


def nll(log_probs, target, weight, reduction, ignore_index, upcast=False):
    input, class_weight = _upcast(upcast, log_probs, weight)
    loss = reference.nll_loss(input, target, class_weight, ignore_index, double_backward.REDUCTIONS[reduction])
    indices = target.long().reshape(log_probs.select(0 if log_probs.dim() == 1 else 1, 0).shape)
    return loss, reference.counts(indices, weight, ignore_index, log_probs)[1].sum()


def _elementwise(name, loss):
    """The decomposition of a loss of one element, which is given the operator's arguments by their names."""
    operator = getattr(torch.ops.fusedloss, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def decomposition(*arguments, **options):
        values = {**dict(zip(names, arguments, strict=False)), **options}
        upcast = values.get("upcast", False)
        given = {name: value for name, value in values.items() if name not in _OF_TRAINING}
        given |= {name: _upcast(upcast, x)[0] for name, x in given.items() if isinstance(x, torch.Tensor)}
        (result,) = loss(**{**given, "reduction": double_backward.REDUCTIONS[given["reduction"]]})
        return result, _counted(values["target"], values["ignore_index"])

    return decomposition


def _counted(target, ignore_index):
    """How many elements count, float64."""
    counts = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    return counts.sum().double()


def rescale_grad(grad, grad_output, scale, keep_zeros):
    wide = torch.promote_types(grad.dtype, torch.float32)
    factor = grad_output.double() if scale is None else grad_output.double() / scale
    result = grad.to(wide) * factor.to(wide)
    return (torch.where(grad == 0, torch.zeros_like(result), result) if keep_zeros else result).to(grad.dtype)


@contextlib.contextmanager
def _autograd():
    """A graph may be built within, also where a tracer has left autograd behind."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _backward(name, loss):
    """The decomposition of a backward operator, by the derivatives of its loss."""
    operator = getattr(torch.ops.fusedloss, f"{name}_backward").default
    names = [argument.name for argument in operator._schema.arguments]
    of_the_loss = [name for name in names if name not in double_backward.NOT_OF_THE_LOSS]
    differentiable = of_the_loss[: len(operator._schema.returns)]

    def decomposition(*arguments):
        values = dict(zip(names, arguments, strict=True))
        mask = values.get("output_mask", [True])
        wanted = [name for name, used in zip(differentiable, mask, strict=True) if used]
        flows = [values.get(name) for name in double_backward.FLOWS]
        # A float32 loss of half precision is autocast's, where native casts every operand first.
        upcast = values["grad_loss"].dtype == torch.float32

        def outputs(*primals):
            given = {
                **values,
                **dict(zip(wanted, primals, strict=True)),
                "reduction": double_backward.REDUCTIONS[values["reduction"]],
            }
            given = {name: _upcast(upcast, given[name])[0] if name in tensors else given[name] for name in of_the_loss}
            return loss(**given)

        tensors = {name for name in of_the_loss if isinstance(values[name], torch.Tensor)}
        with _autograd():
            leaves = [values[name].detach().requires_grad_() for name in wanted]
            grads = double_backward.differentiate(outputs(*leaves), leaves, flows, create_graph=False)
        grads = {n: torch.zeros_like(x) if g is None else g for n, x, g in zip(wanted, leaves, grads, strict=True)}
        results = [grads[name] if name in grads else values[name].new_empty(0) for name in differentiable]
        return results[0] if len(results) == 1 else tuple(results)

    return decomposition


_DECOMPOSITIONS = {
    **{name: _elementwise(name, loss) for name, loss in double_backward.LOSSES.items()},
    "cross_entropy": cross_entropy,
    "nll": nll,
    "rescale_grad": rescale_grad,
    **{f"{name}_backward": _backward(name, loss) for name, loss in double_backward.LOSSES.items()},
}
