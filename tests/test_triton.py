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
from pathlib import Path

import pytest
import torch
from conftest import HAS_TRITON
from support import LOSSES, compare, each, each_bce_loss, each_class_loss, short

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
