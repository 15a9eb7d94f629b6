"""Random calls, valid and not: ours returns what native returns on the CPU, or raises what native raises."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DTYPES, REDUCTIONS, asserts, differentiate, each, moved, widen

# The example count keeps the file under a minute; derandomised, so that a failure stays one.
fuzzed = settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
SIZES = st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])
CLASSES = st.sampled_from([1, 2, 3, 7, 19, 33, 70])


@st.composite
def shapes(draw):
    """(C,), (N, C) or (N, C, d1, ...), small."""
    classes = draw(CLASSES)
    if draw(st.integers(0, 9)) == 0:
        return (classes,)
    spatial = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3))
    return (draw(SIZES), classes, *spatial)


@st.composite
def restrided(draw, tensor):
    """Equal values in another layout: dimensions stored in any order, some with gaps between, some offset."""
    order = draw(st.permutations(range(tensor.dim())))
    inverse = [order.index(dim) for dim in range(tensor.dim())]
    tensor = tensor.permute(order).contiguous().permute(inverse)
    if tensor.dim() and draw(st.booleans()):
        dim = draw(st.integers(0, tensor.dim() - 1))
        step = draw(st.integers(2, 3))
        tensor = tensor.repeat_interleave(step, dim)
        tensor = tensor[(slice(None),) * dim + (slice(None, None, step),)]
    return tensor


@st.composite
def options_of(draw, loss, input):
    options = {"reduction": draw(st.sampled_from(REDUCTIONS))}
    classes = input.shape[min(1, input.dim() - 1)]
    if draw(st.booleans()):
        if loss.target == "element":
            shape = [draw(st.sampled_from([1, size])) for size in input.shape]
            shape = shape[draw(st.integers(0, len(shape))) :]
        else:
            shape = [classes]
        options["weight"] = torch.rand(shape, dtype=torch.float64).to(input.dtype)
    if loss.target == "index" and draw(st.booleans()):
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0, 1, 255]))
    if loss.function == "cross_entropy" and draw(st.booleans()):
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if loss.function.endswith("logits") and draw(st.booleans()):
        options["pos_weight"] = torch.rand(input.shape[-1:], dtype=torch.float64).to(input.dtype)
    return options


@st.composite
def calls(draw, loss):
    """A call native and ours both accept."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    input, target = loss.sample(*draw(shapes()), dtype=draw(st.sampled_from(DTYPES)), scale=scale)
    options = draw(options_of(loss, input))
    if loss.target == "index" and target.numel():
        target.view(-1)[0] = options.get("ignore_index", -100)
    return draw(restrided(input)), draw(restrided(target)), options


def placed(tensor, device):
    """On the device, in the layout that was drawn: to() closes the gaps."""
    if device == "cpu":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def outcome(function, input, target, options, device="cpu"):
    """The values and gradients, or the type of the exception."""
    input, target, options = placed(input, device), placed(target, device), moved(options, device)
    try:
        return moved(differentiate(function, input, target, **options), "cpu")
    except Exception as error:
        return type(error)


def close_to_truth(loss, ours, input, target, options):
    """To assert_close's tolerance for the dtype; test_parity and test_accuracy count the units."""
    wide = {name: widen(value) for name, value in options.items()}
    truth = differentiate(loss.reference, widen(input), widen(target), **wide)
    truth = truth[: len(ours)]  # one more when the truth needs an integer target as floats
    expected = [true.to(our.dtype) for our, true in zip(ours, truth, strict=True)]
    torch.testing.assert_close(ours, expected, equal_nan=True)


@each()
def test_valid_calls(loss, device):
    @fuzzed
    @given(calls(loss))
    def check(call):
        input, target, options = call
        native = outcome(loss.native, input.contiguous(), target.contiguous(), options)
        ours = outcome(loss.ours, input, target, options, device)
        if isinstance(native, type) or isinstance(ours, type):
            assert ours is native
        else:
            assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in native]
            close_to_truth(loss, ours, input.contiguous(), target.contiguous(), options)

    check()


def reshaped(tensor, draw):
    """One dimension longer, shorter, gone or new."""
    dim = draw(st.integers(0, max(0, tensor.dim() - 1)))
    change = draw(st.sampled_from(["repeat", "halve", "drop", "add"]))
    if change == "add" or not tensor.dim():
        return tensor.unsqueeze(0)
    if change == "drop":
        return tensor.sum(dim).to(tensor.dtype)
    return tensor.repeat_interleave(2, dim) if change == "repeat" else tensor.narrow(dim, 0, tensor.shape[dim] // 2)


BAD_DTYPES = [torch.int16, torch.complex64, torch.bool, torch.float64, torch.float16, torch.float8_e5m2]
BAD_OPTIONS = [
    {"reduction": "average"},
    {"reduction": 1},
    {"weight": torch.ones(4, 3, 2, 6)},
    {"weight": torch.ones(11)},
    {"weight": torch.ones(())},
    {"weight": torch.tensor([])},
]


@st.composite
def broken(draw, loss):
    """A good call with one thing about it changed; it may still be good."""
    input, target, options = draw(calls(loss))
    what = draw(st.sampled_from(["input shape", "target shape", "input dtype", "target dtype", "value", "option"]))
    if what == "input shape":
        input = reshaped(input, draw)
    elif what == "target shape":
        target = reshaped(target, draw)
    elif what == "input dtype":
        input = input.to(draw(st.sampled_from(BAD_DTYPES)))
    elif what == "target dtype":
        target = target.to(draw(st.sampled_from(BAD_DTYPES)))
    elif what == "value" and target.numel():
        target = target.contiguous()
        # Of probabilities as large as the last, what remains where they cancel out would be their rounding.
        values = [-1, 2, 70, 2**31 - 1]
        target.view(-1)[-1] = draw(st.sampled_from(values[:-1] if target.is_floating_point() else values))
    else:
        options = options | draw(st.sampled_from(BAD_OPTIONS))
    return input, target, options


def legalised(loss, input, target):
    """What native refuses and ours takes, as native takes it."""
    integer = not target.is_floating_point() and not target.is_complex()
    if loss.target == "element" and integer and input.is_floating_point():
        return target.to(input.dtype)
    if loss.target == "index" and input.dim() == target.dim() == 1 and target.numel() == 1 != input.numel():
        return target[0]  # native has the value, but fails in backward
    return target


def may_be_an_assertion(loss, input, target, options):
    """Whether CUDA could find a class or a value out of bounds, which ends the process's use of the device."""
    if input.is_complex() or target.is_complex():
        return False
    classes = input.shape[min(1, input.dim() - 1)] if input.dim() else 0
    ignored = target.double() == options.get("ignore_index", -100)
    if loss.target == "index":
        return not (ignored | ((target.double() >= 0) & (target.double() < classes))).all()
    inside = [((tensor.double() >= 0) & (tensor.double() <= 1)).all() for tensor in (input, target)]
    return loss.module == "BCELoss" and not all(inside)


@each()
def test_broken_calls(loss, device):
    @fuzzed
    @given(broken(loss))
    def check(call):
        input, target, options = call
        if asserts(device) and may_be_an_assertion(loss, input, target, options):
            return
        legal = legalised(loss, input, target)
        native = outcome(loss.native, input.contiguous(), legal.contiguous(), options)
        ours = outcome(loss.ours, input, target, options, device)
        if target.is_floating_point() and target.dtype.itemsize == 1:
            assert isinstance(
                ours, type
            )  # which of its types native raises depends on the step that meets float8 first
            return
        if loss.target == "index" and target.dim() == 0 and input.dim() > 1:
            assert isinstance(ours, type)  # likewise: native compares the batch sizes, 0 for the target
            return
        if native is ValueError and target.is_floating_point() and target.dim() == 1 and torch.__version__ < "2.13":
            assert isinstance(ours, type)  # likewise: that native compares the sizes of (C) logits before the types
            return
        if ours is NotImplementedError and not input.numel():
            return  # native meets the dtype in its loop over elements, and so accepts any where there are none
        if isinstance(native, type) or isinstance(ours, type):
            # Of a complex loss native has no derivative; that is a RuntimeError, and one of a narrower kind since 2.15.
            assert ours is native or (target.is_complex() and issubclass(native, ours))
        else:
            assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in native[: len(ours)]]
            close_to_truth(loss, ours, input.contiguous(), legal.contiguous(), options)

    check()
