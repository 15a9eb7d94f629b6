"""The miniature beside native torch: python -m pytest, in this folder, once it is built."""

import pytest
import torch
from tinyloss import cross_entropy


@pytest.mark.parametrize("scale", [1, 1000])  # at 1000 an exponential of a logit overflows
@pytest.mark.parametrize("transposed", [False, True])
def test_value_and_gradient_are_native_s(scale, transposed):
    torch.manual_seed(0)
    target = torch.randint(10, (32,))
    values = torch.randn(10, 32).t() if transposed else torch.randn(32, 10)
    ours, native = ((scale * values).requires_grad_() for _ in range(2))
    loss, expected = cross_entropy(ours, target), torch.nn.functional.cross_entropy(native, target)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, native.grad)


def test_bad_input_is_refused():
    logits, target = torch.zeros(2, 3), torch.tensor([0, 3])
    with pytest.raises(IndexError, match="target 3 is outside"):
        cross_entropy(logits, target)
    with pytest.raises(RuntimeError, match=r"logits must be .* got torch.DoubleTensor"):
        cross_entropy(logits.double(), target)
    with pytest.raises(RuntimeError, match=r"target must be .* \[2, 3\]"):
        cross_entropy(logits, logits.long())


def test_there_is_no_second_derivative():
    logits = torch.zeros(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0, 1])), logits, create_graph=True)
    assert not grad.requires_grad
