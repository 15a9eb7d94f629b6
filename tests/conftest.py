"""Fixtures every test file shares."""

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
    choices = {"of Triton's interpreter (pytest --interpreted all)": SAMPLES[config.getoption("--interpreted")]}
    if config.getoption("--quick"):
        choices["that are long (make test-all)"] = not_long
        choices["of more combinations of parameters (make test-all)"] = covering
    kept = list(items)
    for kind, choose in choices.items():
        before, kept = kept, choose(kept)
        left_out[kind] = len(before) - len(kept)
    if hasattr(config, "workeroutput"):  # pytest-xdist's process: the one that tells has collected nothing
        config.workeroutput["left_out"] = left_out
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def sample(items):
    return [item for item in items if not is_interpreted(item) or zlib.crc32(item.nodeid.encode()) % ONE_IN == 0]


def none(items):
    return [item for item in items if not is_interpreted(item)]


def not_long(items):
    return [item for item in items if not item.get_closest_marker("long")]


SAMPLES = {"all": list, "sample": sample, "none": none}


def covering(items):
    """Of the cases of each test few that show every value of each parameter."""
    # In no order, and always in the same; but of what is interpreted, and slow, first what has the fewest options.
    in_some_order = sorted(
        items, key=lambda item: (is_interpreted(item) * len(item.nodeid), zlib.crc32(item.nodeid.encode()))
    )
    values = {item: values_of(item) for item in in_some_order}
    most = max(map(len, values.values()), default=0)
    shown, kept = set(), set()
    # What is interpreted takes longest: it comes where nothing else shows a value. Cases that show more come first.
    for these in ([item for item in values if is_interpreted(item) == interpreted] for interpreted in (False, True)):
        for new in range(most, 0, -1):
            for item in these:
                if len(values[item] - shown) >= new:
                    shown |= values[item]
                    kept.add(item)
    return [item for item in items if item in kept]


def values_of(item):
    """(test, parameter, value), the latter by its identity: it need not be hashable."""
    parameters = item.callspec.params.items() if hasattr(item, "callspec") else [("", None)]
    return {(item.nodeid.partition("[")[0], name, id(value)) for name, value in parameters}


# --- what was left out, which a run says at its end -------------------------------------------------------------------

left_out: dict[str, int] = {}  # cases by kind


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node):
    """Every worker collects all tests: one speaks for all."""
    left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter):
    kinds = ", ".join(f"{number} {kind}" for kind, number in left_out.items() if number)
    if kinds:
        terminalreporter.write_line(f"Left out: cases {kinds}.")


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
def as_the_first():
    """Every test begins with the same numbers, and with one thread: more only slow these small samples down, and what a
    test leaves behind would change what the next one measures. test_threads shows that their number changes no bit."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def threads_of_autograd():
    """It starts its threads when a process first goes backward. Beside a torch with CUDA it starts one too many if that
    is with fake tensors, and then refuses to run in a fork."""
    torch.ones(1, requires_grad=True).sum().backward()
