"""DTensors: values and gradients of the whole, wherever its parts lie; a clear sentence for what is not shared yet."""

import itertools
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from support import LOSSES, REDUCTIONS, each, eighths
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import fusedloss

RANKS = 2
# Of torch 2.11 between a DTensor and its shard.
FIRST_DERIVATIVES_ONLY = torch.__version__.startswith("2.11.")
# One placement for each: shapes whose parts are even, uneven, and, with one row, empty.
SHAPES = [((4, 6), 0), ((5, 6), 0), ((1, 6), 0), ((4, 6), None), ((6,), None), ((2, 6, 3), 2), ((3, 6, 4, 5), 3)]
WEIGHED = [{"sample_weight": "rows", "logit_scale": 0.7}, {"sample_weight": "rows", "weight": (6,), "denominator": 7}]
OPTIONS = {
    "cross_entropy": [{}, {"weight": (6,), "ignore_index": 2}, {"z_loss": 0.1, "label_smoothing": 0.1}, *WEIGHED],
    "cross_entropy_soft": [{}, {"weight": (6,), "label_smoothing": 0.1}, *WEIGHED],
    "nll": [{}, {"weight": (6,), "ignore_index": 2}],
    "bce_with_logits": [{}, {"weight": (1,), "pos_weight": "whole"}, {"pos_weight": "last", "ignore_index": 1}],
    "bce": [{}, {"weight": "whole"}],
}


def placement(dim):
    return Replicate() if dim is None else Shard(dim)


def differentiated(call, input, target, twice):
    """The loss and its gradients, as whole tensors; where asked for, those of the gradients' squares as well."""
    leaves = [tensor for tensor in (input, target) if tensor.requires_grad]
    loss = call(input, target)
    seed = eighths(loss.shape, loss.dtype)
    if isinstance(loss, DTensor):
        seed = distribute_tensor(seed, loss.device_mesh, loss.placements)
    grads = torch.autograd.grad(loss, leaves, seed, create_graph=twice)
    results = [loss, *grads]
    if twice:
        results += torch.autograd.grad(sum((grad * grad).sum() for grad in grads), leaves)
    return [result.full_tensor() if isinstance(result, DTensor) else result for result in results]


def check(mesh, name, shape, dim, options, reduction, dtype=torch.float64, twice=False, target_dim="beside"):
    loss = LOSSES[name]
    input, target = loss.sample(*shape, dtype=dtype)
    if options.get("ignore_index") is not None and loss.target == "element":
        target = target.round()
    if reduction != "mean":
        options = {name: value for name, value in options.items() if name != "denominator"}
    sizes = {"whole": shape, "last": shape[-1:], "rows": shape[:1]}
    options = {
        name: torch.rand(sizes.get(value, value), dtype=torch.float64).to(dtype) + 0.5 if "weight" in name else value
        for name, value in options.items()
    }
    shared = {
        name: distribute_tensor(value, mesh, [placement(0 if name == "sample_weight" else None)])
        if isinstance(value, torch.Tensor)
        else value
        for name, value in options.items()
    }
    if target_dim == "beside":
        target_dim = dim if dim is None or dim == 0 or target.dim() == len(shape) else dim - 1
    wanted = target.is_floating_point() and not options.get("ignore_index")

    def call(options):
        return lambda input, target: loss.ours(input, target, reduction=reduction, **options)

    def leaves(input, target):
        return input.detach().requires_grad_(), target.detach().requires_grad_(wanted)

    ours = leaves(
        distribute_tensor(input, mesh, [placement(dim)]), distribute_tensor(target, mesh, [placement(target_dim)])
    )
    actual = differentiated(call(shared), *ours, twice)
    expected = differentiated(call(options), *leaves(input, target), twice)
    torch.testing.assert_close(actual, expected, equal_nan=True)


def check_all(mesh):
    for name, (shape, dim), reduction in itertools.product(LOSSES, SHAPES, REDUCTIONS):
        yield check, name, shape, dim, {}, reduction
    for name, reduction in itertools.product(LOSSES, REDUCTIONS):
        for options in OPTIONS[name][1:]:
            yield check, name, (5, 6), 0, options, reduction
        yield check, name, (5, 6), 0, {}, reduction, torch.float32
        yield check, name, (5, 6), 0, {}, reduction, torch.bfloat16
        yield check, name, (5, 6), None, {}, reduction, torch.float64, not FIRST_DERIVATIVES_ONLY  # twice
        yield check, name, (4, 6), 0, {}, reduction, torch.float64, False, None  # a replicated target
        yield check, name, (4, 6), None, {}, reduction, torch.float64, False, 0  # a target in parts


def work(rank, file, failures):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (RANKS,))
    for step, (function, *arguments) in enumerate(check_all(mesh)):
        torch.manual_seed(step)
        try:
            function(mesh, *arguments)
        except Exception:
            failures.put(f"{arguments}\n{traceback.format_exc()}")
            break  # the ranks may be at different collectives now
    dist.destroy_process_group()
    os._exit(0)  # where Python takes everything down, a thread of torch's that still runs may abort the process


@pytest.mark.long
def test_two_processes_have_the_loss_of_one(tmp_path):
    failures = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(work, (tmp_path / "store", failures), nprocs=RANKS)
    assert failures.empty(), failures.get()


@pytest.fixture
def mesh():
    """Of a group that does not communicate: this process is the first of two."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def distribute(tensor, mesh, place):
    """Every rank takes its own part. Sent by the first rank, which is the default, torch 2.11's would hold anything."""
    return distribute_tensor(tensor, mesh, [place], src_data_rank=None)


@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each()
def test_where_losses_and_gradients_lie(loss, reduction, dim, mesh):
    input, target = (distribute(tensor, mesh, placement(dim)) for tensor in loss.sample(4, 6))
    input.requires_grad_()
    value = loss.ours(input, target, reduction=reduction)
    value.sum().backward()
    assert value.placements == (placement(dim if reduction == "none" else None),)
    assert input.grad.placements == input.placements
    assert input.grad.shape == (4, 6)


def test_ranks_may_ignore_different_numbers_of_targets(mesh):
    """Native's mean over shards is the mean of their means. The other rank of this group counts as this one does."""
    logits, target = LOSSES["cross_entropy"].sample(4, 6)
    target[1] = -100
    shared = [distribute(tensor, mesh, Shard(0)) for tensor in (logits, target)]
    value = fusedloss.cross_entropy(*shared).to_local()
    torch.testing.assert_close(value, fusedloss.cross_entropy(logits[:2], target[:2]))


@pytest.mark.parametrize("place", [Shard(0), *[Replicate()] * FIRST_DERIVATIVES_ONLY], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each()
def test_second_derivatives_of_an_input_in_parts_are_refused(loss, reduction, place, mesh):
    """Between a DTensor and its shard torch loses what flows through the gradient: a square's would be wrong."""
    input, target = (distribute(tensor, mesh, place) for tensor in loss.sample(4, 6))
    value = loss.ours(input.requires_grad_(), target, reduction=reduction).square().sum()
    says = "torch 2.12" if FIRST_DERIVATIVES_ONLY else r"Shard\(dim=0\)"
    with pytest.raises(NotImplementedError, match=rf"{loss.function}: second derivatives.*{says}"):
        torch.autograd.grad(value, input, create_graph=True)


@pytest.mark.parametrize("place", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each()
def test_an_input_that_is_changed_after_the_loss_is_refused(loss, reduction, place, mesh):
    input, target = (distribute(tensor, mesh, place) for tensor in loss.sample(4, 6))
    hidden = input.requires_grad_() * 1
    value = loss.ours(hidden, target, reduction=reduction).sum()
    with torch.no_grad():
        hidden.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, input)


def test_answers_and_hints(mesh):
    logits, target = (distribute(tensor, mesh, Shard(0)) for tensor in LOSSES["cross_entropy"].sample(4, 6))
    answers = {"return_lse": True, "return_entropy": True, "return_argmax": True}
    whole = fusedloss.cross_entropy(logits.full_tensor(), target.full_tensor(), **answers)
    for answer, expected in zip(fusedloss.cross_entropy(logits, target, **answers), whole, strict=True):
        assert answer.placements == ((Shard(0),) if answer.dim() else (Replicate(),))
        torch.testing.assert_close(answer.full_tensor(), expected)
    log_probs, entropy = fusedloss.token_log_probs(logits, target, return_entropy=True)
    assert (log_probs.shape, log_probs.placements) == (entropy.shape, entropy.placements) == ((4,), (Shard(0),))
    logits.requires_grad_()
    loss = fusedloss.cross_entropy(logits * 1, target, grad_in_forward=True, grad_scale=0.5, inplace=True)
    expected = fusedloss.cross_entropy(logits, target)
    torch.testing.assert_close(
        [grad.to_local() for grad in torch.autograd.grad(loss, logits)],
        [grad.to_local() for grad in torch.autograd.grad(expected, logits)],
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each()
def test_compiled_as_a_whole(loss, reduction, mesh):
    # Whatever was compiled before, with other sizes: torch stops at DTensors of sizes that it takes for dynamic.
    torch.compiler.reset()
    input, target = (distribute(tensor, mesh, Shard(0)) for tensor in loss.sample(4, 6))
    results = []
    for call in loss.ours, torch.compile(loss.ours, fullgraph=True, backend="aot_eager"):
        leaf = input.detach().requires_grad_()
        value = call(leaf, target, reduction=reduction)
        value.sum().backward()
        results.append([value.detach().to_local(), leaf.grad.to_local()])
    torch.testing.assert_close(*results)


X, Y, P = torch.randn(4, 6), torch.randint(6, (4,)), torch.full((4, 6), 0.5)
REFUSED = {  # loss, input, target, options, each tensor with its placement; then what the message names
    "probabilities of classes in parts, plain": ("cross_entropy", (X, Shard(1)), (P, None), {}, "target", "Shard"),
    "classes of log-probabilities in parts": ("nll", (X, Shard(1)), (Y, Replicate()), {}, "input", r"Shard\(dim=1\)"),
    "logits that are terms of a sum": ("cross_entropy", (X, Partial()), (Y, Replicate()), {}, "input", r"Partial"),
    "scores that are terms": ("bce_with_logits", (X, Partial()), (P, Replicate()), {}, "input", r"Partial"),
    "class weights in parts": (
        "cross_entropy",
        (X, Replicate()),
        (Y, Replicate()),
        {"weight": (torch.ones(6), Shard(0))},
        "weight",
        r"Shard\(dim=0\)",
    ),
    "positive weights in other parts": (
        "bce_with_logits",
        (X, Shard(0)),
        (P, Shard(0)),
        {"pos_weight": (torch.ones(6), Shard(0))},
        "pos_weight",
        r"Shard\(dim=0\)",
    ),
    "a plain target": ("cross_entropy", (X, Shard(0)), (Y, None), {}, "target", "Shard"),
    "plain logits": ("bce", (P, None), (P, Shard(0)), {}, "input", "Shard"),
    "a plain weight": ("nll", (X, Replicate()), (Y, Replicate()), {"weight": (torch.ones(6), None)}, "weight", "Repl"),
    "a shared weight of plain logits": ("nll", (X, None), (Y, None), {"weight": (torch.ones(6), Replicate())}, "input"),
    "a row of targets too few": ("cross_entropy", (X, Shard(0)), (Y[:3], Shard(0)), {}, "target", r"\[3\]"),
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_what_is_not_shared_is_refused_in_a_sentence(row, mesh):
    def shared(pair):
        tensor, place = pair
        if place is None:
            return tensor
        return DTensor.from_local(tensor, mesh, [place]) if place.is_partial() else distribute(tensor, mesh, place)

    name, input, target, options, *says = row
    options = {name: shared(value) for name, value in options.items()}
    with pytest.raises((RuntimeError, ValueError)) as caught:
        LOSSES[name].ours(shared(input), shared(target), **options)
    for pattern in (LOSSES[name].function, *says):
        caught.match(pattern)
