"""The operators of each namespace: schemas, fakes, autograd registration, strides."""

import sys

import pytest
import torch
from support import LOSSES, differentiate, moved
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fusedloss import _C
from fusedloss.backend import NAMESPACES, namespace

OPS = torch.ops.fusedloss
NONE, MEAN, SUM = 0, 1, 2


def sample(name, *shape, dtype=torch.float32):
    """Fixed data, on the CPU: the tables below are made when the file is imported."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LOSSES[name].sample(*shape, dtype=dtype)


def image(name, dtype=torch.float32):
    input, target = sample(name, 2, 3, 4, 5, dtype=dtype)
    return input.contiguous(memory_format=torch.channels_last), target


def integers(pair):
    return pair[0], pair[1].round().byte()


WEIGHT = torch.tensor([0.5, 2.0, 1.0])
SAMPLES, COUNT = torch.tensor([1.0, 0.0, 0.5, 2.0]), torch.tensor(7)
NO_WEIGHTS, LSE, ARGMAX = (None, None, None), (True, False, False), (False, False, True)
PLAIN = (0.0, 0.0, 1.0, 0.0)  # label_smoothing, z_loss, logit_scale, logit_softcap
EVERYTHING = (0.1, 0.01, 0.7, 2.0)


def cross_entropy(
    reduction, *rest, loss="cross_entropy", size=(4, 3), weights=NO_WEIGHTS, answers=(False, False, False)
):
    """rest: the options of the formula, or what follows the answers."""
    of_rows, rest = (rest, ()) if len(rest) == len(PLAIN) else (PLAIN, rest)
    return (*sample(loss, *size), *weights, reduction, -100, *of_rows, *answers, *rest)


EVERY_OUTPUT = {"cross_entropy": {"statistics": True}}
SEPARATE = (False, False)  # upcast, grad_in_forward: absent, eager and compiled calls may return different statistics
# The arguments of each forward operator; its backward operator is called on what they return.
ARGUMENTS = {
    "cross_entropy": {
        "plain": cross_entropy(MEAN, *SEPARATE),
        "no batch": cross_entropy(NONE, size=(3,), answers=(True, True, True)),
        "all options": cross_entropy(MEAN, *EVERYTHING, weights=(WEIGHT, SAMPLES, COUNT), answers=(True, True, True)),
        "weights of samples": cross_entropy(MEAN, weights=(WEIGHT, SAMPLES, None), answers=(False, True, False)),
        "half precision image": (*image("cross_entropy", torch.bfloat16), *NO_WEIGHTS, NONE, 2, *PLAIN, *LSE, True),
        "probabilities": cross_entropy(MEAN, *EVERYTHING, loss="cross_entropy_soft", weights=(WEIGHT, SAMPLES, None)),
        "empty": cross_entropy(SUM, size=(0, 3), answers=(True, True, False)),
    },
    "nll": {
        "plain": (*sample("nll", 4, 3), None, MEAN, -100),
        "weighted image": (*image("nll"), WEIGHT, NONE, 1),
        "half precision": (*sample("nll", 4, 3, dtype=torch.bfloat16), None, SUM, -100, True),
    },
    "bce_with_logits": {
        "plain": (*sample("bce_with_logits", 4, 3), None, None, MEAN, None, *SEPARATE),
        "weights": (*sample("bce_with_logits", 4, 3), WEIGHT, WEIGHT, NONE, None),
        "ignored integers": (*integers(sample("bce_with_logits", 4, 3)), None, WEIGHT, MEAN, 1, *SEPARATE),
        "half precision image": (*image("bce_with_logits", torch.bfloat16), None, None, SUM, None, True),
    },
    "bce": {
        "plain": (*sample("bce", 4, 3), None, MEAN, None, *SEPARATE),
        "weighted": (*sample("bce", 4, 3), WEIGHT, NONE, None),
        "ignored integers": (*integers(sample("bce", 4, 3)), None, MEAN, 1, *SEPARATE),
        "half precision image": (*image("bce", torch.bfloat16), None, SUM, None, True),
    },
}
each_call = pytest.mark.parametrize(
    ("name", "arguments"),
    [pytest.param(name, row, id=f"{name} {what}") for name, rows in ARGUMENTS.items() for what, row in rows.items()],
)


@pytest.fixture(autouse=True)
def operators_of_the_backend(request, monkeypatch):
    """Tests over devices are about the namespace of the device's backend."""
    if "device" in request.fixturenames:
        input = torch.empty(0, device=request.getfixturevalue("device"))
        monkeypatch.setattr(sys.modules[__name__], "OPS", namespace(None, input))


def operator(name):
    return getattr(OPS, name).default


class Seen(TorchDispatchMode):
    """The operators of this library that a block calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace in NAMESPACES:
            self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_losses_are_called_as_their_schemas_say(namespace):
    """By pybind11's functions, which have the schema's arguments in its order and no defaults."""
    direct = vars(getattr(_C, namespace))
    losses = {name for name in direct if not name.startswith("_")}
    assert losses >= ARGUMENTS.keys() | {"linear_cross_entropy"}
    for name in losses:
        count = len(getattr(getattr(torch.ops, namespace), name).default._schema.arguments)
        assert f"arg{count - 1}:" in direct[name].__doc__
        assert f"arg{count}:" not in direct[name].__doc__


@each_call
def test_a_direct_call_is_the_operators(name, arguments):
    schema = operator(name)._schema.arguments
    complete = (*arguments, *(argument.default_value for argument in schema[len(arguments) :]))
    ours, expected = Seen(), Seen()
    with ours:
        found = getattr(_C.fusedloss, name)(*complete)
    with expected:
        wanted = operator(name)(*complete)
    assert ours.names == expected.names != []
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    with torch.enable_grad():
        leaf, *others = complete
        grads = []
        for call in (getattr(_C.fusedloss, name), operator(name)):
            logits = leaf.detach().clone().requires_grad_() * 1
            loss = call(logits, *others)[0].sum()
            grads += torch.autograd.grad(loss, logits)
    torch.testing.assert_close(*grads, rtol=0, atol=0, equal_nan=True)


def wanting_gradients(arguments):
    """The input and a floating target become leaves."""
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in arguments[:2]]
    return (*leaves, *arguments[2:])


def backward_arguments(name, arguments):
    """What autograd passes to the backward operator after this call of the forward one."""
    outputs = [output.detach() for output in operator(name)(*arguments, **EVERY_OUTPUT.get(name, {}))]
    input, target, *rest = arguments
    mask = [True, target.is_floating_point()]
    grad_loss = torch.ones_like(outputs[0])
    if name == "cross_entropy":
        weights, options, answers = rest[:3], rest[3:9], rest[9:11]
        grads = [
            torch.ones_like(output) if given else None for output, given in zip(outputs[1:3], answers, strict=True)
        ]
        row_max, row_log_sum, row_gap, divisor = outputs[4:]
        statistics = (row_max, row_log_sum, row_gap if answers[1] else None, divisor)
        return grad_loss, *grads, input, target, *weights, *statistics, *options, mask
    weights = 2 if name == "bce_with_logits" else 1
    common = (grad_loss, input, target, *rest[:weights], outputs[1], *rest[weights : weights + 2])
    return common if name == "nll" else (*common, mask)


def tensors_of(outputs):
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [output for output in outputs if output is not None]


def to_meta(arguments):
    return [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments]


def same_layout(actual, expected):
    actual, expected = (
        [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors_of(outputs)]
        for outputs in (actual, expected)
    )
    assert actual == expected


@each_call
def test_forward_operator(name, arguments, device):
    opcheck(operator(name), wanting_gradients(moved(arguments, device)))


SCALE = torch.tensor(0.5)
# Forward and backward in one pass: the arguments of the forward operator, with an input that requires grad.
IN_ONE_PASS = {
    "cross_entropy": cross_entropy(MEAN, False, True, SCALE, weights=(WEIGHT, SAMPLES, COUNT), answers=ARGMAX),
    "bce_with_logits": (*integers(sample("bce_with_logits", 4, 3)), None, WEIGHT, MEAN, 1, False, True, SCALE),
    "bce": (*integers(sample("bce", 4, 3)), WEIGHT, SUM, None, False, True, SCALE),
}
each_call_in_one_pass = pytest.mark.parametrize(("name", "arguments"), IN_ONE_PASS.items(), ids=IN_ONE_PASS)


@each_call_in_one_pass
def test_forward_operator_with_the_gradient_in_forward(name, arguments, device):
    opcheck(operator(name), wanting_gradients(moved(arguments, device)))


@each_call_in_one_pass
def test_operator_in_one_pass(name, arguments, device):
    """Without autograd: it writes the gradient into a tensor of any strides, and for which grad_output it is."""
    arguments, wished = moved((arguments, SCALE), device)
    input, target, *rest = arguments
    weights, upcast = {"cross_entropy": 3, "bce_with_logits": 2, "bce": 1}[name], len(rest) - 3
    options = rest[weights : upcast - len(ARGMAX) if name == "cross_entropy" else upcast]
    expected = input.detach().requires_grad_()
    loss = operator(name)(expected, *arguments[1:])[0]
    loss.backward(wished)
    grad = torch.full_like(input.T.contiguous(), 7.0).T
    scale = torch.full((), 7.0, dtype=torch.float64, device=device)
    argmax = [torch.full_like(target, 7)] if name == "cross_entropy" else []
    call = (input, target, *rest[:weights], wished, *options, rest[upcast], grad, scale, *argmax)
    opcheck(operator(f"{name}_with_grad"), call)
    torch.testing.assert_close(operator(f"{name}_with_grad")(*call), loss)
    torch.testing.assert_close(grad, expected.grad)
    assert scale == wished
    assert argmax == [] or torch.equal(argmax[0], input.argmax(1))


@pytest.mark.parametrize("keep_zeros", [True, False])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_rescaling_a_gradient(scale, keep_zeros, device):
    grad, grad_output, scale = moved((sample("cross_entropy", 4, 3)[0], torch.tensor(3.0), scale), device)
    grad[1] = 0
    before = grad.clone()
    opcheck(OPS.rescale_grad_.default, (grad.clone(), grad_output, scale, keep_zeros))
    opcheck(OPS.rescale_grad.default, (grad, grad_output, scale, keep_zeros))
    expected = grad * 3 / (1 if scale is None else scale.float())
    torch.testing.assert_close(OPS.rescale_grad(grad, grad_output, scale, keep_zeros), expected)
    assert torch.equal(grad, before)
    OPS.rescale_grad_(grad, grad_output, scale, keep_zeros)
    torch.testing.assert_close(grad, expected)
    infinite = OPS.rescale_grad(before, grad_output * torch.inf, scale, keep_zeros)
    zeros = torch.zeros_like(before) if keep_zeros else before * torch.inf
    torch.testing.assert_close(infinite, torch.where(before == 0, zeros, before * torch.inf), equal_nan=True)


@each_call
def test_backward_operator(name, arguments, device):
    weight = arguments[2]
    arguments = list(backward_arguments(name, moved(arguments, device)))
    opcheck(operator(f"{name}_backward"), tuple(arguments))
    arguments[0] = arguments[0].requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # Its derivative is native's, which before torch 2.13 takes no symbolic sizes here: of a mean over probabilities,
    # and with a weight that broadcasts.
    probabilities = name == "cross_entropy" and arguments[4].is_floating_point()
    if torch.__version__ < "2.13" and (probabilities or (name == "bce" and weight is not None)):
        checks[-1] = "test_aot_dispatch_static"
    opcheck(operator(f"{name}_backward"), tuple(arguments), test_utils=checks)


@each_call
def test_meta_tensors_have_the_real_layout(name, arguments, device):
    arguments = moved(arguments, device)
    every = EVERY_OUTPUT.get(name, {})
    same_layout(operator(name)(*to_meta(arguments), **every), operator(name)(*arguments, **every))
    arguments = backward_arguments(name, arguments)
    backward = operator(f"{name}_backward")
    same_layout(backward(*to_meta(arguments)), backward(*arguments))


def test_operators_are_differentiable_themselves(device):
    input, target = moved(sample("cross_entropy", 4, 3), device)

    def raw(input, target):
        return OPS.cross_entropy(input, target, *NO_WEIGHTS, MEAN, -100, *PLAIN)[0]

    expected = differentiate(torch.nn.functional.cross_entropy, input, target)
    torch.testing.assert_close(differentiate(raw, input, target), expected)


@pytest.mark.parametrize("upcast", [False, True])
def test_upcast_gives_a_float32_loss_of_half_precision_logits(upcast, device):
    input, target = moved(sample("cross_entropy", 4, 3, dtype=torch.bfloat16), device)
    loss = OPS.cross_entropy(input, target, *NO_WEIGHTS, MEAN, -100, *PLAIN, upcast=upcast)[0]
    assert loss.dtype == (torch.float32 if upcast else torch.bfloat16)
    expected = torch.nn.functional.cross_entropy(input.float(), target).to(loss.dtype)
    torch.testing.assert_close(loss, expected)


def shortened(arguments, position):
    """The same call with a row missing from one tensor."""
    return [value[1:] if place == position else value for place, value in enumerate(arguments)]


MISMATCHED = {  # positions of the tensors that a backward operator must check against its input
    "cross_entropy": (0, 1, 2, 4, 6, 8, 9, 10),
    "nll": (0, 2),
    "bce_with_logits": (0, 2),
    "bce": (0, 2),
}


@pytest.mark.parametrize(
    ("name", "position"), [(name, position) for name, places in MISMATCHED.items() for position in places]
)
def test_backward_operators_check_what_they_are_given(name, position, device):
    """Called by hand, a tensor that is too short is refused, not read beyond its end."""
    row = list(moved(ARGUMENTS[name]["plain"], device))
    if name == "cross_entropy":
        row = list(moved(cross_entropy(MEAN, weights=(None, SAMPLES, None), answers=(True, True, False)), device))
    reduction = {"cross_entropy": 5, "nll": 3, "bce_with_logits": 4, "bce": 3}[name]
    row[reduction] = NONE
    arguments = backward_arguments(name, row)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        operator(f"{name}_backward")(*shortened(arguments, position))


def test_backward_operator_writes_nothing_for_a_target_out_of_range():
    """On the CPU: a CUDA kernel may refuse it with an assertion, after which no test would have a device."""
    arguments = list(backward_arguments("nll", ARGUMENTS["nll"]["plain"]))
    arguments[2] = torch.tensor([1000, -1, 2**40, 3])
    grad = OPS.nll_backward(*arguments)
    assert grad.shape == (4, 3)
    assert grad.eq(0).all()
