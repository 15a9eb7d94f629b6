"""Classes shared between the ranks of a process group: each rank has of its own classes what one process has of all.

The ranks are processes, one set of them for each number of ranks, in which all cases run one after the other. Every
case has a process group of its own, so that what one leaves behind is not the next one's. What a case compares it names
in its error. Groups end what takes too long: a case in which ranks wait for each other fails.
"""

# ruff: noqa: B023  # what a loop calls, it calls at once

import contextlib
import copy
import functools
import itertools
import math
import os
import re
import time
import traceback
import zlib
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from support import DTYPES, LOSSES, REDUCTIONS, eighths, judge, outputs_of, widen
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.multiprocessing.spawn import ProcessException
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss

TIMEOUT = timedelta(seconds=15)
HALVES = [torch.bfloat16, torch.float16]
ANSWERS = {"return_lse": True, "return_entropy": True, "return_argmax": True}


# --- Ranks -----------------------------------------------------------------------------------------------------------

CASES = {}
WORLDS = {2: [], 3: [], 4: []}


def on(*worlds):
    """Makes a function a case, which these numbers of ranks run."""

    def add(case):
        CASES[case.__name__] = case
        for world in worlds:
            WORLDS[world].append(case.__name__)
        return case

    return add


each_world = on(*WORLDS)


@functools.cache
def mesh_of(*shape):
    """One for all cases: DTensors of equal meshes share what torch remembers of them, the process group included."""
    return init_device_mesh("cpu", shape)


class Ranks:
    """The ranks of a case, and what this one has of a tensor."""

    def __init__(self):
        self.group = dist.new_group(timeout=TIMEOUT)
        self.rank, self.count = dist.get_rank(self.group), dist.get_world_size(self.group)

    @property
    def mesh(self):
        return mesh_of(self.count)

    def part(self, tensor, dim, rank=None):
        """A view of this rank's classes. torch.chunk is the rule; it leaves out those who have none."""
        parts = tensor.chunk(self.count, dim)
        rank = self.rank if rank is None else rank
        return parts[rank] if rank < len(parts) else tensor.narrow(dim, tensor.shape[dim], 0)

    def have_the_same(self, tensors):
        """Whether tensors of all ranks are the same to the last bit."""
        flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors if tensor.numel()]
        if not flat:
            return True
        bits = torch.cat(flat)
        every = [torch.empty_like(bits) for _ in range(self.count)]
        dist.all_gather(every, bits, group=self.group)
        return all(torch.equal(bits, other) for other in every)


def work(rank, world, names, folder, reports):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=world, timeout=TIMEOUT)
    arrived = dist.FileStore(f"{folder}/arrived", world)
    for name in names:
        torch.manual_seed(zlib.crc32(name.encode()))
        ranks = Ranks()
        try:
            CASES[name](ranks)
        except Exception:
            reports.put((name, rank, traceback.format_exc()[-6000:]))
            arrived.set(f"failed at {name}", "")
        else:
            reports.put((name, rank, None))
        # Whoever has failed does not wait in the case's group, where others may be at any collective.
        if arrived.add(name, 1) == world:
            arrived.set(f"all at {name}", "")
        arrived.wait([f"all at {name}"], timedelta(seconds=90))
        if arrived.check([f"failed at {name}"]):
            break
        dist.destroy_process_group(ranks.group)
    os._exit(0)  # where Python takes everything down, a thread of torch's that still runs may abort the process


def run(world, names, folder):
    """What each rank says of each case, by its name: None, or how it has failed.

    The cases behind one that fails have new processes: ranks may be at different collectives of the mesh that they
    share, and gloo takes a process down that gets a tensor of another size than it waits for.
    """
    reports = torch.multiprocessing.get_context("spawn").SimpleQueue()
    found = {name: {} for name in names}
    for attempt in itertools.count():
        of_attempt = folder / str(attempt)
        of_attempt.mkdir()
        arguments = (world, names, of_attempt, reports)
        processes = torch.multiprocessing.spawn(work, arguments, nprocs=world, join=False)
        ended = False
        while not ended:
            try:
                ended = processes.join(timeout=0.1)
            except ProcessException as error:
                ended = str(error)
            while not reports.empty():  # as they come: a full pipe would block the ranks
                name, rank, failure = reports.get()
                found[name][rank] = failure
        names = [name for name in names if len(found[name]) < world]
        if not names:
            return found
        if ended is not True:
            for rank in range(world):
                found[names[0]].setdefault(rank, f"not run to its end: {ended}")
            del names[0]


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory):
    """Of a case on a number of ranks, which run all that this session asks of them at once."""
    wanted = {world: [] for world in WORLDS}
    for item in request.session.items:
        if item.path == request.path and {"world", "name"} <= getattr(item, "callspec", item).params.keys():
            wanted[item.callspec.params["world"]].append(item.callspec.params["name"])

    @functools.cache
    def of(world):
        return run(world, wanted[world], tmp_path_factory.mktemp("ranks"))

    return lambda world, name: of(world)[name]


# --- Judges ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def about(*what):
    """Names what is compared where it fails."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"at {what}") from error


def leaves_of(*tensors, wanted=None):
    """The tensors, those that are asked for, or all that have a gradient, as leaves of a graph."""
    wanted = [tensor is not None and tensor.is_floating_point() for tensor in tensors] if wanted is None else wanted
    return [x if x is None else x.detach().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]


def results(function, leaves, seed=None):
    """The outputs of a call, and the gradients of its leaves."""
    outputs = outputs_of(function(*leaves))
    floating = [y for y in outputs if y.is_floating_point()]
    seeds = [eighths(y.shape, y.dtype) if seed is None else torch.full_like(y, seed) for y in floating]
    of = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [y.detach() for y in outputs], list(torch.autograd.grad(floating, of, seeds)) if of else []


def class_dim(tensor):
    return min(1, tensor.dim() - 1)


def drawn(*shape, dtype=torch.float64, scale=2.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


OURS_ALONE = {"grad_in_forward", "grad_scale", "inplace", "backend"}


def compare(ranks, input, target, of_target=None, views=False, seed=None, **options):
    """Judges a loss of shared classes, and the gradient of each rank's.

    The error is no larger than that of all classes in one call at the same dtype, by torch or by us, or than
    support.UNITS of the last place: one of half precision, six of float32. In float64 they have what our one call has,
    to 1e-12.
    """
    dim, soft = class_dim(input), target.is_floating_point()
    loss, of_target = (
        LOSSES["cross_entropy_soft" if soft else "cross_entropy"],
        soft if of_target is None else of_target,
    )
    plain = {name: value for name, value in options.items() if name not in OURS_ALONE}
    wide = {name: widen(value) for name, value in plain.items()}

    def leaves(input, target):
        return leaves_of(input, target, wanted=[True, of_target])

    soft_part = ranks.part(target, dim) if soft else target
    mine = [ranks.part(input, dim), soft_part]
    mine = mine if views else [tensor.clone(memory_format=torch.contiguous_format) for tensor in mine]

    def call(input, target):
        given = {"process_group": ranks.group, "num_classes": input_classes, **options}
        return fusedloss.cross_entropy(input * 1 if options.get("inplace") else input, target, **given)

    input_classes = input.shape[dim]
    ours = results(call, leaves(*mine), seed)
    assert ranks.have_the_same(ours[0]), "ranks differ"
    unshared = results(partial(fusedloss.cross_entropy, **plain), leaves(input, target), seed)
    if input.dtype == torch.float64:
        same(ours[0] + ours[1], unshared[0] + [ranks.part(grad, dim) for grad in unshared[1]])
        return ours
    truth = results(partial(loss.reference, **wide), leaves(widen(input), widen(target)), seed)
    legal = leaves(input, loss.native_target(input, target).contiguous())
    native = results(partial(loss.baseline(plain), **plain), legal, seed)
    whole = [filled(ranks, our, true, dim) for our, true in zip(ours[1], truth[1], strict=True)]
    parties = [party[0] + party[1] for party in (native, truth, unshared)]
    for our, theirs, true, ours_unshared in zip(ours[0] + whole, *parties, strict=True):
        if our.is_floating_point():
            judge_beside(our, theirs, ours_unshared, true)
        else:
            assert torch.equal(our, true), f"{our} is not {true}"
    return ours


def filled(ranks, part, truth, dim):
    """A whole gradient of which this rank's part is its own, and the rest is true."""
    found = truth.to(part.dtype)
    ranks.part(found, dim).copy_(part)
    return found


def error_of(value, truth):
    error = (value - truth).abs()
    return error[error.isfinite()].amax().item() if error.isfinite().any() else 0.0


def judge_beside(ours, native, unshared, truth):
    """Of the two calls that all classes have, the worse; two of them may differ by their luck."""
    peer = max((native, unshared), key=lambda other: error_of(other, truth))
    judge(ours, peer, truth, ours.dtype)


def same(actual, expected, rtol=1e-12, atol=1e-12):
    for our, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(our, theirs, rtol=rtol, atol=atol, equal_nan=True)


def shared(ranks, input, target, function=fusedloss.cross_entropy, **options):
    """A loss of this rank's part of some logits."""
    dim = class_dim(input)
    target = ranks.part(target, dim) if target.is_floating_point() else target
    return function(ranks.part(input, dim), target, process_group=ranks.group, num_classes=input.shape[dim], **options)


class Collectives(TorchDispatchMode):
    """The collectives that a block issues, by their names."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name
        if "c10d" in function.namespace and not name.endswith("wait_tensor"):
            self.names.append(name.split("::")[1])
        return function(*arguments, **(options or {}))


GATHER, REDUCE = "all_gather_into_tensor", "all_reduce"


def fails(kind, call, *says):
    """Asserts that a call raises an error, soon, and that it says what is wanted.

    What pytest.raises raises where there is no error is no Exception, and would end the process.
    """
    start, message = time.monotonic(), None
    try:
        call()
    except kind as error:
        message = str(error)
    assert message is not None, f"no {kind}"
    for pattern in says:
        assert re.search(pattern, message), f"{pattern} is not in: {message}"
    assert time.monotonic() - start < 10, f"it is a timeout that has ended the call: {message}"


# --- Values and gradients --------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"weight": "classes"},
    {"label_smoothing": 0.1},
    {"weight": "classes", "label_smoothing": 0.3, "ignore_index": 1},
    {"ignore_index": 0},
    {"ignore_index": 10**6},
    {"z_loss": 0.1, "logit_scale": 0.7},
    {"logit_softcap": 3.0, "label_smoothing": 0.1},
    {"return_lse": True},
    {"return_entropy": True, "logit_scale": 1.3},
    ANSWERS,
    {**ANSWERS, "label_smoothing": 0.2, "weight": "classes", "z_loss": 0.01, "sample_weight": "rows"},
    {"sample_weight": "rows", "weight": "classes"},
    {"sample_weight": "rows", "denominator": 5.0, "reduction": "mean"},
    {"soft": True},
    {"soft": True, "weight": "classes", "label_smoothing": 0.2},
    {"soft": True, **ANSWERS, "sample_weight": "rows", "z_loss": 0.1},
]


def check(ranks, shape, dtype, by_default, soft=False, target_dtype=torch.int64, **options):
    """A third of the targets are ignored, where there is something to ignore."""
    dim = min(1, len(shape) - 1)
    classes, rows = shape[dim], shape[:dim] + shape[dim + 1 :]
    input = drawn(*shape, dtype=dtype)
    if soft:
        target = drawn(*shape).softmax(dim).to(dtype)
    else:
        target = torch.randint(classes, rows)
        ignored = options.setdefault("ignore_index", -100 if target_dtype != torch.uint8 else 200)
        if target.numel() > 2 and (target_dtype != torch.uint8 or 0 <= ignored < 256):
            target.view(-1)[: target.numel() // 3] = ignored
        target = target.to(target_dtype)
    sizes = {"classes": (classes,), "rows": rows}
    for name, value in options.items():
        if isinstance(value, str) and value in sizes:
            options[name] = (torch.rand(sizes[value], dtype=torch.float64) + 0.5).to(dtype)
    options.setdefault("reduction", by_default)
    with about(shape, dtype, options, "probabilities" if soft else target_dtype):
        return compare(ranks, input, target, **options)


@each_world
def every_size_has_the_loss_of_one_process(ranks):
    reductions = itertools.cycle(REDUCTIONS)
    for classes, rows, options in itertools.product((1, 2, 5, 16, 37), (0, 1, 7), OPTIONS):
        check(ranks, (rows, classes), torch.float32, next(reductions), **options)


@each_world
def every_dtype_and_reduction_has_the_loss_of_one_process(ranks):
    for dtype, options in itertools.product(DTYPES, OPTIONS):
        for reduction in REDUCTIONS:
            check(ranks, (7, 5), dtype, reduction, **options)
        check(ranks, (6, 37), dtype, "mean", **options)


@each_world
def every_shape_has_the_loss_of_one_process(ranks):
    shapes = [(5,), (1,), (37,), (3, 5, 4), (2, 16, 3, 2), (0, 5, 3), (3, 5, 0), (2, 1, 3), (4, 2, 1)]
    for shape, options, dtype in itertools.product(shapes, OPTIONS, (torch.float64, torch.bfloat16)):
        if dtype == torch.float64 or options in OPTIONS[::4]:
            check(ranks, shape, dtype, "mean" if len(shape) > 3 else "none", **options)


@each_world
def every_type_of_target_is_taken(ranks):
    for dtype, shape in itertools.product((torch.int64, torch.int32, torch.uint8), ((6, 5), (5,), (2, 5, 3))):
        check(ranks, shape, torch.float32, "mean", target_dtype=dtype)
        check(ranks, shape, torch.float64, "none", target_dtype=dtype, ignore_index=0)
    single, input = torch.tensor([3]), drawn(5)  # one index in a tensor of one dimension
    same([shared(ranks, input, single)], [fusedloss.cross_entropy(input, single)])
    for of_input, of_target in itertools.product((torch.float32, torch.bfloat16), DTYPES):
        input, target = drawn(4, 5, dtype=of_input), drawn(4, 5).softmax(1).to(of_target)
        with about(of_input, of_target):
            loss, expected = shared(ranks, input, target), fusedloss.cross_entropy(input, target)
            torch.testing.assert_close(loss, expected)


@each_world
def no_layout_is_a_special_case(ranks):
    rows = drawn(7, 37)
    layouts = {
        "rows of a wider tensor": drawn(7, 64)[:, 3:40],
        "every second class": drawn(7, 74)[:, ::2],
        "every second row": drawn(14, 37)[::2],
        "transposed": drawn(37, 7).t(),
        "one row for all": rows[:1].expand(7, 37),
        "one class for all": rows[:, :1].expand(7, 37),
        "images": drawn(3, 5, 4),
        "images, classes last": drawn(3, 4, 5).movedim(-1, 1),
        "larger images, classes last": drawn(2, 3, 4, 16).movedim(-1, 1),
        "a vector's every second": drawn(20)[::2],
    }
    for (name, input), dtype in itertools.product(layouts.items(), (torch.float64, torch.float32)):
        dim = class_dim(input)
        places, strided = input.to(torch.float64), input  # to() keeps strides
        input = strided.to(dtype)
        target = torch.randint(places.shape[dim], places.shape[:dim] + places.shape[dim + 1 :])
        probabilities = drawn(*places.shape).softmax(dim).to(dtype)
        for options in ({}, {"label_smoothing": 0.1, **ANSWERS}):
            with about(name, dtype, options):
                compare(ranks, input, target, views=True, **options)
                compare(ranks, input, probabilities, views=True, **options)
                if target.dim() == 1:
                    twice = torch.stack([target, target], 1)[:, 0]
                    compare(ranks, input, twice, views=True, reduction="none", **options)


@each_world
def a_gradient_that_is_written_in_forward_is_the_same(ranks):
    for dtype, reduction in itertools.product(DTYPES, ("mean", "sum")):
        input, target = drawn(6, 5, dtype=dtype), torch.randint(5, (6,))
        target[2] = -100
        roads = [
            {"grad_in_forward": False},
            {"grad_in_forward": True},
            {"grad_in_forward": True, "grad_scale": 0.5},
            {"grad_in_forward": True, "grad_scale": 3.0},
            {"grad_scale": torch.tensor(0.5)},
            {"inplace": True},
            {"inplace": True, "grad_scale": 0.5},
            {"backend": "cpu"},
        ]
        for road, options in itertools.product(roads, ({}, {"label_smoothing": 0.1, "z_loss": 0.1})):
            if dtype == torch.float16 and road == {"inplace": True}:
                continue  # which needs a grad_scale
            with about(dtype, reduction, road, options):
                # Written for another grad_output, a gradient of half precision is rounded once more.
                seed = road.get("grad_scale", 1.0)
                compare(ranks, input, target, seed=float(seed), reduction=reduction, **road, **options)
    hidden = leaves_of(ranks.part(drawn(4, 5), 1))[0] * 1
    before = hidden.detach().clone()
    fusedloss.cross_entropy(hidden, torch.arange(4), inplace=True, process_group=ranks.group, num_classes=5)
    assert before.numel() == 0 or not torch.equal(hidden, before), "nothing was written over the logits"


@each_world
def every_target_is_on_one_rank(ranks):
    for rank in range(ranks.count):
        numbers = ranks.part(torch.arange(37), 0, rank)
        target = numbers[torch.arange(7) % len(numbers)]
        for options in ({}, {"label_smoothing": 0.1}, ANSWERS):
            with about(rank, options):
                compare(ranks, drawn(7, 37, dtype=torch.float32), target, **options)


@each_world
def every_target_is_ignored(ranks):
    input, target = drawn(4, 5), torch.full((4,), -100)
    for reduction, options in itertools.product(REDUCTIONS, ({}, {"label_smoothing": 0.1}, ANSWERS, {"z_loss": 0.1})):
        with about(reduction, options):
            compare(ranks, input, target, reduction=reduction, **options)
    (loss,), (grad,) = results(
        lambda x: fusedloss.cross_entropy(x, target, denominator=0.5, process_group=ranks.group, num_classes=5),
        leaves_of(ranks.part(input, 1)),
    )
    assert loss == 0
    assert not grad.any()


@each_world
def weights_of_classes_may_be_0_or_negative(ranks):
    weight, target = torch.tensor([0.0, 1.5, -0.5, 0.0, 2.0, -1.0]), torch.tensor([0, 1, 2, 3, 4, 5, 0, -100])
    for dtype, smoothing, reduction in itertools.product((torch.float64, torch.float32), (0.0, 0.2), REDUCTIONS):
        options = {"weight": weight.to(dtype), "label_smoothing": smoothing, "reduction": reduction}
        with about(options):
            compare(ranks, drawn(8, 6, dtype=dtype), target, **options)
            compare(ranks, drawn(8, 6, dtype=dtype), drawn(8, 6).softmax(1).to(dtype), **options)
            zero = {**options, "weight": torch.zeros(6, dtype=dtype)}
            compare(ranks, drawn(8, 6, dtype=dtype), target, **zero)


INF, NAN = math.inf, math.nan
SPECIAL = {  # what is written to which rows of (6, 8) logits, at the classes of which rank (None: one class alone)
    "NaN on one rank": (NAN, [1], 0),
    "one NaN": (NAN, [0, 3], None),
    "one inf": (INF, [0, 3], None),
    "inf on one rank": (INF, [1], 1),
    "inf everywhere": (INF, [2], slice(None)),
    "one -inf": (-INF, [0, 3], None),
    "-inf on the first rank": (-INF, range(6), 0),
    "-inf on the last rank": (-INF, range(6), -1),
    "-inf everywhere": (-INF, [2], slice(None)),
    "large": (1e4, range(6), 0),
    "large, negative": (-1e4, range(6), 1),
    "the largest there are": (3e38, [1, 2], 1),
    "the smallest there are": (-3e38, [1, 2], 0),
}


@each_world
def what_is_not_finite_is_as_it_is_in_one_process(ranks):
    target, reductions = torch.tensor([0, 1, 5, 7, -100, 3]), itertools.cycle(("none", "none", "mean", "none", "sum"))
    kinds = [{}, {"label_smoothing": 0.1}, ANSWERS, {"z_loss": 0.1}, {"logit_softcap": 30.0}, {"soft": True, **ANSWERS}]
    for (name, (value, rows, where)), dtype in itertools.product(SPECIAL.items(), (torch.float64, torch.float32)):
        input = drawn(6, 8, dtype=dtype)
        classes = torch.arange(8)
        if where is None:
            classes = classes[5:6]
        elif isinstance(where, int):
            classes = ranks.part(classes, 0, where % ranks.count)
        for row in rows:
            input[row, classes] = value
        for options in kinds:
            options = {**options, "reduction": next(reductions)}
            of_case = drawn(6, 8).softmax(1).to(dtype) if options.pop("soft", False) else target
            with about(name, dtype, options, "probabilities" if of_case is not target else "indices"):
                ours = results(lambda x: shared_part(ranks, x, of_case, **options), leaves_of(ranks.part(input, 1)))
                whole = results(lambda x: fusedloss.cross_entropy(x, of_case, **options), leaves_of(input))
                assert ranks.have_the_same(ours[0])
                tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}[dtype]
                same(ours[0] + ours[1], whole[0] + [ranks.part(whole[1][0], 1)], tolerance, tolerance)


def shared_part(ranks, part, target, function=fusedloss.cross_entropy, classes=8, **options):
    """A loss of a leaf that holds this rank's classes."""
    target = ranks.part(target, 1) if target.is_floating_point() else target
    return function(part, target, process_group=ranks.group, num_classes=classes, **options)


@each_world
def rows_that_are_ignored_may_hold_anything(ranks):
    input, target = drawn(5, 6), torch.tensor([1, -100, 4, -100, -100])
    expected = results(lambda x: fusedloss.cross_entropy(x, target), leaves_of(input))
    for value in (NAN, INF, -INF):
        held = input.clone()
        held[1], held[3, 0], held[4, 5] = value, value, value
        for options in ({}, {"grad_in_forward": False}, {"inplace": True}):
            with about(value, options):
                call = partial(shared_part, ranks, target=target, classes=6, **options)
                ours = results(lambda x: call(x * 1), leaves_of(ranks.part(held, 1)))
                same(ours[0] + ours[1], expected[0] + [ranks.part(expected[1][0], 1)])


@each_world
def a_target_among_classes_of_no_probability_costs_infinity(ranks):
    for rank, dtype in itertools.product(range(ranks.count), (torch.float32, torch.float64, torch.bfloat16)):
        input, classes = drawn(2, 8, dtype=dtype), ranks.part(torch.arange(8), 0, rank)
        if not len(classes):
            continue
        input[0, classes] = -INF
        target = torch.stack([classes[0], classes[-1]])
        with about(rank, dtype):
            loss = shared(ranks, input, target, reduction="none")
            assert loss[0] == INF
            torch.testing.assert_close(loss[1], fusedloss.cross_entropy(input[1], target[1]))
            # Where it has no mass, it costs nothing.
            other = (target + 4) % 8
            torch.testing.assert_close(
                shared(ranks, input, other, reduction="none"), fusedloss.cross_entropy(input, other, reduction="none")
            )


@each_world
def the_first_of_equal_classes_is_the_largest(ranks):
    input = torch.zeros(9, 11)
    input[1, [2, 10]] = 1.0
    input[2, [5, 6]] = 1.0
    input[3, 10] = 1.0
    input[4, [3, 9]] = NAN
    input[5, 0], input[5, 10] = INF, NAN
    input[6] = -INF
    input[7, [4, 7]] = INF
    input[8], input[8, [6, 10]] = -0.0, 0.0
    target = torch.arange(9)
    for dtype in DTYPES:
        _, argmax = shared(ranks, input.to(dtype), target, return_argmax=True)
        assert torch.equal(argmax, input.argmax(1)), f"{argmax} is not {input.argmax(1)}"
        assert argmax.dtype == torch.int64
        assert not argmax.requires_grad
    many = drawn(64, 37).round()
    assert torch.equal(shared(ranks, many, target[:1].expand(64), return_argmax=True)[1], many.argmax(1))


# --- Accuracy --------------------------------------------------------------------------------------------------------


@each_world
def nearly_certain_rows_keep_their_digits(ranks):
    """A loss of 1e-9 has as many digits as float64's sum of 1 and 1e-9, wherever the target is; so has an entropy.

    A float32 sum over a rank's own classes is another matter: there the loss has what the unshared call has.
    """
    one_each = ranks.count
    for dtype, classes, entropy in itertools.product((torch.float32, torch.float64), (one_each, 11), (False, True)):
        input, target = drawn(classes, classes, scale=0.5).to(dtype), torch.arange(classes)
        input[target, target] = torch.linspace(18, 24, classes, dtype=dtype)
        gaps = input.double().diagonal()[:, None] - input.double()
        others = (-gaps).exp().masked_fill(torch.eye(classes, dtype=torch.bool), 0)
        loss = others.sum(1).log1p()
        truth = [loss, loss + (others * gaps).sum(1) / (1 + others.sum(1))]
        options = {"return_entropy": True} if entropy else {}
        with about(dtype, classes, options):
            ours = outputs_of(shared(ranks, input, target, reduction="none", **options))
            log_probs = outputs_of(shared(ranks, input, target, fusedloss.token_log_probs, **options))
            assert torch.equal(log_probs[0], -ours[0])
            if entropy or classes == one_each:
                same([x.double() for x in ours], truth[: len(ours)], 2e-6, 3e-16)
            unshared = fusedloss.cross_entropy(input, target, reduction="none")
            allowed = max(error_of(unshared, loss), 2 * torch.finfo(dtype).eps)
            assert error_of(ours[0], loss) <= allowed


@each_world
def entries_of_small_probability_keep_their_digits(ranks):
    """Each entry of a gradient is judged beside itself: of 1e-12, beside the target's of 1, and on its rank."""
    classes = 12
    for rank, road in itertools.product(range(ranks.count), ({}, {"grad_in_forward": False})):
        numbers = ranks.part(torch.arange(classes), 0, rank)
        if not len(numbers):
            continue
        input = drawn(4, classes, dtype=torch.float32, scale=0.5)
        target = numbers[torch.arange(4) % len(numbers)]
        input[torch.arange(4), target] += 27
        whole = leaves_of(input.double())[0]
        (truth,) = torch.autograd.grad(F.cross_entropy(whole, target, reduction="sum"), whole)
        part = leaves_of(ranks.part(input, 1))[0]
        loss = fusedloss.cross_entropy(
            part, target, reduction="sum", process_group=ranks.group, num_classes=classes, **road
        )
        (grad,) = torch.autograd.grad(loss, part)
        others = ranks.part(torch.arange(classes) != target[:, None], 1)
        assert truth.abs()[torch.arange(classes) != target[:, None]].max() < 1e-9
        with about(rank, road):
            same([grad.double()[others]], [ranks.part(truth, 1)[others]], 1e-5, 0.0)


@each_world
def logits_of_10000_lose_nothing(ranks):
    for dtype, offset in itertools.product((torch.float32, torch.float64, torch.bfloat16), (1e4, -1e4)):
        input, target = (drawn(6, 16) + offset).to(dtype), torch.randint(16, (6,))
        for options in ({}, {"label_smoothing": 0.1}, {"return_entropy": True}, {"return_lse": True}):
            with about(dtype, offset, options):
                compare(ranks, input, target, reduction="none", **options)
    # In float32 the differences from the maximum are exact: so are all digits of the loss.
    input = (drawn(6, 16).float() + 1e4).float()
    truth = F.cross_entropy(input.double(), target, reduction="none")
    torch.testing.assert_close(shared(ranks, input, target, reduction="none").double(), truth, rtol=2e-6, atol=0)


def slopes(function, tensors, of, step=1e-6):
    """Central differences of a number of each entry of a tensor, which all ranks move together."""
    found = torch.empty_like(tensors[of])
    for i in range(tensors[of].numel()):
        values = []
        for sign in (1, -1):
            moved = [tensor if j != of else tensor.clone() for j, tensor in enumerate(tensors)]
            moved[of].view(-1)[i] += sign * step
            values.append(function(*moved))
        found.view(-1)[i] = (values[0] - values[1]) / (2 * step)
    return found


def weighted(outputs):
    return sum((y * eighths(y.shape, y.dtype)).sum() for y in outputs_of(outputs) if y.is_floating_point())


@each_world
def gradients_are_the_slopes(ranks):
    """gradcheck through the collective, over the logits of all ranks."""
    target = torch.tensor([4, 0, -100])
    for options in (
        {"reduction": "none"},
        {"weight": torch.rand(5, dtype=torch.float64), "label_smoothing": 0.2, "z_loss": 0.1},
        {"logit_scale": 0.7, "logit_softcap": 2.0, **ANSWERS},
        {"sample_weight": torch.rand(3, dtype=torch.float64), "reduction": "none", "return_entropy": True},
        {"soft": True, "label_smoothing": 0.1, "weight": torch.rand(5, dtype=torch.float64), "return_lse": True},
    ):
        options = dict(options)
        of_case = drawn(3, 5).softmax(1) if options.pop("soft", False) else target
        tensors = [drawn(3, 5), of_case]
        with about(options):
            parts = leaves_of(*(ranks.part(x, 1) if x.is_floating_point() else x for x in tensors))
            total = weighted(fusedloss.cross_entropy(*parts, process_group=ranks.group, num_classes=5, **options))
            wanted = [i for i, part in enumerate(parts) if part.requires_grad]
            grads = torch.autograd.grad(total, [parts[i] for i in wanted])
            for i, grad in zip(wanted, grads, strict=True):
                expected = slopes(lambda *moved: weighted(shared(ranks, *moved, **options)), tensors, i)
                same([grad], [ranks.part(expected, 1)], 1e-6, 1e-8)


# --- Collectives -----------------------------------------------------------------------------------------------------


@each_world
def there_is_one_collective_in_forward_and_none_in_backward(ranks):
    variants = [
        {},
        {"label_smoothing": 0.1, "z_loss": 0.1},
        ANSWERS,
        {"grad_in_forward": False},
        {"reduction": "none"},
        {"soft": True},
    ]
    for rows, options in enumerate(variants, 2):
        options = dict(options)
        target = drawn(rows, 5).softmax(1) if options.pop("soft", False) else torch.randint(5, (rows,))
        for attempt in range(3):
            part = leaves_of(ranks.part(drawn(rows, 5), 1))[0]
            with Collectives() as forward:
                loss = weighted(shared_part(ranks, part, target, classes=5, **options))
            with Collectives() as backward:
                loss.backward()
            with about(options, attempt):
                # What all ranks do for the first time, they compare first.
                assert forward.names == [GATHER] * (2 if attempt == 0 else 1)
                assert backward.names == []
    with Collectives() as forward:
        shared(ranks, drawn(3, 5), torch.randint(5, (3,)), fusedloss.token_log_probs)
        shared(ranks, drawn(3, 5), torch.randint(5, (3,)), fusedloss.token_log_probs)
    assert len(forward.names) <= 3


@each_world
def there_is_one_collective_more_where_the_input_of_a_layer_has_a_gradient(ranks):
    for plan, (options, frozen, backward_names) in itertools.product(
        ({}, {"memory": 1}, {"reduction": "none"}, ANSWERS),
        (({}, False, [REDUCE]), ({"reduce_input_grad": False}, False, []), ({}, True, [])),
    ):
        input, weight = drawn(4, 3), ranks.part(drawn(5, 3), 0)
        for attempt in range(2):
            leaves = leaves_of(input, weight, wanted=[not frozen, True])
            with Collectives() as forward:
                loss = weighted(
                    fusedloss.linear_cross_entropy(
                        *(*leaves, torch.arange(4)), process_group=ranks.group, num_classes=5, **plan, **options
                    )
                )
            with Collectives() as backward:
                loss.backward()
            with about(plan, options, frozen, attempt):
                assert set(forward.names) == {GATHER}
                assert attempt == 0 or len(forward.names) == 1
                assert backward.names == backward_names


@each_world
def a_group_of_one_rank_communicates_nothing(ranks):
    """Which Megatron had to add (Megatron-LM#7295)."""
    alone = [dist.new_group([rank], timeout=TIMEOUT) for rank in range(ranks.count)][ranks.rank]
    input, weight, target = drawn(4, 5), drawn(5, 5), torch.randint(5, (4,))
    for options in ({}, {"label_smoothing": 0.1}, ANSWERS):
        expected = results(lambda x: fusedloss.cross_entropy(x, target, **options), leaves_of(input))
        of_layer = results(
            lambda x, w: fusedloss.linear_cross_entropy(x, w, target, **options), leaves_of(input, weight)
        )
        for classes in (None, 5):
            given = {**options, "process_group": alone, "num_classes": classes}
            with Collectives() as found:
                ours = results(lambda x: fusedloss.cross_entropy(x, target, **given), leaves_of(input))
                layer = results(
                    lambda x, w: fusedloss.linear_cross_entropy(x, w, target, **given), leaves_of(input, weight)
                )
            assert found.names == []
            same(ours[0] + ours[1], expected[0] + expected[1], 0, 0)
            same(layer[0] + layer[1], of_layer[0] + of_layer[1], 0, 0)
    fails(ValueError, lambda: fusedloss.cross_entropy(input, target, process_group=alone, num_classes=6), "6", "5")


@on(2)
def without_a_group_the_number_of_classes_is_the_input_s(ranks):
    input, weight, target = drawn(4, 5), drawn(5, 5), torch.randint(5, (4,))
    same([fusedloss.cross_entropy(input, target, num_classes=5)], [fusedloss.cross_entropy(input, target)])
    for function, *tensors in (
        (fusedloss.cross_entropy, input, target),
        (fusedloss.token_log_probs, input, target),
        (fusedloss.linear_cross_entropy, input, weight, target),
        (fusedloss.linear_token_log_probs, input, weight, target),
        (fusedloss.CrossEntropyLoss(num_classes=6), input, target),
    ):
        options = {} if isinstance(function, nn.Module) else {"num_classes": 6}
        fails(ValueError, lambda: function(*tensors, **options), "num_classes", "5", "6")


@each_world
def by_default_all_ranks_have_as_many_classes(ranks):
    input, target = drawn(4, 3 * ranks.count), torch.randint(3 * ranks.count, (4,))
    part = ranks.part(input, 1)
    same([fusedloss.cross_entropy(part, target, process_group=ranks.group)], [fusedloss.cross_entropy(input, target)])
    weight, hidden = drawn(3 * ranks.count, 2), drawn(4, 2)
    same(
        [fusedloss.linear_cross_entropy(hidden, ranks.part(weight, 0), target, process_group=ranks.group)],
        [fusedloss.linear_cross_entropy(hidden, weight, target)],
    )


# --- Other functions, and modules ------------------------------------------------------------------------------------


@each_world
def log_probabilities_of_tokens_are_those_of_one_process(ranks):
    for dtype, classes, options in itertools.product(
        DTYPES,
        (1, 5, 37),
        ({}, {"return_entropy": True}, {"logit_scale": 0.7, "logit_softcap": 3.0, "ignore_index": 0}),
    ):
        input, target = drawn(7, classes, dtype=dtype), torch.randint(classes, (7,))
        target[0] = options.get("ignore_index", -100)
        with about(dtype, classes, options):
            call = partial(shared_part, ranks, target=target, function=fusedloss.token_log_probs, classes=classes)
            ours = results(lambda x: call(x, **options), leaves_of(ranks.part(input, 1)))
            whole = results(lambda x: fusedloss.token_log_probs(x, target, **options), leaves_of(input))
            truth = results(
                lambda x: fusedloss.reference.token_log_probs(x, target, **options), leaves_of(input.double())
            )
            assert ranks.have_the_same(ours[0])
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert all(y.dtype == wide for y in ours[0])
            parties = [party[0] + [ranks.part(party[1][0], 1)] for party in (whole, truth)]
            for our, theirs, true in zip(ours[0] + ours[1], *parties, strict=True):
                judge(our, theirs, true, our.dtype)


class Chunks:
    """All that is asked of options."""

    def __init__(self, rows):
        self.batch_chunk_size = rows

    def __repr__(self):
        return f"Chunks({self.batch_chunk_size})"


PLANS_ALONE = {"memory", "options", "skip_ignored", "backend", "reduce_input_grad"}


def layer(rows, features, classes, dims=(), soft=False, bias=False, dtype=torch.float64):
    """(input, linear_weight, linear_bias, target)"""
    weight = drawn(classes, *dims, features, dtype=dtype, scale=1 / math.sqrt(features))
    target = torch.randint(classes, (rows, *dims))
    if soft:
        target = drawn(rows, classes, *dims).softmax(1).to(dtype)
    elif rows > 2:
        target[: rows // 3] = -100
    return (
        drawn(rows, features, dtype=dtype, scale=1.0),
        weight,
        drawn(classes, *dims, dtype=dtype) if bias else None,
        target,
    )


def distance(actual, truth):
    """The error in the Frobenius norm, relative where there is something to relate it to."""
    if actual.numel() == 0:
        return 0.0
    error = (actual.double() - truth).norm()
    return float(error / truth.norm()) if truth.norm() > 0 else float(error)


def by_name(function, **options):
    def call(input, weight, bias, target):
        return function(input, weight, target, linear_bias=bias, **options)

    return call


def compare_layers(ranks, tensors, wanted=None, seed=None, function=fusedloss.linear_cross_entropy, **options):
    """Judges a layer and its loss: no larger an error than the call of all classes, times 1.5, or of the last place.

    In float64 they have what it has, to 1e-11.
    """
    input, weight, bias, target = tensors
    soft = target.is_floating_point()
    wanted = [True, True, bias is not None, soft] if wanted is None else wanted
    mine = [input, ranks.part(weight, 0), bias if bias is None else ranks.part(bias, 0)]
    mine.append(ranks.part(target, 1) if soft else target)
    mine = [x if x is None else x.clone() for x in mine]
    given = {"process_group": ranks.group, "num_classes": weight.shape[0], **options}
    ours = results(by_name(function, **given), leaves_of(*mine, wanted=wanted), seed)
    assert ranks.have_the_same(ours[0]), "ranks differ"
    whole = results(by_name(function, **options), leaves_of(*tensors, wanted=wanted), seed)
    dims = [dim for dim, want in zip((None, 0, 0, 1), wanted, strict=True) if want]

    def parts(grads):
        return [grad if dim is None else ranks.part(grad, dim) for grad, dim in zip(grads, dims, strict=True)]

    expected = whole[0] + parts(whole[1])
    if input.dtype == torch.float64:
        same(ours[0] + ours[1], expected, 1e-11, 1e-11)
        return
    plain = {name: widen(value) for name, value in options.items() if name not in PLANS_ALONE}
    reference = getattr(fusedloss.reference, function.__name__)
    wide = leaves_of(*(x if x is None else widen(x) for x in tensors), wanted=wanted)
    truth = results(by_name(reference, **plain), wide, seed)
    grain = 2 * torch.finfo(input.dtype).eps if input.dtype in HALVES else 16 * torch.finfo(input.dtype).eps
    for our, theirs, true in zip(ours[0] + ours[1], expected, truth[0] + parts(truth[1]), strict=True):
        assert (our.dtype, our.shape) == (theirs.dtype, theirs.shape)
        if not our.is_floating_point():
            continue
        finite = true.isfinite()
        assert torch.equal(our.isfinite(), theirs.isfinite())
        our, theirs, true = our[finite], theirs[finite], true[finite]
        allowed = max(1.5 * distance(theirs, true), grain)
        assert distance(our, true) <= allowed, f"{distance(our, true):.3g} > {allowed:.3g}"


LAYERS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 0.1},
    {"logit_scale": 0.7, "logit_softcap": 3.0},
    {"weight": "classes", "label_smoothing": 0.2},
    {"sample_weight": "rows", "denominator": 5.0, "reduction": "mean"},
    {"sample_weight": "rows", "z_loss": 0.1},
    {"return_lse": True},
    {"return_entropy": True},
    ANSWERS,
    {"soft": True},
    {"soft": True, "weight": "classes", "label_smoothing": 0.1, **ANSWERS},
]
PLANS = [{}, {"memory": 1}, {"options": Chunks(2)}, {"skip_ignored": False}, {"memory": 1, "skip_ignored": True}]


def check_layer(ranks, rows, classes, dtype, by_default, plan, dims=(), bias=False, **options):
    tensors = layer(rows, 6, classes, dims, options.pop("soft", False), bias, dtype)
    sizes = {"classes": (classes,), "rows": (rows, *dims)}
    for name, value in options.items():
        if isinstance(value, str) and value in sizes:
            options[name] = (torch.rand(sizes[value], dtype=torch.float64) + 0.5).to(dtype)
    options.setdefault("reduction", by_default)
    with about(rows, classes, dims, dtype, bias, plan, options):
        compare_layers(ranks, tensors, **plan, **options)


@each_world
def a_layer_and_its_loss_are_those_of_one_process(ranks):
    turns = itertools.cycle(itertools.product(REDUCTIONS, (False, True)))
    for classes, rows, options, plan in itertools.product((1, 5, 37), (0, 1, 7), LAYERS, PLANS):
        reduction, bias = next(turns)
        if rows != 7 and plan in PLANS[2:4]:
            continue
        check_layer(ranks, rows, classes, torch.float64, reduction, plan, bias=bias, **options)


@each_world
def ranks_of_unequal_numbers_of_classes_take_one_plan(ranks):
    """Of a memory that holds the logits of some of them; and each leaves out the rows that all leave out."""
    tensors = layer(6, 3, 5)
    for count, options in itertools.product(range(1, 5), ({}, {"reduction": "sum", "label_smoothing": 0.1})):
        with about(count, options):
            compare_layers(ranks, tensors, memory=6 * count * 8, **options)
            compare_layers(ranks, tensors, memory=6 * count * 8, wanted=[False, True, False, False], **options)


@each_world
def a_layer_and_its_loss_lose_no_digits(ranks):
    turns = itertools.cycle(itertools.product(REDUCTIONS, (False, True)))
    for dtype, options, plan in itertools.product((torch.float32, *HALVES), LAYERS, PLANS[:3]):
        reduction, bias = next(turns)
        check_layer(ranks, 9, 16, dtype, reduction, plan, bias=bias, **options)


@each_world
def a_layer_may_have_several_positions_for_a_sample(ranks):
    turns = itertools.cycle(itertools.product(REDUCTIONS, (False, True)))
    for dims, options, plan in itertools.product(((2,), (2, 3)), LAYERS, PLANS[:3]):
        reduction, bias = next(turns)
        check_layer(ranks, 4, 5, torch.float64, reduction, plan, dims, bias, **options)
    check_layer(ranks, 4, 5, torch.float32, "mean", {}, (2,), True)
    check_layer(ranks, 4, 5, torch.bfloat16, "mean", {"memory": 1}, (2,), True)


@each_world
def samples_of_a_layer_may_lie_in_any_dimensions(ranks):
    weight = drawn(5, 3)
    for leading, options in itertools.product(((), (2,), (2, 3), (2, 0, 3)), ({}, {"memory": 1}, ANSWERS)):
        target, input = torch.randint(5, leading), drawn(*leading, 3)
        for reduction in ("none", "mean"):
            given = {**options, "reduction": reduction}
            with about(leading, given):
                compare_layers(ranks, (input, weight, None, target), **given)
        with about(leading, "probabilities"):
            probabilities = drawn(*leading, 5).softmax(-1)
            call = partial(fusedloss.linear_cross_entropy, process_group=ranks.group, num_classes=5)
            part = ranks.part(probabilities, -1)
            same(
                [call(input, ranks.part(weight, 0), part)],
                [fusedloss.linear_cross_entropy(input, weight, probabilities)],
            )


@each_world
def log_probabilities_from_a_layer_are_those_of_one_process(ranks):
    for dtype, bias, options in itertools.product(
        (torch.float64, torch.float32, torch.bfloat16),
        (False, True),
        ({}, {"return_entropy": True}, {"memory": 1}, {"logit_softcap": 3.0, "skip_ignored": False}),
    ):
        input, weight, of_bias, target = layer(6, 4, 5, bias=bias, dtype=dtype)
        with about(dtype, bias, options):
            function = fusedloss.linear_token_log_probs
            given = {**options, "process_group": ranks.group, "num_classes": 5}
            mine = [input, ranks.part(weight, 0), of_bias if of_bias is None else ranks.part(of_bias, 0), target]
            ours = results(by_name(function, **given), leaves_of(*mine))
            whole = results(by_name(function, **options), leaves_of(input, weight, of_bias, target))
            assert ranks.have_the_same(ours[0])
            expected = whole[0] + whole[1][:1] + [ranks.part(grad, 0) for grad in whole[1][1:]]
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            same(ours[0] + ours[1], expected, tolerance, tolerance)


@each_world
def parts_of_the_gradient_of_an_input_add_up_to_the_whole(ranks):
    """For a caller who reduces them: as they are made, in float32 or the input's type."""
    for dtype, plan in itertools.product((torch.float64, torch.float32), PLANS[:3]):
        input, weight, _, target = layer(6, 4, 5, dtype=dtype)
        call = partial(fusedloss.linear_cross_entropy, target=target, **plan)
        whole = results(call, leaves_of(input, weight))
        given = {"process_group": ranks.group, "num_classes": 5, "reduce_input_grad": False}
        ours = results(lambda x, w: call(x, w, **given), leaves_of(input, ranks.part(weight, 0)))
        total = ours[1][0].clone()
        dist.all_reduce(total, group=ranks.group)
        with about(dtype, plan):
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
            same(
                [*ours[0], total, ours[1][1]],
                [*whole[0], whole[1][0], ranks.part(whole[1][1], 0)],
                tolerance,
                tolerance,
            )


@each_world
def gradients_of_a_layer_are_the_slopes(ranks):
    target = torch.tensor([4, 0, -100])
    for plan, options in itertools.product(
        ({}, {"memory": 1}), ({"label_smoothing": 0.1, "z_loss": 0.1}, {"reduction": "none", **ANSWERS})
    ):
        tensors = [drawn(3, 2), drawn(5, 2), drawn(5)]

        def call(input, weight, bias):
            given = {"process_group": ranks.group, "num_classes": 5, "linear_bias": bias, **plan, **options}
            return weighted(fusedloss.linear_cross_entropy(input, weight, target, **given))

        def moved(input, weight, bias):
            return call(input, ranks.part(weight, 0), ranks.part(bias, 0))

        with about(plan, options):
            leaves = leaves_of(tensors[0], *(ranks.part(x, 0) for x in tensors[1:]))
            grads = torch.autograd.grad(call(*leaves), leaves)
            same([grads[0]], [slopes(moved, tensors, 0)], 1e-6, 1e-8)
            for i in (1, 2):
                same([grads[i]], [ranks.part(slopes(moved, tensors, i), 0)], 1e-6, 1e-8)


@each_world
def backward_may_be_called_again(ranks):
    input, weight, bias, target = layer(5, 3, 7, bias=True)
    for options in ({}, {"memory": 1}, {"reduction": "none"}, {"return_lse": True}):
        given = {"process_group": ranks.group, "num_classes": 7, **options}
        leaves = leaves_of(input, ranks.part(weight, 0), ranks.part(bias, 0))
        loss = weighted(by_name(fusedloss.linear_cross_entropy, **given)(*leaves, target))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        with about(options):
            same(torch.autograd.grad(loss, leaves, torch.tensor(2.0, dtype=loss.dtype)), [2 * grad for grad in first])
    for options in ({}, {"grad_in_forward": False}, {"reduction": "none"}):
        part = leaves_of(ranks.part(drawn(4, 5), 1))[0]
        loss = weighted(shared_part(ranks, part, torch.arange(4), classes=5, **options))
        (first,) = torch.autograd.grad(loss, part, retain_graph=True)
        with about(options):
            same(torch.autograd.grad(loss, part, torch.tensor(2.0, dtype=loss.dtype)), [2 * first])
            fails(RuntimeError, lambda: torch.autograd.grad(loss, part), "backward through the graph a second time")


@each_world
def autocast_gives_losses_of_float32(ranks):
    input, weight, bias, target = layer(6, 4, 5, bias=True, dtype=torch.float32)
    for dtype in HALVES:
        half = drawn(6, 5, dtype=dtype)
        for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1, **ANSWERS}, {"memory": 1}):
            of_logits = {name: value for name, value in options.items() if name != "memory"}
            with torch.autocast("cpu", dtype=dtype), about(dtype, options):
                ours = results(
                    lambda x: shared_part(ranks, x, target, classes=5, **of_logits), leaves_of(ranks.part(half, 1))
                )
                whole = results(lambda x: fusedloss.cross_entropy(x, target, **of_logits), leaves_of(half))
                assert ours[0][0].dtype == torch.float32
                assert ours[1][0].dtype == dtype
                same(ours[0], whole[0], 1e-5, 1e-6)
                eps = torch.finfo(dtype).eps
                same(ours[1], [ranks.part(whole[1][0], 1)], 2 * eps, eps)
                given = {"process_group": ranks.group, "num_classes": 5, **options}
                mine = leaves_of(input, ranks.part(weight, 0), ranks.part(bias, 0), target)
                ours = results(by_name(fusedloss.linear_cross_entropy, **given), mine)
                whole = results(
                    by_name(fusedloss.linear_cross_entropy, **options), leaves_of(input, weight, bias, target)
                )
                assert all(y.dtype in (torch.float32, torch.int64) for y in ours[0])
                assert all(grad.dtype == torch.float32 for grad in ours[1])
                expected = whole[0] + whole[1][:1] + [ranks.part(grad, 0) for grad in whole[1][1:]]
                same(ours[0] + ours[1], expected, 4 * eps, 4 * eps)


@each_world
def modules_have_the_rows_of_their_rank(ranks):
    classes, weight = 5, torch.rand(5, dtype=torch.float64) + 0.5
    target = torch.tensor([0, 4, -100, 2])
    for options in ({}, {"label_smoothing": 0.1, "return_lse": True}, {"reduction": "none", "z_loss": 0.1}):
        of_group = {"process_group": ranks.group, "num_classes": classes}
        module = fusedloss.CrossEntropyLoss(weight, **options, **of_group)
        assert list(module.state_dict()) == ["weight"]
        same([module.state_dict()["weight"]], [weight], 0, 0)
        input = drawn(4, classes)
        ours = results(lambda x: module(x, target), leaves_of(ranks.part(input, 1)))
        whole = results(lambda x: fusedloss.CrossEntropyLoss(weight, **options)(x, target), leaves_of(input))
        same(ours[0] + ours[1], whole[0] + [ranks.part(whole[1][0], 1)])

    for dims, bias in itertools.product(((), (2,)), (False, True)):
        options = {"out_features": dims, "bias": bias, "dtype": torch.float64, "weight": weight, "label_smoothing": 0.1}
        input, of_dims = drawn(4, 3), target[:, None].expand(4, 2) if dims else target
        whole = fusedloss.LinearCrossEntropyLoss(3, classes, **options)
        after = torch.get_rng_state()  # ranks that have other numbers of rows draw other numbers
        module = fusedloss.LinearCrossEntropyLoss(3, classes, process_group=ranks.group, **options)
        local = len(ranks.part(torch.arange(classes), 0))
        assert module.num_classes == classes
        assert module.linear.weight.shape == (local * math.prod(dims), 3)
        assert list(module.state_dict()) == list(whole.state_dict())
        same([module.state_dict()["weight"]], [weight], 0, 0)

        def part(tensor):
            """Rows, of which a class has as many as it has positions."""
            return ranks.part(tensor.unflatten(0, (classes, -1)), 0).flatten(0, 1).clone()

        state = whole.state_dict()
        module.load_state_dict({name: value if name == "weight" else part(value) for name, value in state.items()})
        ours = results(lambda x, *_: module(x, of_dims), [*leaves_of(input), *module.parameters()])
        theirs = results(lambda x, *_: whole(x, of_dims), [*leaves_of(input), *whole.parameters()])
        with about(dims, bias):
            same(ours[0] + ours[1], theirs[0] + theirs[1][:1] + [part(grad) for grad in theirs[1][1:]])
            sums = fusedloss.LinearCrossEntropyLoss(
                3, classes, process_group=ranks.group, reduce_input_grad=False, **options
            )
            sums.load_state_dict(module.state_dict())
            partial_sum = results(lambda x: sums(x, of_dims), leaves_of(input))[1][0]
            dist.all_reduce(partial_sum, group=ranks.group)
            same([partial_sum], theirs[1][:1])
        torch.set_rng_state(after)


# --- What is refused -------------------------------------------------------------------------------------------------


@on(2, 3)
def second_derivatives_are_refused_when_they_are_taken(ranks):
    input, weight, target = drawn(4, 5), drawn(5, 5), torch.randint(5, (4,))
    for options in (
        {},
        {"grad_in_forward": False},
        {"reduction": "none"},
        {"label_smoothing": 0.1, "return_lse": True},
    ):
        part = leaves_of(ranks.part(input, 1))[0]
        loss = weighted(shared_part(ranks, part, target, classes=5, **options))
        with about(options):
            (first,) = torch.autograd.grad(loss, part, create_graph=True)
            if first.numel():
                fails(NotImplementedError, lambda: first.square().sum().backward())
    for options in ({}, {"memory": 1}):
        leaves = leaves_of(input, ranks.part(weight, 0))
        given = {"process_group": ranks.group, "num_classes": 5, **options}
        loss = fusedloss.linear_cross_entropy(*leaves, target, **given)
        with about(options):
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            fails((RuntimeError, NotImplementedError), lambda: first[0].square().sum().backward())


@on(2)
def transforms_are_refused(ranks):
    input, target, weight = drawn(4, 5), torch.randint(5, (4,)), ranks.part(drawn(5, 5), 0)
    part = ranks.part(input, 1).clone()

    def of_logits(x, function=fusedloss.cross_entropy):
        return shared_part(ranks, x, target, function, classes=5).sum()

    def of_layer(x, function=fusedloss.linear_cross_entropy):
        return function(x, weight, target, process_group=ranks.group, num_classes=5).sum()

    losses = [
        (part, of_logits),
        (part, partial(of_logits, function=fusedloss.token_log_probs)),
        (input, of_layer),
        (input, partial(of_layer, function=fusedloss.linear_token_log_probs)),
    ]
    for x, loss in losses:
        fails(NotImplementedError, lambda: torch.func.grad(loss)(x), "process group")
        fails(NotImplementedError, lambda: torch.func.jvp(loss, (x,), (x,)), "process group")
        fails(NotImplementedError, lambda: torch.func.vmap(loss)(x.expand(2, *x.shape)), "process group")
        fails(NotImplementedError, lambda: torch.jit.trace(lambda x: loss(x), x), "process group")
        with forward_ad.dual_level():
            fails(NotImplementedError, lambda: loss(forward_ad.make_dual(x, x)), "process group")
    probabilities = drawn(4, 5).softmax(1)
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    fails(NotImplementedError, lambda: shared(ranks, input, probabilities, weight=weight))
    compare(ranks, input, target)


def unharmed(ranks):
    """Asserts that the next calls are right: an error has left no rank at another collective than the others."""
    torch.manual_seed(0)  # where ranks have drawn different numbers
    target = torch.tensor([0, 4, -100, 2])
    for rows in (4, 3):
        compare(ranks, drawn(rows, 5), target[:rows])
    compare_layers(ranks, (drawn(4, 3), drawn(5, 3), None, target))


@each_world
def what_is_no_group_of_this_rank_is_refused(ranks):
    input, weight, target = drawn(4, 5), drawn(5, 5), torch.randint(5, (4,))
    others = dist.new_group([ranks.count - 1], timeout=TIMEOUT)
    calls = [
        (fusedloss.cross_entropy, input, target),
        (fusedloss.token_log_probs, input, target),
        (fusedloss.linear_cross_entropy, input, weight, target),
        (fusedloss.linear_token_log_probs, input, weight, target),
    ]
    for function, *tensors in calls:
        for thing in ("gloo", 0, ranks.mesh if ranks.count > 2 else object()):
            fails(TypeError, lambda: function(*tensors, process_group=thing), "process_group")
        if ranks.rank == ranks.count - 1:
            function(*tensors, process_group=others)
        else:
            fails(ValueError, lambda: function(*tensors, process_group=others), "process_group", str(ranks.rank))
    if ranks.rank != ranks.count - 1:
        fails(ValueError, lambda: fusedloss.LinearCrossEntropyLoss(3, 5, process_group=others), "process_group")
    unharmed(ranks)


@each_world
def a_wrong_number_of_classes_is_refused_on_all_ranks(ranks):
    """By its own sentence where it is wrong, while the others do not wait for this rank."""
    target = torch.randint(7, (4,))
    for function in (fusedloss.cross_entropy, fusedloss.token_log_probs):
        wrong = len(ranks.part(torch.arange(7), 0)) + (ranks.rank == 1)
        part = drawn(4, wrong)
        call = partial(function, part, target, process_group=ranks.group, num_classes=7)
        with about(function.__name__):
            if ranks.rank == 1:
                fails(ValueError, call, "num_classes", str(wrong), str(wrong - 1), "7")
            else:
                fails(RuntimeError, call, "rank 1")
    wrong = len(ranks.part(torch.arange(7), 0)) + (ranks.rank == 1)
    weight = drawn(wrong, 3)
    call = partial(
        fusedloss.linear_cross_entropy, drawn(4, 3), weight, target, process_group=ranks.group, num_classes=7
    )
    if ranks.rank == 1:
        fails(ValueError, call, "linear_weight", str(wrong), str(wrong - 1), "7")
    else:
        fails(RuntimeError, call, "rank 1")
    unharmed(ranks)
    everywhere = drawn(4, 9)
    fails(ValueError, lambda: fusedloss.cross_entropy(everywhere, target, process_group=ranks.group, num_classes=7))
    unharmed(ranks)


@each_world
def ranks_that_disagree_all_raise(ranks):
    first = ranks.rank == 0

    def loss(rows=4, classes=None, dtype=torch.float64, target=None, **options):
        classes = 7 * ranks.count if classes is None else classes
        input = ranks.part(torch.zeros(rows, classes, dtype=dtype), 1)
        target = torch.arange(rows) if target is None else target
        return fusedloss.cross_entropy(input, target, process_group=ranks.group, num_classes=classes, **options)

    disagreements = {
        "num_classes": partial(loss, classes=8 if first else 9),
        "number of positions": partial(loss, rows=3 if first else 5),
        "target": partial(loss, target=torch.tensor([0, 1, 2, 3 if first else 4])),
        "type of input": partial(loss, dtype=torch.float64 if first else torch.float32),
        "return_": partial(loss, return_entropy=first),
        "type of inputs of one size": partial(loss, dtype=torch.float16 if first else torch.bfloat16),
        "reduction": partial(loss, reduction="sum" if first else "mean"),
        "ignore_index": partial(loss, ignore_index=-100 if first else -1),
        "label_smoothing": partial(loss, label_smoothing=0.1 if first else 0.2),
    }
    for name, call in disagreements.items():
        with about(name):
            fails(RuntimeError, call, "process_group", name.replace(" of inputs of one size", " of input"))
            loss(rows=6)
    with about("order of targets"):
        swapped = torch.tensor([1, 0, 2] if first else [0, 1, 2])
        fails(RuntimeError, lambda: loss(rows=3, target=swapped), "target")
    with about("a layer"):
        rows = 3 if first else 5
        weight = ranks.part(drawn(9, 2), 0)
        given = {"process_group": ranks.group, "num_classes": 9}
        fails(
            RuntimeError,
            lambda: fusedloss.linear_cross_entropy(drawn(rows, 2), weight, torch.arange(rows), **given),
            "number of positions",
        )
    unharmed(ranks)


@each_world
def an_error_of_one_rank_is_told_in_every_new_call(ranks):
    """Whether or not the group has seen others: those that wait are told, and what was wrong is raised where it was."""
    first = ranks.rank == 0
    for rows in (3, 4, 5):
        input, target = drawn(rows, 7), torch.arange(rows) + 1
        of_samples = torch.ones(rows + first)
        kind, says = (ValueError, "sample_weight") if first else (RuntimeError, "rank 0 of process_group has raised")
        with about(rows):
            fails(kind, lambda: shared(ranks, input, target, sample_weight=of_samples), says)
        unharmed(ranks)


@each_world
def ranks_may_learn_different_parameters(ranks):
    """What is frozen on one rank, or computed without gradients there, changes nothing on the others."""
    torch.manual_seed(1)
    input, weight, target = drawn(6, 4), drawn(9, 4), torch.randint(9, (6,))
    target[1] = -100
    expected = fusedloss.linear_cross_entropy(input, weight, target)
    part = ranks.part(weight, 0).clone().requires_grad_(ranks.rank != 0)
    given = {"process_group": ranks.group, "num_classes": 9}
    loss = fusedloss.linear_cross_entropy(input, part, target, **given)
    same([loss.detach()], [expected])
    with torch.set_grad_enabled(ranks.rank == 0):
        same([fusedloss.linear_cross_entropy(input, part, target, **given).detach()], [expected])
    if ranks.rank:
        whole = weight.clone().requires_grad_()
        (grad,) = torch.autograd.grad(fusedloss.linear_cross_entropy(input, whole, target), whole)
        same(torch.autograd.grad(loss, part), [ranks.part(grad, 0)])


@each_world
def shapes_of_a_layer_s_arguments_are_checked(ranks):
    """Also where ignored rows are left out, which a target and weights of other sizes could hide."""
    input, part = drawn(8, 4), leaves_of(ranks.part(drawn(9, 4), 0))[0]
    loss = partial(fusedloss.linear_cross_entropy, input, part, process_group=ranks.group, num_classes=9)
    target = torch.arange(8)
    target[3] = -100
    for count in (6, 10):
        other = torch.cat([target, target])[:count]
        fails(ValueError, lambda: loss(other), "batch size")
    for shape in ((12,), (1,), (8, 1)):
        fails(ValueError, lambda: loss(target, sample_weight=torch.ones(shape)), "sample_weight")
    unharmed(ranks)


@on(2)
def copies_of_a_module_share_its_group(ranks):
    modules = [
        fusedloss.CrossEntropyLoss(process_group=ranks.group, num_classes=9),
        fusedloss.LinearCrossEntropyLoss(4, 9, process_group=ranks.group),
    ]
    for module in modules:
        copied = copy.deepcopy(module)
        assert copied.process_group is ranks.group
        assert copied.num_classes == 9
        assert all(torch.equal(*pair) for pair in zip(module.parameters(), copied.parameters(), strict=True))
        assert not {id(x) for x in module.parameters()} & {id(x) for x in copied.parameters()}


@each_world
def a_target_that_is_no_class_is_an_index_error_on_all_ranks(ranks):
    input, weight = drawn(4, 5), drawn(5, 5)
    for wrong, later in itertools.product((5, -1, 2**31 + 1), (False, True)):
        if later:  # the ranks know each other's calls by now
            unharmed(ranks)
        target = torch.tensor([0, wrong, 2, 3])
        for function in (fusedloss.cross_entropy, fusedloss.token_log_probs):
            with about(wrong, later, function.__name__):
                fails(IndexError, lambda: shared(ranks, input, target, function), str(wrong))
        for options in ({}, {"memory": 1}):
            part = leaves_of(ranks.part(weight, 0))[0]
            given = {"process_group": ranks.group, "num_classes": 5, **options}
            with about(wrong, later, options):
                fails(IndexError, lambda: fusedloss.linear_cross_entropy(input, part, target, **given), str(wrong))
    unharmed(ranks)


@each_world
def errors_of_arguments_are_those_of_one_process(ranks):
    """Of their kind, and as they name what is wrong, on every rank."""
    input, weight, target = drawn(4, 5), drawn(5, 3), torch.randint(5, (4,))
    hidden, part, rows = drawn(4, 3), ranks.part(input, 1), ranks.part(weight, 0)
    loss = partial(fusedloss.cross_entropy, process_group=ranks.group, num_classes=5)
    log_probs = partial(fusedloss.token_log_probs, process_group=ranks.group, num_classes=5)
    of_layer = partial(fusedloss.linear_cross_entropy, process_group=ranks.group, num_classes=5)
    grown, ones = torch.ones(4, requires_grad=True), torch.ones(5, dtype=torch.float64)
    wrong = {
        "weights of too few classes": (RuntimeError, lambda: loss(part, target, ones[:4]), "weight", "5"),
        "weights of this rank's classes": (RuntimeError, lambda: loss(part, target, ones[:1]), "weight", "5"),
        "weights of another type": (RuntimeError, lambda: loss(part, target, ones.float()), "weight|dtype|type"),
        "weights that require grad": (RuntimeError, lambda: loss(part, target, leaves_of(ones)[0]), "weight"),
        "too few targets": (ValueError, lambda: loss(part, target[:3]), "batch|target"),
        "too few weights of samples": (
            ValueError,
            lambda: loss(part, target, sample_weight=ones[:3]),
            "sample_weight",
        ),
        "one weight of a sample": (ValueError, lambda: loss(part, target, sample_weight=ones[:1]), "sample_weight"),
        "weights of samples that require grad": (
            RuntimeError,
            lambda: loss(leaves_of(part)[0], target, sample_weight=grown),
            "sample_weight",
        ),
        "a denominator of 0": (ValueError, lambda: loss(part, target, denominator=0.0), "denominator"),
        "a denominator of a sum": (ValueError, lambda: loss(part, target, reduction="sum", denominator=2.0), "denom"),
        "a denominator that requires grad": (
            RuntimeError,
            lambda: loss(leaves_of(part)[0], target, denominator=grown[0]),
            "denominator",
        ),
        "too much smoothing": (RuntimeError, lambda: loss(part, target, label_smoothing=1.5), "label_smoothing"),
        "logits that are integers": (NotImplementedError, lambda: loss(part.long(), target)),
        "an unknown reduction": (ValueError, lambda: loss(part, target, reduction="average")),
        "an overwritten leaf": (RuntimeError, lambda: loss(leaves_of(part)[0], target, inplace=True), "inplace"),
        "an overwritten input, unreduced": (
            ValueError,
            lambda: loss(leaves_of(part)[0] * 1, target, inplace=True, reduction="none"),
            "inplace",
        ),
        "a gradient in forward, unreduced": (
            ValueError,
            lambda: loss(leaves_of(part)[0], target, grad_in_forward=True, reduction="none"),
            "grad_in_forward",
        ),
        "a number of classes that is none": (TypeError, lambda: loss(part, target, num_classes="5"), "num_classes"),
        "log-probabilities of probabilities": (RuntimeError, lambda: log_probs(part, input.softmax(1)), "target"),
        "a layer of other features": (RuntimeError, lambda: of_layer(drawn(4, 2), rows, target), "in_features"),
        "a layer's weights of samples": (
            ValueError,
            lambda: of_layer(hidden, rows, target, sample_weight=ones),
            "sample_weight",
        ),
        "a layer's weights of classes": (
            RuntimeError,
            lambda: of_layer(hidden, rows, target, weight=ones[:4]),
            "weight",
        ),
        "a sum that is no bool": (
            TypeError,
            lambda: of_layer(hidden, rows, target, reduce_input_grad="no"),
            "reduce_in",
        ),
        "a bias of all classes": (
            RuntimeError,
            lambda: of_layer(hidden, rows, target, linear_bias=drawn(9)),
            "linear_bias",
        ),
    }
    found = []
    for name, (kind, call, *says) in wrong.items():
        try:
            fails(kind, call, *says)
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
    assert not found, "\n".join(found)
    unharmed(ranks)


# --- torch.compile ---------------------------------------------------------------------------------------------------


def compiled_is_eager(ranks, backend, sizes):
    torch.compiler.reset()
    group = ranks.group

    def of_logits(logits, target):
        return fusedloss.cross_entropy(
            logits, target, label_smoothing=0.1, z_loss=0.1, process_group=group, num_classes=7
        )

    def of_layer(input, weight, target):
        logits = {"process_group": group, "num_classes": 7, "label_smoothing": 0.1}
        return fusedloss.linear_cross_entropy(input * 1, weight, target, **logits)

    whole = {"of logits": torch.compile(of_logits, fullgraph=True, backend=backend)}
    whole["of layer"] = torch.compile(of_layer, fullgraph=True, backend=backend)
    for rows in sizes:
        target = torch.randint(7, (rows,))
        target[0] = -100
        logits, input, weight = drawn(rows, 7), drawn(rows, 3), drawn(7, 3)
        part, of_rank = ranks.part(logits, 1).clone(), ranks.part(weight, 0).clone()
        for name, eager, leaves in (
            ("of logits", of_logits, lambda: leaves_of(part, target)),
            ("of layer", of_layer, lambda: leaves_of(input, of_rank, target)),
        ):
            if name == "of layer" and not fusedloss.vocab_parallel._COMPILES_GRADIENTS:
                with pytest.raises(Exception, match=r"linear_cross_entropy: .* needs torch 2.12"):
                    results(whole[name], leaves())
                continue
            with about(backend, rows, name):
                ours, theirs = results(whole[name], leaves()), results(eager, leaves())
                assert ranks.have_the_same(ours[0])
                same(ours[0] + ours[1], theirs[0] + theirs[1])


@on(2)
def compiled_as_a_whole(ranks):
    compiled_is_eager(ranks, "aot_eager", (4, 6, 5))


@on(2)
def compiled_by_inductor(ranks):
    compiled_is_eager(ranks, "inductor", (4,))


@on(2)
def compiled_with_its_options(ranks):
    input, target = drawn(4, 7), torch.randint(7, (4,))
    for options in (ANSWERS, {"reduction": "none"}, {"weight": torch.rand(7, dtype=torch.float64), "denominator": 3.0}):
        torch.compiler.reset()

        def loss(x, options=options):
            return shared_part(ranks, x, target, classes=7, **options)

        def log_probs(x):
            return shared_part(ranks, x, target, fusedloss.token_log_probs, classes=7, return_entropy=True)

        for function in (loss, log_probs):
            leaf = ranks.part(input, 1).clone()
            ours = results(torch.compile(function, fullgraph=True, backend="aot_eager"), leaves_of(leaf))
            theirs = results(function, leaves_of(leaf))
            with about(options, function.__name__):
                same(ours[0] + ours[1], theirs[0] + theirs[1])


# --- DTensors --------------------------------------------------------------------------------------------------------


def placed(tensor, mesh, *placements):
    """Every rank takes its own part, without a collective."""
    return distribute_tensor(tensor, mesh, list(placements), src_data_rank=None)


def placed_results(function, leaves):
    """As results, of DTensors: whole, with the placements of the gradients checked on the way."""
    outputs = outputs_of(function(*leaves))
    floating = [y for y in outputs if y.is_floating_point()]
    seeds = [placed(eighths(y.shape, y.dtype), y.device_mesh, *y.placements) for y in floating]
    of = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    grads = torch.autograd.grad(floating, of, seeds)
    for leaf, grad in zip(of, grads, strict=True):
        assert grad.shape == leaf.shape
        assert grad.placements == leaf.placements, f"{grad.placements} is not {leaf.placements}"
    return [y.detach().full_tensor() for y in outputs], [grad.full_tensor() for grad in grads], outputs


def compare_placed(function, mesh, tensors, placements, rows_on=None, **options):
    """Judges a call of DTensors by that of whole tensors: values, gradients, and where the results lie.

    tensors and what lies plainly beside them (placements None) are the function's first arguments.
    """

    def shared_one(name, value):
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        whole = [Replicate()] * mesh.ndim
        return placed(value, mesh, *(rows_on if name == "sample_weight" and rows_on else whole))

    theirs = results(partial(function, **options), leaves_of(*tensors))
    leaves = [x if at is None else placed(x, mesh, *at) for x, at in zip(tensors, placements, strict=True)]
    of_mesh = {name: shared_one(name, value) for name, value in options.items()}
    ours = placed_results(partial(function, **of_mesh), leaves_of(*leaves))
    same(ours[0] + ours[1], theirs[0] + theirs[1], 1e-11, 1e-12)
    for output in ours[2]:
        expected = rows_on if rows_on is not None and output.dim() else [Replicate()] * mesh.ndim
        assert output.placements == tuple(expected), f"{output.placements} is not {expected}"


@each_world
def placements_say_that_classes_are_shared(ranks):
    for classes, rows, options in itertools.product((1, 5, 16), (0, 4), OPTIONS):
        if rows == 0 and classes != 5:
            continue
        options = dict(options)
        soft = options.pop("soft", False)
        input = drawn(rows, classes)
        target = drawn(rows, classes).softmax(1) if soft else torch.randint(classes, (rows,))
        for name, size in (("weight", classes), ("sample_weight", rows)):
            if name in options:
                options[name] = torch.rand(size, dtype=torch.float64) + 0.5
        for reduction, plain in ((None, True), ("none", False)) if rows else ((None, False),):
            if reduction and "denominator" in options:
                continue
            given = options if reduction is None else {**options, "reduction": reduction}
            at = [Shard(1)] if soft else None if plain else [Replicate()]
            with about(rows, classes, given, at):
                compare_placed(fusedloss.cross_entropy, ranks.mesh, [input, target], [[Shard(1)], at], **given)


@each_world
def placements_of_every_function_and_module(ranks):
    mesh, classes, target = ranks.mesh, 5, torch.tensor([0, 4, -100, 2])
    logits = [(drawn(4, classes), target), (drawn(classes), target[3]), (drawn(2, classes, 2), target.view(2, 2))]
    for input, of_target in logits:
        at = [[Shard(class_dim(input))], None]
        with about(list(input.shape)):
            compare_placed(fusedloss.cross_entropy, mesh, [input, of_target], at, **ANSWERS)
            compare_placed(fusedloss.token_log_probs, mesh, [input, of_target], at, return_entropy=True)
            compare_placed(fusedloss.CrossEntropyLoss(label_smoothing=0.1), mesh, [input, of_target], at)
    for options in ({}, {"label_smoothing": 0.1}, {"memory": 1}, {"reduction": "none"}, ANSWERS):
        with about("a layer", options):
            tensors, at = [drawn(4, 3), drawn(classes, 3), target], [[Replicate()], [Shard(0)], None]
            compare_placed(fusedloss.linear_cross_entropy, mesh, tensors, at, **options)
            at[2] = [Replicate()]
            compare_placed(fusedloss.linear_cross_entropy, mesh, tensors, at, **options)

    def with_bias(input, weight, bias, target):
        return fusedloss.linear_cross_entropy(input, weight, target, linear_bias=bias)

    tensors = [drawn(4, 3), drawn(classes, 3), drawn(classes), target]
    compare_placed(with_bias, mesh, tensors, [[Replicate()], [Shard(0)], [Shard(0)], None])
    tensors = [drawn(4, 3), drawn(classes, 2, 3), target[:, None].expand(4, 2)]
    compare_placed(fusedloss.linear_cross_entropy, mesh, tensors, [[Replicate()], [Shard(0)], None])
    tensors = [drawn(4, 3), drawn(classes, 3), drawn(4, classes).softmax(1)]
    compare_placed(fusedloss.linear_cross_entropy, mesh, tensors, [[Replicate()], [Shard(0)], [Shard(1)]])
    tensors = [drawn(2, 4, 3), drawn(classes, 3), target.expand(2, 4)]
    compare_placed(fusedloss.linear_cross_entropy, mesh, tensors, [[Replicate()], [Shard(0)], None])
    tensors = [drawn(4, 3), drawn(classes, 3), target]
    at = [[Replicate()], [Shard(0)], None]
    compare_placed(fusedloss.linear_token_log_probs, mesh, tensors, at)
    compare_placed(fusedloss.linear_token_log_probs, mesh, tensors, at, return_entropy=True, memory=1)

    module = fusedloss.LinearCrossEntropyLoss(3, classes, bias=True, dtype=torch.float64)
    theirs = results(lambda x, *_: module(x, target), [*leaves_of(tensors[0]), *module.parameters()])
    module = copy.deepcopy(module)
    for name, parameter in list(module.linear.named_parameters()):
        setattr(module.linear, name, nn.Parameter(placed(parameter.detach(), mesh, Shard(0))))
    leaves = [*leaves_of(placed(tensors[0], mesh, Replicate())), *module.parameters()]
    ours = placed_results(lambda x, *_: module(x, target), leaves)
    same(ours[0] + ours[1], theirs[0] + theirs[1])


@each_world
def placements_reach_native_names_while_patched(ranks):
    mesh, target = ranks.mesh, torch.tensor([0, 4, -100, 2])
    input, weight = drawn(4, 5), drawn(5, 5)
    with fusedloss.patch():
        for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(5, dtype=torch.float64)}):
            compare_placed(F.cross_entropy, mesh, [input, target], [[Shard(1)], None], **options)
            options = {name: value for name, value in options.items() if name != "weight"}
            compare_placed(nn.CrossEntropyLoss(**options), mesh, [input, target], [[Shard(1)], None])
        if hasattr(F, "linear_cross_entropy"):
            at = [[Replicate()], [Shard(0)], None]
            compare_placed(F.linear_cross_entropy, mesh, [input, weight, target], at, label_smoothing=0.1)


@each_world
def a_call_of_placements_has_one_collective(ranks):
    target = torch.randint(5, (4,))
    for attempt in range(2):
        leaf = leaves_of(placed(drawn(4, 5), ranks.mesh, Shard(1)))[0]
        with Collectives() as forward:
            loss = fusedloss.cross_entropy(leaf, target, label_smoothing=0.1)
        with Collectives() as backward:
            loss.backward()
        assert attempt == 0 or forward.names == [GATHER]
        assert backward.names == []


@on(4)
def a_mesh_may_share_both_rows_and_classes(ranks):
    mesh = mesh_of(2, 2)
    ranks_of_rows = [Shard(0), Replicate()]
    for rows, classes, options in itertools.product((5, 1), (1, 5), OPTIONS):
        options = dict(options)
        soft = options.pop("soft", False)
        input = drawn(rows, classes)
        if soft:
            target, at = drawn(rows, classes).softmax(1), [Shard(0), Shard(1)]
        else:
            target, at = torch.randint(classes, (rows,)), ranks_of_rows
            target[1:2] = options.get("ignore_index", -100)  # of the first two rows, and none of the others
        for name, size in (("weight", classes), ("sample_weight", rows)):
            if name in options:
                options[name] = torch.rand(size, dtype=torch.float64) + 0.5
        for reduction in REDUCTIONS if (rows, classes) == (5, 5) else ("mean",):
            if "reduction" in options and reduction != "mean":
                continue
            given = {**options, "reduction": reduction}
            with about(rows, classes, given):
                call, places = fusedloss.cross_entropy, [[Shard(0), Shard(1)], at]
                compare_placed(call, mesh, [input, target], places, ranks_of_rows, **given)
    with about("the classes on the first dimension"):
        input, target = drawn(5, 5), torch.tensor([0, -100, 2, 3, 4])
        at = [[Shard(1), Shard(0)], [Replicate(), Shard(0)]]
        compare_placed(fusedloss.cross_entropy, mesh, [input, target], at, [Replicate(), Shard(0)], return_lse=True)
    with about("the classes on one dimension, and nothing on the other"):
        at = [[Replicate(), Shard(1)], None]
        compare_placed(fusedloss.cross_entropy, mesh, [input, target], at, **ANSWERS)
        at = [[Shard(1), Replicate()], [Replicate(), Replicate()]]
        compare_placed(fusedloss.cross_entropy, mesh, [input, target], at, label_smoothing=0.1)
    with about("log-probabilities"):
        at = [[Shard(0), Shard(1)], ranks_of_rows]
        compare_placed(fusedloss.token_log_probs, mesh, [input, target], at, ranks_of_rows, return_entropy=True)


@on(4)
def a_mesh_may_share_both_the_rows_and_the_classes_of_a_layer(ranks):
    mesh = mesh_of(2, 2)
    rows_at, target = [Shard(0), Replicate()], torch.tensor([0, -100, 4, 3, -100])
    input, weight = drawn(5, 3), drawn(5, 3)
    places = [rows_at, [Replicate(), Shard(0)], rows_at]
    for options, reduction in itertools.product(
        (
            {},
            {"memory": 1},
            {"label_smoothing": 0.1, "z_loss": 0.1},
            {"weight": torch.rand(5, dtype=torch.float64) + 0.5},
            {"sample_weight": torch.rand(5, dtype=torch.float64) + 0.5},
            {"return_lse": True},
            ANSWERS,
        ),
        REDUCTIONS,
    ):
        given = {**options, "reduction": reduction}
        with about(given):
            call = fusedloss.linear_cross_entropy
            compare_placed(call, mesh, [input, weight, target], places, rows_at, **given)
    with about("denominator"):
        compare_placed(fusedloss.linear_cross_entropy, mesh, [input, weight, target], places, rows_at, denominator=7.0)
    with about("log-probabilities"):
        compare_placed(fusedloss.linear_token_log_probs, mesh, [input, weight, target], places, rows_at)


@each_world
def placements_that_are_not_supported_say_what_to_redistribute(ranks):
    mesh, target = ranks.mesh, torch.tensor([0, 4, -100, 2])
    logits, input, weight = drawn(4, 5), drawn(4, 3), drawn(5, 3)
    partial_logits = DTensor.from_local(logits, mesh, [Partial()])

    def at(tensor, place):
        return placed(tensor, mesh, place)

    ce, layer_of = fusedloss.cross_entropy, fusedloss.linear_cross_entropy
    unlike = NotImplementedError
    replicated = at(target, Replicate())
    fails(unlike, lambda: ce(partial_logits, replicated), "cross_entropy", "input", "Partial", "redistribute")
    fails(
        unlike, lambda: ce(at(logits, Shard(1)), target, weight=at(torch.ones(5).double(), Shard(0))), "weight", "Shard"
    )
    fails(unlike, lambda: fusedloss.nll_loss(at(logits, Shard(1)), replicated), "nll_loss", "input", "redistribute")
    fails(
        unlike, lambda: layer_of(at(input, Replicate()), at(weight, Shard(1)), target), "linear_weight", "redistribute"
    )
    fails(unlike, lambda: layer_of(at(input, Shard(1)), at(weight, Shard(0)), replicated), "input", "redistribute")
    summed = DTensor.from_local(weight, mesh, [Partial()])
    fails(unlike, lambda: layer_of(at(input, Replicate()), summed, target), "linear_weight", "redistribute")
    says = ["linear_weight", "fully_shard", r"unshard\(\)", "redistribute"]
    fails(unlike, lambda: layer_of(at(input, Shard(0)), at(weight, Shard(0)), at(target, Shard(0))), *says)
    fails(unlike, lambda: layer_of(input, at(weight, Shard(0)), target), "linear_weight", r"unshard\(\)")
    plain_soft = logits.softmax(1)
    fails(RuntimeError, lambda: ce(at(logits, Shard(1)), plain_soft), "target", "DTensor")
    for function, *tensors in (
        (ce, at(logits, Shard(1)), target),
        (fusedloss.token_log_probs, at(logits, Shard(1)), target),
        (layer_of, at(input, Replicate()), at(weight, Shard(0)), target),
        (fusedloss.linear_token_log_probs, at(input, Replicate()), at(weight, Shard(0)), target),
    ):
        call = partial(function, *tensors, process_group=ranks.group)
        fails(ValueError, call, function.__name__, "process_group", "placements")
    wrong = torch.tensor([0, 5, 1, 1])
    fails(IndexError, lambda: ce(at(logits, Shard(1)), wrong), "5")
    fails(ValueError, lambda: ce(at(logits, Shard(1)), target[:3]))
    compare_placed(ce, mesh, [logits, target], [[Shard(1)], None])


@on(4)
def classes_that_two_dimensions_of_a_mesh_share_are_refused(ranks):
    mesh, target = mesh_of(2, 2), torch.tensor([0, 4, -100, 2])
    both, of_rows = placed(drawn(4, 8), mesh, Shard(1), Shard(1)), placed(target, mesh, Replicate(), Replicate())
    fails(NotImplementedError, lambda: fusedloss.cross_entropy(both, of_rows), "input", "redistribute")
    input, weight = placed(drawn(4, 3), mesh, Replicate(), Replicate()), placed(drawn(8, 3), mesh, Shard(0), Shard(0))
    fails(NotImplementedError, lambda: fusedloss.linear_cross_entropy(input, weight, target), "linear_weight")
    rows = placed(drawn(4, 8), mesh, Shard(0), Shard(1))
    fails(RuntimeError, lambda: fusedloss.cross_entropy(rows, target), "target", "DTensor")


@on(2)
def placements_may_be_compiled(ranks):
    torch.compiler.reset()
    mesh, target = ranks.mesh, torch.randint(6, (4,))

    def loss(x):
        return fusedloss.cross_entropy(x, target, label_smoothing=0.1)

    leaf = placed(drawn(4, 6), mesh, Shard(1))
    ours = placed_results(torch.compile(loss, fullgraph=True, backend="aot_eager"), leaves_of(leaf))
    theirs = placed_results(loss, leaves_of(leaf))
    same(ours[0] + ours[1], theirs[0] + theirs[1])


@on(2)
def second_derivatives_of_placements_are_refused(ranks):
    leaf = leaves_of(placed(drawn(4, 6), ranks.mesh, Shard(1)))[0]
    loss = fusedloss.cross_entropy(leaf, torch.arange(4)).square()

    def twice():
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        grad.square().sum().backward()

    fails(NotImplementedError, twice, "cross_entropy", "second derivatives")


class Model(nn.Module):
    def __init__(self, classes=10, features=6):
        super().__init__()
        self.embedding = nn.Embedding(classes, features, dtype=torch.float64)
        self.head = nn.Linear(features, classes, bias=False, dtype=torch.float64)

    def forward(self, tokens, target):
        hidden = self.embedding(tokens).tanh()
        return fusedloss.linear_cross_entropy(hidden, self.head.weight, target)


def trained(model, batches):
    """Ten steps; the losses."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for tokens, target in batches:
        optimizer.zero_grad()
        loss = model(tokens, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def ten_batches(rows):
    return [(torch.randint(10, (rows,)), torch.randint(10, (rows,))) for _ in range(10)]


@each_world
def a_model_of_fully_shard_trains_as_one_process_does(ranks):
    model = Model()
    theirs, batches = copy.deepcopy(model), ten_batches(3 * ranks.count)
    losses = trained(theirs, batches)
    model = fully_shard(model, mesh=ranks.mesh)
    mine = [[ranks.part(tensor, 0) for tensor in batch] for batch in batches]
    for loss, expected in zip(trained(model, mine), losses, strict=True):
        total = loss.clone()
        dist.all_reduce(total, group=ranks.group)
        same([total / ranks.count], [expected], 1e-10, 1e-12)
    same(map(whole, model.parameters()), theirs.parameters(), 1e-10, 1e-12)
    # Outside of the module the weight is in parts, and they are not the classes of a process group.
    tokens, target = batches[0]
    hidden = theirs.embedding(tokens).tanh().detach()
    says = ["linear_cross_entropy", "linear_weight", "fully_shard", r"module\.unshard\(\)"]
    call = partial(fusedloss.linear_cross_entropy, hidden, model.head.weight, target)
    fails(NotImplementedError, call, *says)
    shared_hidden = placed(hidden, ranks.mesh, Shard(0))
    shared_target = placed(target, ranks.mesh, Shard(0))
    call = partial(fusedloss.linear_cross_entropy, shared_hidden, model.head.weight, shared_target)
    fails(NotImplementedError, call, *says)
    model.unshard()
    loss = fusedloss.linear_cross_entropy(hidden, model.head.weight, target)
    same([loss], [fusedloss.linear_cross_entropy(hidden, theirs.head.weight, target)], 1e-10, 1e-12)
    model.reshard()


class Parallel(nn.Module):
    """Whose head has its classes in parts."""

    def __init__(self, model, of_layer=False):
        super().__init__()
        self.embedding, self.head, self.of_layer = model.embedding, model.head, of_layer

    def forward(self, tokens, target):
        hidden = self.embedding(tokens).tanh()
        return fusedloss.cross_entropy(self.head(hidden), target)


@each_world
def a_head_of_parallelize_module_trains_as_one_process_does(ranks):
    model = Parallel(Model())
    theirs, batches = copy.deepcopy(model), ten_batches(5)
    losses = trained(theirs, batches)
    plan = {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    model = parallelize_module(model, ranks.mesh, plan)
    assert model.head.weight.placements == (Shard(0),)
    same(map(whole, trained(model, batches)), losses, 1e-10, 1e-12)
    same(map(whole, model.parameters()), theirs.parameters(), 1e-10, 1e-12)


@each_world
def logits_of_sequences_may_be_flattened_before_the_loss(ranks):
    """(batch, sequence, C), in parts over its last dimension, as a head of parallelize_module returns them."""
    input, target = drawn(2, 3, 5), torch.randint(5, (2, 3))
    leaf = leaves_of(placed(input, ranks.mesh, Shard(2)))[0]
    loss = fusedloss.cross_entropy(leaf.flatten(0, 1), target.flatten())
    (grad,) = torch.autograd.grad(loss, leaf)
    expected = results(lambda x: fusedloss.cross_entropy(x.flatten(0, 1), target.flatten()), leaves_of(input), seed=1.0)
    same([loss.full_tensor(), grad.full_tensor()], expected[0] + expected[1])


# --- What others get wrong -------------------------------------------------------------------------------------------

# torch.distributed.tensor.parallel.loss_parallel, in torch 2.13.


def of_placed_logits(ranks, input, target, at=None, **options):
    compare_placed(fusedloss.cross_entropy, ranks.mesh, [input, target], [[Shard(1)], at], **options)


@each_world
def loss_parallel_a_weight_beside_an_ignored_target(ranks):
    """index -100 is out of bounds, in backward."""
    weight, target = torch.rand(6, dtype=torch.float64) + 0.5, torch.tensor([0, -100, 5, 3])
    for reduction in REDUCTIONS:
        of_placed_logits(ranks, drawn(4, 6), target, weight=weight, reduction=reduction)
        compare(ranks, drawn(4, 6), target, weight=weight, reduction=reduction)


@each_world
def loss_parallel_a_rank_without_classes_hangs(ranks):
    for classes in range(1, ranks.count):
        input, target = drawn(3, classes), torch.randint(classes, (3,))
        of_placed_logits(ranks, input, target)
        compare(ranks, input, target, return_lse=True)


@each_world
def loss_parallel_an_exception_leaves_handlers_behind(ranks):
    handlers = dict(getattr(DTensor._op_dispatcher, "_custom_op_handlers", {}))
    input, target = placed(drawn(4, 6), ranks.mesh, Shard(1)), torch.tensor([0, 1, 2, 6])
    fails(IndexError, lambda: fusedloss.cross_entropy(input, target))
    assert dict(getattr(DTensor._op_dispatcher, "_custom_op_handlers", {})) == handlers
    of_placed_logits(ranks, drawn(4, 6), target % 6)
    assert dict(getattr(DTensor._op_dispatcher, "_custom_op_handlers", {})) == handlers


@each_world
def loss_parallel_label_smoothing(ranks):
    """got mixed torch.Tensor and DTensor."""
    of_placed_logits(ranks, drawn(4, 6), torch.arange(4), label_smoothing=0.1)


@each_world
def loss_parallel_probabilities(ranks):
    """got mixed torch.Tensor and DTensor."""
    of_placed_logits(ranks, drawn(4, 6), drawn(4, 6).softmax(1), [Shard(1)])


@each_world
def loss_parallel_backward_outside_a_context(ranks):
    """And forward without one, with a plain target: got mixed torch.Tensor and DTensor."""
    input, target = drawn(4, 6), torch.arange(4)
    leaf = leaves_of(placed(input, ranks.mesh, Shard(1)))[0]
    with fusedloss.patch():
        loss = F.cross_entropy(leaf, target)
    loss.backward()
    expected = results(lambda x: F.cross_entropy(x, target), leaves_of(input), seed=1.0)
    same([loss.full_tensor(), leaf.grad.full_tensor()], expected[0] + expected[1])


@each_world
def loss_parallel_accuracy_of_bfloat16(ranks):
    """A loss 0.031 off, and a gradient 7.4 % off."""
    input, target = drawn(64, 512, dtype=torch.bfloat16), torch.randint(512, (64,))
    truth = results(lambda x: F.cross_entropy(x, target, reduction="sum"), leaves_of(input.double()))
    leaf = leaves_of(placed(input, ranks.mesh, Shard(1)))[0]
    loss = fusedloss.cross_entropy(leaf, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, leaf)
    eps = torch.finfo(torch.bfloat16).eps / 2  # rounded once
    assert abs(loss.full_tensor().item() / truth[0][0].item() - 1) <= eps
    # A seed of torch's eighths multiplies the truth's.
    assert distance(grad.full_tensor(), truth[1][0] / eighths(())) <= eps
    compare(ranks, input, target)


@on(4)
def loss_parallel_mean_on_a_mesh_of_two_dimensions(ranks):
    """NotImplementedError; and over shards, torch's mean is the mean of their means (pytorch#185167)."""
    mesh, target = mesh_of(2, 2), torch.tensor([0, -100, -100, 3, 4, 5])
    rows, weight = [Shard(0), Replicate()], torch.rand(6, dtype=torch.float64) + 0.5
    for options in ({}, {"weight": weight}):
        input = drawn(6, 6)
        compare_placed(fusedloss.cross_entropy, mesh, [input, target], [[Shard(0), Shard(1)], rows], rows, **options)


@each_world
def loss_parallel_another_log_softmax_has_its_own_gradient(ranks):
    """Within the context it is the identity's, silently (pytorch#190746)."""
    input, target = drawn(4, 6), torch.arange(4)

    def both(x, target):
        return fusedloss.cross_entropy(x, target) + torch.log_softmax(x, 1).square().sum()

    theirs = results(both, leaves_of(input, target))
    leaf = leaves_of(placed(input, ranks.mesh, Shard(1)))[0]
    total = both(leaf, target)
    (grad,) = torch.autograd.grad(total, leaf)
    expected = results(both, leaves_of(input, target), seed=1.0)
    same([total.full_tensor(), grad.full_tensor()], [theirs[0][0], expected[1][0]])


# Megatron's vocab_parallel_cross_entropy.


@each_world
def megatron_smoothing_over_the_classes_of_one_rank(ranks):
    """Over all classes, weighed by how many there are of them (Megatron-LM#737, #7452)."""
    for classes, smoothing in itertools.product((5, 16), (0.1, 1.0)):
        input, target = drawn(4, classes), torch.randint(classes, (4,))
        log_p = input.log_softmax(1)
        expected = -(1 - smoothing) * log_p.gather(1, target[:, None])[:, 0] - smoothing * log_p.mean(1)
        same([shared(ranks, input, target, label_smoothing=smoothing, reduction="none")], [expected])
        # Megatron's own, of other masses: as the documents say.
        compare(ranks, input, target, label_smoothing=smoothing)


@each_world
def megatron_an_ignored_target_has_a_loss_and_a_gradient(ranks):
    """Of the logarithm of the sum, and of the softmax: its callers mask them."""
    input, target = drawn(4, 6), torch.tensor([-100, 2, -100, 5])
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1}):
        call = partial(shared_part, ranks, target=target, classes=6, reduction="none", **options)
        (loss,), (grad,) = results(call, leaves_of(ranks.part(input, 1)))
        assert not loss[[0, 2]].any()
        assert not grad[[0, 2]].any()
        assert loss[[1, 3]].all()


@each_world
def megatron_a_gradient_of_float32_is_bfloat16(ranks):
    """Of its fused loss always: eight bits."""
    input, target = drawn(4, 6, dtype=torch.float32), torch.randint(6, (4,))
    assert compare(ranks, input, target)[1][0].dtype == torch.float32


# TransformerEngine's parallel_cross_entropy.


@each_world
def transformer_engine_the_loss_with_smoothing_on_several_ranks(ranks):
    input, target = drawn(6, 4 * ranks.count, dtype=torch.float32), torch.randint(4 * ranks.count, (6,))
    for smoothing, reduction in itertools.product((0.01, 0.1, 0.5), REDUCTIONS):
        compare(ranks, input, target, label_smoothing=smoothing, reduction=reduction)


# Liger Kernel's vocabulary in parallel.


@each_world
def liger_a_target_104_below_the_largest_costs_infinity(ranks):
    for dtype, below in itertools.product((torch.float32, torch.float64, torch.bfloat16), (104.0, 200.0, 1e4)):
        for place in (0, 3, 4, 7):
            input, target = torch.zeros(2, 8, dtype=dtype), torch.tensor([place, place])
            input[:, place] = -below
            input[1, place], input[1, (place + 4) % 8] = 0, below
            loss = shared(ranks, input, target, reduction="none")
            truth = F.cross_entropy(input.double(), target, reduction="none")
            with about(dtype, below, place):
                assert loss.isfinite().all()
                torch.testing.assert_close(loss.double(), truth, rtol=torch.finfo(dtype).eps * 2, atol=0)
                compare(ranks, input, target, reduction="none")


# --- The tests -------------------------------------------------------------------------------------------------------

ALL = [
    pytest.param(world, name, id=f"{name}-{world}", marks=[pytest.mark.long] if world > 2 else [])
    for world, names in WORLDS.items()
    for name in names
]


@pytest.mark.xdist_group("ranks")  # which a process starts once for all its tests
@pytest.mark.parametrize(("world", "name"), ALL)
def test_classes_shared_between_ranks(world, name, outcome):
    failures = [f"rank {rank} of {world}: {text}" for rank, text in sorted(outcome(world, name).items()) if text]
    assert not failures, f"{name}\n" + "\n".join(failures)
