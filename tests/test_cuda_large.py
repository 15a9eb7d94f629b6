"""More than 2**31 elements on a CUDA device: offsets of 32 bits would come round.

A file of its own, so that it can be run alone: each test takes most of a device's memory.
"""

import fcntl
import os
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import missing_cuda
from support import differentiate, each

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing_cuda() is not None, reason=f"{missing_cuda()}")]

DEVICE = "cuda"
# The shape, and a part that lies beyond 2**31 elements: a slice for each dimension from the first.
LARGE = {
    "rows": ((16_760, 128_256), (slice(-8, None),)),
    "short rows": ((214_760_000, 10), (slice(-8, None),)),
    "image": ((2, 19, 8192, 8192), (slice(1, None), slice(None), slice(-4, None))),
}
NEEDED = 20  # GiB: 5 for the logits, 5 for their gradient, 2 for the targets, the rest for one number per position


@pytest.fixture
def much_memory():
    """One test at a time has it, whichever process it runs in: together they would run out of it."""
    with open(Path(tempfile.gettempdir(), f"fusedloss-large-{os.getuid()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < NEEDED:
            pytest.skip(f"{NEEDED} GiB of device memory, of which {free:.0f} are free")
        yield
        torch.cuda.empty_cache()


def check_a_part(loss, input, target, part, places):
    """Values and gradients of `part` of the input, whose targets are at `places`, against float64."""
    rows, classes = input.detach()[part].double(), target[places]
    ones = torch.ones(classes.shape, dtype=torch.double, device=DEVICE)
    exact, exact_grad = differentiate(loss.reference, rows, classes, ones, reduction="none")
    assert exact.numel() > 0
    with torch.autocast(DEVICE, dtype=torch.bfloat16):  # a float32 loss: bfloat16 would hide an error of the part
        losses = loss.ours(input.detach(), target, reduction="none")
    torch.testing.assert_close(losses[places].double(), exact, rtol=1e-5, atol=1e-6)
    # In parts: a copy in float64 would need twice as much as all the rest.
    mean = sum(some.sum(dtype=torch.double) for some in losses.flatten().split(2**28)) / losses.numel()
    del losses
    roads = [{}, loss.separate] if loss.separate else [{}]
    for options in roads:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            value = loss.ours(input, target, **options)
        torch.testing.assert_close(value.detach().double(), mean, rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(value, input)
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad[part].double() * target.numel(), exact_grad, rtol=eps, atol=1e-6 * eps)
        del grad, value


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize(("shape", "part"), LARGE.values(), ids=LARGE)
@each("cross_entropy", "nll")
def test_classes_beyond_2_to_the_31_elements(loss, shape, part):
    input = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    target = torch.randint(shape[1], shape[:1] + shape[2:], device=DEVICE)
    assert input.numel() > 2**31
    check_a_part(loss, input, target, part, part[:1] + part[2:])


@pytest.mark.usefixtures("much_memory")
@each("bce_with_logits")
def test_elements_beyond_2_to_the_31(loss):
    shape, part = (2**11 + 1, 2**20), (slice(-1, None),)
    input = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    target = torch.randint(2, shape, dtype=torch.uint8, device=DEVICE)
    check_a_part(loss, input, target, part, part)
