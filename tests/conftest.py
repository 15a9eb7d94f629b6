"""Fixtures every test file shares."""

import collections
import importlib.util
import os
import signal
import zlib

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import support  # noqa: E402

import fusedloss  # noqa: E402

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not HAS_GPU:
    import interpreter

    interpreter.mend()


def missing_cuda():
    """Why tests cannot run on CUDA, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if fusedloss.build_info()["cuda"] else "fusedloss is built without CUDA kernels"


def backends_here():
    """(backend, device) of all kernels that can run: Triton's on a GPU if there is one, else interpreted."""
    here = [("cpu", "cpu")]
    if not missing_cuda():
        here += [("cuda", "cuda")]
    if HAS_TRITON:
        here += [("triton", "cuda" if HAS_GPU else "cpu")]
    return here


# What this machine lacks is left out as a whole; test_what_is_there says so, in one line.
@pytest.fixture(
    params=[
        pytest.param((backend, device), id=backend, marks=[pytest.mark.gpu] if device == "cuda" else [])
        for backend, device in backends_here()
    ]
)
def device(request):
    """Where tensors are to be for a backend's kernels, which are the default meanwhile."""
    backend, device = request.param
    with fusedloss.use_backend(backend):
        yield device


# Interpreted, a test takes from a tenth of a second to some seconds. A name alone decides whether a test is chosen.
ONE_IN = 40


def pytest_addoption(parser):
    help = "of each test, cases that show every value of each of its parameters; and none that is marked long"
    parser.addoption("--quick", action="store_true", help=help)
    help = f"the tests over devices that run Triton's interpreter: all, none, or a sample of one in {ONE_IN}"
    parser.addoption("--interpreted", choices=["all", "sample", "none"], default="sample", help=help)
    parser.addoption("--wheel", help="a wheel to install and try: tools/wheel.py")
    parser.addoption("--sanitized", choices=["address", "thread"], help="what the build looks for: tools/sanitize.py")


def interrupt(*_):
    """Whoever ends a run that takes too long learns what has failed until then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may come twice: for the process, and for its group
    raise KeyboardInterrupt


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, interrupt)
        # A child that a test has forked would go on instead of ending, and the test wait for it for ever.
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if config.getoption("--sanitized"):
        # Checks keep sums from becoming vectors; one after the other, their terms leave twice the error.
        support.UNITS[torch.float32] *= 2


def is_interpreted(item):
    return hasattr(item, "callspec") and item.callspec.params.get("device") == ("triton", "cpu")


def pytest_collection_modifyitems(config, items):
    wish = config.getoption("--interpreted")

    def left_out(item):
        if not is_interpreted(item):
            return False
        return wish == "none" or (wish == "sample" and zlib.crc32(item.nodeid.encode()) % ONE_IN != 0)

    kept = [item for item in items if not left_out(item)]
    if config.getoption("--quick"):
        kept = [item for item in kept if not item.get_closest_marker("long")]
        kept = covering(kept)
    kept_ones = set(kept)
    others = [item for item in items if item not in kept_ones]
    config.hook.pytest_deselected(items=others)
    count_left_out(config, others)
    items[:] = kept


def covering(items):
    """Of the cases of each test as many as show every value of each parameter."""
    shown, kept = set(), set()
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):  # in no order, and always in the same
        values = item.callspec.params.items() if hasattr(item, "callspec") else [("", None)]
        new = {(item.nodeid.partition("[")[0], name, id(value)) for name, value in values} - shown
        if new:
            shown |= new
            kept.add(item)
    return [item for item in items if item in kept]


# --- what was left out, which a run says at its end -------------------------------------------------------------------

left_out_of = collections.Counter()  # cases by kind; pytest-xdist's workers send theirs


def count_left_out(config, items):
    for item in items:
        long = item.get_closest_marker("long")
        kind = "of Triton's interpreter" if is_interpreted(item) else "long" if long else "of more combinations"
        left_out_of[kind] += 1
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = dict(left_out_of)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node):
    """Every worker collects all tests: one speaks for all."""
    left_out_of.clear()
    left_out_of.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter, config):
    if left_out_of and config.getoption("--quick"):
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(left_out_of.items()))
        terminalreporter.write_line(f"Left out: cases {kinds}. `make test-all` runs them too.")


failed = []  # in this process, of the test that runs


def pytest_runtest_logreport(report):
    if report.failed:
        failed.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    """An error of a kernel stays with its process, and whatever follows there fails; pytest-xdist starts another."""
    if failed and HAS_GPU and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    failed.clear()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads only slow these small samples down; test_threads shows that their number changes no bit."""
    torch.set_num_threads(1)
    # Autograd starts its threads when a process first goes backward. Beside a torch with CUDA it starts one too many if
    # that is with fake tensors, and then refuses to run in a fork.
    torch.ones(1, requires_grad=True).sum().backward()
