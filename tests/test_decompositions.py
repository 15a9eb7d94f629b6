"""The operators decompose to ATen's: the same results, for exporters and compilers that do not know them."""

import functools

import pytest
import test_operators as operators
import torch
from support import each, each_reduction
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from fusedloss.decompositions import table

each_namespace = pytest.mark.parametrize("namespace", ["fusedloss", "fusedloss_triton"])


def names_in(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def decomposed(operator, arguments, **options):
    """The results of a graph in which only ATen's operators are left."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]

    def call(*tensors):
        rest = iter(tensors)
        return operator(*[next(rest) if isinstance(v, torch.Tensor) else v for v in arguments], **options)

    graph = make_fx(call, decomposition_table=table(), tracing_mode="fake")(*tensors)
    assert [name for name in names_in(graph.graph) if "fusedloss" in name] == []
    return operators.tensors_of(graph(*tensors))


def same(actual, expected):
    for ours, theirs in zip(actual, operators.tensors_of(expected), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@operators.each_call
def test_forward_operators(name, arguments):
    operator, every = operators.operator(name), operators.EVERY_OUTPUT.get(name, {})
    same(decomposed(operator, arguments, **every), operator(*arguments, **every))


@operators.each_call
def test_outputs_that_are_not_asked_for_are_absent(name, arguments):
    operator = operators.operator(name)
    actual, expected = table()[operator](*arguments), operator(*arguments)
    assert [value is None for value in actual] == [value is None for value in expected]
    same(operators.tensors_of(actual), expected)


@operators.each_call
def test_backward_operators(name, arguments):
    arguments = operators.backward_arguments(name, arguments)
    operator = operators.operator(f"{name}_backward")
    same(decomposed(operator, arguments), operator(*arguments))


@each_namespace
def test_the_operators_of_both_namespaces(namespace):
    found = {str(operator) for operator in table() if operator.namespace == namespace}
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")}
    writing = {name for name in defined if name.endswith(("_with_grad", "::rescale_grad_"))}
    of_ranks = {name for name in defined if "_shard" in name}
    assert len(of_ranks) == 6
    assert found == {f"{name.replace('::', '.')}.default" for name in defined - writing - of_ranks}


@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rescaling(dtype, keep_zeros):
    grad = torch.tensor([0.0, 1.0, -3.0], dtype=dtype)
    for grad_output, scale in ((1 / 3, None), (3.0, 0.7), (torch.inf, None), (torch.nan, 2.0)):
        factor = torch.tensor(grad_output), scale and torch.tensor(scale, dtype=torch.float64)
        arguments = (grad, *factor, keep_zeros)
        operator = torch.ops.fusedloss.rescale_grad.default
        same(decomposed(operator, arguments), operator(*arguments))


class Model(nn.Module):
    def __init__(self, loss, **options):
        super().__init__()
        self.linear, self.loss = nn.Linear(3, 3), functools.partial(loss.ours, **options)

    def forward(self, x, y):
        return self.loss(self.linear(x).sigmoid(), y)


@each_reduction
@each()
def test_export_leaves_aten_operators(loss, reduction):
    (_, target), input = loss.sample(4, 3), torch.randn(4, 3)
    model = Model(loss, weight=torch.tensor([0.5, 1.0, 2.0]), reduction=reduction)
    program = torch.export.export(model, (input, target))
    assert any("fusedloss" in name for name in names_in(program.graph))
    program = program.run_decompositions()
    assert [name for name in names_in(program.graph) if not name.startswith("aten.")] == []
    torch.testing.assert_close(program.module()(input, target), model(input, target))


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": 1, "label_smoothing": 0.1},
        {"z_loss": 0.1, "logit_softcap": 2.0, "return_lse": True},
        {"logit_scale": 0.7, "denominator": 5, "return_entropy": True, "return_argmax": True},
        {"sample_weight": torch.tensor([1.0, 0.0, 2.0, 0.5]), "label_smoothing": 0.1},
        {"grad_scale": 0.5},
        {"grad_in_forward": True, "grad_scale": 0.5, "inplace": True},
        {"backend": "cpu"},
    ],
    ids=str,
)
def test_options_exported(options):
    input, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    model = Model(operators.LOSSES["cross_entropy"], **options)
    program = torch.export.export(model, (input, target)).run_decompositions()
    assert [name for name in names_in(program.graph) if "fusedloss" in name] == []
    torch.testing.assert_close(program.module()(input, target), model(input, target))


def gradients(function, model, *arguments):
    loss = function(*arguments)
    return loss.detach(), *torch.autograd.grad(loss.sum(), list(model.parameters()))


@each_reduction
@each()
def test_training_graphs_of_a_compiler_that_knows_aten_only(loss, reduction):
    """Forward and backward of the joint graph, for values and gradients."""
    (_, target), input = loss.sample(4, 3), torch.randn(4, 3)
    model, seen = Model(loss, reduction=reduction), []

    def compiler(graph, inputs):
        seen.extend(names_in(graph.graph))
        return graph.forward

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, decompositions=table())
    actual = gradients(torch.compile(model, backend=backend, fullgraph=True), model, input, target)
    assert seen
    assert [name for name in seen if "fusedloss" in name] == []
    torch.testing.assert_close(actual, gradients(model, model, input, target))


@each()
def test_torch_compile_keeps_the_fused_operators(loss):
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    torch.export.default_decompositions()
    input, target = loss.sample(4, 3)
    compiled = torch.compile(loss.ours, fullgraph=True)
    value, code = run_and_get_code(compiled, input.requires_grad_(), target)
    name = {"cross_entropy_soft": "cross_entropy", "nll_loss": "nll", "binary_cross_entropy": "bce"}.get(loss.function)
    assert f"torch.ops.fusedloss.{name or ''}" in "".join(code)
    torch.testing.assert_close(value, loss.native(input, target))
    assert not any("fusedloss" in str(operator) for operator in torch._decomp.core_aten_decompositions())


def test_export_keeps_what_it_is_told_to_keep():
    program = torch.export.export(Model(operators.LOSSES["nll"]), (torch.randn(4, 3), torch.tensor([0, 1, 2, 1])))
    decompositions = torch.export.default_decompositions()
    del decompositions[torch.ops.fusedloss.nll.default]
    assert "fusedloss.nll.default" in names_in(program.run_decompositions(decompositions).graph)
