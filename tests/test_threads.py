"""Threads change the time, never the result."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import LOSSES, compare, differentiate, each, each_reduction, short

import fusedloss

# More rows, and more elements, than one thread gets: (rows, classes) and an image.
BIG = [(4096, 33), (4, 19, 64, 65)]


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def on_threads(count, function):
    torch.set_num_threads(count)
    return function()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("shape", BIG, ids=str)
@each_reduction
@each()
def test_one_thread_and_two_give_the_same_bits(loss, reduction, shape, dtype, two_threads):
    input, target = loss.sample(*shape, dtype=dtype)
    options = {"reduction": reduction}
    if loss.target != "element":
        options["weight"] = torch.rand(shape[1], dtype=dtype)
    two, again, one = (on_threads(n, lambda: differentiate(loss.ours, input, target, **options)) for n in (2, 2, 1))
    torch.testing.assert_close(two, again, rtol=0, atol=0)
    torch.testing.assert_close(two, one, rtol=0, atol=0)


LONG = (3, 300_001)  # rows that are split over threads, with a ragged end
WAYS = {
    "plain": {},
    "options": {"label_smoothing": 0.1, "z_loss": 1e-4, "logit_scale": 0.5},
    "capped": {"logit_softcap": 20.0},
    "unreduced": {"reduction": "none"},
    "every answer": {"return_lse": True, "return_entropy": True, "return_argmax": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@each("cross_entropy", "cross_entropy_soft")
def test_a_long_row_is_the_same_on_one_thread_and_two_and_right(loss, options, dtype, two_threads):
    input, target = loss.sample(*LONG, dtype=dtype, scale=3.0)
    input[0, 200_000] = 40.0  # a maximum that later segments do not reach
    input[1, :280_000] = -torch.inf  # segments without a finite logit
    if not target.is_floating_point():
        target = torch.tensor([7, 290_000, -100])
    two, one = (
        on_threads(count, lambda: differentiate(loss.ours, input, target, **options, **loss.separate))
        for count in (2, 1)
    )
    torch.testing.assert_close(two, one, rtol=0, atol=0, equal_nan=True)
    if "return_argmax" in options:
        assert torch.equal(loss.ours(input, target, **options)[3], input.argmax(1))
        options = {name: value for name, value in options.items() if name != "return_argmax"}
    if dtype != torch.float64 and not target.is_floating_point():
        compare(loss, input, target, **options)  # of float64 there is no wider truth, and the sum is 1 + 3.5e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_a_long_row_is_the_same_among_more_than_are_split(dtype, two_threads):
    logits = torch.randn(17, LONG[1], dtype=dtype)
    target = torch.randint(LONG[1], (17,))
    options = {"reduction": "none", "return_lse": True}
    few, many = (fusedloss.cross_entropy(logits[:count], target[:count], **options) for count in (3, 17))
    torch.testing.assert_close(few, tuple(answer[:3] for answer in many), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"logit_softcap": 20.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_a_long_row_may_be_replaced_by_its_gradient(dtype, options, two_threads):
    logits = torch.randn(2, LONG[1]).to(dtype)
    target = torch.tensor([5, 299_999])

    def gradient(inplace):
        scaled = (logits.clone().requires_grad_() * 1).requires_grad_()
        loss = fusedloss.cross_entropy(scaled, target, inplace=inplace, **options)
        return torch.autograd.grad(loss, scaled)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0, atol=0)


@pytest.mark.parametrize("shape", BIG, ids=str)
def test_what_else_is_returned_has_the_same_bits(shape, two_threads):
    input, target = LOSSES["cross_entropy"].sample(*shape)
    answers = {"return_lse": True, "return_entropy": True, "return_argmax": True}
    options = {"sample_weight": torch.rand(target.shape), "logit_scale": 0.7, **answers}

    def outputs():
        found = differentiate(LOSSES["cross_entropy"].ours, input, target, **options)
        return [*found, LOSSES["cross_entropy"].ours(input, target, **options)[3]]

    two, one = (on_threads(count, outputs) for count in (2, 1))
    torch.testing.assert_close(two, one, rtol=0, atol=0)


def test_two_python_threads_at_once(two_threads, device):
    """Each repeats its own loss while the other runs, and always gets the result it gets alone."""
    cases = {name: (loss, *loss.sample(512, 33, device=device)) for name, loss in LOSSES.items()}
    alone = {name: differentiate(loss.ours, input, target) for name, (loss, input, target) in cases.items()}
    failures = []
    start = threading.Barrier(2)

    def work(order):
        start.wait()
        for name in list(cases)[::order] * 20:
            loss, input, target = cases[name]
            result = differentiate(loss.ours, input, target)
            if not all(map(torch.equal, result, alone[name])):
                failures.append(name)

    threads = [threading.Thread(target=work, args=(order,)) for order in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_many_python_threads_train_at_once(device):
    """Each with a graph of its own over the same leaf, second derivatives and errors in between."""
    cases = {name: (loss.ours, *loss.sample(8, 65, device=device)) for name, loss in LOSSES.items()}

    def train(name):
        function, data, target = cases[name]
        input = data.requires_grad_()
        (grad,) = torch.autograd.grad(function(input, target), input, create_graph=True)
        with pytest.raises((RuntimeError, ValueError)):
            function(input, target[:3])
        return grad.detach(), *torch.autograd.grad(grad.square().sum(), input)

    alone = {name: train(name) for name in cases if name != "nll"}  # whose second derivative is zero
    start = threading.Barrier(8)

    def work(_):
        start.wait()
        return [name for name in list(alone) * 10 if not all(map(torch.equal, train(name), alone[name]))]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[]] * 8


COUNT_WORKERS = """
import os, sys, torch, fusedloss
torch.set_num_threads(int(sys.argv[1]))
x, y = torch.randn(8192, 100), torch.randint(100, (8192,))
before = len(os.listdir("/proc/self/task"))
with torch.no_grad():
    fusedloss.cross_entropy(x, y)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts a process's threads in /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_loss_uses_the_threads_it_is_given(threads):
    """With two, one worker joins the caller; with one, none does."""
    arguments = [sys.executable, "-c", COUNT_WORKERS, str(threads)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads - 1
