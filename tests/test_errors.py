"""Bad input raises what native raises, and the message names the argument and shows its value or shape.

On every device, but for bad values in a target or a probability: on CUDA those are device-side assertions, natively too
(tests/test_cuda.py). What native raises is asked of its CPU kernels: some of its CUDA kernels assert where those raise.
"""

import math
import re

import pytest
import torch
from support import LOSSES, each, moved

import fusedloss


def image(*shape):
    return torch.zeros(2, 3, *shape)


def classes(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


X, Y, P = torch.zeros(4, 3), torch.tensor([0, 1, 2, 1]), torch.full((4, 3), 1 / 3)
LOGITS = "input|logits|log_probs"

# Each row: input, target, options, then patterns that the message must contain, in any order.
CLASS_LOSSES = {
    "two targets without a batch": (X[0], Y[:2], {}, "target", "2"),
    "a target too few": (X, Y[:3], {}, "target", "4", "3"),
    "a scalar target for a batch": (X, Y[0], {}, "target", "4"),
    "a column of targets": (X, Y[:, None], {}, "target", "4, 1"),
    "a longer sequence": (image(4), classes(2, 5), {}, "target", "2, 4", "2, 5"),
    "a larger batch": (image(4), classes(3, 4), {}, "target", "2", "3"),
    "no sequence": (image(4), classes(2), {}, "target", "2, 4"),
    "a wider image": (image(4, 5), classes(2, 4, 6), {}, "target", "2, 4, 6"),
    "a line for an image": (image(4, 5), classes(2, 4), {}, "target", "2, 4"),
    "a deeper volume": (image(4, 5, 2), classes(2, 4, 5, 3), {}, "target", "2, 4, 5, 3"),
    "a weight too many": (X, Y, {"weight": torch.ones(4)}, "weight", "3", "4"),
    "a list of weights": (X, Y, {"weight": [1.0, 1.0, 1.0]}, "weight", "list"),
    "a row of weights": (X, Y, {"weight": torch.ones(1, 3)}, "weight", "1, 3"),
    "a weight too many for an image": (
        image(4, 5),
        classes(2, 4, 5),
        {"weight": torch.ones(4)},
        "weight",
        "4",
    ),
    "float64 weights": (X, Y, {"weight": torch.ones(3).double()}, "weight", "Double|float64"),
    "integer weights": (X, Y, {"weight": torch.ones(3).long()}, "weight", "Long|int64"),
    "complex weights": (X, Y, {"weight": torch.ones(3) + 0j}, "weight", "Complex", r"\[3\]"),
    "8-bit float weights": (X, Y, {"weight": torch.ones(3).to(torch.float8_e5m2)}, "weight", "Float8", r"\[3\]"),
    "weights with a gradient": (X, Y, {"weight": torch.ones(3, requires_grad=True)}, "weight"),
    "16-bit targets": (X, Y.short(), {}, "target", "Short|int16"),
    "bool targets": (X, Y.bool(), {}, "target", "Bool|bool"),
    "one float target per row": (X, Y.float(), {}, "target", "Float|float32"),
    "integer logits": (X.long(), Y, {}, LOGITS, "Long|int64"),
    "bool logits": (X.bool(), Y, {}, LOGITS, "Bool|bool"),
    "complex logits": (X + 0j, Y, {}, LOGITS, "Complex|complex"),
    "8-bit float logits": (X.to(torch.float8_e4m3fn), Y, {}, LOGITS, "Float8|float8"),
    "sparse logits": (X.to_sparse(), Y, {}, "[Ss]parse"),
    "targets elsewhere": (X, Y.to("meta"), {}, "cpu", "meta"),
    "weights elsewhere": (X, Y, {"weight": torch.ones(3, device="meta")}, "cpu", "meta"),
    "a list": ([[0.0, 1.0]], Y, {}, "input", "list"),
    "no target": (X, None, {}, "target", "None"),
    "an unknown reduction": (X, Y, {"reduction": "average"}, "average", "reduction"),
    "no reduction": (X, Y, {"reduction": None}, "None", "reduction"),
    "a fraction to ignore": (X, Y, {"ignore_index": 1.5}, "ignore_index", "float"),
    "nothing to ignore": (X, Y, {"ignore_index": None}, "ignore_index", "None"),
}
CROSS_ENTROPY = {
    "a number and a class": (X[0, 0], Y[0], {}),
    "two numbers": (X[0, 0], X[0, 0], {}),
    "too much smoothing": (X, Y, {"label_smoothing": 1.5}, "label_smoothing", r"1\.5"),
    "infinite smoothing": (X, Y, {"label_smoothing": math.inf}, "label_smoothing", "inf"),
    "smoothing in words": (X, Y, {"label_smoothing": "some"}, "label_smoothing", "str"),
    "integer probabilities": (X, X.long(), {}, "target", "Long|int64"),
    "complex probabilities": (X, P + 0j, {}, "target", "Complex|complex"),
    "a row of probabilities too few": (X, P[:3], {}, "target", "4", "3"),
    "an ignored class of probabilities": (X, P, {"ignore_index": 1}, "ignore_index"),
    "a weight too many for probabilities": (X, P, {"weight": torch.ones(4)}, "weight", "3", "4"),
    "a row of weights for probabilities": (X, P, {"weight": torch.ones(1, 3)}, "weight", "1, 3"),
    "a row of weights for an image of probabilities": (
        image(4),
        image(4),
        {"weight": torch.ones(1, 3)},
        "weight",
        "1, 3",
    ),
}
NLL = {
    "a number and a class": (X[0, 0], Y[0], {}),
    "integer probabilities": (X, X.long(), {}, "target", "4, 3"),
    "float probabilities": (X, P, {}, "target", "4, 3"),
}
BCE = {
    "a row of targets": (P, P[0], {}, "[Tt]arget", "3", "4, 3"),
    "a target transposed": (P, P.T, {}, "[Tt]arget", "3, 4", "4, 3"),
    "complex logits": (P + 0j, P, {}, LOGITS, "Complex|complex"),
    "integer logits": (P.long(), P, {}, LOGITS, "Long|int64"),
    "a weight too many": (P, P, {"weight": torch.ones(4)}, "weight", "4"),
    "weights that would widen the loss": (P, P, {"weight": torch.ones(5, 4, 3)}, "weight", "5, 4, 3"),
    "weights with a gradient": (P, P, {"weight": torch.ones(3, requires_grad=True)}, "weight"),
    "complex weights": (P, P, {"weight": torch.ones(3) + 0j}, "weight", "Complex", r"\[3\]"),
    "16-bit unsigned targets": (P, P.to(torch.uint16), {}, "target", "UInt16"),
    "targets elsewhere": (P, P.to("meta"), {}, "cpu", "meta"),
    "weights elsewhere": (P, P, {"weight": torch.ones(3, device="meta")}, "cpu", "meta"),
    "sparse logits": (P.to_sparse(), P, {}, "[Ss]parse"),
    "an unknown reduction": (P, P, {"reduction": "average"}, "average", "reduction"),
    "no reduction": (P, P, {"reduction": None}, "None", "reduction"),
    "a number": (0.5, P, {}, "float"),
    "no target": (P, None, {}, "None"),
}
BCE_WITH_LOGITS = {
    "complex positive weights": (P, P, {"pos_weight": torch.ones(3) + 0j}, "pos_weight", "Complex", r"\[3\]"),
    "8-bit float positive weights": (
        P,
        P,
        {"pos_weight": torch.ones(3).to(torch.float8_e5m2)},
        "pos_weight",
        "Float8",
        r"\[3\]",
    ),
    "one positive weight elsewhere": (P, P, {"pos_weight": torch.ones(1, device="meta")}, "cpu", "meta"),
    "positive weights elsewhere": (P, P, {"pos_weight": torch.ones(3, device="meta")}, "cpu", "meta"),
    "a positive weight too many": (P, P, {"pos_weight": torch.ones(4)}, "pos_weight", "4"),
    "positive weights that would widen": (P, P, {"pos_weight": torch.ones(5, 4, 3)}, "pos_weight", "5, 4, 3"),
    "positive weights with a gradient": (
        P,
        P,
        {"pos_weight": torch.ones(3, requires_grad=True)},
        "pos_weight",
    ),
}
PROBABILITY = {
    "float64 labels": (P, P.double(), {}, "target", "Double|float64"),
    "bfloat16 probabilities": (P.bfloat16(), P, {}, LOGITS, "BFloat16|bfloat16"),
    "complex labels": (P, P + 0j, {}, "target", "Complex|complex"),
}
CLASS_VALUES = {
    "a class too many": (X, Y + 1, {}, "[Tt]arget", "3"),
    "a negative class": (X, Y - 1, {}, "[Tt]arget", "-1"),
    "a class far out": (X, Y * 2**62, {}, "[Tt]arget", str(2**62)),
    "a class too many in a byte": (X, (Y * 100).byte(), {}, "[Tt]arget", "100|200"),
    "a class too many in an image": (image(4, 5), classes(2, 4, 5) + 3, {}, "[Tt]arget", "3"),
    "a class where there is none": (X[:, :0], Y * 0, {}, "[Tt]arget", "0"),
    "a default ignored class when another is ignored": (
        X,
        Y * 0 - 100,
        {"ignore_index": 1},
        "[Tt]arget",
        "-100",
    ),
}
PROBABILITY_VALUES = {
    "a probability above 1": (P * 4, P, {}, "input", r"1\.333"),
    "a probability below 0": (-P, P, {}, "input", r"-0\.333"),
    "no probability": (P * math.nan, P, {}, "input", "nan"),
    "a label above 1": (P, P * 4, {}, "target", r"1\.333"),
    "no label": (P, P * math.nan, {}, "target", "nan"),
}
TABLES = {
    "cross_entropy": CLASS_LOSSES | CROSS_ENTROPY,
    "nll": CLASS_LOSSES | NLL,
    "bce_with_logits": BCE | BCE_WITH_LOGITS,
    "bce": BCE | PROBABILITY,
}
VALUES = {"cross_entropy": CLASS_VALUES, "nll": CLASS_VALUES, "bce": PROBABILITY_VALUES}


def each_row(tables):
    rows = [
        pytest.param(LOSSES[name], *row[:3], row[3:], id=f"{name}: {what}")
        for name, table in tables.items()
        for what, row in table.items()
    ]
    return pytest.mark.parametrize(("loss", "input", "target", "options", "says"), rows)


def error_of(function, *arguments, **options):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever native raises is the expectation
        function(*arguments, **options)
    return caught.value


def check_error(loss, input, target, options, says, device="cpu"):
    expected = error_of(loss.native, input, target, **options)
    input, target, options = moved((input, target, options), device)
    actual = error_of(loss.ours, input, target, **options)
    assert type(actual) is type(expected)
    assert [pattern for pattern in says if not re.search(pattern, str(actual))] == [], str(actual)


@each_row(TABLES)
def test_bad_input_raises_what_native_raises(loss, input, target, options, says, device):
    check_error(loss, input, target, options, [device if pattern == "cpu" else pattern for pattern in says], device)


FLOAT8 = torch.ones(3).to(torch.float8_e4m3fn)
REFUSED = {  # by ours alone, or with a narrower type of error: input, target, options, patterns
    "cross_entropy": {
        "complex weights for probabilities": (X, P, {"weight": torch.ones(3) + 0j}, "weight", "Complex", r"\[3\]"),
        "8-bit float weights for probabilities": (X, P, {"weight": FLOAT8}, "weight", "Float8", r"\[3\]"),
    },
    "bce_with_logits": {
        "complex targets": (P, P + 0j, {}, "target", "Complex", r"\[4, 3\]"),
        "8-bit float weights": (P, P, {"weight": FLOAT8}, "weight", "Float8", r"\[3\]"),
    },
    "bce": {"8-bit float weights": (P, P, {"weight": FLOAT8}, "weight", "Float8", r"\[3\]")},
}


@each_row(REFUSED)
def test_types_that_no_kernel_reads_are_refused_by_name(loss, input, target, options, says, device):
    error = error_of(loss.ours, *moved((input, target), device), **moved(options, device))
    assert isinstance(error, RuntimeError)
    assert [pattern for pattern in (loss.function, *says) if not re.search(pattern, str(error))] == [], str(error)


LAYOUTS = {
    "sparse": lambda x: x.to_sparse(),
    "compressed rows": lambda x: x.to_sparse_csr(),
    "MKL-DNN's": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # such tensors come with warnings of their own
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each()
def test_tensors_that_are_not_dense_are_refused_by_name(loss, layout, grad):
    """Native refuses most, with whatever its first step says."""
    target = Y if loss.target == "index" else P
    calls = {"input": (layout(P), target, {})}
    if loss.target != "index":
        calls["target"] = (P.clone().requires_grad_(grad), layout(P), {})
        calls["weight"] = (P.clone().requires_grad_(grad), P, {"weight": layout(P)})
    for name, (input, target, options) in calls.items():
        if grad and name == "input" and not input.is_quantized:
            input.requires_grad_()
        with pytest.raises(NotImplementedError, match=f"{loss.function}: {name} must be a dense tensor"):
            loss.ours(input, target, **options)


@each_row(VALUES)
def test_bad_values_raise_what_native_raises(loss, input, target, options, says):
    check_error(loss, input, target, options, says)


def test_target_out_of_range_is_named_among_thousands():
    """The message shows the offending value, wherever it stands."""
    target = classes(5000)
    target[4321] = 777
    with pytest.raises(IndexError, match="777"):
        fusedloss.cross_entropy(torch.zeros(5000, 10), target)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("ignore_index", [-100, -1])
def test_ignored_targets_before_the_one_out_of_range_are_not_blamed(ignore_index, dtype):
    target = torch.tensor([0, ignore_index, 5, 1], dtype=dtype)
    with pytest.raises(IndexError, match="target 5 at position 2 is out of bounds for 3 classes"):
        fusedloss.cross_entropy(torch.zeros(4, 3), target, ignore_index=ignore_index)


def test_bad_target_leaves_the_next_call_alone():
    with pytest.raises(IndexError):
        fusedloss.cross_entropy(X, Y + 1)
    torch.testing.assert_close(fusedloss.cross_entropy(X, Y), torch.tensor(3.0).log())
