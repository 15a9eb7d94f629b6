"""What only the Triton kernels have: tiles of several shapes, alignment, slices, sums over a grid; their compilation;
being absent.

Everything else about them is in the tests over devices. Without a GPU the kernels are interpreted, and compiled for one
that is not there.
"""

import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import HAS_TRITON
from support import (
    LOSSES,
    compare,
    each,
    each_bce_loss,
    each_class_loss,
    eighths,
    judge,
    moved,
    short,
    widen,
)

import fusedloss

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

if HAS_TRITON:
    from fusedloss.triton import (
        arguments,
        class_loss,
        cross_entropy,
        elementwise,
        geometry,
        launch,
        nll,
        reduce,
        rescale,
    )
    from fusedloss.triton.geometry import Geometry, TileShape

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ANY = float("inf")
each_weighted = pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
each_width = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)


@pytest.fixture(autouse=True)
def backend():
    with fusedloss.use_backend("triton"):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that few classes are many."""
    monkeypatch.setattr(geometry, "ROWS", [])
    monkeypatch.setattr(geometry, "COLUMNS", [])
    monkeypatch.setattr(geometry, "SWEPT_ROWS", Geometry(ANY, 64, 4))
    monkeypatch.setattr(geometry, "SWEPT_COLUMNS", Geometry(ANY, 64, 4))
    monkeypatch.setattr(geometry, "SWEPT_CLASSES", 4)
    monkeypatch.setattr(geometry, "GRADIENT", Geometry(ANY, 64, 4))


def slices(monkeypatch, count):
    monkeypatch.setattr(cross_entropy, "_slice_count", lambda args, tile: min(count, tile.chunks(args.shape)))


LAYOUTS = {
    "contiguous": lambda x: x,
    "one element into its storage": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "classes apart": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x.t().contiguous().t(),
    "gaps behind the rows": lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1],
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01},
    "capped": {"logit_softcap": 3.0, "return_lse": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def check(loss, shape, dtype, layout, reduction="mean", **options):
    input, target = loss.sample(*shape, dtype=dtype, device=DEVICE)
    if loss.target == "index":
        target.view(-1)[1:2] = -100
    weight = torch.rand(shape[1], dtype=torch.float64).add(0.5).to(DEVICE, dtype)
    compare(loss, layout(input), target, weight=weight, reduction=reduction, **options)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, "smoothed"), (torch.bfloat16, "capped"), (torch.float64, "plain"), (torch.bfloat16, "plain")],
    ids=str,
)
@each_layout
@each("cross_entropy", "cross_entropy_soft")
def test_rows_longer_than_a_tile(loss, dtype, layout, options, small_tiles):
    check(loss, (3, 103), dtype, layout, **OPTIONS[options])


@pytest.mark.parametrize("classes", [96, 103], ids=["whole packets", "heads and tails"])
@each_layout
@each_width
@each_class_loss
def test_rows_within_a_tile(loss, dtype, layout, classes):
    check(loss, (3, classes), dtype, layout)


@each_option
@each_layout
@each("cross_entropy", "cross_entropy_soft")
def test_slices_of_rows(loss, layout, options, small_tiles, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_slice_count", lambda args, tile: min(3, tile.chunks(args.shape)))
    check(loss, (2, 150), torch.float32, layout, **options)


@pytest.mark.parametrize("width", [5, 8], ids=["any width", "whole packets"])
@each_layout
@each_class_loss
def test_images(loss, layout, width, small_tiles):
    check(loss, (2, 7, 1, width), torch.bfloat16, layout)


# --- What else a row is asked for --------------------------------------------------------------------------------


@pytest.fixture(params=["whole", "swept", "sliced"])
def tiles(request, monkeypatch):
    """How a row of about a hundred classes is divided, where its loss is reduced."""
    if request.param != "whole":
        request.getfixturevalue("small_tiles")
    if request.param == "sliced":
        monkeypatch.setattr(cross_entropy, "multiprocessors", lambda device: 64)
    return request.param


ANSWERS = {"return_lse": True, "return_entropy": True, "return_argmax": True}


def evaluate(function, input, target, **options):
    """The outputs, and the gradient of the input."""
    leaf = input.detach().requires_grad_()
    # A leaf cannot be overwritten; its copy keeps the layout.
    given = leaf * 1 if options.get("inplace") else leaf
    outputs = function(given, target, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    floats = [output for output in outputs if output.is_floating_point()]
    (grad,) = torch.autograd.grad(floats, leaf, [eighths(output.shape, output.dtype, DEVICE) for output in floats])
    return [output.detach() for output in outputs] + [grad]


def check_answers(loss, input, target, **options):
    """As close to the truth as the CPU's kernels are."""
    plain = [{name: moved(value, "cpu") for name, value in options.items()}, input.cpu(), target.cpu()]
    wide, *tensors = plain[0], *map(widen, plain[1:])
    in_forward = ("grad_in_forward", "inplace")
    wide = {name: widen(value) for name, value in wide.items() if name not in in_forward}
    truth = evaluate(loss.reference, *tensors, **wide)
    on_cpu = evaluate(partial(loss.ours, backend="cpu"), plain[1].contiguous(), plain[2], **plain[0])
    ours = evaluate(loss.ours, input, target, **options)
    for our, theirs, true in zip(ours, on_cpu, truth, strict=True):
        if our.is_floating_point():
            judge(our.cpu(), theirs, true, input.dtype if our.dtype == input.dtype else None)
        else:
            assert our.cpu().equal(true)


def asked(loss, shape, dtype=torch.float32, layout=LAYOUTS["contiguous"]):
    """(input, target, options) with the weights of classes and samples; one sample is ignored, whatever its weight."""
    input, target = loss.sample(*shape, dtype=dtype, device=DEVICE)
    weight = torch.rand(shape[1], dtype=torch.float64).add(0.5).to(DEVICE, dtype)
    sample_weight = torch.rand(shape[0], *shape[2:], dtype=torch.float64).add(0.5).to(DEVICE, torch.float32)
    if loss.target == "index":
        target.view(-1)[1:2] = -100
        sample_weight.view(-1)[1:2] = math.nan
    return layout(input), target, {"weight": weight, "sample_weight": sample_weight}


SCALED = {"logit_scale": 0.7, "label_smoothing": 0.1}
ASKED = {  # (type, layout, options)
    "float64": (torch.float64, "contiguous", SCALED),
    "bfloat16": (torch.bfloat16, "contiguous", SCALED),
    **{layout: (torch.float32, layout, SCALED) for layout in LAYOUTS},
    "capped": (torch.float32, "contiguous", {"logit_scale": 3.0, "logit_softcap": 2.0}),
}


@pytest.mark.parametrize(("dtype", "layout", "options"), ASKED.values(), ids=ASKED)
@each("cross_entropy", "cross_entropy_soft")
def test_answers(loss, dtype, layout, options, tiles):
    input, target, weights = asked(loss, (3, 103), dtype, LAYOUTS[layout])
    reduction = "mean" if tiles == "sliced" else "none"
    check_answers(loss, input, target, reduction=reduction, **weights, **options, **ANSWERS)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each("cross_entropy", "cross_entropy_soft")
def test_answers_of_images(loss, layout, small_tiles, monkeypatch):
    monkeypatch.setattr(geometry, "SWEPT_COLUMNS", Geometry(ANY, 256, 4))  # 16 bytes of positions, in their share of it
    input, target, options = asked(loss, (2, 7, 1, 8), torch.float32, layout)
    check_answers(loss, input, target, logit_scale=0.7, **options, **ANSWERS)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("denominator", [None, 2.5], ids=["counted", "given"])
@each("cross_entropy", "cross_entropy_soft")
def test_gradient_in_forward(loss, denominator, inplace, tiles):
    """Beside an argmax, which is found before the gradient takes the logits' place."""
    input, target, options = asked(loss, (3, 103))
    if denominator:
        options["denominator"] = torch.tensor(denominator, device=DEVICE)
    options.update(return_argmax=True, logit_scale=0.7, grad_in_forward=True, inplace=inplace)
    check_answers(loss, input, target, **options)


@pytest.mark.parametrize("inline", [True, False], ids=["in every program", "in a launch before"])
@each("cross_entropy", "cross_entropy_soft")
def test_counting_weights_of_samples(loss, inline, monkeypatch, launches):
    if not inline:
        monkeypatch.setattr(class_loss, "COUNTED_INLINE", 4)
        monkeypatch.setattr(class_loss, "_COUNT_BLOCK", 16)
    input, target, options = asked(loss, (70, 5))
    check_answers(loss, input, target, grad_in_forward=True, **options)
    assert ("_count_kernel" in [name for name, _ in launches]) != inline


@pytest.mark.parametrize("rows", [3, 40], ids=["one program", "many programs"])
@each("cross_entropy", "cross_entropy_soft")
def test_nothing_is_counted_beside_a_denominator(loss, rows, monkeypatch, launches):
    monkeypatch.setattr(class_loss, "COUNTED_INLINE", 4)
    monkeypatch.setattr(geometry, "ROWS", [Geometry(ANY, 64, 1)])
    input, target, options = asked(loss, (rows, 5))
    denominator = torch.tensor(rows * 3, device=DEVICE)
    check_answers(loss, input, target, denominator=denominator, **options, grad_in_forward=True)
    assert "_count_kernel" not in [name for name, _ in launches]


def test_a_batch_in_which_nothing_counts(launches):
    """Its mean over a denominator of 0 is 0, and so is its gradient."""
    input, target = torch.randn(3, 5, device=DEVICE), torch.full((3,), -100, device=DEVICE)
    for grad_in_forward in (False, True):
        options = {"denominator": torch.tensor(0.0, device=DEVICE), "grad_in_forward": grad_in_forward}
        loss, grad = evaluate(fusedloss.cross_entropy, input, target, **options)
        assert loss == 0
        assert not grad.any()


@each_width
def test_entropies_of_peaked_rows(dtype, tiles):
    """A float32 sum of exponentials has lost most of their digits. Logits of -inf, or far below, change nothing."""
    input = torch.zeros(4, 103, device=DEVICE, dtype=dtype)
    for row, peak in enumerate((7.0, 14.0, 20.0, 24.0)):
        input[row, 40 * row % 103] = peak
    input[:, 50], input[:, 51] = -math.inf, -3e4
    logits = input.double().cpu()
    p = logits.softmax(1)
    truth = -(p * p.log().clamp_min(-1e300)).sum(1)
    target = torch.zeros(4, dtype=torch.long, device=DEVICE)
    reduction = "sum" if tiles == "sliced" else "none"
    leaf = input.requires_grad_()
    _, entropy = fusedloss.cross_entropy(leaf, target, reduction=reduction, return_entropy=True)
    assert (entropy.detach().cpu() / truth - 1).abs().max() < (1e-6 if dtype == torch.float32 else 1e-5)
    (grad,) = torch.autograd.grad(entropy.sum(), leaf)
    log_p = p.log().clamp_min(-1e300)
    expected = -p * (log_p + truth[:, None])
    assert grad.isfinite().all()
    assert (grad.cpu() - expected).abs().max() < (1e-6 if dtype == torch.float32 else 4e-3) * expected.abs().max()


def largest_of():
    """Rows of 103 classes, by what is particular about their largest logits."""
    rows = {
        name: torch.linspace(-3, 3, 103)[torch.randperm(103)] for name in ("any", "ties", "infinite", "NaN", "late")
    }
    rows["ties"][[17, 80, 99]] = 7.0
    rows["infinite"][[30, 61]] = math.inf
    rows["NaN"][[5, 70]] = math.inf
    rows["NaN"][[33, 90]] = math.nan
    rows["late"][102] = 9.0
    rows["zeros"] = torch.full((103,), -1.0)
    rows["zeros"][40], rows["zeros"][77] = -0.0, 0.0
    rows["negative NaN"] = torch.full((103,), 2.0)
    rows["negative NaN"][64] = -torch.tensor(math.nan)
    rows["nothing"] = torch.full((103,), -math.inf)
    rows["a last one"] = torch.full((103,), -math.inf)
    rows["a last one"][102] = -1e30
    return torch.stack(list(rows.values()))


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=short)
def test_argmax(dtype, transposed, tiles):
    """torch.argmax: the first of several, and the first NaN before all; of the logits as they are."""
    input = largest_of().to(DEVICE, dtype)
    input = input.t().contiguous().t() if transposed else input
    target = torch.full((len(input),), -100, device=DEVICE)
    options = {"logit_softcap": 1.0} if dtype == torch.float16 else {}  # it makes the largest ones equal
    reduction = "mean" if tiles == "sliced" else "none"
    _, argmax = fusedloss.cross_entropy(input, target, reduction=reduction, return_argmax=True, **options)
    assert argmax.equal(input.argmax(1))


@each_weighted
def test_a_row_that_is_only_looked_at_has_no_gradient(weighted, tiles):
    """NaN would come of its logits."""
    input = torch.randn(3, 103, device=DEVICE)
    input[1, 4] = math.nan
    target = torch.tensor([1, -100, 2], device=DEVICE)
    sample_weight = torch.tensor([1.0, math.nan, 2.0], device=DEVICE) if weighted else None
    for road in ({"grad_in_forward": True}, {"grad_in_forward": False}):
        loss, argmax, grad = evaluate(
            fusedloss.cross_entropy, input, target, sample_weight=sample_weight, return_argmax=True, **road
        )
        assert loss.isfinite()
        assert argmax[1] == 4
        assert not grad[1].any()
        assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("classes", [96, 103], ids=["whole packets", "any packets"])
@pytest.mark.parametrize("size", [None, 64], ids=["within a tile", "longer than a tile"])
@each_width
def test_a_row_is_the_same_in_every_batch(dtype, size, classes, request, monkeypatch):
    """Where each has its own loss: to the last bit, wherever it lies, and however few rows there are."""
    monkeypatch.setattr(cross_entropy, "multiprocessors", lambda device: 4)
    if size:
        request.getfixturevalue("small_tiles")
    many = torch.randn(20, classes, device=DEVICE).to(dtype)
    target = torch.randint(classes, (20,), device=DEVICE)

    def answers(rows, **options):
        # The rows begin elsewhere in a copy; but for an entropy, it shows in a sum if they are added in another order.
        return fusedloss.cross_entropy(many[rows].clone(), target[rows], reduction="none", return_lse=True, **options)

    for options in ({}, {"return_entropy": True}):
        whole = answers(slice(None), **options)
        for rows in (slice(0, 1), slice(3, 4), slice(5, 9), [19, 2, 7], slice(1, None)):
            for alone, together in zip(answers(rows, **options), whole, strict=True):
                assert alone.equal(together[rows])


# --- Sums over a grid --------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """(name, programs) of the kernels that are started."""
    started = []

    def start(function, programs, *arguments, **options):
        started.append((function.fn.__name__, programs))
        launch.start(function, programs, *arguments, **options)

    for module in (class_loss, cross_entropy, elementwise, nll, reduce, rescale):
        monkeypatch.setattr(module, "start", start)
    return started


def total_of(losses, divisors, is_mean):
    """(loss, divisor), both float64, of the parts that so many programs have left."""
    reduction = arguments.Reduction.mean if is_mean else arguments.Reduction.sum
    total = arguments.Total(reduction, *torch.empty(2, 1, dtype=torch.float64, device=DEVICE))
    parts = reduce.Parts(total, len(losses), torch.device(DEVICE))
    parts.totals.parts.copy_(torch.cat([losses, divisors]))
    parts.add_up()
    return total.loss.item(), total.divisor.item()


# (parts that a program adds up, parts, programs of each launch)
SUMS = [
    (None, 2, [1]),
    (None, 4096, [1]),
    (None, 4097, [2, 1]),
    (None, 9001, [3, 1]),
    (7, 7, [1]),
    (7, 8, [2, 1]),
    (7, 48, [7, 1]),
    (7, 49, [7, 1]),
    (7, 50, [8, 2, 1]),
]


@pytest.mark.parametrize("is_mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(("run", "count", "programs"), SUMS)
def test_parts_are_added_up_run_by_run(run, count, programs, is_mean, launches, monkeypatch):
    if run:
        monkeypatch.setattr(reduce, "RUN", run)
    losses = torch.rand(count, dtype=torch.float64) + 0.5
    divisors = torch.randint(1, 2000, (count,), dtype=torch.float64)
    loss, divisor = total_of(losses, divisors, is_mean)
    assert launches == [("_sum_runs", many) for many in programs]
    assert divisor == divisors.sum().item()  # whole numbers: exact
    expected = math.fsum(losses.tolist()) / (divisor if is_mean else 1)
    assert abs(loss - expected) <= 4 * math.ulp(expected)
    assert total_of(losses, divisors, is_mean) == (loss, divisor)


@pytest.fixture
def small_programs(monkeypatch):
    """Programs of 8 positions, of up to 8 classes, or of 8 elements."""
    geometry = TileShape(positions=8, chunk=1, lanes=8, warps=1, sweeps=False)
    monkeypatch.setattr(cross_entropy, "forward_geometry", lambda share: lambda entries, wide: geometry)
    monkeypatch.setattr(nll, "_BLOCK", 8)
    monkeypatch.setattr(elementwise, "BLOCK", 8)


@pytest.mark.parametrize(("parts", "programs"), [(3, [1]), (4, [2, 1]), (9, [3, 1]), (10, [4, 2, 1])])
@each()
def test_totals_of_as_many_programs(loss, parts, programs, small_programs, launches, monkeypatch):
    """Values and gradients with a part of one position in the last run."""
    monkeypatch.setattr(reduce, "RUN", 3)
    count = 8 * parts - 7
    input, target = loss.sample(*((count, 1) if loss.target == "element" else (count, 5)), device=DEVICE)
    compare(loss, input, target)
    sums = [many for name, many in launches if name == "_sum_runs"]
    assert sums
    assert sums == programs * (len(sums) // len(programs))
    outputs = [loss.ours(input, target) for _ in range(2)]
    assert outputs[0].equal(outputs[1])


def test_weights_of_more_classes_than_a_program_adds_up(launches, monkeypatch):
    """Backward of a smoothed loss wants the sum of all weights."""
    monkeypatch.setattr(reduce, "RUN", 3)
    input, target = LOSSES["cross_entropy"].sample(4, 10, device=DEVICE)
    weight = torch.rand(10, device=DEVICE) + 0.5
    compare(LOSSES["cross_entropy"], input, target, weight=weight, label_smoothing=0.1)
    sums = [many for name, many in launches if name == "_sum_runs"]
    assert sums == [4, 2, 1]


@pytest.mark.parametrize(("rows", "counted_before"), [(256, False), (257, True)])
@each_weighted
def test_the_rows_of_a_divisor_that_every_program_counts(rows, counted_before, weighted, launches):
    loss = LOSSES["cross_entropy"]
    input, target = loss.sample(rows, 5, device=DEVICE)
    target[::3] = -100
    target[-1] = 2  # the last one counts
    weight = torch.rand(5, device=DEVICE) + 0.5 if weighted else None
    compare(loss, input, target, weight=weight)
    assert ("_count_kernel" in [name for name, _ in launches]) == counted_before


@pytest.mark.parametrize(("count", "counted_before"), [(4096, False), (4097, True)])
@each_bce_loss
def test_the_elements_of_a_divisor_that_every_program_counts(loss, count, counted_before, launches):
    input, target = loss.sample(count, device=DEVICE)
    target = target.round()
    target[-1] = 1  # the last one counts
    compare(loss, input, target, ignore_index=0)
    assert ("_count_kernel" in [name for name, _ in launches]) == counted_before


@each()
def test_a_small_training_step_is_two_launches(loss, launches):
    """Where one program has all of it; there is nothing to add up."""
    input, target = loss.sample(32, 10, device=DEVICE)
    loss.ours(input.requires_grad_(), target).backward()
    assert len(launches) == 2, launches


@each_class_loss
def test_counting_in_a_launch_before(loss, monkeypatch):
    """The divisor of a mean, where there are many positions, and totals of many programs."""
    monkeypatch.setattr(class_loss, "COUNTED_INLINE", 4)
    monkeypatch.setattr(class_loss, "_COUNT_BLOCK", 16)
    monkeypatch.setattr(geometry, "ROWS", [Geometry(ANY, 64, 1)])
    check(loss, (70, 5), torch.float32, LAYOUTS["contiguous"])


@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}], ids=["all", "some"])
@each_bce_loss
def test_elements_of_many_blocks(loss, options, monkeypatch):
    monkeypatch.setattr(elementwise, "BLOCK", 32)
    monkeypatch.setattr(elementwise, "COUNTED_INLINE", 4)
    input, target = loss.sample(5, 33, device=DEVICE)
    compare(loss, input, target.round() if options else target, **options)
    weight = torch.rand(33, device=DEVICE)
    compare(loss, input.t().contiguous().t(), target, weight=weight)


# --- Alignment ---------------------------------------------------------------------------------------------------


class Shape:
    outer, inner, classes = 1, 6, 96


def tensor(classes, inner_stride, offset=0, dtype=torch.bfloat16):
    class Tensor:
        data = torch.zeros(4096, dtype=dtype)[offset:]
        outer_stride, class_stride = 0, 1

    Tensor.inner_stride = inner_stride
    return Tensor


@pytest.mark.parametrize(
    ("classes", "stride", "offset", "expected"),
    [(96, 96, 0, (8, 0)), (96, 104, 8, (8, 0)), (96, 96, 1, (1, 8)), (103, 103, 0, (1, 8)), (10, 10, 0, (1, 0))],
)
def test_alignment_of_rows(classes, stride, offset, expected):
    """(elements of 16 bytes, 0) where all is aligned; (1, them) where rows are long enough to have packets inside."""
    shape = Shape()
    shape.classes = classes
    assert geometry.alignment(shape, "rows", [tensor(classes, stride, offset)]) == expected


def test_alignment_of_rows_that_are_the_same_in_every_batch():
    """Neither where a row begins decides which of its entries are added first, nor whether another row follows."""
    shape, packed, apart = Shape(), tensor(103, 103), tensor(96, 96)
    assert geometry.alignment(shape, "rows", [packed]) == (1, 8)
    assert geometry.alignment(shape, "rows", [packed], steady=True) == (1, 0)
    assert geometry.alignment(shape, "rows", [apart], steady=True) == (8, 0)
    apart.outer_stride, shape.inner = 97, 1
    assert geometry.alignment(shape, "rows", [apart]) == (8, 0)
    assert geometry.alignment(shape, "rows", [apart], steady=True) == (1, 0)


def test_tensors_that_lie_differently_share_no_packets():
    pair = [tensor(103, 103), tensor(103, 103, offset=1)]
    assert geometry.alignment(Shape(), "rows", pair) == (1, 0)


def test_a_program_has_as_many_threads_on_every_gpu(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: started.append((grid, options["num_warps"]))

    started = []
    for size in (32, 64):
        monkeypatch.setattr(launch, "warp_size", lambda size=size: size)
        launch.start(Kernel(), 7, warps=32)
        launch.start(Kernel(), 0)
    assert started == [((7,), 32), ((7,), 16)]


# --- Bad values --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion of a GPU ends the process's use of it")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@each("cross_entropy", "nll", "bce")
def test_values_out_of_bounds_stop_the_kernel(loss, reduction):
    input, target = loss.sample(4, 3)
    target.view(-1)[2] = 3
    with pytest.raises(Exception, match=r"out of bounds|between 0 and 1"):
        loss.ours(input.requires_grad_() * 1, target, reduction=reduction)


# --- Arguments ---------------------------------------------------------------------------------------------------


def fields_of(struct):
    """Of a struct of csrc, the names in order. A base is one field, by the last word of its name."""
    headers = "".join(
        path.read_text() for folder in ("math", "kernels") for path in (ROOT / "csrc" / folder).rglob("*.h")
    )
    base, body = re.search(rf"\nstruct {struct}(?: : math::Row(\w+))? {{\n(.*?)\n}};", headers, re.DOTALL).groups()
    inherited = [base.lower()] if base else []
    return inherited + re.findall(r"^  [\w:<>, *]+?[ *](\w+)(?: = [^;]*|{})?;", body, re.MULTILINE)


STRUCTS = [name for name, value in vars(arguments).items() if hasattr(value, "_fields")] if HAS_TRITON else []


@pytest.mark.parametrize("struct", STRUCTS)
def test_arguments_are_those_of_the_other_kernels(struct):
    """But for types and dimensions, which a tensor and a tuple have, and the device, which a struct is not told."""
    implied = {"dtype", "grad_output_dtype", "dims"}
    mirrored = [name for name in vars(arguments)[struct]._fields if name != "device"]
    assert mirrored == [name for name in fields_of(struct) if name not in implied]


@each()
def test_arguments_are_made_by_name(loss):
    """A field that csrc/triton.cpp does not name, or names otherwise, raises in a forward or a backward pass."""
    input, target = loss.sample(4, 3, device=DEVICE)
    loss.ours(input.requires_grad_(), target).backward()
    loss.ours(input.detach(), target)


# --- In a process of its own --------------------------------------------------------------------------------------


def python(*command):
    """The output of a process that does not interpret Triton."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_a_gpu_that_is_not_there(capability):
    assert f"for compute capability {capability}" in python(ROOT / "tests/compile_triton.py", str(capability))


def without_triton(code):
    """Runs code where Triton cannot be imported."""
    hide = "import sys; sys.modules['triton'] = None; import importlib.util as u; find = u.find_spec; "
    hide += "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest); "
    script = hide + "import torch, fusedloss; x, t = torch.randn(2, 3), torch.tensor([0, 1]); " + code
    return python("-c", script)


def test_without_triton_all_else_works():
    assert "tensor" in without_triton("print(fusedloss.cross_entropy(x, t)); assert fusedloss.backends()['triton']")


def test_without_triton_asking_for_it_says_how_to_get_it():
    code = "\ntry: fusedloss.cross_entropy(x, t, backend='triton')\nexcept NotImplementedError as e: print(e)"
    assert "pip install 'fusedloss[triton]'" in without_triton(code)
