"""A linear layer and its cross entropy in one call: native's semantics, by every plan the same numbers, and no work
that nobody asked for.

The truth is the layer, then the reference, in float64. What half precision may lose is what the layer, then cross
entropy at that dtype, lose: the unchunked call.
"""

import collections
import contextlib
import importlib
import itertools
import math
import sys
import types
import unittest
import warnings
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from support import DTYPES, REDUCTIONS, each_dtype, each_reduction, eighths, outputs_of, peak_bytes, short, widen
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fusedloss
from fusedloss import reference

HALVES = [torch.bfloat16, torch.float16]
NAMES = ("input", "linear_weight", "linear_bias", "target")
ANSWERS = {"return_lse": True, "return_entropy": True, "return_argmax": True}
AMPLE = 1 << 40


def ours(*arguments, **options):
    return fusedloss.linear_cross_entropy(*arguments, **options)


# --- Samples, and parties ------------------------------------------------------------------------------------------


class Chunks:
    """All that is asked of options."""

    def __init__(self, rows):
        self.batch_chunk_size = rows

    def __repr__(self):
        return f"Chunks({self.batch_chunk_size})"


def sample(*batch, features=6, classes=11, dims=(), kind="index", bias=True, dtype=torch.float64, scale=1.0):
    """The tensors by name, drawn in float64 and rounded once, so that every dtype holds the same data."""

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)

    case = {
        "input": draw(*batch, features),
        "linear_weight": draw(classes, *dims, features, scale=scale / math.sqrt(max(features, 1))),
    }
    if kind == "soft":
        shape = (*batch, classes, *dims)
        case["target"] = torch.randn(shape, dtype=torch.float64).softmax(len(batch)).to(dtype)
    else:
        case["target"] = torch.randint(classes, (*batch, *dims))
    if bias:
        case["linear_bias"] = draw(classes, *dims)
    return case


def composed(function, input, linear_weight, target, linear_bias=None, ignore_index=None, **options):
    """The linear layer, then a cross entropy over positions in one dimension."""
    batch, (classes, *dims) = input.shape[:-1], linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.reshape(classes * math.prod(dims), input.shape[-1]), bias)
    logits = logits.reshape(*batch, classes, *dims)
    many = len(batch) > 1
    if many:
        logits, target = logits.flatten(0, -2), target.flatten(0, len(batch) - 1)
        samples = options.get("sample_weight")
        options |= {} if samples is None else {"sample_weight": samples.flatten()}
    if not target.is_floating_point():
        options["ignore_index"] = -100 if ignore_index is None else ignore_index
    results = function(logits, target, **options)
    if not many:
        return results
    shaped = [y.reshape(batch) if y.dim() else y for y in outputs_of(results)]
    return tuple(shaped) if isinstance(results, tuple) else shaped[0]


unchunked = partial(composed, lambda *arguments, **options: fusedloss.cross_entropy(*arguments, **options))
in_plain_torch = partial(composed, reference.cross_entropy)


def leaves_of(case, wanted=NAMES):
    return {
        name: tensor.detach().requires_grad_(name in wanted and tensor.is_floating_point())
        for name, tensor in case.items()
    }


def floating(outputs):
    return [y for y in outputs_of(outputs) if y.is_floating_point()]


def differentiate(function, case, wanted=NAMES, grad_output=None, **options):
    """The floating outputs, then the gradients of what is wanted, in the order of the case."""
    leaves = leaves_of(case, wanted)
    outputs = floating(function(**leaves, **options))
    seeds = [eighths(y.shape, y.dtype) if grad_output is None else torch.full_like(y, grad_output) for y in outputs]
    grads = torch.autograd.grad(outputs, [leaf for leaf in leaves.values() if leaf.requires_grad], seeds)
    return [y.detach() for y in outputs] + list(grads)


def wide(values):
    return {name: widen(value) for name, value in values.items()}


def truth_of(case, wanted=NAMES, grad_output=None, **options):
    if grad_output is not None:  # as a loss of the case's dtype gets it
        grad_output = float(torch.tensor(grad_output, dtype=case["input"].dtype))
    return differentiate(in_plain_torch, wide(case), wanted, grad_output, **wide(options))


def distance(actual, truth):
    """The error in the Frobenius norm, relative where there is something to relate it to."""
    error = (actual.double() - truth).norm()
    return float(error / truth.norm()) if truth.norm() > 0 else float(error)


def same(actual, truth, rtol=1e-11, atol=1e-12):
    assert len(actual) == len(truth)
    for our, true in zip(actual, truth, strict=True):
        torch.testing.assert_close(our, true, rtol=rtol, atol=atol, equal_nan=True)


def no_worse(actual, peer, truth, grain, factor=1.25):
    """The dtypes and shapes of the unchunked call, and no larger an error, or one of the last place."""
    for our, theirs, true in zip(actual, peer, truth, strict=True):
        assert (our.dtype, our.shape) == (theirs.dtype, theirs.shape)
        assert our.isfinite().all()
        if grain == torch.float64:  # the truth's own type
            torch.testing.assert_close(our.double(), true, rtol=1e-11, atol=1e-12)
            continue
        allowed = max(factor * distance(theirs, true), (2 if grain in HALVES else 16) * torch.finfo(grain).eps)
        assert distance(our, true) <= allowed, f"{distance(our, true):.3g} > {allowed:.3g}"


# --- Plans ---------------------------------------------------------------------------------------------------------


def one_chunk(case):
    return {"memory": AMPLE}


def in_chunks(case, rows=5):
    return {"options": Chunks(rows)}


def recomputing(case):
    """Less than all logits, or 32 rows of them; and room for 64 classes at a time."""
    weight = case["linear_weight"]
    rows, logits = math.prod(case["input"].shape[:-1]), math.prod(weight.shape[:-1])
    return {"memory": max(min(rows, 32) * logits * weight.element_size() - 1, 1)}


PLANS = {"one chunk": one_chunk, "chunks": in_chunks, "recomputed": recomputing}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
each_kind = pytest.mark.parametrize("kind", ["index", "soft"])
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1, "addmv": 1, "addmv_": 1}


def products(run):
    """The shapes (m, k, n) of the matrix products in a call."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        run()
    found = []
    for event in record.events():
        name = event.name.removeprefix("aten::")
        if event.name.startswith("aten::") and name in PRODUCTS:
            a, b = event.input_shapes[PRODUCTS[name] :][:2]
            found.append((math.prod(a[:-1]), a[-1], b[-1] if len(b) > 1 else 1))
    return found


def work(case, wanted=NAMES, **options):
    """How often forward and backward multiply as much as the logits take."""
    leaves, loss = leaves_of(case, wanted), []
    unit = case["input"].numel() * case["linear_weight"][..., 0].numel()

    def forward():
        loss.append(ours(**leaves, **options))

    def total(run):
        return sum(map(math.prod, products(run))) / unit

    in_forward = total(forward)
    return in_forward, total(lambda: loss[0].sum().backward()) if wanted else 0.0


PARAMETERS = ("input", "linear_weight", "linear_bias")
WORK = {"one chunk": (1, 2), "chunks": (3, 0), "recomputed": (1, 3)}
# A CPU's products of half precision are rounded to it: what one of a sum loses is another product.
IN_HALVES = {"chunks": (4, 0), "recomputed": (1, 4)}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_each_plan_does_its_work_and_no_more(name, dtype):
    case = sample(48, features=16, classes=256, dtype=dtype)
    expected = IN_HALVES.get(name, WORK[name]) if dtype in HALVES else WORK[name]
    assert work(case, **PLANS[name](case)) == pytest.approx(expected)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("wanted", [("input",), ("linear_weight",), ("linear_bias",), ("linear_weight", "linear_bias")])
def test_what_is_frozen_costs_nothing(name, wanted):
    case = sample(48, features=16, classes=256, dtype=torch.float32)
    options, count = PLANS[name](case), sum(name in ("input", "linear_weight") for name in wanted)
    in_forward, in_backward = work(case, wanted, **options)
    expected = {"one chunk": (1, count), "chunks": (1 + count, 0), "recomputed": (1, 1 + count)}[name]
    assert in_forward <= expected[0] + 1e-6
    assert in_forward + in_backward <= sum(expected) + 1e-6
    leaves = leaves_of(case, wanted)
    ours(**leaves, **options).backward()
    for tensor, leaf in leaves.items():
        assert (leaf.grad is not None) == (tensor in wanted)
    actual, truth = differentiate(ours, case, wanted, **options), truth_of(case, wanted)
    no_worse(actual, actual, truth, torch.float32)


@pytest.mark.parametrize("name", PLANS)
def test_without_gradients_only_the_logits_are_made(name):
    case = sample(48, features=16, classes=256, dtype=torch.float32)
    options, expected = PLANS[name](case), ours(**case)
    assert work(case, (), **options)[0] == pytest.approx(1)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            leaves = leaves_of(case)
            assert sum(map(math.prod, products(lambda: ours(**leaves, **options)))) == 48 * 16 * 256  # noqa: B023
            loss = ours(**leaves, **options)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("skip", [None, True])
@each_reduction
def test_ignored_rows_are_left_out_of_the_products(reduction, skip, name):
    case = sample(64, features=16, classes=256, dtype=torch.float32)
    case["target"][torch.randperm(64)[:40]] = -100
    forward, backward = work(case, reduction=reduction, skip_ignored=skip, **PLANS[name](case))
    expected = (1, 3) if reduction == "none" else WORK[name]
    share = 24 / 64
    assert forward == pytest.approx(share * expected[0])
    assert backward == pytest.approx(share * expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=short)
def test_chunks_are_taken_only_where_they_save_memory(dtype):
    # Parts of a float16 gradient may not have its range: there the logits are made again.
    several = "recomputed" if dtype == torch.float16 else "chunks"
    for rows, name in ((96, "one chunk"), (512, "one chunk"), (1500, several)):
        case = sample(rows, features=8, classes=128, dtype=dtype)
        expected = IN_HALVES.get(name, WORK[name]) if dtype in HALVES else WORK[name]
        assert work(case) == pytest.approx(expected), rows
        truth, peer = truth_of(case), differentiate(unchunked, case)
        no_worse(differentiate(ours, case), peer, truth, dtype)
    if dtype in HALVES:  # the accumulator takes more than the chunks save
        case = sample(1500, features=512, classes=96, dtype=dtype)
        assert work(case) == pytest.approx(WORK["one chunk"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_more_memory_is_taken_than_is_allowed(reduction, dtype):
    rows, features, classes = 512, 32, 8192
    case = sample(rows, features=features, classes=classes, dtype=dtype, bias=False)
    logits = rows * classes * dtype.itemsize
    results = (rows + classes) * features * dtype.itemsize
    slack = 64 * rows + (1 << 20)  # numbers of each row, and what libraries take for their products
    peaks = []
    for share in (1, 2, 4, 8):
        leaves = leaves_of(case)

        def step(leaves=leaves, share=share):
            ours(**leaves, reduction=reduction, memory=logits // share).sum().backward()

        peaks.append(peak_bytes(step))
        assert peaks[-1] <= results + logits // share + slack, f"a {share}th of the logits"
    assert peaks[0] >= peaks[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_one_chunk_takes_the_logits_once(dtype):
    for bias in (False, True):
        case = sample(256, features=32, classes=4096, dtype=dtype, bias=bias)
        leaves = leaves_of(case)
        results = sum(leaf.nbytes for leaf in leaves.values())
        peak = peak_bytes(lambda: ours(**leaves).backward())  # noqa: B023
        assert peak <= results + 256 * 4096 * dtype.itemsize + (480 << 10), f"bias: {bias}"


# --- Native's semantics --------------------------------------------------------------------------------------------

SHAPES = {
    "no batch": {"batch": ()},
    "batch": {"batch": (7,)},
    "one row": {"batch": (1,)},
    "sequences": {"batch": (2, 5)},
    "sequences of sequences": {"batch": (2, 3, 2)},
    "one class": {"batch": (4,), "classes": 1},
    "one feature": {"batch": (4,), "features": 1},
    "no features": {"batch": (4,), "features": 0},
    "one position of each row": {"batch": (4,), "dims": (1,)},
    "K = 1": {"batch": (4,), "dims": (3,)},
    "K = 2": {"batch": (7,), "dims": (3, 2), "classes": 5},
    "slices": {"batch": (7,), "classes": 150},
    "slices of K = 1": {"batch": (7,), "dims": (3,), "classes": 90},
    "no rows": {"batch": (0,)},
    "no sequences": {"batch": (0, 5)},
    "empty sequences": {"batch": (5, 0)},
    "no positions": {"batch": (3,), "dims": (0,)},
}


@each_kind
@each_reduction
@each_plan
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shape(shape, plan, reduction, kind):
    for bias in (True, False):
        shape = dict(shape)
        case = sample(*shape["batch"], kind=kind, bias=bias, **{k: v for k, v in shape.items() if k != "batch"})
        options = {"reduction": reduction}
        for wanted in (NAMES, PARAMETERS):
            actual = differentiate(ours, case, wanted, **options, **plan(case))
            same(actual, truth_of(case, wanted, **options))


OPTIONS = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "all smoothing": {"label_smoothing": 1.0},
    "weight and smoothing": {"weight": True, "label_smoothing": 0.1},
    "z loss": {"z_loss": 0.1},
    "scale": {"logit_scale": 0.7},
    "softcap": {"logit_softcap": 2.0},
    "denominator": {"denominator": 5},
    "a tensor's denominator": {"denominator": torch.tensor([5.0])},
    "samples": {"sample_weight": True},
    "all": {
        "weight": True,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "logit_scale": 0.7,
        "logit_softcap": 2.0,
        "sample_weight": True,
    },
}
PLACES = {"batch": {"batch": (7,)}, "sequences": {"batch": (2, 5)}, "K = 2": {"batch": (7,), "dims": (3, 2)}}
PLACES["slices"] = {"batch": (7,), "classes": 150}


def filled(options, case):
    """With True made into weights of classes, or of samples: some of them 0."""
    options = dict(options)
    classes, dtype = case["linear_weight"].shape[0], case["linear_weight"].dtype
    if options.get("weight"):
        options["weight"] = torch.linspace(0.25, 2, classes, dtype=torch.float64).to(dtype)
    if options.get("sample_weight"):
        batch, dims = case["input"].shape[:-1], case["linear_weight"].shape[1:-1]
        samples = torch.linspace(0, 2, math.prod((*batch, *dims)), dtype=torch.float64).view(*batch, *dims)
        options["sample_weight"] = samples.to(dtype)
    return options


@each_kind
@each_plan
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, place, plan, kind):
    place = dict(place)
    case = sample(*place.pop("batch"), kind=kind, **place)
    options = filled(options, case)
    for reduction in REDUCTIONS:
        if options.get("denominator") is not None and reduction != "mean":
            continue
        for wanted in (NAMES, PARAMETERS) if kind == "soft" else (NAMES,):
            actual = differentiate(ours, case, wanted, reduction=reduction, **options, **plan(case))
            same(actual, truth_of(case, wanted, reduction=reduction, **options))


@each_plan
@each_reduction
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("ignored", [None, -100, 2, 0, -1, -(2**63), 2**63 - 1, 255, 1000])
@pytest.mark.parametrize("weight", [False, True])
def test_ignored_targets(weight, ignored, place, reduction, plan):
    place = dict(place)
    case = sample(*place.pop("batch"), **place)
    case["target"].view(-1)[::3] = -100 if ignored is None else ignored
    case["target"].view(-1)[3:5] = -100 if ignored is None else ignored
    options = filled({"weight": weight or None, "label_smoothing": 0.1 * weight}, case)
    for skip in (None, False, True):
        actual = differentiate(
            ours, case, reduction=reduction, ignore_index=ignored, skip_ignored=skip, **options, **plan(case)
        )
        same(actual, truth_of(case, reduction=reduction, ignore_index=ignored, **options))


@each_plan
@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64], ids=short)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_class_indices_of_every_integer_dtype(place, kind, plan):
    place = dict(place)
    case = sample(*place.pop("batch"), **place)
    expected = truth_of(case, ignore_index=2)
    case["target"] = case["target"].to(kind)
    same(differentiate(ours, case, ignore_index=2, **plan(case)), expected)


@each_plan
@pytest.mark.parametrize("batch", [(5,), (2, 3), (0,)], ids=str)
def test_the_mean_of_nothing_is_nan_and_its_gradient_zero(batch, plan):
    """Native's answer, where a peer's is 0."""
    case = sample(*batch)
    case["target"].fill_(-100)
    for skip, smoothing in itertools.product((None, False, True), (0.0, 0.1)):
        options = {"skip_ignored": skip, "label_smoothing": smoothing, **plan(case)}
        loss, *grads = differentiate(ours, case, **options)
        assert loss.isnan()
        for grad, name in zip(grads, PARAMETERS, strict=True):
            assert torch.equal(grad, torch.zeros_like(case[name]))
        for reduction in ("sum", "none"):
            values = differentiate(ours, case, reduction=reduction, **options)
            assert all(value.eq(0).all() for value in values)
            assert not values[0].signbit().any()


@each_plan
@pytest.mark.parametrize("denominator", [8, torch.tensor(8), torch.tensor(0)], ids=str)
def test_all_ignored_is_a_zero_in_the_graph_beside_a_denominator(denominator, plan):
    for batch in ((5,), (0,)):
        case = sample(*batch, dtype=torch.float32)
        case["target"].fill_(-100)
        case["input"][3:] = torch.nan
        for skip in (None, False, True):
            leaves = leaves_of(case)
            loss = ours(**leaves, denominator=denominator, skip_ignored=skip, **plan(case))
            assert loss == 0
            assert loss.requires_grad
            loss.backward()
            for name in PARAMETERS:
                assert torch.equal(leaves[name].grad, torch.zeros_like(case[name]))


@each_plan
def test_classes_that_weigh_nothing(plan):
    case, weight = sample(5), torch.zeros(11, dtype=torch.float64)
    assert ours(**case, weight=weight, **plan(case)).isnan()
    case["target"] = torch.tensor([0, 1, 2, 0, 0])
    weight[1] = 2.0
    same(differentiate(ours, case, weight=weight, **plan(case)), truth_of(case, weight=weight))


@each_plan
@each_reduction
def test_classes_that_a_bias_masks(reduction, plan):
    """The padding of a vocabulary: whole slices of it have no probability."""
    for dtype, (low, high) in itertools.product((torch.float64, torch.float32), ((0, 130), (64, 128), (100, 300))):
        case = sample(9, classes=300, dtype=dtype)
        case["target"] = torch.arange(9) + (135 if low == 0 else 0)
        case["linear_bias"][low:high] = -torch.inf
        values = differentiate(ours, case, reduction=reduction, **ANSWERS, **plan(case))
        assert all(value.isfinite().all() for value in values)
        few, truth = (values[:1], truth_of(case, reduction=reduction)[:1])
        same([x.double() for x in few], truth, rtol=1e-5, atol=1e-6)
        actual, truth = (
            differentiate(ours, case, reduction=reduction, **plan(case)),
            truth_of(case, reduction=reduction),
        )
        same([x.double() for x in actual], truth, rtol=1e-4, atol=1e-6)
        assert actual[-1][low:high].eq(0).all()


@each_plan
def test_large_logits_neither_overflow_nor_cancel(plan):
    """A peer is known for instability of such: its users are warned."""
    for dtype, scale in itertools.product((torch.float32, torch.bfloat16), (30.0, 1e3, 3e4)):
        case = sample(9, classes=150, dtype=dtype, scale=scale)
        truth, peer = truth_of(case), differentiate(unchunked, case)
        actual = differentiate(ours, case, **plan(case))
        # Logits that are made twice may differ in their last places.
        twice = 8 * scale * torch.finfo(torch.float32).eps if plan is recomputing else 0.0
        for our, theirs, true in zip(actual, peer, truth, strict=True):
            allowed = max(1.25 * distance(theirs, true), 16 * torch.finfo(torch.float32).eps, twice)
            assert distance(our, true) <= allowed
        case["linear_weight"].fill_(scale)
        case["input"].fill_(100.0)
        values = differentiate(ours, case, **plan(case))
        assert all(value.isfinite().all() for value in values)


def held_out_module(name):
    """A module of torch's own tests, which needs nothing of a package for them but its name."""
    if "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    try:
        return importlib.import_module(f"torch.testing._internal.{name}")
    except ImportError as error:
        pytest.skip(f"torch's own tests cannot be imported: {error}")


@pytest.fixture(scope="module")
def held_out():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has linear_cross_entropy from 2.13 on")
    return held_out_module("common_methods_invocations")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("flags", [{}, {"chunked": True}, {"chunked": True, "chunked_none": True}], ids=str)
def test_natives_own_samples(flags, dtype, held_out):
    native = held_out_module("common_nn").linear_cross_entropy_loss_reference
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(held_out.sample_inputs_linear_cross_entropy(None, "cpu", dtype, True, **flags))
    assert samples
    errors = collections.defaultdict(list)  # ours and native's, by plan
    for given in samples:
        case = {"input": given.input, "linear_weight": given.args[0], "target": given.args[1]}
        options = dict(given.kwargs)
        if (bias := options.pop("linear_bias", None)) is not None:
            case["linear_bias"] = bias
        plain = {name: value for name, value in options.items() if name != "options"}
        truth = differentiate(native, wide(case), **wide(plain))
        peer = differentiate(native, case, **plain)
        plans = {"as asked": options, "one chunk": {**plain, "memory": AMPLE}, "again": {**plain, **recomputing(case)}}
        for name, plan in plans.items():
            actual = differentiate(ours, case, **plan)
            no_worse(actual, peer, truth, dtype, factor=4)  # of one row with a tiny gradient all digits may be luck
            errors[name] += [
                (distance(our, true), distance(theirs, true))
                for our, theirs, true in zip(actual, peer, truth, strict=True)
            ]
        assert truth[0].isfinite().all()
    for name, pairs in errors.items():
        ours_of_all, native_of_all = torch.tensor(pairs, dtype=torch.float64).norm(dim=0)
        # Logits that are computed again, by a product of another shape, are not rounded as those of forward were.
        assert ours_of_all <= (2 if name == "again" else 1.25) * native_of_all or dtype == torch.float64


def test_natives_own_errors(held_out):
    inputs = list(held_out.error_inputs_linear_cross_entropy(None, "cpu"))
    assert len(inputs) >= 6
    for error in inputs:
        given = error.sample_input
        with pytest.raises(error.error_type, match=r"linear_cross_entropy: .{20}"):
            ours(given.input, *given.args, **given.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            F.linear_cross_entropy(given.input, *given.args, **given.kwargs)


def draw(*shape):
    return torch.zeros(shape)


ZEROS = {"input": draw(3, 4), "linear_weight": draw(5, 4), "target": torch.tensor([0, 1, 2])}
INDICES, SOFT = ZEROS["target"], draw(3, 5)
ERRORS = {
    "an input of no dimensions": (RuntimeError, {"input": draw()}),
    "a weight of one dimension": (RuntimeError, {"linear_weight": draw(4)}),
    "other features": (RuntimeError, {"linear_weight": draw(5, 3)}),
    "a bias of other classes": (RuntimeError, {"linear_bias": draw(4)}),
    "a bias of a matrix": (RuntimeError, {"linear_bias": draw(1, 5)}),
    "K = 1 without a batch": (RuntimeError, {"input": draw(4), "linear_weight": draw(5, 2, 4)}),
    "K = 1 of sequences": (RuntimeError, {"input": draw(3, 2, 4), "linear_weight": draw(5, 2, 4)}),
    "ignored probabilities": (RuntimeError, {"target": SOFT, "ignore_index": 0}),
    "ignored probabilities by native's default": (RuntimeError, {"target": SOFT, "ignore_index": -100}),
    "too few targets": ((RuntimeError, ValueError), {"target": INDICES[:2]}),
    "too many dimensions of the target": ((RuntimeError, ValueError), {"target": INDICES[:, None]}),
    "sequences with targets in a row": (
        (RuntimeError, ValueError),
        {"input": draw(3, 2, 4), "target": torch.zeros(6, dtype=torch.int64)},
    ),
    "sequences with targets the other way round": (
        (RuntimeError, ValueError),
        {"input": draw(3, 2, 4), "target": torch.zeros(2, 3, dtype=torch.int64)},
    ),
    "floating indices": (RuntimeError, {"target": draw(3)}),
    "int16 indices": (RuntimeError, {"target": INDICES.short()}),
    "a class beyond": (IndexError, {"target": torch.tensor([0, 5, 1])}),
    "a class below": (IndexError, {"target": torch.tensor([0, -1, 1])}),
    "a class far beyond": (IndexError, {"target": torch.tensor([0, 2**40, 1])}),
    "an unknown reduction": (ValueError, {"reduction": "average"}),
    "much smoothing": (RuntimeError, {"label_smoothing": 1.5}),
    "a smoothing of a string": (TypeError, {"label_smoothing": "0"}),
    "a weight of other classes": (RuntimeError, {"weight": draw(4)}),
    "a weight that wants a gradient": (RuntimeError, {"weight": torch.ones(5, requires_grad=True)}),
    "integers": ((RuntimeError, NotImplementedError), {"input": draw(3, 4).long(), "linear_weight": draw(5, 4).long()}),
    "two types": (RuntimeError, {"linear_weight": draw(5, 4).bfloat16()}),
    "two types of bias": (RuntimeError, {"linear_bias": draw(5).double()}),
    "two devices": (RuntimeError, {"linear_weight": torch.zeros(5, 4, device="meta")}),
    "a list": (TypeError, {"linear_weight": [[0.0] * 4] * 5}),
    "no target": (TypeError, {"target": None}),
    "negative memory": (ValueError, {"memory": -1}),
    "no memory": (ValueError, {"memory": 0}),
    "memory of a bool": (TypeError, {"memory": True}),
    "memory of a float": (TypeError, {"memory": 1e9}),
    "memory of a string": ((TypeError, ValueError), {"memory": "much"}),
    "memory of None": (TypeError, {"memory": None}),
    "chunks of nothing": (ValueError, {"options": Chunks(0)}),
    "negative chunks": (ValueError, {"options": Chunks(-3)}),
    "chunks of a bool": (TypeError, {"options": Chunks(True)}),
    "chunks of a float": (TypeError, {"options": Chunks(2.5)}),
    "options of an int": (TypeError, {"options": 512}),
    "skip_ignored of an int": (TypeError, {"skip_ignored": 1}),
    "return_lse of an int": (TypeError, {"return_lse": 1}),
    "a scale of zero": (ValueError, {"logit_scale": 0.0}),
    "a softcap of zero": (ValueError, {"logit_softcap": 0.0}),
    "a z_loss of NaN": (ValueError, {"z_loss": math.nan}),
    "a denominator of zero": (ValueError, {"denominator": 0}),
    "a denominator of a sum": (ValueError, {"denominator": 3, "reduction": "sum"}),
    "a denominator that wants a gradient": (RuntimeError, {"denominator": torch.ones((), requires_grad=True)}),
    "samples of another shape": (ValueError, {"sample_weight": draw(2)}),
    "samples that want a gradient": (RuntimeError, {"sample_weight": torch.ones(3, requires_grad=True)}),
    "an unknown backend": (ValueError, {"backend": "tpu"}),
}


@pytest.mark.parametrize("plan", [*PLANS.values(), lambda case: {}], ids=[*PLANS, "auto"])
@pytest.mark.parametrize(("error", "change"), ERRORS.values(), ids=ERRORS)
def test_what_is_refused(error, change, plan):
    """By whatever plan."""
    arguments = plan(ZEROS) | ZEROS | change
    for reduction in ("mean",) if "denominator" in change else ("mean", "none"):
        with pytest.raises(error) as caught:
            ours(**{"reduction": reduction} | arguments)
        assert len(str(caught.value)) > 30


def test_all_but_three_arguments_are_named():
    with pytest.raises(TypeError, match="positional"):
        ours(*ZEROS.values(), torch.zeros(5))


def test_options_of_native_bring_neither_warnings_nor_fallbacks():
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch has LinearCrossEntropyOptions from 2.13 on")
    make = torch.nn.LinearCrossEntropyOptions
    every = [make(), make(allow_retain_graph=True), make(batch_chunk_size=3), make(acc_policy="compact")]
    every += [make(acc_dtype=torch.float32), make(chunking_method="aspect_ratio:4"), make(chunking_method=None)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options, kind, dims, smoothing in itertools.product(every, ("index", "soft"), ((), (2,)), (0.0, 0.1)):
            case = sample(7, kind=kind, dims=dims)
            actual = differentiate(ours, case, PARAMETERS, label_smoothing=smoothing, options=options)
            same(actual, truth_of(case, PARAMETERS, label_smoothing=smoothing))


# --- What comes beside the loss ------------------------------------------------------------------------------------


@each_kind
@each_plan
@each_reduction
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_answers_and_their_gradients(place, reduction, plan, kind):
    place = dict(place)
    case = sample(*place.pop("batch"), kind=kind, **place)
    options = filled({"weight": True, "z_loss": 0.1, "logit_scale": 0.7, "logit_softcap": 3.0}, case)
    if kind == "index":
        case["target"].view(-1)[::3] = -100
    for flags in itertools.product((False, True), repeat=3):
        asked = dict(zip(ANSWERS, flags, strict=True))
        wanted = NAMES if flags[0] else PARAMETERS
        actual = differentiate(ours, case, wanted, reduction=reduction, **options, **asked, **plan(case))
        same(actual, truth_of(case, wanted, reduction=reduction, **options, **asked))
    results = ours(**case, **options, **ANSWERS, **plan(case))
    expected = in_plain_torch(**case, **options, **ANSWERS)
    assert isinstance(results, tuple)
    assert len(results) == 4
    assert results[3].dtype == torch.int64
    assert torch.equal(results[3], expected[3])
    assert not results[3].requires_grad


@each_plan
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_gradients_of_some_of_the_answers(used, plan):
    case = sample(7, classes=150)
    case["target"][::2] = -100
    results = []
    for function, options in ((ours, plan(case)), (in_plain_torch, {})):
        leaves = leaves_of(case)
        outputs = function(**leaves, return_lse=True, return_entropy=True, **options)
        total = sum((outputs[place] * (1.5 + place)).sum() for place in used)
        results.append(torch.autograd.grad(total, [leaves[name] for name in PARAMETERS]))
    same(*results)


@each_plan
@each_dtype
def test_answers_are_of_float32_or_wider(dtype, plan):
    case = sample(7, classes=150, dtype=dtype)
    loss, lse, entropy, argmax = ours(**case, **ANSWERS, **plan(case))
    wider = torch.promote_types(dtype, torch.float32)
    assert (loss.dtype, lse.dtype, entropy.dtype, argmax.dtype) == (dtype, wider, wider, torch.int64)
    logits = F.linear(case["input"], case["linear_weight"], case["linear_bias"])
    truth = logits.double()
    grain = 64 * torch.finfo(wider).eps if dtype not in HALVES else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double(), truth.logsumexp(1), rtol=grain, atol=grain)
    torch.testing.assert_close(entropy.double(), reference.entropy(truth), rtol=grain, atol=grain)
    assert torch.equal(argmax, logits.argmax(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("batch", [(), (9,), (3, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.7}, {"logit_scale": 2.0, "logit_softcap": 3.0}], ids=str)
def test_log_probabilities(options, batch, dtype):
    case = sample(*batch, classes=150, dtype=dtype)
    if batch:
        case["target"].view(-1)[::4] = -100
    log_probs = partial(composed, reference.token_log_probs)
    for entropy, memory in itertools.product((False, True), ("auto", *recomputing(case).values(), AMPLE)):
        given = options | {"return_entropy": entropy}
        actual = differentiate(fusedloss.linear_token_log_probs, case, **given, memory=memory)
        truth = differentiate(log_probs, wide(case), **given)
        peer = differentiate(log_probs, case, **given)
        no_worse(actual, peer, truth, dtype)
        assert actual[0].dtype == torch.promote_types(dtype, torch.float32)
        if batch:
            ignored = actual[0].view(-1)[::4]
            assert ignored.eq(0).all()
            assert not ignored.signbit().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_log_probability_is_never_positive(dtype):
    """Nor +123, as a peer's has been."""
    for scale in (1.0, 10.0, 300.0):
        case = sample(40, classes=150, dtype=dtype, scale=scale)
        case["target"] = F.linear(case["input"], case["linear_weight"], case["linear_bias"]).argmax(1)
        for memory in ("auto", AMPLE, *recomputing(case).values()):
            log_probs, entropy = fusedloss.linear_token_log_probs(**case, return_entropy=True, memory=memory)
            assert log_probs.le(0).all()
            assert entropy.ge(0).all()
            assert entropy.le(math.log(150) * (1 + 1e-6)).all()


def test_what_log_probabilities_refuse():
    case = sample(3)
    with pytest.raises(RuntimeError, match=r"linear_token_log_probs: target must hold class indices, got torch.float"):
        fusedloss.linear_token_log_probs(case["input"], case["linear_weight"], torch.rand(3, 11, dtype=torch.float64))
    for name in ("logit_scale", "logit_softcap"):
        with pytest.raises(ValueError, match=f"linear_token_log_probs: {name} must be positive, got 0"):
            fusedloss.linear_token_log_probs(**case, **{name: 0.0})
    with pytest.raises(TypeError, match="linear_token_log_probs: return_entropy must be a bool, got int: 1"):
        fusedloss.linear_token_log_probs(**case, return_entropy=1)
    for memory, error in ((-1, ValueError), (True, TypeError)):
        with pytest.raises(error, match="linear_token_log_probs: memory"):
            fusedloss.linear_token_log_probs(**case, memory=memory)
    with pytest.raises(IndexError, match=r"target 11 .*is out of bounds for 11 classes"):
        fusedloss.linear_token_log_probs(case["input"], case["linear_weight"], torch.tensor([0, 11, 1]))


# --- Every plan gives the same numbers -----------------------------------------------------------------------------


@each_dtype
@each_reduction
@each_kind
def test_every_way_to_go_through_the_logits(kind, reduction, dtype):
    case = sample(37, features=16, classes=150, kind=kind, dtype=dtype)
    if kind == "index":
        case["target"][3::7] = -100
    truth, peer = truth_of(case, reduction=reduction), differentiate(unchunked, case, reduction=reduction)
    ways = [{}, one_chunk(case), recomputing(case)]
    ways += [{"options": Chunks(rows)} for rows in (1, 2, 5, 16, 31, 32, 36, 37, 1000)]
    row, weight = 150 * dtype.itemsize, 150 * 16 * 4 * (dtype in HALVES)
    ways += [{"memory": weight + rows * row} for rows in (32, 36, 37)] + [{"memory": share * row} for share in (2, 16)]
    for way in ways:
        for skip in (None, False):
            actual = differentiate(ours, case, reduction=reduction, skip_ignored=skip, **way)
            if dtype == torch.float64:
                same(actual, truth)
            no_worse(actual, peer, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_kind
def test_options_in_narrow_types(kind, options, dtype):
    case = sample(37, features=16, classes=150, kind=kind, dtype=dtype)
    options = filled(options, case)
    truth, peer = truth_of(case, PARAMETERS, **options), differentiate(unchunked, case, PARAMETERS, **options)
    for plan in PLANS.values():
        actual = differentiate(ours, case, PARAMETERS, **options, **plan(case))
        no_worse(actual, peer, truth, dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@each_plan
def test_runs_repeat_to_the_last_bit(plan, dtype, threads):
    case = sample(130, features=40, classes=600, dtype=dtype)
    case["target"][::3] = -100
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for reduction in ("mean", "none"):
            runs = [differentiate(ours, case, reduction=reduction, **plan(case)) for _ in range(3)]
            for run in runs[1:]:
                for first, again in zip(runs[0], run, strict=True):
                    assert torch.equal(first, again)
    finally:
        torch.set_num_threads(before)


@each_plan
@each_reduction
@each_kind
@each_dtype
def test_nothing_that_is_given_is_modified(dtype, kind, reduction, plan):
    """Nor the float32 logits of a peer, which are the caller's."""
    case = sample(9, classes=150, kind=kind, dtype=dtype)
    extras = filled({"weight": True, "sample_weight": True}, case)
    if kind == "index":
        case["target"][::3] = -100
    given = {**case, **extras}
    copies = {name: tensor.clone() for name, tensor in given.items()}
    versions = {name: tensor._version for name, tensor in given.items()}
    for answers, skip in itertools.product(({}, ANSWERS), (None, False)):
        differentiate(ours, case, reduction=reduction, skip_ignored=skip, **extras, **answers, **plan(case))
        for name, tensor in given.items():
            assert torch.equal(tensor, copies[name]), name
            assert tensor._version == versions[name], name


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "rows strided": lambda x: x.repeat_interleave(3, 0)[::3],
    "reversed": lambda x: x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1]),
    "expanded over rows": lambda x: x[:1].expand_as(x),
    "expanded over columns": lambda x: x[..., :1].expand_as(x),
    "one element into its storage": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@each_plan
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each_kind
def test_layouts(kind, layout, place, plan):
    place = dict(place)
    case = sample(*place.pop("batch"), kind=kind, **place)
    for names in (*((name,) for name in case), tuple(case)):
        laid = {name: layout(tensor) if name in names else tensor for name, tensor in case.items()}
        for reduction in ("mean", "none"):
            actual = differentiate(ours, laid, PARAMETERS, reduction=reduction, **plan(case))
            same(actual, truth_of({k: v.contiguous() for k, v in laid.items()}, PARAMETERS, reduction=reduction))


@each_plan
def test_a_grad_output_that_is_expanded_or_strided(plan):
    case = sample(2, 6)
    for seed in (torch.ones((), dtype=torch.float64).expand(2, 6), torch.randn(6, 2, dtype=torch.float64).mT):
        results = []
        for function, options in ((ours, plan(case)), (in_plain_torch, {})):
            leaves = leaves_of(case)
            loss = function(**leaves, reduction="none", **options)
            results.append(torch.autograd.grad(loss, [leaves[name] for name in PARAMETERS], seed))
        same(*results)


# --- Accuracy ------------------------------------------------------------------------------------------------------


def one_rounding(case, factor=1.0):
    """The weight's gradient as one product of the logits' gradients and hidden states, in the narrow type."""
    dtype = case["input"].dtype
    logits = F.linear(case["input"], case["linear_weight"])
    probabilities = logits.double().softmax(1)
    errors = probabilities - F.one_hot(case["target"], probabilities.shape[1])
    narrow = (errors * (factor / len(errors))).to(dtype)
    return (narrow.double().T @ case["input"].double()).to(dtype)


def natively(input, linear_weight, target):
    return F.cross_entropy(F.linear(input, linear_weight), target)


@pytest.mark.parametrize("ways", ["one chunk", "chunks", "recomputed"])
@pytest.mark.parametrize("factor", [1.0, 0.37, 1 / 3, -2.0])
@pytest.mark.parametrize("shape", [(512, 64, 512), (256, 128, 2048)], ids=str)
def test_a_weights_gradient_in_bfloat16_is_rounded_once(shape, factor, ways):
    rows, features, classes = shape
    case = sample(rows, features=features, classes=classes, bias=False, dtype=torch.bfloat16)
    truth = truth_of(case, grad_output=factor)
    allowed = 1.1 * distance(one_rounding(case, factor), truth[2])
    peer = differentiate(unchunked, case, grad_output=factor)
    native_dx = differentiate(natively, case, grad_output=factor)[1]
    options = [PLANS[ways](case)]
    if ways == "chunks":
        options = [{"options": Chunks(rows // count)} for count in (2, 8, 32)]
    for way in options:
        loss, dx, dw = differentiate(ours, case, grad_output=factor, **way)
        assert distance(dw, truth[2]) <= allowed, f"{way}: {distance(dw, truth[2]):.3g} > {allowed:.3g}"
        # What chunks have added up is rounded once more where it is multiplied by another factor than a power of 2.
        twice = ways == "chunks" and factor not in (1.0, -2.0)
        assert distance(dx, truth[1]) <= (1.5 if twice else 1.1) * distance(peer[1], truth[1])
        assert twice or distance(dx, truth[1]) <= distance(native_dx, truth[1])
        assert distance(loss, truth[0]) <= max(distance(peer[0], truth[0]), torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("chunks", [1, 8, 32, 128])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mean_is_not_added_up_in_bfloat16(reduction, chunks):
    """Native's is 4 % off with 128 chunks."""
    case = sample(2048, features=16, classes=256, bias=False, dtype=torch.bfloat16)
    truth = truth_of(case, reduction=reduction)[0]
    loss = ours(**leaves_of(case), reduction=reduction, options=Chunks(2048 // chunks)).detach()
    assert loss.dtype == torch.bfloat16
    assert distance(loss, truth) <= torch.finfo(torch.bfloat16).eps / 2 * 1.1


@pytest.mark.parametrize("name", PLANS)
def test_a_bias_has_a_gradient_that_is_rounded_once(name):
    case = sample(512, features=32, classes=256, dtype=torch.bfloat16)
    plan = {"options": Chunks(16)} if name == "chunks" else PLANS[name](case)
    truth, peer = truth_of(case), differentiate(unchunked, case)
    actual = differentiate(ours, case, **plan)
    assert distance(actual[-1], truth[-1]) <= 1.1 * distance(peer[-1], truth[-1])


@each_plan
def test_improbable_classes_keep_their_gradients(plan):
    """A peer drops blocks of small ones."""
    case = sample(40, features=8, classes=256, dtype=torch.bfloat16)
    case["linear_bias"][64:192] = -12.0
    case["target"] = case["target"] % 64
    truth = truth_of(case)
    actual = differentiate(ours, case, **plan(case))
    for our, true in zip(actual[2:], truth[2:], strict=True):
        assert true[64:192].abs().max() < 1e-5
        assert distance(our[64:192], true[64:192]) < 0.02


@pytest.mark.parametrize("dtype", HALVES, ids=short)
@each_plan
@pytest.mark.parametrize("scale", [65536.0, 1024.0, 1.0])
def test_a_grad_scaler_neither_overflows_nor_loses_small_gradients(scale, plan, dtype):
    """As natively under autocast: there the scale is in the logits' gradients before they are narrow."""
    for rows, classes in ((4, 40), (256, 2048)):
        case = sample(rows, features=16, classes=classes, dtype=torch.float32)
        truth = truth_of(case, grad_output=scale)
        with torch.autocast("cpu", dtype=dtype):
            peer = differentiate(in_plain_torch, case, grad_output=scale)
            actual = differentiate(ours, case, grad_output=scale, **plan(case))
        assert all(value.isfinite().all() for value in peer)
        no_worse(actual, peer, truth, dtype, factor=1.1)


@each_plan
@pytest.mark.parametrize("scale", [60000.0, 1024.0, 1.0, 2.0**-10])
def test_a_scaled_loss_in_float16(scale, plan):
    for rows, classes in ((4, 40), (256, 2048)):
        case = sample(rows, features=16, classes=classes, dtype=torch.float16)
        truth = truth_of(case, grad_output=scale)
        peer = differentiate(in_plain_torch, case, grad_output=scale)
        actual = differentiate(ours, case, grad_output=scale, **plan(case))
        for our, theirs, true in zip(actual, peer, truth, strict=True):
            if not theirs.isfinite().all():
                continue
            assert our.isfinite().all()
            info = torch.finfo(torch.float16)
            floor = 2 * info.eps + float(info.smallest_normal * info.eps * math.sqrt(true.numel()) / true.norm())
            assert distance(our, true) <= max(1.25 * distance(theirs, true), floor)


# --- Gradients -----------------------------------------------------------------------------------------------------


@each_plan
@each_dtype
@pytest.mark.parametrize("factor", [0.37, 1 / 3, -2.0, 0.0, 1.0, 1e-30, 1e30])
def test_any_grad_output(factor, dtype, plan):
    case = sample(9, classes=150, dtype=dtype)
    if dtype == torch.float16 and abs(factor) not in (0.37, 1 / 3, 2.0, 0.0, 1.0):
        return
    truth = truth_of(case, grad_output=factor)
    peer = differentiate(unchunked, case, grad_output=factor)
    actual = differentiate(ours, case, grad_output=factor, **plan(case))
    if dtype == torch.float64:
        same(actual, truth, rtol=1e-11, atol=1e-13 * abs(factor))
    no_worse(actual, peer, truth, dtype)


@each_plan
@pytest.mark.parametrize("factor", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("skip", [None, False])
def test_rows_that_are_ignored_stay_zero_whatever_flows_back(skip, factor, plan):
    for dtype in (torch.float32, torch.bfloat16):
        case = sample(7, dtype=dtype)
        case["target"][[1, 4]] = -100
        _, dx, *_ = differentiate(ours, case, grad_output=factor, skip_ignored=skip, **plan(case))
        assert dx[[1, 4]].eq(0).all()
        assert not dx[[0, 2, 3, 5, 6]].isfinite().any()


@each_plan
@each_reduction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=short)
def test_backward_twice_gives_the_same_and_hands_out_nothing_it_keeps(dtype, reduction, plan):
    case = sample(9, classes=150, dtype=dtype)
    leaves = leaves_of(case)
    wanted = [leaves[name] for name in PARAMETERS]
    loss = ours(**leaves, reduction=reduction, **plan(case)).sum()
    for factor in (1.0, 2.0, 1.0):
        expected = differentiate(ours, case, grad_output=factor, reduction=reduction, **plan(case))
        grads = torch.autograd.grad(loss, wanted, torch.full_like(loss, factor), retain_graph=True)
        for grad, other in zip(grads, expected[1:], strict=True):
            assert torch.equal(grad, other)
            grad.fill_(7)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@each_plan
def test_a_second_backward_is_not_scaled_by_the_first(plan):
    """Two peers multiply what they keep, in place."""
    case = sample(9, classes=150)
    leaves = leaves_of(case)
    loss = ours(**leaves, **plan(case))
    (2 * loss).backward(retain_graph=True)
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    same([leaves[name].grad for name in PARAMETERS], truth_of(case, PARAMETERS, grad_output=6.0)[1:])


@each_plan
def test_gradients_accumulate(plan):
    case, other = sample(9, classes=150), sample(5, classes=150)
    weight = case["linear_weight"].detach().requires_grad_()
    for part in (case, other, case):
        ours(part["input"], weight, part["target"], **plan(part)).backward()
    total = 0
    for part in (case, other, case):
        alone = {"input": part["input"], "linear_weight": case["linear_weight"], "target": part["target"]}
        total = total + truth_of(alone, ("linear_weight",), grad_output=1.0)[1]
    same([weight.grad], [total])


@each_plan
def test_the_loss_beside_other_terms(plan):
    """grad_output comes from a graph; one leaf is in it twice: tied weights, and hidden states made of them."""
    case = sample(9, features=6, classes=150)
    results = []
    for function, options in ((ours, plan(case)), (in_plain_torch, {})):
        weight = case["linear_weight"].clone().requires_grad_()
        hidden = weight[torch.arange(9) * 7 % 150].tanh()
        loss = function(hidden, weight, case["target"], **options)
        total = loss.square() + 0.1 * weight.square().sum() + loss.exp()
        results.append([total.detach(), *torch.autograd.grad(total, weight)])
    same(*results)


@each_plan
def test_one_tensor_as_hidden_states_and_weight(plan):
    """As contrastive losses have it."""
    weight, target = torch.randn(90, 6, dtype=torch.float64), torch.arange(90).roll(1)
    results = []
    for function in (ours, in_plain_torch):
        leaf = weight.clone().requires_grad_()
        options = plan({"input": weight, "linear_weight": weight}) if function is ours else {}
        loss = function(leaf, leaf, target, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
    same(*results)


@each_plan
def test_a_frozen_input_leaves_the_weight_its_gradient(plan):
    """A peer's weight.grad stays None then."""
    for reduction in REDUCTIONS:
        case = sample(9, classes=150)
        for wanted in itertools.chain.from_iterable(itertools.combinations(PARAMETERS, n) for n in (1, 2)):
            actual = differentiate(ours, case, wanted, reduction=reduction, **plan(case))
            same(actual, truth_of(case, wanted, reduction=reduction))


@each_plan
def test_an_adapter_of_the_head_learns(plan):
    """A head of a frozen weight and a product of small ones, which a peer leaves silently frozen."""
    case = sample(9, classes=150)
    down, up = torch.randn(2, 6, dtype=torch.float64), torch.randn(150, 2, dtype=torch.float64)
    results = []
    for function, options in ((ours, plan(case)), (in_plain_torch, {})):
        small = [down.clone().requires_grad_(), up.clone().requires_grad_()]
        weight = case["linear_weight"] + small[1] @ small[0]
        loss = function(case["input"], weight, case["target"], **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, small)])
    assert all(gradient.abs().max() > 1e-3 for gradient in results[0][1:])
    same(*results)


@each_plan
@each_reduction
def test_a_mask_of_all_but_the_last_rows_leaves_their_gradients(reduction, plan):
    """With a last turn's mask a peer's gradients are all zero."""
    case = sample(2, 20, classes=150)
    case["target"][:, :-3] = -100
    actual = differentiate(ours, case, reduction=reduction, **plan(case))
    same(actual, truth_of(case, reduction=reduction))
    assert actual[1][:, -3:].abs().amax(-1).gt(1e-4).all()
    assert actual[1][:, :-3].eq(0).all()


@each_plan
@each_dtype
@each_reduction
def test_gradients_have_the_dtypes_and_shapes_of_their_tensors(reduction, dtype, plan):
    """A peer's are always of bfloat16."""
    for batch, dims in (((7,), ()), ((2, 5), ()), ((7,), (3, 2))):
        case = sample(*batch, dims=dims, dtype=dtype)
        _, *grads = differentiate(ours, case, reduction=reduction, **plan(case))
        assert [(g.dtype, g.shape) for g in grads] == [(case[name].dtype, case[name].shape) for name in PARAMETERS]


@each_plan
@each_reduction
@pytest.mark.parametrize("skip", [None, True, False])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nothing_of_an_ignored_row_goes_anywhere(poison, skip, reduction, plan):
    """A NaN in one makes a peer's loss NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        case = sample(9, classes=150, dtype=dtype)
        case["target"][[0, 3, 8]] = -100
        clean = {name: tensor.clone() for name, tensor in case.items()}
        case["input"][[0, 3, 8]] = poison
        case["input"][3, 1:] = 1.0  # some of it
        options = filled({"sample_weight": True}, case)
        options["sample_weight"][[0, 3, 8]] = poison
        for given in ({}, {"sample_weight": True}, {"return_argmax": True}):
            given = options if "sample_weight" in given else given
            cleaned = filled({"sample_weight": True}, clean) if "sample_weight" in given else given
            actual = differentiate(ours, case, reduction=reduction, skip_ignored=skip, **given, **plan(case))
            expected = differentiate(ours, clean, reduction=reduction, skip_ignored=skip, **cleaned, **plan(case))
            for our, other in zip(actual, expected, strict=True):
                assert our.isfinite().all()
                torch.testing.assert_close(our, other)
            assert actual[1][[0, 3, 8]].eq(0).all()


@each_plan
@pytest.mark.parametrize("skip", [None, True, False])
def test_an_ignored_row_without_gradients_beside_answers(skip, plan):
    case = sample(9, classes=150, dtype=torch.float32)
    case["target"][[0, 3, 8]] = -100
    case["input"][[0, 3, 8]] = torch.nan
    leaves = leaves_of(case)
    loss, lse, entropy, argmax = ours(**leaves, skip_ignored=skip, **ANSWERS, **plan(case))
    assert loss.isfinite()
    assert lse[[0, 3, 8]].isnan().all()
    assert entropy[[0, 3, 8]].isnan().all()
    assert argmax[[0, 3, 8]].eq(0).all()
    counted = [1, 2, 4, 5, 6, 7]
    (loss + lse[counted].sum() + entropy[counted].sum()).backward()
    assert leaves["input"].grad[counted].isfinite().all()


# --- Second derivatives, transforms --------------------------------------------------------------------------------

CURVED = {
    "mean": lambda loss: loss,
    "square": lambda loss: loss.square(),
    "exp": lambda loss: loss.exp().sum(),
}


def in_positions(case, **options):
    """The function of its floating tensors, as gradcheck calls it."""
    names = [name for name, tensor in case.items() if tensor.is_floating_point()]
    rest = {name: tensor for name, tensor in case.items() if name not in names}

    def function(*tensors, outer=CURVED["mean"]):
        results = floating(ours(**dict(zip(names, tensors, strict=True)), **rest, **options))
        return outer(sum((y * (1 + 0.3 * place)).sum() for place, y in enumerate(results)))

    return function, [case[name].detach().requires_grad_() for name in names]


@each_kind
@pytest.mark.parametrize("outer", CURVED.values(), ids=CURVED)
@pytest.mark.parametrize("plan", [one_chunk, partial(in_chunks, rows=2), recomputing], ids=PLANS)
def test_second_derivatives(plan, outer, kind):
    for options in ({}, {"reduction": "sum"}, {"label_smoothing": 0.1, "logit_softcap": 2.0, "z_loss": 0.1}):
        case = sample(3, features=2, classes=4, kind=kind)
        function, leaves = in_positions(case, **options, **plan(case))
        assert torch.autograd.gradcheck(partial(function, outer=outer), leaves)
        assert torch.autograd.gradgradcheck(partial(function, outer=outer), leaves)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"return_lse": True, "return_entropy": True}], ids=str)
@pytest.mark.parametrize("dims", [(), (2,)], ids=str)
def test_second_derivatives_of_unreduced_losses_and_answers(dims, options):
    case = sample(3, features=2, classes=4, dims=dims)
    case["target"].view(-1)[1] = -100
    function, leaves = in_positions(case, **options)
    assert torch.autograd.gradgradcheck(partial(function, outer=CURVED["square"]), leaves)


@each_plan
def test_a_gradient_that_is_to_be_differentiated_can_be(plan):
    """A peer's does not require grad, and says nothing."""
    case = sample(9, classes=150)
    results = []
    for function, options in ((ours, plan(case)), (in_plain_torch, {})):
        leaves = leaves_of(case)
        wanted = [leaves[name] for name in PARAMETERS]
        grads = torch.autograd.grad(function(**leaves, **options), wanted, create_graph=True)
        assert all(grad.requires_grad for grad in grads)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append([*(g.detach() for g in grads), *torch.autograd.grad(penalty, wanted)])
    same(*results)


@each_plan
def test_second_derivatives_with_ignored_rows_of_nan(plan):
    case = sample(9, classes=150)
    case["target"][::3] = -100
    counts = case["target"] >= 0
    kept = case | {name: case[name][counts] for name in ("input", "target")}
    case["input"][::3] = torch.nan
    results = []
    for function, given, options in ((ours, case, plan(case)), (in_plain_torch, kept, {})):
        leaves = leaves_of(given)
        wanted = [leaves[name] for name in ("linear_weight", "linear_bias")]
        grads = torch.autograd.grad(function(**leaves, **options), wanted, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append([*(g.detach() for g in grads), *torch.autograd.grad(penalty, wanted)])
    same(*results)


@each_kind
@each_plan
@each_reduction
def test_functional_transforms(reduction, plan, kind):
    case = sample(5, kind=kind)
    x, w, t = case["input"], case["linear_weight"], case["target"]
    options = {"reduction": reduction, "linear_bias": case["linear_bias"]}

    def call(function, extra):
        def loss(x, w, t):
            return function(x, w, t, **options, **extra).sum()

        one = torch.func.grad(loss, argnums=(0, 1))(x, w, t)
        many = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, 0))(x[:, None], w, t[:, None])
        tangents = (torch.ones_like(x), torch.ones_like(w))
        forward = torch.func.jvp(lambda x, w: loss(x, w, t), (x, w), tangents)
        _, pullback = torch.func.vjp(lambda x, w: loss(x, w, t), x, w)
        hessian = torch.func.hessian(loss)(x[:1], w, t[:1])
        with forward_ad.dual_level():
            dual = loss(forward_ad.make_dual(x, tangents[0]), w, t)
            dual = forward_ad.unpack_dual(dual)
        return [*one, many, *forward, *pullback(torch.ones((), dtype=x.dtype)), hessian, *dual]

    same(call(ours, plan(case)), call(in_plain_torch, {}))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_plan
@each_reduction
def test_a_batch_of_grad_outputs(reduction, plan):
    case = sample(4)
    results = []
    for function, options in ((ours, plan(case)), (in_plain_torch, {})):
        leaves = leaves_of(case)
        wanted = [leaves[name] for name in PARAMETERS]
        loss = function(**leaves, reduction=reduction, **options)
        seeds = torch.arange(1.0, 1 + 3 * loss.numel(), dtype=torch.float64).view(3, *loss.shape)
        results.append(torch.autograd.grad(loss, wanted, seeds, retain_graph=True, is_grads_batched=True))
    same(*results)


@each_plan
def test_a_traced_call(plan):
    case = sample(5)
    x, w, t = case["input"], case["linear_weight"], case["target"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x, w, t: ours(x, w, t, **plan(case)), (x, w, t))
    same([traced(x + 1, w, t)], [in_plain_torch(x + 1, w, t)])


# --- Surroundings --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def arrays():
    with saved_tensors_hooks(lambda x: x.detach().clone().numpy(), torch.from_numpy):
        yield


SURROUNDINGS = {"offloading": save_on_cpu, "arrays": arrays}


@each_plan
@each_reduction
@pytest.mark.parametrize("context", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_hooks_of_saved_tensors(context, reduction, plan):
    case = sample(9, classes=150)
    case["target"][::3] = -100
    leaves = leaves_of(case)
    hidden = leaves["input"] * 1.0
    with context():
        loss = ours(**leaves | {"input": hidden}, reduction=reduction, **plan(case))
    grads = torch.autograd.grad(loss, [leaves[name] for name in PARAMETERS], eighths(loss.shape, loss.dtype))
    same([loss.detach(), *grads], truth_of(case, reduction=reduction))


@each_plan
@each_reduction
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, reduction, plan):
    case = sample(9, classes=150)
    leaves = leaves_of(case)

    def step(input, weight, bias):
        return ours(input * 1.0, weight, case["target"], linear_bias=bias, reduction=reduction, **plan(case))

    loss = checkpoint(step, *(leaves[name] for name in PARAMETERS), use_reentrant=reentrant)
    loss.backward(eighths(loss.shape, loss.dtype))
    same([loss.detach(), *(leaves[name].grad for name in PARAMETERS)], truth_of(case, reduction=reduction))


@each_plan
@each_reduction
@pytest.mark.parametrize("name", ["input", "linear_weight", "target"])
def test_what_is_changed_after_the_loss(name, reduction, plan):
    """As an optimizer does that steps early: an error, or the gradient of what has been; never of what has become."""
    case = sample(9, classes=150)
    leaves = leaves_of(case)
    given = {key: leaf * 1.0 if leaf.requires_grad else leaf.clone() for key, leaf in leaves.items()}
    loss = ours(**given, reduction=reduction, **plan(case)).sum()
    with torch.no_grad():
        given[name].zero_()
    wanted = [leaves[key] for key in PARAMETERS]
    truth = truth_of(case, reduction=reduction, grad_output=1.0)[1:]
    try:
        grads = torch.autograd.grad(loss, wanted)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        same(grads, truth)


@each_plan
def test_tensors_of_inference_mode(plan):
    """Class indices are welcome; what autograd must save, it may refuse."""
    for frozen in (("target",), ("input", "target"), ("linear_weight", "target"), ("linear_bias", "target")):
        case = sample(9, classes=150)
        expected = truth_of(case, tuple(name for name in PARAMETERS if name not in frozen))
        with torch.inference_mode():
            case |= {name: case[name].clone() for name in frozen}
        leaves = {name: x if name in frozen else x.detach().requires_grad_() for name, x in case.items()}
        try:
            loss = ours(**leaves, **plan(case))
        except RuntimeError as error:
            assert "Inference tensors cannot be saved" in str(error)  # noqa: PT017
            assert len(frozen) > 1
            continue
        grads = torch.autograd.grad(loss, [x for x in leaves.values() if x.requires_grad], eighths((), loss.dtype))
        same([loss.detach(), *grads], expected)


def test_a_layers_parameters_and_the_functions_own_namespace():
    layer = torch.nn.Linear(6, 11, dtype=torch.float64)
    case = {"input": torch.randn(7, 6, dtype=torch.float64), "target": torch.randint(11, (7,))}
    fusedloss.functional.linear_cross_entropy(
        case["input"], layer.weight, case["target"], linear_bias=layer.bias
    ).backward()
    case |= {"linear_weight": layer.weight.detach(), "linear_bias": layer.bias.detach()}
    expected = truth_of({name: case[name] for name in NAMES}, grad_output=1.0)
    same([layer.weight.grad, layer.bias.grad], expected[2:])


def test_whoever_overrides_the_function_is_handed_it():
    class Tagged(torch.Tensor):
        seen = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append((function, args, kwargs))
            return super().__torch_function__(function, types, args, kwargs or {})

    case = sample(5)
    expected = ours(**case)
    for name in case:
        Tagged.seen.clear()
        given = case | {name: case[name].as_subclass(Tagged)}
        loss = ours(given["input"], given["linear_weight"], given["target"], linear_bias=given["linear_bias"])
        assert fusedloss.linear_cross_entropy in [function for function, *_ in Tagged.seen]
        torch.testing.assert_close(torch.Tensor(loss.detach()).as_subclass(torch.Tensor), expected)


# --- Autocast ------------------------------------------------------------------------------------------------------


@each_plan
@each_reduction
@pytest.mark.parametrize("cast", HALVES, ids=short)
@each_kind
def test_autocast_multiplies_narrow_and_adds_wide(kind, cast, reduction, plan):
    case = sample(40, features=16, classes=150, kind=kind, dtype=torch.float32)
    truth = truth_of(case, PARAMETERS, reduction=reduction)
    with torch.autocast("cpu", dtype=cast):
        peer = differentiate(unchunked, case, PARAMETERS, reduction=reduction)
        for way in (plan(case), {}):
            actual = differentiate(ours, case, PARAMETERS, reduction=reduction, **way)
            assert {value.dtype for value in actual} == {torch.float32}
            no_worse(actual, peer, truth, cast, factor=1.05)
            # What is near is not float32's either: the products are narrow.
            assert distance(actual[1], truth[1]) > 1e-5
    leaves = leaves_of(case, PARAMETERS)
    with torch.autocast("cpu", dtype=cast):
        loss = ours(**leaves, reduction=reduction, **plan(case))
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    outside = torch.autograd.grad(loss, wanted, eighths(loss.shape, loss.dtype))
    with torch.autocast("cpu", dtype=cast):
        inside = differentiate(ours, case, PARAMETERS, reduction=reduction, **plan(case))
    same(outside, inside[1:], rtol=0, atol=0)


@pytest.mark.parametrize("ways", ["one chunk", "chunks", "recomputed"])
def test_a_float32_parameter_gets_more_than_bfloat16_of_its_gradient(ways):
    case = sample(512, features=64, classes=512, bias=False, dtype=torch.float32)
    truth = truth_of(case, grad_output=1.0)
    narrow = {name: x.bfloat16() if x.is_floating_point() else x for name, x in case.items()}
    rounded = truth_of(narrow, grad_output=1.0)
    options = [PLANS[ways](case)] if ways != "chunks" else [{"options": Chunks(512 // n)} for n in (2, 8, 32)]
    for way in options:
        with torch.autocast("cpu"):
            loss, _, dw = differentiate(ours, case, grad_output=1.0, **way)
            _, _, peer = differentiate(unchunked, case, grad_output=1.0)
        assert dw.dtype == torch.float32
        assert distance(dw, rounded[2]) <= distance(peer, rounded[2])
        assert distance(loss, truth[0]) < 2e-3
        # float32 straight from the sum: most of its entries are no bfloat16 numbers
        if ways == "chunks":
            assert (dw != dw.bfloat16().float()).float().mean() > 0.5


@each_plan
@pytest.mark.parametrize("kind", ["float32 weight", "float32 input"])
def test_autocast_of_mixed_types_gives_a_float32_loss(kind, plan):
    """A peer's is of bfloat16."""
    case = sample(40, features=16, classes=150, dtype=torch.float32)
    narrow = ["input"] if kind == "float32 weight" else ["linear_weight", "linear_bias"]
    case |= {name: case[name].bfloat16() for name in narrow}
    truth = truth_of(case)
    with torch.autocast("cpu"):
        peer = differentiate(unchunked, case)
        actual = differentiate(ours, case, **plan(case))
    assert actual[0].dtype == torch.float32
    no_worse(actual, peer, truth, torch.bfloat16)
    with pytest.raises(RuntimeError):
        ours(**case, **plan(case))


@each_plan
@each_reduction
def test_autocast_leaves_float64_alone(reduction, plan):
    case = sample(9, classes=150)
    with torch.autocast("cpu"):
        actual = differentiate(ours, case, reduction=reduction, **plan(case))
    same(actual, truth_of(case, reduction=reduction))


@each_plan
def test_autocast_of_answers_and_log_probabilities(plan):
    case = sample(40, features=16, classes=150, dtype=torch.float32)
    truth = truth_of(case, return_lse=True, return_entropy=True)
    with torch.autocast("cpu"):
        peer = differentiate(unchunked, case, return_lse=True, return_entropy=True)
        actual = differentiate(ours, case, return_lse=True, return_entropy=True, **plan(case))
        log_probs = fusedloss.linear_token_log_probs(**case)
    no_worse(actual, peer, truth, torch.bfloat16)
    assert {value.dtype for value in actual} == {log_probs.dtype} == {torch.float32}


@each_plan
def test_second_derivatives_under_autocast(plan):
    case = sample(9, features=4, classes=20, dtype=torch.float32)

    def second(function, given, cast, **options):
        leaves = leaves_of(given)
        wanted = [leaves[name] for name in PARAMETERS]
        with torch.autocast("cpu", enabled=cast):
            loss = function(**leaves, **options)
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), wanted)

    truth = second(in_plain_torch, wide(case), False)
    for our, true in zip(second(ours, case, True, **plan(case)), truth, strict=True):
        assert our.dtype == torch.float32
        assert distance(our, true) < 0.03


# --- Compilers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"ignore_index": 2, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("plan", [*PLANS.values(), lambda case: {}], ids=[*PLANS, "auto"])
def test_compiled(plan, options, fresh_compiler):
    """Without a break of the graph, which a peer's default has; and a backward of its own."""
    case = sample(9, classes=150)
    case["target"][::3] = 2
    call = compiled(partial(ours, **options, **plan(case)))
    for factor in (None, 1.0):
        same(differentiate(call, case, grad_output=factor), truth_of(case, grad_output=factor, **options))
    with torch.no_grad():
        same([call(**case)], [in_plain_torch(**case, **options)])


@pytest.mark.parametrize("kind", ["soft", "answers", "autocast", "sequences", "K = 1", "bfloat16", "frozen", "weights"])
def test_compiled_calls_of_other_kinds(kind, fresh_compiler):
    batch, dims = ((2, 5), ()) if kind == "sequences" else ((9,), (2,) if kind == "K = 1" else ())
    dtype = {"autocast": torch.float32, "bfloat16": torch.bfloat16}.get(kind, torch.float64)
    case = sample(*batch, dims=dims, classes=150, kind="soft" if kind == "soft" else "index", dtype=dtype)
    options = {"return_lse": True, "return_entropy": True, "return_argmax": True} if kind == "answers" else {}
    options |= filled({"weight": True, "sample_weight": True, "denominator": 7}, case) if kind == "weights" else {}
    wanted = {"frozen": ("linear_weight",)}.get(kind, NAMES)
    with torch.autocast("cpu", enabled=kind == "autocast"):
        actual = differentiate(compiled(partial(ours, **options)), case, wanted)
        eager = differentiate(ours, case, wanted, **options)
    if dtype == torch.float64:
        same(eager, truth_of(case, wanted, **options))
        same(actual, eager)
    else:
        no_worse(actual, eager, truth_of(case, wanted, **options), torch.bfloat16)


@pytest.mark.parametrize("plan", [*PLANS.values(), lambda case: {}], ids=[*PLANS, "auto"])
def test_compiled_for_sizes_that_vary(plan, fresh_compiler):
    cases = [sample(rows, classes=150) for rows in (40, 41, 57, 33, 7)]
    ways = plan(cases[0])
    for call in (compiled(partial(ours, **ways), dynamic=True), compiled(partial(ours, **ways))):
        for case in cases:
            same(differentiate(call, case), truth_of(case))


def test_sizes_that_vary_recompile_no_more_than_a_layer_and_cross_entropy(fresh_compiler):
    counts = []
    for function in (ours, unchunked):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        call = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        for rows in (40, 41, 57, 33):
            case = sample(rows)
            same(differentiate(call, case), truth_of(case))
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_model_through_inductor(plan, fresh_compiler):
    """It relies on the sizes that were promised, also where rows are left out."""
    case = sample(40, features=16, classes=150, dtype=torch.float32)
    case["target"][::3] = 2

    def step(input, **rest):
        return ours(input.tanh() * 2, **rest, ignore_index=2, **plan(case))

    eager = differentiate(step, case)
    actual = differentiate(compiled(step, "inductor"), case)
    same(actual, eager, rtol=1e-4, atol=1e-6)


def test_log_probabilities_compiled(fresh_compiler):
    case = sample(9, classes=150)
    options = {"logit_scale": 0.7, "return_entropy": True}
    call = compiled(partial(fusedloss.linear_token_log_probs, **options))
    expected = differentiate(fusedloss.linear_token_log_probs, case, **options)
    same(differentiate(call, case), expected)


def test_a_denominator_that_varies_compiled(fresh_compiler):
    case = sample(9)
    call = compiled(lambda count: ours(**case, denominator=count))
    for count in (3, 5, 8, 13):
        same([call(count)], [in_plain_torch(**case, denominator=count)])


def test_exported():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 11, dtype=torch.float64)

        def forward(self, x, y):
            return ours(x, self.linear.weight, y, linear_bias=self.linear.bias)

    model, case = Model(), sample(7)
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(model, (case["input"], case["target"]), dynamic_shapes=({0: rows}, {0: rows}))
    for count in (7, 31):
        case = sample(count)
        same([program.module()(case["input"], case["target"])], [model(case["input"], case["target"])])


# --- Operators -----------------------------------------------------------------------------------------------------

OPS = torch.ops.fusedloss
CODES = {name: code for code, name in enumerate(REDUCTIONS)}
PLAIN = (0.0, 0.0, 1.0, 0.0)  # label_smoothing, z_loss, logit_scale, logit_softcap
EVERYTHING = (0.1, 0.01, 0.7, 2.0)


def operator_call(reduction, of_rows=PLAIN, weights=(None, None, None), **case):
    """The arguments that forward and with_grad begin with; leaves, as autograd's operators are checked with."""
    batch = case.pop("batch", (4,))
    leaves = leaves_of(sample(*batch, **{"features": 3, "classes": 5, "dtype": torch.float32, **case}))
    tensors = (leaves["input"], leaves["linear_weight"], leaves["target"], leaves.get("linear_bias"))
    return (*tensors, *weights, CODES[reduction], -100, *of_rows)


def operator_calls():
    weights = (torch.linspace(0.5, 2, 5), torch.tensor([1.0, 0.0, 0.5, 2.0]), torch.tensor(7))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "plain": operator_call("mean"),
            "unreduced": operator_call("none", bias=False),
            "everything": operator_call("mean", EVERYTHING, weights),
            "probabilities": operator_call("sum", EVERYTHING, kind="soft"),
            "K = 1": operator_call("mean", dims=(2,)),
            "half precision": operator_call("mean", dtype=torch.bfloat16),
            "float16": operator_call("sum", dtype=torch.float16),
            "empty": operator_call("sum", batch=(0,)),
        }


each_call = pytest.mark.parametrize("arguments", operator_calls().values(), ids=operator_calls())


@each_call
@pytest.mark.parametrize("answers", [(False, False, False), (True, True, True)], ids=["", "answers"])
@pytest.mark.parametrize("rest", [{}, {"chunk": 3}, {"memory": 16}], ids=str)
def test_forward_operator(rest, answers, arguments):
    opcheck(OPS.linear_cross_entropy.default, (*arguments, *answers), rest)


@each_call
@pytest.mark.parametrize("one_chunk", [True, False])
def test_operator_in_one_pass(one_chunk, arguments):
    if arguments[7] == CODES["none"] or (not one_chunk and arguments[0].dtype == torch.float16):
        pytest.skip("refused")
    wanted = [True, True, arguments[3] is not None]
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    rest = {"skip_ignored": False} | ({} if one_chunk else {"chunk": 3})
    operator = OPS.linear_cross_entropy_with_grad.default
    opcheck(operator, (*detached, True, one_chunk, wanted), rest)
    if not one_chunk:
        return
    _, _, grad_logits, rows, scale, *_ = operator(*detached, False, True, wanted, **rest)
    x, w, t = detached[:3]
    scale = scale if scale.numel() else None
    for mask in (wanted, [True, False, False], [False, True, False]):
        call = (torch.tensor(0.5), grad_logits, rows, scale, x, w, t, -100, w.dtype, mask)
        opcheck(OPS.linear_cross_entropy_gradients.default, call)


@each_call
def test_backward_operator(arguments):
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    answers = (True, True, False)
    loss, lse, entropy, _, *statistics = OPS.linear_cross_entropy.default(*detached, *answers, statistics=True)
    seeds = [torch.ones_like(y) for y in (loss, lse, entropy)]
    mask = [True, True, detached[2].is_floating_point(), detached[3] is not None]
    call = (*seeds, *detached[:7], *statistics, *detached[7:], detached[1].dtype, mask)
    opcheck(OPS.linear_cross_entropy_backward.default, call)


# --- Found by who tried to break it ----------------------------------------------------------------------------------


def test_a_gradient_of_no_bias_is_refused():
    case = sample(7, bias=False, dtype=torch.float32)
    tensors = [case["input"], case["linear_weight"], case["target"], None, None, None, None]
    options = [1, -100, 0.0, 0.0, 1.0, 0.0, False]
    for one_chunk, device in itertools.product((True, False), ("cpu", "meta")):
        moved = [x if x is None else x.to(device) for x in tensors]
        with pytest.raises(RuntimeError, match="no linear_bias"):
            OPS.linear_cross_entropy_with_grad.default(*moved, *options, one_chunk, [True] * 3, chunk=3)


@each_plan
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_target_that_is_no_class_is_named_by_its_position(plan, reduction):
    """Not by that among the rows that are left, or in its chunk."""
    case = sample(20, classes=40)
    case["target"][:10] = -100
    case["target"][15] = 77
    for wanted in (NAMES, ()):
        with pytest.raises(IndexError, match=r"linear_cross_entropy: target 77 at position 15 "):
            ours(**leaves_of(case, wanted), reduction=reduction, **plan(case))


@pytest.mark.parametrize("weights", ["samples", "classes"])
def test_a_divisor_of_zero_leaves_no_number(weights):
    case = sample(20, bias=False)
    if weights == "samples":  # which cancel, and the losses do not
        options = {"sample_weight": torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(10)}
    else:
        case["target"][:] = 3
        options = {"label_smoothing": 0.1, "weight": torch.ones(11, dtype=torch.float64)}
        options["weight"][3] = 0
    expected = unchunked(**case, **options)
    assert expected.isinf()
    assert ours(**case, **options, **one_chunk(case)) == expected
    for plan in PLANS.values():  # parts that are infinite may cancel
        assert not ours(**leaves_of(case), **options, **plan(case)).isfinite()


def test_smoothing_in_little_memory_takes_more_than_a_row_at_a_time():
    """Each row would be a pass over the weight and its gradient."""
    case = sample(256, features=16, classes=512, dtype=torch.float32)
    leaves = leaves_of(case)
    found = products(lambda: ours(**leaves, label_smoothing=0.1, memory=1).backward())
    assert min(rows for rows, _, _ in found if rows not in (16, 512)) >= 32


@each_plan
def test_an_operators_results_are_not_its_arguments(plan):
    case = sample(100)
    denominator = torch.tensor(7.0, dtype=torch.float64)
    tensors = [*case.values(), None, None, denominator]
    tensors = [case["input"], case["linear_weight"], case["target"], case["linear_bias"], None, None, denominator]
    options = {"chunk": 3, "statistics": True}
    outputs = OPS.linear_cross_entropy.default(*tensors, 1, -100, 0.0, 0.0, 1.0, 0.0, **options)
    given = {x.data_ptr() for x in tensors if x is not None}
    assert not given & {x.data_ptr() for x in outputs if x.numel()}
    assert outputs[-1] == denominator


@each_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_a_batch_of_grad_outputs_in_each_type(plan, dtype):
    case = sample(20, dtype=dtype)
    leaves = leaves_of(case)
    loss = ours(**leaves, **plan(case))
    inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]
    factors = torch.tensor([1.0, 2.0, -0.5], dtype=loss.dtype)
    together = torch.autograd.grad(loss, inputs, factors, is_grads_batched=True, retain_graph=True)
    for i, factor in enumerate(factors):
        alone = torch.autograd.grad(loss, inputs, factor, retain_graph=True)
        same([grad[i] for grad in together], alone, rtol=2 * torch.finfo(dtype).eps, atol=0)


@each_plan
def test_second_derivatives_under_anothers_autocast(plan):
    """The statistics and the logits that are made again have forward's type."""
    case = sample(20, dtype=torch.float32, scale=3.0)
    leaves = leaves_of(case)
    inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]
    loss = ours(**leaves, **plan(case))
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        again = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
    wider = leaves_of(wide(case))
    inputs = [leaf for leaf in wider.values() if leaf.requires_grad]
    truth = torch.autograd.grad(in_plain_torch(**wider), inputs, create_graph=True)
    truth_again = torch.autograd.grad(sum(grad.square().sum() for grad in truth), inputs)
    for actual, expected in zip((*grads, *again), (*truth, *truth_again), strict=True):
        assert distance(actual, expected) < 1e-5


@pytest.mark.parametrize("changed", ["input", "linear_weight"])
def test_hooks_do_not_hide_that_a_tensor_has_changed(changed):
    """New logits beside old statistics would be a gradient of nothing."""
    case = sample(20, dtype=torch.float32)
    leaves = leaves_of(case)
    with saved_tensors_hooks(lambda x: x, lambda x: x):
        loss = ours(**leaves, reduction="sum")
    with torch.no_grad():
        leaves[changed].mul_(2)
    with pytest.raises(RuntimeError, match=f"{changed}, which has been modified by an inplace operation"):
        loss.backward()


def test_a_number_of_rows_that_depends_on_data_is_compiled():
    case = sample(2000, features=8, classes=40, bias=False, dtype=torch.float32)

    def masked(input, linear_weight, target):
        kept = target != 3
        return ours(input[kept], linear_weight, target[kept])

    leaves, peers = leaves_of(case), leaves_of(case)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        loss = torch.compile(masked, backend="aot_eager", fullgraph=True)(**leaves)
    loss.backward()
    masked(**peers).backward()
    same([loss, leaves["linear_weight"].grad], [masked(**peers), peers["linear_weight"].grad], rtol=1e-5, atol=1e-7)


def test_sizes_of_the_weight_may_vary_while_compiled():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, dynamic=True, fullgraph=True)
    for rows, features, classes in ((20, 6, 11), (22, 7, 13), (25, 8, 17)):
        case = sample(rows, features=features, classes=classes, dtype=torch.float32)
        same(differentiate(compiled, case), differentiate(ours, case), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2
