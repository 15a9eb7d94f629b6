"""The formulas in Triton (fusedloss/triton/math.py) beside those in C++ (csrc/math), function by function."""

import ctypes
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

    from fusedloss.triton import math

    @triton.jit
    def _apply(FUNCTION: tl.constexpr, x, y, ARGUMENTS: tl.constexpr, RESULTS: tl.constexpr, COUNT: tl.constexpr):
        """The function of the rows of x, (COUNT, ARGUMENTS), into those of y, (COUNT, RESULTS)."""
        x += tl.arange(0, COUNT) * ARGUMENTS
        y += tl.arange(0, COUNT) * RESULTS
        if ARGUMENTS == 1:
            result = FUNCTION(tl.load(x))
        elif ARGUMENTS == 2:
            result = FUNCTION(tl.load(x), tl.load(x + 1))
        elif ARGUMENTS == 3:
            result = FUNCTION(tl.load(x), tl.load(x + 1), tl.load(x + 2))
        elif ARGUMENTS == 4:
            result = FUNCTION(tl.load(x), tl.load(x + 1), tl.load(x + 2), tl.load(x + 3))
        else:
            result = FUNCTION(tl.load(x), tl.load(x + 1), tl.load(x + 2), tl.load(x + 3), tl.load(x + 4))
        if RESULTS == 1:
            tl.store(y, result)
        else:
            tl.store(y, result[0])
            tl.store(y + 1, result[1])

    @triton.jit
    def _normaliser_grad(grad_loss, grad_lse, mass, lse, z_loss):
        return math.normaliser_grad(grad_loss, grad_lse, mass, lse, z_loss, True)

    @triton.jit
    def _rescaled(grad, factor):
        return math.rescaled(grad, factor, True)


ROOT = Path(__file__).parents[1]
COUNT = 4096
INFINITY, NAN = float("inf"), float("nan")
# Where a function's arguments lie, for those that are not any numbers; and what else is to be tried.
NONPOSITIVE, UNIT, ANY = (-100.0, 0.0), (0.0, 1.0), (-20.0, 20.0)
FUNCTIONS = {
    "larger": ([ANY, ANY], 1),
    "clamp": ([ANY, (-5.0, -1.0), (1.0, 5.0)], 1),
    "quotient": ([ANY, (0.1, 10.0)], 1),
    "exp_nonpositive": ([NONPOSITIVE], 1),
    "exp_roughly": ([(-80.0, 0.0)], 1),
    "times_exp": ([ANY, (-80.0, 0.0)], 1),
    "tanh": ([ANY], 1),
    "log1p_unit": ([UNIT], 1),
    "log1p": ([(-1.0, 0.0)], 1),
    "rescaled": ([ANY, ANY], 1),
    "finite_shift": ([ANY], 1),
    "rescale": ([UNIT, (-20.0, 0.0), (0.0, 20.0)], 1),
    "log_sum_exp": ([ANY, UNIT], 1),
    "probability_mass": ([UNIT, UNIT, UNIT, UNIT], 1),
    "entry_loss": ([NONPOSITIVE, UNIT, UNIT], 1),
    "entry_loss_at_max": ([NONPOSITIVE, UNIT], 1),
    "z_term": ([ANY, UNIT], 1),
    "normaliser_grad": ([UNIT, UNIT, UNIT, ANY, (0.1, 1.0)], 1),
    "logit_grad": ([UNIT, UNIT, UNIT], 1),
    "probability_grad": ([NONPOSITIVE, UNIT, UNIT, UNIT, UNIT], 1),
    "soft_cap": ([ANY, (1.0, 50.0)], 2),
    "nll_loss": ([NONPOSITIVE, UNIT], 1),
    "nll_grad": ([ANY, UNIT], 1),
    "bce_with_logits_evaluate": ([ANY, UNIT, (0.0, 5.0)], 2),
    "bce_with_logits_target_grad": ([ANY, UNIT, (0.0, 5.0), ANY], 1),
    "bce_evaluate": ([UNIT, UNIT, UNIT], 2),
    "bce_target_grad": ([(0.01, 0.99), UNIT, UNIT, ANY], 1),
}
SPECIAL = {  # rows of arguments, for the functions that have to do something particular with them
    "larger": [[NAN, 1.0], [-INFINITY, 1.0], [1.0, -INFINITY], [INFINITY, 1.0]],
    "clamp": [[NAN, -1.0, 1.0], [INFINITY, -1.0, 1.0], [-INFINITY, -1.0, 1.0]],
    "exp_nonpositive": [[0.0], [-INFINITY], [NAN], [-87.33], [-87.4], [-708.0], [-709.0], [-1e-30]],
    "exp_roughly": [[0.0], [-INFINITY], [NAN]],
    "times_exp": [[INFINITY, -1.0], [0.0, -1.0], [-INFINITY, -1.0], [NAN, -1.0], [1.0, 0.0]],
    "tanh": [[0.0], [1e-20], [-1e-20], [INFINITY], [-INFINITY], [NAN], [100.0]],
    "log1p_unit": [[0.0], [1.0], [1e-20]],
    "log1p": [[-1.0], [0.0], [-1e-20], [NAN]],
    "rescaled": [[0.0, INFINITY], [-0.0, NAN], [1.0, INFINITY], [1.0, NAN], [INFINITY, 0.0]],
    "finite_shift": [[-INFINITY], [INFINITY], [NAN]],
    "rescale": [[1.0, -INFINITY, -INFINITY], [1.0, -INFINITY, 1.0], [1.0, INFINITY, INFINITY], [0.0, 1.0, INFINITY]],
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
ROUGH_UNITS = 128  # of exp_roughly, which rounds off as many as its argument is large
# Functions that subtract: their units are those of the numbers that take part, which products of arguments bound.
DIFFERENCES = {"soft_cap", "logit_grad", "normaliser_grad", "z_term", "entry_loss", "log_sum_exp", "probability_mass"}
DIFFERENCES |= {"probability_grad", "bce_with_logits_evaluate", "bce_with_logits_target_grad"}
DIFFERENCES |= {"bce_evaluate", "bce_target_grad"}


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


def in_triton(name, x, results):
    function = {"normaliser_grad": _normaliser_grad, "rescaled": _rescaled}.get(name) or getattr(math, name)
    x = x.cuda() if HAS_GPU else x
    y = torch.empty(len(x), results, dtype=x.dtype, device=x.device)
    _apply[(1,)](function, x, y, x.shape[1], results, COUNT)
    return y.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_twins_agree(name, dtype, library):
    x = arguments_of(name, dtype)
    results = FUNCTIONS[name][1]
    theirs, ours = in_cpp(library, name, x, results), in_triton(name, x, results)
    units = ROUGH_UNITS if name == "exp_roughly" else UNITS
    size = theirs.abs()
    if name in DIFFERENCES:
        size = size + x.abs().clamp_min(1).prod(1, keepdim=True)
    apart = (ours - theirs).abs()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    wrong = ~(same | (apart <= units * torch.finfo(dtype).eps * size))
    assert not wrong.any(), f"{x[wrong.any(1)][:3]}: {ours[wrong.any(1)][:3]}, in C++ {theirs[wrong.any(1)][:3]}"


def test_every_function_has_a_twin():
    """In both files by the same name; what Triton has beside them is what C++ has as operators and types."""
    headers = " ".join(path.read_text() for path in (ROOT / "csrc/math").glob("*.h"))
    own = {"number", "constant", "converted", "divide", "exp_rest", "exp_scale", "reduce_exp", "polynomial", "zero_if"}
    named = {name for name, value in vars(math).items() if isinstance(value, type(math.larger)) and name[0] != "_"}
    for name in named - own:
        words = name.split("_")  # a struct's name comes first: Bce::evaluate is bce_evaluate
        assert any(f"{'_'.join(words[i:])}(" in headers for i in range(len(words))), f"csrc/math has no {name}"
        assert name in FUNCTIONS or name.endswith("in_domain") or name in ("reduced", "at_least_minus_100")
