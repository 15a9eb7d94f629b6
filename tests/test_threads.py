"""Threads change the time, never the result."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import LOSSES, differentiate, each, each_reduction, short

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
