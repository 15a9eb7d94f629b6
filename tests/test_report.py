"""fusedloss.report() counts calls: what kernels took, and what went to native torch, and why."""

import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support import LOSSES, each
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fusedloss
from fusedloss.backend import NAMES


@pytest.fixture(autouse=True)
def nothing_patched():
    yield
    fusedloss.unpatch()


@pytest.fixture
def backend(device):
    """The name of the backend whose kernels `device` has chosen."""
    return fusedloss.backend._override


def fused(loss, calls, backend="cpu"):
    """A report of so many calls that kernels took, and no other."""
    return fusedloss.calls.Report(Counter({(loss, backend): calls}), Counter())


def by_native(loss, reason, calls=1):
    return fusedloss.calls.Report(Counter(), Counter({(loss, reason): calls}))


def sample(loss, device="cpu"):
    input, target = loss.sample(4, 3, device=device)
    return input.requires_grad_(), target


def linear(device="cpu", requires_grad=True):
    """The tensors of a linear layer and its loss."""
    hidden, weight = (torch.randn(n, 5, device=device, requires_grad=requires_grad) for n in (6, 3))
    return hidden, weight, torch.randint(3, (6,), device=device)


MODES = {
    "training": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@each()
def test_calls_are_counted(loss, mode, device, backend):
    input, target = sample(loss, device)
    with fusedloss.report() as report, mode():
        for _ in range(3):
            value = loss.ours(input, target)
    assert report == fused(loss.function, 3, backend)
    if value.requires_grad:
        with fusedloss.report() as report:
            value.backward()
        assert report == fusedloss.calls.Report(Counter(), Counter())


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}, {"reduction": "none"}], ids=str)
@each("cross_entropy", "bce_with_logits", "bce")
def test_either_road_to_the_gradient_is_one_call(loss, options, device, backend):
    input, target = sample(loss, device)
    with fusedloss.report() as report:
        loss.ours(input, target, **options).sum().backward()
    assert report == fused(loss.function, 1, backend)


@pytest.mark.parametrize("options", [{}, {"memory": 1}, {"return_lse": True}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_linear_layer_s_loss_is_one_call(options, requires_grad, device, backend):
    """Whatever it runs within, of however many chunks."""
    tensors = linear(device, requires_grad)
    with fusedloss.report() as report:
        value = fusedloss.linear_cross_entropy(*tensors, **options)
        value = value[0] if isinstance(value, tuple) else value
        if requires_grad:
            value.sum().backward()
    assert report == fused("linear_cross_entropy", 1, backend)


def test_log_probs_are_calls_of_their_operators(device, backend):
    hidden, weight, target = linear(device)
    with fusedloss.report() as report:
        fusedloss.token_log_probs(hidden @ weight.T, target).sum().backward()
    assert report == fused("cross_entropy", 1, backend)
    with fusedloss.report() as report:
        fusedloss.linear_token_log_probs(hidden, weight, target).sum().backward()
    assert report == fused("linear_cross_entropy", 1, backend)


def test_shared_classes_have_a_name_of_their_own():
    shard = torch.ops.fusedloss.cross_entropy_shard.default
    options = (None, None, None, 1, -100, 0.0, 0.0, 1.0, 0.0, 0, 6, False, False, False)
    with fusedloss.report() as report:
        shard(torch.randn(4, 3), torch.randint(6, (4,)), *options)
        shard(torch.randn(4, 0), torch.randint(6, (4,)), *options)  # a rank without classes
    assert report == fused("losses of shared classes", 1)


@each()
def test_modules_and_patched_names_are_counted(loss):
    input, target = sample(loss)
    with fusedloss.report() as report, fusedloss.patch():
        getattr(fusedloss, loss.module)()(input, target)
        getattr(torch.nn, loss.module)()(input, target)
        getattr(F, loss.function)(input, target)
    assert report == fused(loss.function, 3)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@each()
def test_compiled_calls_are_counted(loss, compiler):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(lambda x, y: 2 * loss.ours(x, y), backend=counter, fullgraph=True)
    input, target = sample(loss)
    for _ in range(3):
        with fusedloss.report() as report:
            compiled(input, target).backward()
        assert report == fused(loss.function, 1)
    assert counter.frame_count == 1


def test_a_compiled_linear_layer_s_loss_is_counted():
    torch.compiler.reset()
    compiled = torch.compile(fusedloss.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with fusedloss.report() as report:
        for _ in range(3):
            compiled(*linear()).backward()
    assert report == fused("linear_cross_entropy", 3)


@each()
def test_exported_programs_are_counted_until_they_are_decomposed(loss):
    input, target = loss.sample(4, 3)
    with fusedloss.report() as report:
        program = torch.export.export(getattr(fusedloss, loss.module)(), (input, target))
    assert report == fusedloss.calls.Report(Counter(), Counter())
    with fusedloss.report() as report:
        for _ in range(2):
            program.module()(input, target)
    assert report == fused(loss.function, 2)
    with fusedloss.report() as report:
        decomposed = program.run_decompositions()
        decomposed.module()(input, target)
    assert report == by_native(loss.function, "decomposed, for each graph")


def test_a_decomposing_compiler_is_counted_for_each_graph():
    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=lambda graph, _: graph, decompositions=fusedloss.decompositions.table())
    input, target = LOSSES["cross_entropy"].sample(4, 3)
    compiled = torch.compile(fusedloss.cross_entropy, backend=backend)
    with fusedloss.report() as report:
        for _ in range(3):
            compiled(input, target)
    assert report == by_native("cross_entropy", "decomposed, for each graph")


def jvp(loss, input, target):
    with forward_ad.dual_level():
        return loss(forward_ad.make_dual(input.detach(), torch.ones_like(input)), target)


ROUTES = {
    "a transform of torch.func": lambda loss, input, target: torch.func.grad(loss)(input, target),
    "forward-mode AD": jvp,
    "torch.jit.trace": lambda loss, *tensors: torch.jit.trace(lambda *x: loss(*x), tensors, check_trace=False),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("reason", ROUTES)
@each()
def test_what_is_routed_to_native_is_counted_by_its_reason(loss, reason):
    input, target = loss.sample(4, 3)
    with fusedloss.report() as report:
        ROUTES[reason](loss.ours, input, target)
    assert report == by_native(loss.function, reason)


def test_a_linear_layer_s_routes_to_native():
    hidden, weight, target = linear(requires_grad=False)
    with fusedloss.report() as report:
        torch.func.grad(fusedloss.linear_cross_entropy)(hidden, weight, target)
        torch.func.vmap(fusedloss.token_log_probs)(torch.randn(2, 4, 3), torch.randint(3, (2, 4)))
        torch.func.grad(lambda x: fusedloss.linear_token_log_probs(x, weight, target).sum())(hidden)
    transform = "a transform of torch.func"
    assert report.native == {("linear_cross_entropy", transform): 2, ("cross_entropy", transform): 1}
    assert not report.fused


def test_a_weight_that_requires_grad_is_a_reason():
    input, target = LOSSES["cross_entropy_soft"].sample(4, 3)
    weight = torch.ones(3, requires_grad=True)
    with fusedloss.report() as report:
        fusedloss.cross_entropy(input, target, weight).backward()
    assert report == by_native("cross_entropy", "a weight that requires grad beside probabilities")


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
@each("cross_entropy", "cross_entropy_soft", "bce_with_logits", "bce")
def test_second_derivatives_are_native(loss, options):
    """The first is fused, also where forward has to be run again for it."""
    input, target = sample(loss)
    with fusedloss.report() as report:
        value = loss.ours(input, target, **options)
        (grad,) = torch.autograd.grad(value, input, create_graph=True)
    assert report == fused(loss.function, 1)
    with fusedloss.report() as report:
        grad.square().sum().backward()
    assert report == by_native(loss.function, "second derivative")


def test_second_derivatives_of_a_linear_layer_are_native():
    hidden, weight, target = linear()
    with fusedloss.report() as report:
        (grad,) = torch.autograd.grad(fusedloss.linear_cross_entropy(hidden, weight, target), hidden, create_graph=True)
    assert report == fused("linear_cross_entropy", 1)
    with fusedloss.report() as report:
        grad.square().sum().backward()
    assert report == by_native("linear_cross_entropy", "second derivative")


def test_what_is_compiled_into_native_is_counted_for_each_graph():
    torch.compiler.reset()
    input, target = LOSSES["cross_entropy"].sample(4, 3)
    compiled = torch.compile(torch.func.grad(fusedloss.cross_entropy), backend="aot_eager", fullgraph=True)
    with fusedloss.report() as report:
        for _ in range(3):
            compiled(input, target)
    assert report == by_native("cross_entropy", "a transform of torch.func, for each graph")


@each()
def test_a_function_that_is_kept_longer_than_the_patch_is_native(loss):
    input, target = sample(loss)
    with fusedloss.patch():
        kept = getattr(F, loss.function)
        with fusedloss.report() as report:
            kept(input, target)
    assert report == fused(loss.function, 1)
    with fusedloss.report() as report:
        kept(input, target)
    assert report == by_native(loss.function, "taken from a patch that has ended")


def test_native_s_own_functions_are_not_seen():
    input, target = LOSSES["cross_entropy"].sample(4, 3)
    native = F.cross_entropy
    with fusedloss.report() as report, fusedloss.patch():
        native(input, target)
    assert report == fusedloss.calls.Report(Counter(), Counter())


def test_calls_that_raise_are_not_counted():
    input, target = LOSSES["cross_entropy"].sample(4, 3)
    hidden, weight, _ = linear()
    with fusedloss.report() as report:
        with pytest.raises(IndexError):
            fusedloss.cross_entropy(input, target + 3)
        with pytest.raises(IndexError):
            fusedloss.cross_entropy(input.requires_grad_(), target + 3)
        with pytest.raises(IndexError):
            fusedloss.linear_cross_entropy(hidden, weight, torch.full((6,), 3))
        with pytest.raises(RuntimeError):
            fusedloss.binary_cross_entropy(torch.full((2,), 2.0), torch.zeros(2))
        with pytest.raises(IndexError):
            torch.func.grad(fusedloss.cross_entropy)(input.detach(), target + 3)
    assert report == fusedloss.calls.Report(Counter(), Counter())


def test_nothing_is_computed_of_fake_and_meta_tensors_and_of_none():
    input, target = LOSSES["cross_entropy"].sample(4, 3)
    with fusedloss.report() as report:
        fusedloss.cross_entropy(input.to("meta"), target.to("meta"))
        with FakeTensorMode():
            fusedloss.cross_entropy(torch.empty(4, 3), torch.empty(4, dtype=torch.int64))
        fusedloss.cross_entropy(input[:0], target[:0], reduction="sum")
    assert report == fusedloss.calls.Report(Counter(), Counter())


def test_no_call_is_lost_between_threads():
    input, target = LOSSES["cross_entropy"].sample(4, 3)
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(300):
            fusedloss.cross_entropy(input, target)
            fusedloss.calls.by_native("nll_loss", "test", None)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with fusedloss.report() as report:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert report.fused == {("cross_entropy", "cpu"): 1200}
    assert report.native == {("nll_loss", "test"): 1200}


def test_reports_are_compared_and_printed():
    input, target = LOSSES["cross_entropy"].sample(4, 3)
    earlier = fusedloss.report()
    for _ in range(12):
        fusedloss.cross_entropy(input, target)
    torch.func.grad(fusedloss.cross_entropy)(input, target)
    later = fusedloss.report()
    with later as within:
        assert within is later
        fusedloss.nll_loss(input, target)
    assert within == fused("nll_loss", 1)
    found = fusedloss.report().since(earlier)
    assert found.fused == {("cross_entropy", "cpu"): 12, ("nll_loss", "cpu"): 1}
    assert found.native == {("cross_entropy", "a transform of torch.func"): 1}
    assert str(found).splitlines() == [
        "loss           taken by                           calls",
        "cross_entropy  fused: cpu                            12",
        "nll_loss       fused: cpu                             1",
        "cross_entropy  native: a transform of torch.func      1",
    ]
    assert {backend for _, backend in fusedloss.report().fused} <= set(NAMES)
