"""What only a CUDA device can show: streams, graphs, launches, memory, assertions, and each traversal of its kernels.

The tests over devices run there too, and are not repeated here.
"""

import itertools
import json
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import missing_cuda
from support import (
    DTYPES,
    LOSSES,
    REDUCTIONS,
    compare,
    differentiate,
    each,
    each_class_loss,
    each_dtype,
    each_reduction,
    eighths,
    moved,
    outputs_of,
    short,
)

import fusedloss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing_cuda() is not None, reason=f"{missing_cuda()}")]

DEVICE = "cuda"
ROOT = Path(__file__).parents[1]
PER_CLASS, NUMBER = "one number on the device for each class", "one number on the device"
PER_ROW = "one number on the device for each position"
ONE_PASS = [{"reduction": "sum"}, {"grad_in_forward": False}, {"grad_scale": 0.5}, {"grad_scale": NUMBER}]
OPTIONS = {
    "cross_entropy": [
        {},
        *ONE_PASS,
        {"reduction": "none"},
        {"inplace": True, "grad_in_forward": True},
        {"weight": PER_CLASS},
        {"ignore_index": 1},
        {"label_smoothing": 0.1},
        {"weight": PER_CLASS, "label_smoothing": 0.1, "ignore_index": 1},
        {"z_loss": 0.01},
        {"logit_softcap": 2.0},
        {"return_lse": True},
        {"return_lse": True, "reduction": "none", "z_loss": 0.01, "logit_softcap": 2.0},
        {"logit_scale": 0.7},
        {"denominator": NUMBER, "sample_weight": PER_ROW},
        {"return_entropy": True, "return_argmax": True, "weight": PER_CLASS, "ignore_index": 1},
        {"return_entropy": True, "reduction": "none", "logit_scale": 0.7, "sample_weight": PER_ROW},
    ],
    "cross_entropy_soft": [
        {},
        *ONE_PASS,
        {"reduction": "none"},
        {"inplace": True, "grad_in_forward": True},
        {"weight": PER_CLASS},
        {"weight": PER_CLASS, "label_smoothing": 0.1, "z_loss": 0.01, "logit_softcap": 2.0},
        {"return_lse": True},
        {"denominator": 7, "sample_weight": PER_ROW, "logit_scale": 0.7},
        {"return_entropy": True, "return_argmax": True, "label_smoothing": 0.1},
    ],
    "nll": [{}, {"reduction": "sum"}, {"reduction": "none"}, {"weight": PER_CLASS, "ignore_index": 1}],
    "bce_with_logits": [
        {},
        *ONE_PASS,
        {"reduction": "none"},
        {"inplace": True, "grad_in_forward": True},
        {"weight": PER_CLASS},
        {"pos_weight": PER_CLASS},
        {"weight": PER_CLASS, "pos_weight": PER_CLASS, "ignore_index": 1},
    ],
    "bce": [{}, *ONE_PASS, {"reduction": "none"}, {"weight": PER_CLASS}, {"ignore_index": 1}],
}
each_case = pytest.mark.parametrize(
    ("loss", "options"),
    [
        pytest.param(LOSSES[name], options, id=" ".join([name, *(f"{key}={value}" for key, value in options.items())]))
        for name, rows in OPTIONS.items()
        for options in rows
    ],
)
# Few classes, many, more than a multiprocessor holds, and an image.
SIZES = [(32, 10), (4096, 1000), (8, 128256), (2, 19, 64, 65)]
each_size = pytest.mark.parametrize("shape", SIZES, ids=str)


@pytest.fixture(autouse=True, scope="module")
def freed_memory():
    yield
    torch.cuda.empty_cache()


class Step:
    """Forward and backward of one call, all of whose data are on the device beforehand."""

    def __init__(self, loss, shape, options=None, dtype=torch.float32, target_wants_grad=False):
        options = options or {}
        self.loss, self.shape, self.dtype = loss, shape, dtype
        self.input, self.target = self.sample()
        self.input.requires_grad_()
        self.leaves = [self.input]
        if target_wants_grad:
            self.leaves.append(self.target.requires_grad_())
        # What broadcasts over the classes of an image has a dimension for each of its own.
        per_class = (shape[1], *(1 for _ in shape[2:])) if loss.target == "element" else shape[1:2]
        drawn = {PER_CLASS: per_class, NUMBER: (), PER_ROW: (*shape[:1], *shape[2:])}
        self.options = {
            name: torch.rand(drawn[value], device=DEVICE).to(dtype) if value in drawn else value
            for name, value in options.items()
        }
        with torch.no_grad():
            outputs = self.outputs()
        self.grad_outputs = [eighths(output.shape, output.dtype, DEVICE) for output in outputs]

    def sample(self):
        return self.loss.sample(*self.shape, dtype=self.dtype, device=DEVICE)

    def outputs(self):
        input = self.input.clone() if self.options.get("inplace") else self.input
        outputs = outputs_of(self.loss.ours(input, self.target, **self.options))
        return [output for output in outputs if output.is_floating_point()]

    def __call__(self):
        """The outputs, then the gradients."""
        outputs = self.outputs()
        grads = torch.autograd.grad(outputs, self.leaves, self.grad_outputs)
        return [*(output.detach() for output in outputs), *grads]


def same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# --- Nothing waits for the device --------------------------------------------------------------------------


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed():
    number = torch.ones((), device=DEVICE)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("shape", [(32, 10), (5, 3000), (2, 19, 8, 9)], ids=str)
@each_case
def test_nothing_waits_for_the_device(loss, options, shape, dtype):
    """A step that does cannot be overlapped with the host's preparation of the next."""
    step = Step(loss, shape, options, dtype)
    with waiting_is_an_error():
        step()


@each_reduction
@each("cross_entropy_soft", "bce_with_logits", "bce")
def test_nothing_waits_where_the_target_wants_a_gradient(loss, reduction):
    step = Step(loss, (32, 10), {"reduction": reduction}, target_wants_grad=True)
    with waiting_is_an_error():
        step()


@each()
def test_nothing_waits_under_autocast(loss):
    if loss.module == "BCELoss":
        pytest.skip("refused under CUDA autocast")
    step = Step(loss, (32, 10), dtype=torch.bfloat16)
    step.grad_outputs = [torch.ones((), device=DEVICE)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16), waiting_is_an_error():
        step()


@each()
def test_nothing_waits_in_an_ordinary_training_step(loss):
    """loss.backward(), twice: the second adds to the gradient of the first."""
    step = Step(loss, (32, 10))
    with waiting_is_an_error():
        for _ in range(2):
            loss.ours(step.input, step.target).backward()


@each("cross_entropy", "cross_entropy_soft", "bce_with_logits", "bce")
def test_nothing_waits_for_second_derivatives(loss):
    step = Step(loss, (32, 10))

    def penalty():
        (grad,) = torch.autograd.grad(loss.ours(step.input, step.target), step.input, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), step.input)[0]

    expected = penalty()
    with waiting_is_an_error():
        actual = penalty()
    torch.testing.assert_close(actual, expected)


# --- Graphs and streams ------------------------------------------------------------------------------------


@each_size
@each_case
def test_a_captured_step_is_replayed_with_new_data(loss, options, shape):
    """What a launch takes from the host, or leaves behind in a workspace, is the first step's on every replay."""
    step = Step(loss, shape, options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for ignored in (0, 3, shape[0]):
        input, target = step.sample()
        if loss.target == "index":
            target[:ignored] = options.get("ignore_index", -100)
        with torch.no_grad():
            step.input.copy_(input)
            step.target.copy_(target)
        graph.replay()
        same_bits(captured, step())


COLD = """
import torch, fusedloss
x = torch.rand({shape}, device="cuda")
y = {target}
grad_output = torch.full((), {grad_output}, device="cuda")
x.requires_grad_()
def step():
    loss = fusedloss.{loss}(x, y)
    return loss.detach(), torch.autograd.grad(loss, x, grad_output)[0]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
graph.replay()
torch.testing.assert_close(captured, step(), rtol=0, atol=0)
print("captured")
"""
INDEX = "torch.randint({0}, {1}, device='cuda')"


@pytest.mark.parametrize("grad_output", [1.0, 0.5])
@pytest.mark.parametrize(
    ("loss", "shape", "target"),
    [
        ("cross_entropy", (70, 10), INDEX.format(10, "(70,)")),
        ("cross_entropy", (5000, 1000), INDEX.format(1000, "(5000,)")),
        ("cross_entropy", (300, 5000), INDEX.format(5000, "(300,)")),
        ("cross_entropy", (8, 128256), INDEX.format(128256, "(8,)")),
        ("cross_entropy", (2, 30, 96, 96), INDEX.format(30, "(2, 96, 96)")),
        ("cross_entropy", (70, 10), "torch.rand(70, 10, device='cuda').softmax(1)"),
        ("nll_loss", (70, 10), INDEX.format(10, "(70,)")),
        ("binary_cross_entropy_with_logits", (70, 1000), "torch.rand(70, 1000, device='cuda')"),
        ("binary_cross_entropy", (70, 1000), "torch.rand(70, 1000, device='cuda')"),
    ],
)
def test_the_first_step_of_a_process_may_be_captured(loss, shape, target, grad_output):
    """Kernels are loaded, and asked what they need, at their first launch: in a capture, if nothing ran before."""
    code = COLD.format(loss=loss, shape=shape, target=target, grad_output=grad_output)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["captured"]


@each_size
@each()
def test_a_step_runs_on_the_current_stream(loss, shape):
    """Its data arrive late there: on any other stream, it would read the zeros from before."""
    step = Step(loss, shape)
    expected, data = step(), step.input.detach().clone()
    with torch.no_grad():
        step.input.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # clock cycles
        with torch.no_grad():
            step.input.copy_(data)
        actual = step()
    side.synchronize()
    same_bits(actual, expected)


@each_size
@each()
def test_two_streams_at_once_do_not_meet(loss, shape):
    """No workspace is shared: the blocks of one step would count as the other's."""
    steps = [Step(loss, shape) for _ in range(2)]
    alone = [step() for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    together = [[], []]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        for step, stream, results in zip(steps, streams, together, strict=True):
            with torch.cuda.stream(stream):
                results.append(step())
    torch.cuda.synchronize()
    for expected, results in zip(alone, together, strict=True):
        for actual in results:
            same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: there is no other device")
@each_size
@each()
def test_a_step_runs_on_the_device_of_its_tensors(loss, shape):
    """Not on the current one."""
    input, target = loss.sample(*shape, device="cuda:0")
    expected = differentiate(loss.ours, input, target)
    with torch.cuda.device(0):
        actual = differentiate(loss.ours, input.to("cuda:1"), target.to("cuda:1"))
    assert {tensor.device for tensor in actual} == {torch.device("cuda:1")}
    same_bits(moved(actual, "cuda:0"), expected)


@each()
def test_tensors_of_two_devices_are_refused(loss):
    """A kernel would read host memory, or fail somewhere later."""
    input, target = loss.sample(4, 3, device=DEVICE)
    input.requires_grad_()
    with pytest.raises(RuntimeError, match="target is on cpu, but input is on cuda"):
        loss.ours(input, target.cpu())
    with pytest.raises(RuntimeError, match=r"target is on cuda.*, but input is on cpu"):
        loss.ours(input.detach().cpu(), target)
    with pytest.raises(RuntimeError, match="weight is on cpu, but input is on cuda"):
        loss.ours(input, target, torch.ones(3))
    if loss.separate:
        with pytest.raises(RuntimeError, match="grad_scale is on cpu, but input is on cuda"):
            loss.ours(input, target, grad_scale=torch.tensor(0.5))


# --- Launches ----------------------------------------------------------------------------------------------


def launches(function, path):
    """The names of everything that a call starts on the device: kernels, copies and fills."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


@each()
def test_a_small_training_step_is_two_launches(loss, tmp_path):
    """Each costs more than the work it does. grad_output is there before: torch would launch a kernel to make it."""
    ones = torch.ones((), device=DEVICE)
    if len(launches(lambda: ones + 1, tmp_path / "control.json")) != 1:
        pytest.skip("the profiler does not see the launches of this device")
    step = Step(loss, (32, 10))
    step.grad_outputs = [ones]
    step()
    names = launches(step, tmp_path / "step.json")
    ours = [name for name in names if "fusedloss" in name]
    assert 1 <= len(ours) <= 2, names
    assert len(names) <= 2, f"not by a kernel of ours: {[name for name in names if name not in ours]}"


# --- Memory ------------------------------------------------------------------------------------------------


def peak_bytes(function):
    """Of all memory allocated while the function runs, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    return torch.cuda.max_memory_allocated() - before, kept


@each("cross_entropy", "cross_entropy_soft", "nll", "bce_with_logits")
def test_autocast_reads_half_precision_logits_as_they_are(loss):
    """The logits and their gradient. Native adds a float32 copy, its log-softmax and their gradients."""
    logits, target = loss.sample(1024, 32000, device=DEVICE)
    target = target.bfloat16() if target.is_floating_point() else target

    def step():
        input = logits.bfloat16().requires_grad_()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            value = loss.ours(input, target)
        return input, value, torch.autograd.grad(value, input)[0]

    peak, (input, value, grad) = peak_bytes(step)
    assert (value.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    assert value.isfinite()
    assert peak < 2.5 * input.nbytes


@pytest.mark.parametrize(("options", "copies"), [({}, 1), ({"inplace": True}, 0)], ids=["fresh", "in place"])
@each("cross_entropy", "cross_entropy_soft", "bce_with_logits")
def test_the_gradient_is_the_only_large_tensor(loss, options, copies):
    input, target = loss.sample(1024, 32000, device=DEVICE)
    output = input.requires_grad_().clone()

    def step():
        return torch.autograd.grad(loss.ours(output, target, **options), input)

    peak, _ = peak_bytes(step)
    assert peak < (copies + 0.1) * input.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
def test_autocast_refuses_probabilities(dtype):
    """As native does, and naming the loss to use instead. A CPU tensor is no business of this mode."""
    input, target = LOSSES["bce"].sample(4, 3, dtype=dtype, device=DEVICE)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for function in (LOSSES["bce"].native, fusedloss.binary_cross_entropy):
            with pytest.raises(RuntimeError, match=r"unsafe to autocast[\s\S]*binary_cross_entropy_with_logits"):
                function(input, target)
        assert fusedloss.binary_cross_entropy(input.cpu(), target.cpu()).dtype == dtype


# --- Assertions of the device ------------------------------------------------------------------------------

# A process of its own for each: the assertion leaves it without a usable device.
BAD = {
    "a class too many": "cross_entropy(x, y + 1)",
    "a class too many, with a gradient": "cross_entropy(x.requires_grad_(), y + 1)",
    "a class too many, of 1000": "cross_entropy(torch.rand(4, 1000, device='cuda'), y + 998)",
    "a class too many, of 50000": "cross_entropy(torch.rand(4, 50000, device='cuda'), y + 49998)",
    "a class too many, in an image": "cross_entropy(torch.rand(4, 3, 5, device='cuda'), (y + 1)[:, None].expand(4, 5))",
    "a class too many, among weights": "cross_entropy(x, y + 1, weight=torch.ones(3, device='cuda'))",
    "a class too many, in a byte": "cross_entropy(x, (y + 200).byte())",
    "a class too many, among smoothed labels": "cross_entropy(x, y + 1, label_smoothing=0.1)",
    "a negative class": "cross_entropy(x, y - 1)",
    "a class that is 0 in 32 bits": "cross_entropy(x, y + 2**32)",
    "a default ignored class when another is ignored": "cross_entropy(x, y * 0 - 100, ignore_index=1)",
    "nll: a class too many": "nll_loss(x, y + 1)",
    "nll: a class too many, with a gradient": "nll_loss(x.requires_grad_(), y + 1)",
    "nll: a negative class": "nll_loss(x, y - 1)",
    "bce: a probability above 1": "binary_cross_entropy(x + 1, x)",
    "bce: a probability above 1, with a gradient": "binary_cross_entropy((x + 1).requires_grad_(), x)",
    "bce: a probability below 0": "binary_cross_entropy(x - 1, x)",
    "bce: no probability": "binary_cross_entropy(x * torch.nan, x)",
    "bce: a label above 1": "binary_cross_entropy(x, x + 1)",
    "bce: no label": "binary_cross_entropy(x, x * torch.nan)",
}
SCRIPT = """
import torch, fusedloss
x, y = torch.rand(4, 3, device="cuda") / 2 + 0.25, torch.tensor([0, 1, 2, 1], device="cuda")
print("ready", flush=True)
print("loss", fusedloss.{call}.item())
"""


def run(call):
    return subprocess.run([sys.executable, "-c", SCRIPT.format(call=call)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_a_bad_value_is_an_assertion_of_the_device(call):
    """Not a number, and not a read out of bounds."""
    done = run(call)
    assert done.stdout.split() == ["ready"], done
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize("call", ["cross_entropy(x, y)", "binary_cross_entropy(x, x)"])
def test_good_values_pass_the_assertions(call):
    """That the tests of bad ones see the assertion, and nothing else that fails."""
    done = run(call)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["ready", "loss"]


# --- The same bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("shape", [*SIZES, (100_000, 10)], ids=str)
@each_reduction
@each()
def test_every_run_gives_the_same_bits(loss, reduction, shape, dtype):
    step = Step(loss, shape, {"reduction": reduction, "weight": PER_CLASS}, dtype)
    first = step()
    for _ in range(5):
        same_bits(step(), first)


# --- The same numbers --------------------------------------------------------------------------------------

CLASSES = [1, 2, 7, 10, 19, 33, 64, 91, 100, 150, 1000, 4096, 32_000, 50_257, 128_256, 256_000]  # that people have
each_number_of_classes = pytest.mark.parametrize("classes", CLASSES)


def many_rows(classes):
    """More than there are multiprocessors, as far as the float64 of the CPU has memory and time for them."""
    return max(150, 2**16 // classes) if classes <= 128_256 else 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@each_number_of_classes
@each_class_loss
def test_numbers_of_classes(loss, classes, dtype):
    for rows in (1, 2, 7, many_rows(classes)):
        compare(loss, *loss.sample(rows, classes, dtype=dtype, device=DEVICE))


@each_number_of_classes
@each_class_loss
def test_numbers_of_classes_in_float64_and_float16(loss, classes):
    for dtype in (torch.float64, torch.float16):
        compare(loss, *loss.sample(5, classes, dtype=dtype, device=DEVICE), reduction="none")


@each_number_of_classes
@each("cross_entropy", "cross_entropy_soft")
def test_numbers_of_classes_with_every_option_at_once(loss, classes):
    options = {"weight": torch.rand(classes, device=DEVICE), "label_smoothing": 0.1}
    compare(loss, *loss.sample(7, classes, device=DEVICE), **options)
    if classes > 1:  # of one class only the z loss has a gradient: what remains of a mass that was added and taken away
        compare(loss, *loss.sample(7, classes, device=DEVICE), **options, z_loss=1e-3, logit_softcap=5.0)


# --- The launcher's borders -------------------------------------------------------------------------------

# Shared memory, static and dynamic together, about 48 KB, which is all that there is without opting in.
STRADDLING_ROWS = {
    torch.float32: [760, 12_100],
    torch.float64: [784],
    torch.bfloat16: [24_300, 49_000],
    torch.float16: [24_300, 49_000],
}
STRADDLING_IMAGES = [24, 48, 95, 96]
PASSES = ["forward", "forward_with_gradient", "backward"]
FEW, MANY = POSITIONS = [2, 20_000]  # for any device
each_road = pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "general"])


def at_borders(columns, most):
    """(classes, dtype, positions): where the launcher takes another way, one class less and one more, and the above."""
    cases = set()
    for dtype in DTYPES:
        straddling = STRADDLING_IMAGES if columns else STRADDLING_ROWS[dtype]
        cases |= set(itertools.product(straddling, [dtype], POSITIONS))
        for pass_, general, positions in itertools.product(PASSES, (False, True), POSITIONS):
            borders = borders_of(dtype, pass_=pass_, columns=columns, general=general, positions=positions, most=most)
            cases |= {(border + d, dtype, positions) for border in borders for d in (-1, 0, 1)}
    # The CPU, which knows the truth, has no time for more; check_kernels pretends to a device for which few are many.
    return sorted((case for case in cases if case[0] * (case[2] == MANY) < 60_000), key=str)


def borders_of(dtype, **problem):
    if missing_cuda() is not None:
        return []
    try:
        return fusedloss._C.cuda_class_borders(dtype=short(dtype), **problem)
    except RuntimeError:  # a test says so: here it would stop all of them
        return []


def test_the_launcher_says_where_its_borders_are():
    problem = {"pass_": "forward", "columns": False, "general": False, "positions": 2, "most": 2000}
    for dtype in DTYPES:
        assert 1025 in fusedloss._C.cuda_class_borders(dtype=short(dtype), **problem)  # from there on rows are long


@each_road
@pytest.mark.parametrize(("classes", "dtype", "positions"), at_borders(columns=False, most=200_000))
@each("cross_entropy")
def test_rows_at_the_launcher_s_borders(loss, classes, dtype, positions, options):
    rows = torch.cuda.get_device_properties(0).multi_processor_count + 1 if positions == MANY else positions
    compare(loss, *loss.sample(rows, classes, dtype=dtype, device=DEVICE), **options)


@each_road
@pytest.mark.parametrize(("classes", "dtype", "positions"), at_borders(columns=True, most=4000))
@each("cross_entropy")
def test_images_at_the_launcher_s_borders(loss, classes, dtype, positions, options):
    """A few pixels, or as many as are read in packets."""
    packets = (1, classes, 96, 96)
    if positions == MANY and math.prod(packets) < 4e6:
        compare(loss, *loss.sample(*packets, dtype=dtype, device=DEVICE), **options)
    else:
        compare(loss, *loss.sample(2, classes, 3, 5, dtype=dtype, device=DEVICE), **options)


# --- Rows, columns, places -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 1000, 4095, 4096, 4097, 20_000, 300_000])
@each_reduction
@each()
def test_numbers_of_rows(loss, rows, reduction):
    """The divisor of few is counted in the kernel that needs it; and the blocks of many take turns."""
    input, target = loss.sample(rows, 3, device=DEVICE)
    options = {"ignore_index": 255} if loss.target != "soft" else {}
    if options:
        target[::3] = 255
    compare(loss, input, target, reduction=reduction, **options)


COLUMNS = [
    *((2, 19, 64, 65), (2, 19, 64, 64), (1, 150, 33, 31), (3, 21, 1, 7), (2, 1000, 5, 5), (1, 2, 257, 129)),
    (2, 5000, 3),
]


@each_dtype
@pytest.mark.parametrize("shape", COLUMNS, ids=str)
@each()
def test_columns(loss, shape, dtype):
    compare(loss, *loss.sample(*shape, dtype=dtype, device=DEVICE))


def placed(tensor, gap=0, offset=0):
    """The rows with a gap after each, and the first one so many elements into their storage."""
    rows = torch.cat([tensor, tensor.new_full((tensor.shape[0], gap), 1e30)], 1)
    return torch.cat([tensor.new_full((offset,), 1e30), rows.flatten()])[offset:].view_as(rows)[:, : tensor.shape[1]]


PLACES = {
    "one element into their storage": lambda x: placed(x, offset=1),
    "one element apart": lambda x: placed(x, gap=1),
    "a row apart": lambda x: placed(x, gap=x.shape[1]),
    "three elements apart, one into their storage": lambda x: placed(x, gap=3, offset=1),
    "columns": lambda x: x.T.contiguous().T,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("classes", [1, 7, 10, 33, 150, 1000, 1025, 4097, 50_257])
@each()
def test_rows_that_no_vector_load_fits(loss, classes, place, dtype):
    """16-byte loads start before a row and end after it; what lies there, 1e30, must not count."""
    for rows in (3, 40):
        input, target = loss.sample(rows, classes, dtype=dtype, device=DEVICE)
        compare(loss, place(input), target)
        if loss.target != "index":
            compare(loss, input, place(target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("classes", [1, 7, 10, 33, 150, 1000, 1025, 4097, 50_257])
@each("cross_entropy", "cross_entropy_soft", "bce_with_logits")
def test_rows_that_no_vector_load_fits_are_overwritten_in_place(loss, classes, place, dtype):
    """The neighbours of a row, in the gaps too, keep what they hold. Another grad_output makes backward write again."""
    input, target = loss.sample(37, classes, dtype=dtype, device=DEVICE)
    expected = differentiate(lambda x: loss.ours(x, target), input, None)
    leaf = input.clone().requires_grad_()
    output = place(leaf.clone())  # a place that is the tensor's own would be the leaf's
    storage = output.detach().as_strided((output.untyped_storage().nbytes() // output.itemsize,), (1,), 0)
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided(output.shape, output.stride(), output.storage_offset()).fill_(False)
    before = storage[outside]
    value = loss.ours(output, target, inplace=True)
    (grad,) = torch.autograd.grad(value, leaf, eighths((), value.dtype, DEVICE))
    same_bits(storage[outside], before)
    torch.testing.assert_close([value.detach(), grad], expected)


# Beside the CPU's, which adds up in another order. assert_close's own tolerance for float64 is that of a float32.
CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-14}}


@each_dtype
@pytest.mark.parametrize("shape", [(32, 10), (100, 1000), (3, 5000), (2, 19, 16, 17)], ids=str)
@each_case
def test_the_cpu_s_results(loss, options, shape, dtype):
    step = Step(loss, shape, options, dtype)
    actual = step()
    leaf, target, grad_outputs, options = moved(
        [step.input.detach(), step.target, step.grad_outputs, step.options], "cpu"
    )
    outputs = outputs_of(loss.ours(leaf.requires_grad_().clone(), target, **options))
    expected = [*outputs, *torch.autograd.grad(outputs, leaf, grad_outputs)]
    torch.testing.assert_close(moved(actual, "cpu"), expected, **CLOSE.get(dtype, {}))


@each_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each("cross_entropy_soft", "bce_with_logits", "bce")
def test_the_cpu_s_gradients_to_the_target(loss, reduction, dtype):
    input, target = loss.sample(33, 70, dtype=dtype)
    expected = differentiate(loss.ours, input, target, reduction=reduction)
    actual = differentiate(loss.ours, input.to(DEVICE), target.to(DEVICE), reduction=reduction)
    torch.testing.assert_close(moved(actual, "cpu"), expected, **CLOSE.get(dtype, {}))
