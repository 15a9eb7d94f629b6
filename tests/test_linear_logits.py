"""Logits that are computed when they are read: losses and gradients as of a layer's output, or a clear error."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import peak_bytes, short
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedloss
from fusedloss.integrations.linear_logits import LinearLogits, linear_logits

CLASSES = 40


def layer_and_input(dtype=torch.float32, bias=True, shape=(3, 7), frozen=False):
    torch.manual_seed(0)
    layer = nn.Linear(8, CLASSES, bias=bias).to(dtype).requires_grad_(not frozen)
    return layer, torch.randn(*shape, 8).to(dtype).requires_grad_()


def gradients(loss, layer, input):
    wanted = [tensor for tensor in (input, *layer.parameters()) if tensor.requires_grad]
    return torch.autograd.grad(loss, wanted)


def labels_of(logits):
    labels = torch.arange(logits.shape[:-1].numel()).view(logits.shape[:-1]) * 7 % CLASSES
    labels[..., 1] = -100
    return labels.flatten()


def plain(logits):
    return F.cross_entropy(logits.view(-1, CLASSES), labels_of(logits))


def shifted(logits):
    shifted = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.size(-1)), labels_of(shifted), label_smoothing=0.1)


def softcapped(logits):
    logits = torch.tanh(logits / 3.0) * 3.0
    return nn.CrossEntropyLoss(reduction="sum")(logits.flatten(0, 1).float(), labels_of(logits)) / 5


def scaled(logits):
    logits = 2.0 * logits.float()[:, 1:]
    return fusedloss.cross_entropy(logits.reshape(-1, CLASSES), labels_of(logits), denominator=torch.tensor(9))


def weighted(logits):
    weight, labels = torch.linspace(0.5, 2, CLASSES), labels_of(logits).clamp(min=4)
    return F.cross_entropy(logits.to(torch.float32).view(-1, CLASSES), labels, weight, ignore_index=4)


def unreduced(logits):
    losses = F.cross_entropy(logits.view(-1, CLASSES), labels_of(logits), reduction="none")
    return (losses * torch.arange(losses.numel())).sum()


SPARED = [plain, shifted, softcapped, scaled, weighted, unreduced]


def probabilities(logits):
    return F.cross_entropy(logits.view(-1, CLASSES), torch.eye(CLASSES, dtype=logits.dtype)[labels_of(logits).clamp(0)])


def classes_second(logits):
    return F.cross_entropy(logits.transpose(1, 2), labels_of(logits).view(logits.shape[:-1]))


def with_answers(logits):
    loss, lse = fusedloss.cross_entropy(logits.view(-1, CLASSES), labels_of(logits), return_lse=True)
    return loss + lse.mean()


def negated(logits):
    return F.cross_entropy((-logits).view(-1, CLASSES), labels_of(logits)) + F.cross_entropy(
        (logits * -2.0).view(-1, CLASSES), labels_of(logits)
    )


def other_classes(logits):
    return F.cross_entropy(logits.view(-1, CLASSES // 2), labels_of(logits).repeat_interleave(2) % 20)


def one_class(logits):
    return logits[..., 0].logsumexp(0).sum() + logits[0, ..., :5].sum() + logits[logits.detach() > 0].sum()


def overwritten(logits):
    before = logits.view(-1, CLASSES)
    logits.mul_(2.0)
    return F.cross_entropy(before, labels_of(logits))


def copied_before_the_write(logits):
    shifted, half, rows = logits[..., :-1, :].contiguous(), logits / 2, logits.view(-1, CLASSES)
    logits.mul_(3.0)
    wide = logits.float() * 1.0
    return F.cross_entropy(shifted.view(-1, CLASSES), labels_of(shifted)) + half.sum() + rows.mean() + wide.mean()


def copied_from_what_was_written_to(logits):
    half = logits / 2
    third = half / 1.5
    half[..., 0] = -100.0
    logits.add_(1.0)
    return plain(third) + plain(half) + plain(logits)


def read_in_inference_mode(logits):
    with torch.inference_mode():
        logits.argmax(-1)
    return plain(logits) + logits.square().mean()


def read_in_a_checkpoint(logits):
    loss = plain(logits)
    return loss + checkpoint(lambda logits: logits.log_softmax(-1).square().mean(), logits, use_reentrant=False)


def read_before(logits):
    return logits.square().mean() + plain(logits)


def read_after(logits):
    loss = plain(logits)
    return loss + logits.square().mean() + (logits.float() - logits.tanh()).mean()


LATE = [read_in_inference_mode, read_in_a_checkpoint, copied_before_the_write, copied_from_what_was_written_to]
READ = [probabilities, classes_second, with_answers, negated, other_classes, one_class, overwritten, read_before]


class Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.square().sum()

    @staticmethod
    def backward(ctx, grad_output):
        (logits,) = ctx.saved_tensors
        return 2 * logits * grad_output


def in_function(logits):
    return Squares.apply(logits) + Squares.apply(logits.float() * 0.5)


def past_overrides(logits):
    """As C++ does it, or a collective."""
    half = (logits * 0.5).float()
    with torch._C.DisableTorchFunctionSubclass():
        return logits.square().mean() + torch.tanh(half).sum()


@pytest.mark.parametrize("loss_of", [*SPARED, *READ, *LATE, read_after, in_function, past_overrides])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_losses_and_gradients_are_those_of_the_output(loss_of, dtype, autocast, bias):
    layer, input = layer_and_input(dtype, bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, logits = loss_of(layer(input)), linear_logits(layer, input)
        assert type(logits) is LinearLogits
        found = loss_of(logits)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert logits.later.call.is_made == (loss_of in (*READ, *LATE, read_after, in_function))
    half = dtype != torch.float32 or autocast
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if half else {"rtol": 1e-5, "atol": 1e-6}
    scale = max(1.0, expected.abs().item() ** 0.5)
    for ours, native in zip(gradients(found, layer, input), gradients(expected, layer, input), strict=True):
        torch.testing.assert_close(ours / scale, native / scale, **tolerance)
    torch.testing.assert_close(found, expected, rtol=tolerance["rtol"], atol=1e-5)


def test_a_loss_in_float32_of_half_precision_is_no_rounded_one():
    layer, input = layer_and_input(torch.bfloat16)
    wide = copy.deepcopy(layer).double()
    logits = linear_logits(layer, input)
    exact = plain(wide(input.double()))
    assert abs(plain(logits.float()) - exact) < 1e-3 * exact
    assert plain(logits).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(logits).dtype == torch.float32


def test_what_is_read_is_what_the_layer_gives():
    layer, input = layer_and_input()
    logits = linear_logits(layer, input)
    plain(logits)
    assert (logits.shape, logits.dtype, logits.device) == ((3, 7, CLASSES), torch.float32, input.device)
    assert logits.requires_grad
    assert not logits.later.call.is_made
    assert torch.equal(logits, layer(input))
    assert type(logits.argmax(-1)) is torch.Tensor
    assert torch.equal(pickle.loads(pickle.dumps(logits.detach())), layer(input).detach())
    assert logits.tolist() == layer(input).tolist()
    assert logits.later.values is logits.later.values


def test_the_graph_is_that_of_where_the_layer_was_called():
    layer, input = layer_and_input()
    with torch.no_grad():
        logits = linear_logits(layer, input)
    assert not logits.requires_grad
    assert not plain(logits).requires_grad
    assert not (logits + 1).requires_grad
    logits = linear_logits(layer, input)
    with torch.no_grad():
        assert not plain(logits).requires_grad
        half = logits / 2
    assert not half.requires_grad
    assert not plain(half).requires_grad
    with torch.inference_mode():
        logits = linear_logits(layer, input)
        expected = plain(layer(input))
        torch.testing.assert_close(plain(logits), expected)
    torch.testing.assert_close(plain(logits * 1), expected)


@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.parametrize("read", [plain, lambda logits: logits.argmax(-1)], ids=["loss", "values"])
def test_reading_after_a_change_raises(changed, read):
    layer, input = layer_and_input()
    logits = linear_logits(layer, input)
    plain(logits).backward()
    with torch.no_grad():
        [input, layer.weight, layer.bias][changed].add_(1)
    with pytest.raises(RuntimeError, match=r"read them before, as before optimizer.step\(\)"):
        read(logits)


def test_reading_after_a_parameter_is_freed_raises():
    layer, input = layer_and_input()
    logits = linear_logits(layer, input)
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="or been freed"):
        logits.argmax(-1)


def test_reading_a_change_past_overrides_raises():
    layer, input = layer_and_input()
    logits = linear_logits(layer, input)
    half = logits / 2
    rows = logits.view(-1, CLASSES)
    logits.mul_(2)
    torch.testing.assert_close(half.clone(), layer(input) / 2)
    with torch._C.DisableTorchFunctionSubclass():
        torch.testing.assert_close(half.square(), (layer(input) / 2).square())
    for read in (logits, rows):
        torch.testing.assert_close(read.clone(), (layer(input) * 2).view(read.shape))
        with (
            torch._C.DisableTorchFunctionSubclass(),
            pytest.raises(RuntimeError, match=r"Hand it a copy, as logits.clone"),
        ):
            read.square()


def test_copies_in_inference_mode_are_of_what_there_was():
    """Nothing tells there that a tensor has been written to."""
    layer, input = layer_and_input()
    with torch.inference_mode():
        logits = linear_logits(layer, input.detach().clone())
        half, rows = logits / 2, logits.view(-1, CLASSES)
        logits.mul_(2)
        torch.testing.assert_close(half.clone(), layer(input) / 2)
        torch.testing.assert_close(rows.clone(), (layer(input) * 2).view(-1, CLASSES))


def test_values_that_could_have_no_gradient_raise():
    """As native's do where the layer is called."""
    layer, input = layer_and_input()
    with torch.inference_mode():
        input = input.detach().clone()
    logits = linear_logits(layer, input)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        logits.argmax(-1)


@pytest.mark.parametrize("read", [plain, lambda logits: logits.argmax(-1)], ids=["loss", "values"])
def test_reading_after_a_parameter_has_other_data_raises(read):
    layer, input = layer_and_input()
    logits = linear_logits(layer, input)
    layer.weight.data = layer.weight.data + 1
    with pytest.raises(RuntimeError, match="has changed or been freed"):
        read(logits)


def test_a_parameter_that_is_freed_when_the_layer_has_run_has_ordinary_logits():
    """As DeepSpeed's are, which it marks."""
    layer, input = layer_and_input()
    layer.weight.ds_id = 0
    assert type(linear_logits(layer, input)) is torch.Tensor


ALL = slice(None)


@pytest.mark.parametrize("index", [(ALL, slice(-1)), (ALL, slice(-1), ALL), (..., slice(-1), ALL)], ids=str)
def test_slices_of_rows_are_remembered(index):
    layer, input = layer_and_input()
    logits = linear_logits(layer, input)
    found, expected = logits[index], layer(input)[index]
    torch.testing.assert_close(plain(found), F.cross_entropy(expected.reshape(-1, CLASSES), labels_of(expected)))
    assert not logits.later.call.is_made
    assert torch.equal(found, expected)


def test_hooks():
    layer, input = layer_and_input()
    logits, seen = linear_logits(layer, input), []
    logits.register_hook(seen.append)
    plain(logits).backward()
    assert seen[0].shape == logits.shape
    logits = linear_logits(layer, input)
    with torch.no_grad():
        plain(logits)
    logits.retain_grad()  # no loss has a graph yet
    plain(logits).backward()
    torch.testing.assert_close(logits.grad, *seen)
    logits = linear_logits(layer, input)
    plain(logits)
    with pytest.raises(RuntimeError, match="register_hook on logits of which a loss was computed before"):
        logits.register_hook(seen.append)
    with pytest.raises(RuntimeError, match="retain_grad on logits of which a loss was computed before"):
        logits.retain_grad()


def test_hooks_of_torch_wait_for_the_logits_to_be_used():
    layer, input = layer_and_input()
    logits, seen = linear_logits(layer, input), []
    loss = plain(logits)

    def hook(gradient):
        seen.append(gradient)

    hook.__module__ = "torch.distributed.fsdp"
    logits.register_hook(hook)
    loss.backward()
    assert seen == []
    logits.sum().backward()
    assert torch.equal(*seen, torch.ones(3, 7, CLASSES))


def test_a_frozen_layer_gets_no_gradient():
    layer, input = layer_and_input(frozen=True)
    (expected,) = gradients(plain(layer(input)), layer, input)
    torch.testing.assert_close(*gradients(plain(linear_logits(layer, input)), layer, input), expected)


def test_what_has_no_place_for_them_gets_the_output():
    layer, input = layer_and_input()
    compiled = torch.compile(lambda input: linear_logits(layer, input), backend="aot_eager", fullgraph=True)
    of_function = torch.func.vmap(lambda input: linear_logits(layer, input))(input)
    for found in (compiled(input), of_function, linear_logits(layer, nn.Parameter(input.detach()))):
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, layer(input))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear_logits(layer, input[..., 1:])
    with pytest.raises(RuntimeError, match="dtype"):
        linear_logits(layer, input.bfloat16())


def test_a_compiled_reader_reads_the_values():
    layer, input = layer_and_input()
    found = torch.compile(plain, backend="aot_eager")(linear_logits(layer, input))
    torch.testing.assert_close(found, plain(layer(input)))


def test_within_patch_a_loss_is_the_same():
    layer, input = layer_and_input()
    logits = linear_logits(layer, input)
    with fusedloss.patch():
        found = plain(logits)
    assert not logits.later.call.is_made
    torch.testing.assert_close(found, plain(layer(input)))


def test_a_step_never_holds_all_logits():
    rows, classes = 4096, 1000
    layer = nn.Linear(16, classes)
    input, target = torch.randn(rows, 16, requires_grad=True), torch.randint(classes, (rows,))
    bytes_of_logits = 4 * rows * classes
    assert peak_bytes(lambda: F.cross_entropy(layer(input), target).backward()) > bytes_of_logits
    assert peak_bytes(lambda: F.cross_entropy(linear_logits(layer, input), target).backward()) < bytes_of_logits / 2
