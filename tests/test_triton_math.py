"""The formulas in Triton (fusedloss/triton/math.py) beside those in C++ (csrc/math), function by function."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import HAS_GPU, HAS_TRITON
from support import short

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is on the PATH"),
]

if HAS_TRITON:
    import triton
    import triton.language as tl

    from fusedloss.triton import math, portable
    from fusedloss.triton.rows import Options

    @triton.jit
    def _apply(
        FUNCTION: tl.constexpr,
        x,
        y,
        ARGUMENTS: tl.constexpr,
        RESULTS: tl.constexpr,
        COUNT: tl.constexpr,
        o: tl.constexpr,
    ):
        """The function of the rows of x, (COUNT, ARGUMENTS), into those of y, (COUNT, RESULTS)."""
        x += tl.arange(0, COUNT) * ARGUMENTS
        y += tl.arange(0, COUNT) * RESULTS
        arguments = (tl.load(x),)
        for i in tl.static_range(1, ARGUMENTS):
            arguments += (tl.load(x + i),)
        if o is None:
            result = FUNCTION(*arguments)
        else:
            result = FUNCTION(*arguments, o)
        if RESULTS == 1:
            tl.store(y, result)
        else:
            for i in tl.static_range(RESULTS):
                tl.store(y + i, result[i])

    @triton.jit
    def _normaliser_grad(grad_loss, grad_lse, mass, lse, z_loss):
        return math.normaliser_grad(grad_loss, grad_lse, mass, lse, z_loss, True)

    @triton.jit
    def _rescaled(grad, factor):
        return math.rescaled(grad, factor, True)

    @triton.jit
    def _row_problem(label_smoothing, z_loss, classes, weight_sum, o: tl.constexpr):
        options = math.RowOptions(label_smoothing.to(tl.float64), z_loss.to(tl.float64), None, None)
        return math.row_problem(options, classes, weight_sum, o)

    @triton.jit
    def _index_mass(keep, weight):
        return math.index_mass(math.RowProblem(keep, keep, keep, keep), weight)

    @triton.jit
    def _probability_mass(keep, spread, probability, weight):
        return math.probability_mass(math.RowProblem(keep, spread, spread, spread), probability, weight)

    @triton.jit
    def _row_lse(max, log_sum):
        return math.row_lse(math.FinishedRow(max, log_sum, max, max, max))

    @triton.jit
    def _row_entropy(log_sum, gap):
        return math.row_entropy(math.FinishedRow(gap, log_sum, gap, gap, gap))

    @triton.jit
    def _merge_of_index(max, sum, other_max, other_sum, o: tl.constexpr):
        max = tl.join(max, other_max)
        sum = tl.join(sum, other_sum)
        return math.merge(math.RowStatistics(max, sum, sum, sum, sum), o)

    @triton.jit
    def _merge(max, sum, gap, loss, mass, other_max, other_sum, other_gap, other_loss, other_mass, o: tl.constexpr):
        max = tl.join(max, other_max)
        sum = tl.join(sum, other_sum)
        gap = tl.join(gap, other_gap)
        dense_loss = tl.join(loss, other_loss)
        mass = tl.join(mass, other_mass).to(tl.float64)
        return math.merge(math.RowStatistics(max, sum, gap, dense_loss, mass), o)

    @triton.jit
    def _row_loss(
        spread,
        spread_mass,
        z_loss,
        max,
        log_sum,
        dense_loss,
        mass,
        counts,
        target_mass,
        shifted,
        weight,
        o: tl.constexpr,
    ):
        problem = math.RowProblem(spread, spread, spread_mass, z_loss)
        row = math.FinishedRow(max, log_sum, dense_loss, mass, mass)
        return math.row_loss(problem, row, math.RowTarget(counts > 0.5, target_mass, shifted, weight), o)

    @triton.jit
    def _row_gradient(
        spread, spread_mass, z_loss, counts, target_mass, mass, lse, grad_loss, grad_lse, o: tl.constexpr
    ):
        problem = math.RowProblem(spread, spread, spread_mass, z_loss)
        target = math.RowTarget(counts > 0.5, target_mass, target_mass, target_mass)
        mass = math.row_mass(problem, target_mass, mass, o)
        return math.row_gradient(problem, target, mass, lse, grad_loss, grad_lse, o)

    @triton.jit
    def _gradient_through(factor, on_target, on_all, on_gap, slope):
        return math.gradient_through(math.RowGradient(factor, on_target, on_all, on_gap), slope)

    @triton.jit
    def _add_entropy_grad(factor, on_target, on_all, on_gap, grad_entropy, gap):
        return math.add_entropy_grad(math.RowGradient(factor, on_target, on_all, on_gap), grad_entropy, gap)

    # Functions that are to be called with other arguments than a table has.
    CALLED = {
        "normaliser_grad": _normaliser_grad,
        "rescaled": _rescaled,
        "row_problem": _row_problem,
        "index_mass": _index_mass,
        "probability_mass": _probability_mass,
        "row_lse": _row_lse,
        "row_entropy": _row_entropy,
        "merge of index": _merge_of_index,
        "merge": _merge,
        "row_loss": _row_loss,
        "row_gradient": _row_gradient,
        "gradient_through": _gradient_through,
        "add_entropy_grad": _add_entropy_grad,
    }


ROOT = Path(__file__).parents[1]
COUNT = 4096
INFINITY, NAN = float("inf"), float("nan")
# Where a function's arguments lie, for those that are not any numbers; and what else is to be tried.
NONPOSITIVE, UNIT, ANY = (-100.0, 0.0), (0.0, 1.0), (-20.0, 20.0)
# A row: spread, spread_mass, z_loss, max, log_sum, dense_loss, mass, whether it counts, the target's mass and shifted,
# and the row's weight.
ROW = [UNIT, UNIT, (0.1, 1.0), ANY, UNIT, UNIT, UNIT, UNIT, UNIT, NONPOSITIVE, (0.1, 2.0)]
ROW_WITHOUT_Z = [*ROW[:2], (0.0, 0.0), *ROW[3:]]
# A gradient's: spread, spread_mass, z_loss, whether the row counts, the target's mass, mass, lse, and what flows back.
FLOW = [UNIT, UNIT, (0.1, 1.0), UNIT, UNIT, UNIT, ANY, ANY, ANY]
PART = [ANY, (1.0, 20.0)]  # max and sum
RICH_PART = [*PART, UNIT, UNIT, UNIT]  # gap, dense_loss and mass
GRADIENT = [ANY, UNIT, UNIT, UNIT]  # factor, on_target, on_all, on_gap
PROBLEM = [UNIT, UNIT, (1.0, 1000.0), (1.0, 1000.0)]  # label_smoothing, z_loss, classes, weight_sum
FUNCTIONS = {
    "max_ignoring_nan": ([ANY, ANY], 1),
    "clamp": ([ANY, (-5.0, -1.0), (1.0, 5.0)], 1),
    "product": ([ANY, ANY], 1),
    "fast_divide": ([ANY, (0.1, 10.0)], 1),
    "exp_nonpositive": ([NONPOSITIVE], 1),
    "fast_exp": ([(-80.0, 0.0)], 1),
    "times_exp": ([ANY, (-80.0, 0.0)], 1),
    "tanh": ([ANY], 1),
    "log1p_unit": ([UNIT], 1),
    "log1p": ([(-1.0, 0.0)], 1),
    "reduced_over": ([ANY, (0.1, 10.0)], 1),
    "rescaled": ([ANY, ANY], 1),
    "finite_shift": ([ANY], 1),
    "rescale": ([UNIT, (-20.0, 0.0), (0.0, 20.0)], 1),
    "log_sum_exp": ([ANY, UNIT], 1),
    "row_problem of index": ([(0.0, 0.0), *PROBLEM[1:]], 4),
    "row_problem of smoothed": (PROBLEM, 4),
    "row_problem of probabilities": (PROBLEM, 4),
    "index_mass": ([UNIT, UNIT], 1),
    "probability_mass": ([UNIT, UNIT, UNIT, UNIT], 1),
    "entry_loss": ([NONPOSITIVE, UNIT, UNIT], 1),
    "entry_loss_at_max": ([NONPOSITIVE, UNIT], 1),
    "times_gap": ([UNIT, NONPOSITIVE], 1),
    "merge of index": ([*PART, *PART], 2),
    "merge of smoothed": ([*RICH_PART, *RICH_PART], 5),
    "row_lse": ([ANY, UNIT], 1),
    "row_entropy": ([UNIT, UNIT], 1),
    "row_loss of index": (ROW_WITHOUT_Z, 1),
    "row_loss of smoothed": (ROW, 1),
    "row_loss of probabilities": (ROW, 1),
    "row_gradient of index": ([(0.0, 0.0), UNIT, (0.0, 0.0), *FLOW[3:]], 4),
    "row_gradient of smoothed": (FLOW, 4),
    "row_gradient of probabilities": (FLOW, 4),
    "gradient_through": ([*GRADIENT, ANY], 4),
    "add_entropy_grad": ([*GRADIENT, ANY, UNIT], 4),
    "times_factor": ([UNIT, ANY, ANY, NONPOSITIVE], 1),
    "over_sum": ([ANY, UNIT], 1),
    "z_term": ([ANY, UNIT], 1),
    "normaliser_grad": ([UNIT, UNIT, UNIT, ANY, (0.1, 1.0)], 1),
    "logit_grad": ([UNIT, UNIT, UNIT], 1),
    "probability_grad": ([NONPOSITIVE, UNIT, UNIT, UNIT, UNIT], 1),
    "soft_cap": ([ANY, (1.0, 50.0)], 2),
    "seen_logit of scaled": ([ANY, (0.1, 5.0), (1.0, 50.0)], 2),
    "seen_logit of capped": ([ANY, (0.1, 5.0), (1.0, 50.0)], 2),
    "seen_logit of scaled and capped": ([ANY, (0.1, 5.0), (1.0, 50.0)], 2),
    "nll_loss": ([NONPOSITIVE, UNIT], 1),
    "nll_grad": ([ANY, UNIT], 1),
    "bce_with_logits_evaluate": ([ANY, UNIT, (0.0, 5.0)], 2),
    "bce_with_logits_target_grad": ([ANY, UNIT, (0.0, 5.0), ANY], 1),
    "bce_evaluate": ([UNIT, UNIT, UNIT], 2),
    "bce_target_grad": ([(0.01, 0.99), UNIT, UNIT, ANY], 1),
}
# Rows of -inf and of inf, an ignored one of NaN and of NaN's weight, one whose classes have an infinite distance, and
# weights of 0 and of NaN.
ROWS = [
    [0.1, 0.5, 0.0, -INFINITY, -INFINITY, 0.0, 1.0, 1.0, 0.5, -1.0, 1.0],
    [0.1, 0.5, 0.0, INFINITY, NAN, 0.0, 1.0, 1.0, 0.5, -1.0, 1.0],
    [0.1, 0.5, 0.0, 1.0, NAN, NAN, NAN, 0.0, 0.5, NAN, NAN],
    [0.1, 0.5, 0.0, 1.0, 0.5, INFINITY, 1.0, 1.0, 0.0, -1.0, 1.0],
    [0.1, 0.5, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.0, 0.0],
    [0.1, 0.5, 0.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.5, -INFINITY, 0.0],
    [0.1, 0.5, 0.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.5, -1.0, NAN],
]
ROWS_WITH_Z = [[*row[:2], 0.5, *row[3:]] for row in ROWS]
FLOWS = [
    [0.1, 0.5, 0.0, counts, 0.5, 0.7, lse, *flow]
    for counts in (0.0, 1.0)
    for lse in (1.0, INFINITY, NAN)
    for flow in ([1.0, 0.0], [INFINITY, 1.0], [NAN, 1.0], [1.0, NAN], [0.0, INFINITY], [0.0, 1.0])
]
FLOWS_WITH_Z = [[*flow[:2], 0.5, *flow[3:]] for flow in FLOWS]
EMPTY = [-INFINITY, 0.0]
SPECIAL = {  # rows of arguments, for the functions that have to do something particular with them
    "max_ignoring_nan": [[NAN, 1.0], [-INFINITY, 1.0], [1.0, -INFINITY], [INFINITY, 1.0]],
    "clamp": [[NAN, -1.0, 1.0], [INFINITY, -1.0, 1.0], [-INFINITY, -1.0, 1.0]],
    "exp_nonpositive": [[0.0], [-INFINITY], [NAN], [-87.33], [-87.4], [-708.0], [-709.0], [-1e-30]],
    "fast_exp": [[0.0], [-INFINITY], [NAN]],
    "times_exp": [[INFINITY, -1.0], [0.0, -1.0], [-INFINITY, -1.0], [NAN, -1.0], [1.0, 0.0]],
    "tanh": [[0.0], [1e-20], [-1e-20], [INFINITY], [-INFINITY], [NAN], [100.0]],
    "log1p_unit": [[0.0], [1.0], [1e-20]],
    "log1p": [[-1.0], [0.0], [-1e-20], [NAN]],
    "reduced_over": [[0.0, 0.0], [0.0, NAN], [1.0, 0.0], [NAN, 1.0], [1.0, INFINITY]],
    "rescaled": [[0.0, INFINITY], [-0.0, NAN], [1.0, INFINITY], [1.0, NAN], [INFINITY, 0.0]],
    "finite_shift": [[-INFINITY], [INFINITY], [NAN]],
    "rescale": [[1.0, -INFINITY, -INFINITY], [1.0, -INFINITY, 1.0], [1.0, INFINITY, INFINITY], [0.0, 1.0, INFINITY]],
    "times_gap": [[1.0, 0.0], [0.0, -INFINITY], [NAN, NAN], [0.0, -9999.0], [0.5, -80.0]],
    "times_factor": [
        *([0.0, 1.0, 2.0, -INFINITY], [0.0, 1.0, 0.0, -INFINITY], [1.0, NAN, 1.0, -1.0], [1.0, 1.0, NAN, -1.0]),
        *([NAN, 1.0, 2.0, NAN], [0.5, 3.0, 0.0, -1.0]),
    ],
    "merge of index": [[*EMPTY, 1.0, 2.0], [1.0, 2.0, *EMPTY], EMPTY * 2, [INFINITY, 1.0] * 2, [1.0, NAN, 2.0, 1.0]],
    "merge of smoothed": [
        [*EMPTY, 0.0, 0.0, 0.0, 1.0, 2.0, 0.5, 3.0, 4.0],
        [1.0, 2.0, 0.5, 3.0, 4.0, *EMPTY, 0.0, 0.0, 0.0],
        [*EMPTY, 0.0, 0.0, 0.0] * 2,
        [*EMPTY, 0.0, 0.0, 1.0, 1.0, 2.0, 0.5, 3.0, 4.0],
        [INFINITY, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5, 1.0],
        [1.0, 1.0, 0.0, INFINITY, INFINITY, 1.0, 1.0, 0.0, 0.5, 1.0],
        [1.0, NAN, NAN, NAN, NAN, 2.0, 1.0, 0.5, 0.5, 1.0],
        [1.0, 1.0, 0.0, 0.5, 1.0, 1e5, 1.0, 0.0, 0.5, 1.0],
    ],
    "row_lse": [[INFINITY, NAN], [-INFINITY, -INFINITY], [1.0, 0.0], [NAN, 1.0]],
    "row_loss of index": ROWS,
    "row_loss of smoothed": ROWS_WITH_Z,
    "row_loss of probabilities": ROWS_WITH_Z,
    "row_gradient of index": [[0.0, *flow[1:]] for flow in FLOWS],
    "row_gradient of smoothed": FLOWS_WITH_Z,
    "row_gradient of probabilities": FLOWS_WITH_Z,
    "over_sum": [[1.0, -INFINITY], [1.0, NAN], [INFINITY, 1.0], [NAN, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, INFINITY]],
    "log_sum_exp": [[INFINITY, NAN], [-INFINITY, -INFINITY], [1.0, 0.0]],
    "entry_loss_at_max": [[0.0, INFINITY], [-INFINITY, 1.0], [-INFINITY, 0.0]],
    "bce_with_logits_evaluate": [
        [INFINITY, 1.0, 1.0],
        [-INFINITY, 0.0, 1.0],
        [NAN, 0.0, 1.0],
        [0.0, 0.5, 1.0],
        [100.0, 1.0, INFINITY],
        [1e4, 0.0, 1.0],
    ],
    "bce_with_logits_target_grad": [[INFINITY, 0.0, 1.0, 1.0], [-INFINITY, 0.0, 1.0, 1.0], [-INFINITY, 0.0, 2.0, 1.0]],
    "bce_evaluate": [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1e-30, 1.0, 1.0]],
    "bce_target_grad": [[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]],
}
# Units in the last place that twins may be apart: each is allowed a few of its own.
UNITS = 8
ROUGH_UNITS = 128  # of fast_exp, which rounds off as many as its argument is large
# Functions that subtract: their units are those of the numbers that take part, which products of arguments bound.
DIFFERENCES = {"soft_cap", "logit_grad", "normaliser_grad", "z_term", "entry_loss", "log_sum_exp", "probability_mass"}
DIFFERENCES |= {"probability_grad", "bce_with_logits_evaluate", "bce_with_logits_target_grad"}
DIFFERENCES |= {"row_problem", "row_lse", "row_loss", "row_gradient", "merge"}
DIFFERENCES |= {"bce_evaluate", "bce_target_grad", "seen_logit", "add_entropy_grad", "times_factor"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/math, compiled as it is for the CPU's kernels."""
    path = tmp_path_factory.mktemp("math") / "math_table.so"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *flags, str(ROOT / "tests/cpp/math_table.cpp"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def arguments_of(name, dtype):
    ranges, _ = FUNCTIONS[name]
    low, high = torch.tensor(ranges, dtype=torch.float64).unbind(1)
    drawn = low + (high - low) * torch.rand(COUNT, len(ranges), dtype=torch.float64)
    special = torch.tensor(SPECIAL.get(name, []), dtype=torch.float64).view(-1, len(ranges))
    drawn[: len(special)] = special
    return drawn.to(dtype)


def in_cpp(library, name, x, results):
    y = torch.empty(len(x), results, dtype=x.dtype)
    evaluate = getattr(library, f"evaluate_{short(x.dtype)}")
    evaluate.restype = ctypes.c_bool
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
    assert evaluate(name.encode(), *pointers, ctypes.c_int64(len(x)), x.shape[1], results)
    return y


def options_of(target, dtype):
    """What a kernel for such targets is compiled for."""
    return Options(
        acc=tl.float64 if dtype == torch.float64 else tl.float32,
        rough=False,
        dense=target != "index",
        probabilities=target == "probabilities",
        weighted=True,
        sharded=False,
        scaled=target.startswith("scaled"),
        capped=target.endswith("capped"),
        has_z=target != "index",
        every_row=False,
        entropy=target != "index",
        argmax=False,
        is_mean=False,
        with_gradient=False,
    )


def in_triton(name, x, results):
    plain, _, target = name.partition(" of ")
    function = CALLED.get(name) or CALLED.get(plain) or getattr(math, plain, None) or getattr(portable, plain)
    x = x.cuda() if HAS_GPU else x
    y = torch.empty(len(x), results, dtype=x.dtype, device=x.device)
    _apply[(1,)](function, x, y, x.shape[1], results, COUNT, options_of(target, x.dtype) if target else None)
    return y.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_twins_agree(name, dtype, library):
    x = arguments_of(name, dtype)
    results = FUNCTIONS[name][1]
    theirs, ours = in_cpp(library, name, x, results), in_triton(name, x, results)
    units = ROUGH_UNITS if name == "fast_exp" else UNITS
    size = theirs.abs()
    if name.partition(" of ")[0] in DIFFERENCES:
        size = size + x.abs().clamp_min(1).prod(1, keepdim=True)
    apart = (ours - theirs).abs()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    wrong = ~(same | (apart <= units * torch.finfo(dtype).eps * size))
    assert not wrong.any(), f"{x[wrong.any(1)][:3]}: {ours[wrong.any(1)][:3]}, in C++ {theirs[wrong.any(1)][:3]}"


def test_every_function_has_a_twin():
    """In both languages by the same name; what Triton has beside them C++ has as operators, types and methods."""
    headers = " ".join(path.read_text() for path in (ROOT / "csrc/math").glob("*.h"))
    own = {"number", "constant", "converted", "divide", "exp_rest", "exp_scale", "reduce_exp", "polynomial", "zero_if"}
    own |= {"with_weight_sum", "relative_to", "finished", "exp_normal"}
    tested = {name.partition(" of ")[0] for name in FUNCTIONS}
    members = {**vars(portable), **vars(math)}
    named = {name for name, value in members.items() if isinstance(value, type(math.reduced)) and name[0] != "_"}
    for name in named - own:
        words = name.split("_")  # a struct's name comes first: Bce::evaluate is bce_evaluate
        assert any(f"{'_'.join(words[i:])}(" in headers for i in range(len(words))), f"csrc/math has no {name}"
        assert name in tested or name.endswith("in_domain") or name in ("reduced", "at_least_minus_100", "row_mass")


def test_every_struct_has_a_twin():
    """By the same name, with fields of the same names, but for the one that o has."""
    header = (ROOT / "csrc/math/cross_entropy.h").read_text()
    for name in ("RowProblem", "FinishedRow", "RowTarget", "RowGradient"):
        body = re.search(rf"\nstruct {name} {{\n(.*?)\n(?:\n.*?)?}};", header, re.DOTALL)[1]
        fields = [found[1] for found in re.finditer(r"^  (?:Acc|bool) (\w+)(?: = [^;]*)?;", body, re.MULTILINE)]
        assert list(getattr(math, name)._fields) == [field for field in fields if field != "probabilities"]
