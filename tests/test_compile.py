"""torch.compile without graph breaks, torch.export, and no recompilation native would not do."""

import pytest
import torch
from support import LOSSES, differentiate, each, each_reduction, moved
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import fusedloss


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@each_reduction
@each()
def test_compiled_is_eager(loss, reduction, device):
    input, target = loss.sample(8, 5, device=device)
    actual = differentiate(compiled(loss.ours), input, target, reduction=reduction)
    same_bits(actual, differentiate(loss.ours, input, target, reduction=reduction, **loss.separate))


EXTRAS = {
    "weight, smoothing": {"weight": torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1]), "label_smoothing": 0.1},
    "z_loss, softcap, lse": {"z_loss": 0.1, "logit_softcap": 2.0, "return_lse": True},
    "weights of samples, entropy": {"sample_weight": torch.arange(8.0), "return_entropy": True, "return_argmax": True},
    "scale, denominator": {"logit_scale": 0.7, "denominator": torch.tensor(5)},
}


@pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS)
@each("cross_entropy", "cross_entropy_soft")
def test_options_compiled(loss, options, device):
    input, target = loss.sample(8, 5, device=device)
    options = moved(options, device)
    same_bits(
        differentiate(compiled(loss.ours), input, target, **options),
        differentiate(loss.ours, input, target, **options, **loss.separate),
    )


def test_a_denominator_that_varies_compiled(device):
    """A count of each batch, as an int: one graph serves all but the first of them."""
    input, target = LOSSES["cross_entropy"].sample(8, 5, device=device)

    def loss(input, target, count):
        return fusedloss.cross_entropy(input, target, denominator=count)

    call = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for count in (3, 5, 8, 13):
        torch.testing.assert_close(call(input, target, count), loss(input, target, count))


def test_log_probabilities_compiled(device):
    input, target = LOSSES["cross_entropy"].sample(8, 5, device=device)
    options = {"logit_scale": 0.7, "return_entropy": True}
    same_bits(
        differentiate(compiled(fusedloss.token_log_probs), input, target, **options),
        differentiate(fusedloss.token_log_probs, input, target, **options),
    )


@pytest.mark.parametrize("name", ["cross_entropy", "bce_with_logits"])
def test_a_model_through_inductor(name, device):
    """The loss behind a layer, as in a training step."""
    if device == "cuda":
        pytest.importorskip("triton", reason="inductor needs triton for CUDA")
    loss = LOSSES[name]
    features, target = torch.randn(8, 4).to(device), loss.sample(8, 5, device=device)[1]
    weight = torch.randn(5, 4).to(device)

    def step(weight, target):
        return loss.ours(features @ weight.T * 2, target)

    actual = differentiate(compiled(step, "inductor"), weight, target)[:2]
    torch.testing.assert_close(actual, differentiate(step, weight, target)[:2])


@pytest.mark.parametrize("layout", ["channels last", "classes last"])
@each("cross_entropy", "bce_with_logits")
def test_layouts_compiled(loss, layout, device):
    """The fake kernels promise the strides the real ones return."""
    input, target = loss.sample(2, 3, 4, 5, device=device)
    input = input.contiguous(memory_format=torch.channels_last) if layout == "channels last" else input.mT
    target = target if layout == "channels last" else target.mT
    same_bits(
        differentiate(compiled(loss.ours), input, target), differentiate(loss.ours, input, target, **loss.separate)
    )


def recompilations(function, first, *others, **options):
    """How often calls after the first compile again. The first may compile twice: floats are found to be constants."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(function, backend=counter, fullgraph=True, **options)
    step(*first)
    before = counter.frame_count
    for call in others:
        step(*call)
    return counter.frame_count - before


@pytest.mark.parametrize("dynamic", [None, True])
@each()
def test_new_sizes_recompile_no_more_than_natively(loss, dynamic, device):
    calls = [loss.sample(rows, 5, device=device) for rows in (4, 5, 6, 7, 8)]
    ours, native = (recompilations(f, *calls, dynamic=dynamic) for f in (loss.ours, loss.native))
    assert ours <= native


@pytest.mark.parametrize("dynamic", [None, True])
@each("cross_entropy", "nll", "bce_with_logits", "bce")
def test_another_ignore_index_recompiles_no_more_than_natively(loss, dynamic, device):
    """The first call knows the number for a constant; when it has changed it is a symbol."""
    input, target = loss.sample(4, 7, device=device)
    target = target.round() if target.is_floating_point() else target
    calls = [(input, target, ignore_index) for ignore_index in (0, 1, 2, 3, 4, -1)]
    ours = recompilations(lambda x, y, i: loss.ours(x, y, ignore_index=i), *calls, dynamic=dynamic)
    if loss.target == "index":
        assert ours <= recompilations(lambda x, y, i: loss.native(x, y, ignore_index=i), *calls, dynamic=dynamic)
    else:
        assert ours == (0 if dynamic else 1)


@each("cross_entropy", "nll", "bce_with_logits", "bce")
def test_an_ignore_index_that_varies_still_reaches_our_operator(loss, device):
    input, target = loss.sample(4, 7, device=device)
    target = target.round() if target.is_floating_point() else target
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    step = torch.compile(lambda x, y, i: loss.ours(x, y, ignore_index=i), backend=backend, fullgraph=True, dynamic=True)
    for ignore_index in (0, 3):
        torch.testing.assert_close(
            step(input, target, ignore_index), loss.ours(input, target, ignore_index=ignore_index)
        )
    assert any("fusedloss" in name for name in targets)
    assert not any("torch._C._nn" in name or "log_softmax" in name for name in targets)


@each()
def test_dynamic_sizes_give_eager_s_results(loss, device):
    step = compiled(loss.ours, dynamic=True)
    for shape in [(4, 5), (7, 5), (7, 9)]:
        input, target = loss.sample(*shape, device=device)
        same_bits(differentiate(step, input, target), differentiate(loss.ours, input, target, **loss.separate))


@each()
def test_modules_compile(loss, device):
    module = getattr(fusedloss, loss.module)(**loss.separate)
    input, target = loss.sample(8, 5, device=device)
    same_bits(differentiate(compiled(module), input, target), differentiate(module, input, target))


@each()
def test_autocast_inside_the_compiled_function(loss, device):
    if loss.module == "BCELoss" and device == "cuda":
        pytest.skip("CUDA autocast refuses binary_cross_entropy")
    input, target = loss.sample(8, 5, dtype=torch.bfloat16, device=device)

    def step(input, target):
        with torch.autocast(device, dtype=torch.bfloat16):
            return loss.ours(input, target, **loss.separate)

    actual, expected = differentiate(compiled(step), input, target), differentiate(step, input, target)
    assert actual[0].dtype == torch.float32
    same_bits(actual, expected)


@each()
def test_patched_code_compiles(loss, device):
    module = getattr(torch.nn, loss.module)()
    input, target = loss.sample(8, 5, device=device)
    with fusedloss.patch():
        actual = differentiate(compiled(module), input, target)
    same_bits(actual, differentiate(loss.ours, input, target, **loss.separate))


@each()
def test_export_with_a_dynamic_batch(loss, device):
    input, target = loss.sample(8, 5, device=device)
    rows = Dim("rows", min=2, max=64)
    program = torch.export.export(
        getattr(fusedloss, loss.module)(), (input, target), dynamic_shapes=({0: rows}, {0: rows})
    )
    assert any("fusedloss" in str(node.target) for node in program.graph.nodes)
    other = loss.sample(13, 5, device=device)
    same_bits(program.module()(*other), loss.ours(*other))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x / 2])),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@each()
def test_transforms_inside_the_compiled_function(loss, transform, device):
    """Routed to native there too: a C++ autograd Function under a transform gives an error, or a tangent of zeros."""
    input, target = loss.sample(8, 5, device=device)
    actual = compiled(lambda x: transform(lambda y: loss.ours(y, target), x))(input)
    torch.testing.assert_close(actual, transform(lambda y: loss.native(y, target), input))
